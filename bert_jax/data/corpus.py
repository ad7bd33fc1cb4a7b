"""Texts -> shards on disk: documents, split into sentences, tokenized, and laid out for pretraining.

A shard is a numpy file of rows; a row is `HEADER` and the token ids. Next to the shards, `corpus.json` records what
they are made from. Once all shards exist, `manifest.json` records what they hold. A shard gets its name only when it is
complete, so that interrupted work resumes where it stopped.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import Progress

from bert_jax.errors import CheckpointError, InputError
from bert_jax.tokenizer import Tokenizer

HEADER = ("tokens", "tokens of the first segment", "whether the second is of another document")
SHARD = 2**24
"""Number of characters of text that fill a shard."""
PIECE = 100_000
"""Maximum number of characters that are tokenized at once; a longer sentence is cut, at a space if it has one."""
WHOLE, PARTS = "manifest.json", "corpus.json"
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'’”)\]]*(?=\s+[\"'‘“(\[]*[A-Z0-9])")

Document = list[list[int]]
"""Sentences, each a list of token ids."""


# ── Texts -> documents ───────────────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """Reads the documents of files, one after another.

    Attributes:
        replaced: Number of U+FFFD characters so far that replace bytes that are not UTF-8.
    """

    def __init__(self, paths: Sequence[Path], format: str | None, column: str):
        self.paths, self.format, self.column = paths, format, column
        self.replaced = 0

    def __iter__(self) -> Iterator[list[str]]:
        """Yields the lines of each document: in JSON lines a row's text, else the lines between two empty lines."""
        for path in self.paths:
            rows = (self.format or ("jsonl" if ".jsonl" in path.suffixes else "text")) == "jsonl"
            document: list[str] = []
            for number, line in enumerate(self._lines(path), 1):
                if rows:
                    if line:
                        yield self._row(path, number, line).splitlines()
                elif line:
                    document.append(line)
                elif document:
                    yield document
                    document = []
            if document:
                yield document

    def _lines(self, path: Path) -> Iterator[str]:
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for line in file:
                    text = line.decode("utf-8", "replace")
                    if "\ufffd" in text:
                        self.replaced += text.count("\ufffd") - line.count("\ufffd".encode())
                    yield text.removeprefix("\ufeff").strip()
        except (OSError, EOFError) as error:
            raise InputError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None

    def _row(self, path: Path, number: int, line: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
            raise InputError(f"{path}, line {number}: expected an object with a text {self.column!r}.")
        return str(row[self.column])


def sentences(line: str) -> Iterator[str]:
    """Splits a line into sentences by punctuation; no sentence is longer than `PIECE`."""
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    for start, end in itertools.pairwise([0, *ends, len(line)]):
        sentence = line[start:end]
        while len(sentence) > PIECE:
            cut = sentence.rfind(" ", 1, PIECE) + 1 or PIECE
            yield sentence[:cut]
            sentence = sentence[cut:]
        if sentence.strip():
            yield sentence


# ── Documents -> rows ────────────────────────────────────────────────────────────────────────────────────────────────


def pairs(
    documents: Sequence[Document], room: int, short: float, random: np.random.Generator
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Pairs of segments for next-sentence prediction: `create_instances_from_document` of create_pretraining_data.py.

    Args:
        documents: At least two.
        room: Maximum number of tokens of both segments together.
        short: Share of pairs that are made for a random length from 2 to `room`.
        random: The random generator.

    Returns:
        First segment, second segment, and whether the second is from another document: always if no sentence is left
        for it, otherwise in half of the pairs.
    """
    for number, document in enumerate(documents):
        start = 0
        while start < len(document):
            target = int(random.integers(2, room + 1)) if random.random() < short else room
            end, tokens = start, 0
            while end < len(document) and tokens < target:
                tokens += len(document[end])
                end += 1
            first_end = start + (int(random.integers(1, end - start)) if end - start > 1 else 1)
            first = [token for sentence in document[start:first_end] for token in sentence]
            other = first_end == end or random.random() < 0.5
            if other:
                n = (number + int(random.integers(1, len(documents)))) % len(documents)
                second: list[int] = []
                for sentence in documents[n][int(random.integers(len(documents[n]))) :]:
                    second += sentence
                    if len(second) >= target - len(first):
                        break
                end = first_end  # unused sentences are used for the next pair
            else:
                second = [token for sentence in document[first_end:end] for token in sentence]
            first_cut, second_cut = _trimmed(len(first), len(second), room, random)
            yield first[first_cut], second[second_cut], other
            start = end


def _trimmed(first: int, second: int, room: int, random: np.random.Generator) -> tuple[slice, slice]:
    """The slices of two segments that remain after the longer one loses tokens, at either end, until both fit."""
    lengths, fronts = [first, second], [0, 0]
    while sum(lengths) > room:
        longer = 0 if lengths[0] > lengths[1] else 1
        lengths[longer] -= 1
        fronts[longer] += int(random.random() < 0.5)
    a, b = (slice(front, front + length) for front, length in zip(fronts, lengths, strict=True))
    return a, b


def runs(documents: Iterable[Document], room: int) -> Iterator[list[int]]:
    """Cuts documents into runs of sentences that fill `room` tokens; a longer sentence is cut."""
    for document in documents:
        tokens: list[int] = []
        for sentence in document:
            if tokens and len(tokens) + len(sentence) > room:
                yield tokens
                tokens = []
            tokens = tokens + sentence
            while len(tokens) > room:
                yield tokens[:room]
                tokens = tokens[room:]
        if tokens:
            yield tokens


@dataclass(frozen=True)
class Layout:
    """How documents become examples.

    Attributes:
        max_length: Maximum number of tokens of an example, special tokens included.
        next_sentence: Whether to make pairs of segments for next-sentence prediction instead of runs of tokens.
        short: Share of the pairs that are made shorter than `max_length`, down to 2 tokens.
    """

    max_length: int = 128
    next_sentence: bool = True
    short: float = 0.1


def rows(
    documents: Sequence[Document],
    layout: Layout,
    special: tuple[int, int, int],
    dtype: Any,
    random: np.random.Generator,
) -> np.ndarray:
    """The rows of a shard: [n, len(HEADER) + max_length]."""
    cls, sep, pad = special
    header, length = len(HEADER), layout.max_length
    found = []
    if layout.next_sentence:
        for first, second, other in pairs(documents, length - 3, layout.short, random):
            ids = [cls, *first, sep, *second, sep]
            found.append([len(ids), len(first) + 2, int(other), *ids])
    else:
        for tokens in runs(documents, length - 2):
            found.append([len(tokens) + 2, len(tokens) + 2, 0, cls, *tokens, sep])
    table = np.full((len(found), header + length), pad, dtype)
    for row, values in zip(table, found, strict=True):
        row[: len(values)] = values
    return table


# ── Shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenize(
    files: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    layout: Layout,
    *,
    seed: int = 0,
    format: Literal["text", "jsonl"] | None = None,
    text: str = "text",
    processes: int | None = None,
    console: Console | None = None,
) -> "Shards":
    """Makes the shards that do not exist yet, and opens all shards.

    Args:
        files: Text files with an empty line between documents, or JSON lines; both may be gzipped.
        folder: The folder of the shards.
        tokenizer: The tokenizer of the model.
        layout: How documents become examples.
        seed: The seed from which pairs are drawn.
        format: The format of the files; None to infer it from their names.
        text: The key of the text in JSON lines.
        processes: Number of processes that tokenize; by default the number of processors.
        console: Shows the progress.

    Raises:
        InputError: If a file cannot be read, the files hold no text, pairs are wanted but there is only one document,
            or the folder holds something else or cannot be written. Finished shards stay.
    """
    special: Any = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    if missing := [name for name, id in zip(("[CLS]", "[SEP]", "[PAD]"), special, strict=True) if id is None]:
        raise InputError(f"The tokenizer has no {', '.join(missing)}; pretraining cannot do without.")
    backend = tokenizer.backend.to_str()
    try:
        listed = [[str(path), path.stat().st_size] for path in files]
    except OSError as error:
        raise InputError(f"Cannot read {error.filename}: {error.strerror}.") from None
    made_of = {"files": listed, "tokenizer": hashlib.sha256(backend.encode()).hexdigest(), "seed": seed}
    made_of |= {"format": format, "text": text, **dataclasses.asdict(layout)}
    made_of = json.loads(json.dumps(made_of))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / PARTS).exists():
            before = json.loads((folder / PARTS).read_text(encoding="utf-8"))
            if different := [name for name in made_of if before.get(name) != made_of[name]]:
                raise InputError(
                    f"{folder} holds shards of another {' and '.join(different)}. Use another folder (data.shards), "
                    "or remove it."
                )
        elif any(folder.iterdir()):
            raise InputError(f"{folder} holds files of something else; use another folder (data.shards).")
        else:
            _write_json(folder / PARTS, made_of)
        if not (folder / WHOLE).exists():
            reader = Reader(files, format, text)
            make = functools.partial(_make_shard, folder, backend, layout, special, seed)
            parts = _made(make, _units(reader), folder, layout, processes, console)
            if not sum(part["rows"] for part in parts):
                raise InputError(f"{', '.join(str(path) for path in files)}: there is no text in it.")
            _write_json(folder / WHOLE, {"replaced": reader.replaced, "shards": parts})
    except OSError as error:
        raise InputError(f"Cannot write {error.filename or folder}: {error.strerror}. Finished shards stay.") from None
    return Shards.opened(folder)


def _units(reader: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Groups documents; a group has at least `SHARD` characters and two documents, if possible; pairs need two."""
    unit: list[list[str]] = []
    ready: list[list[str]] | None = None  # held back, because it may get a last document that would be alone
    size = 0
    for document in reader:
        if size >= SHARD and len(unit) > 1:
            if ready:
                yield ready
            ready, unit, size = unit, [], 0
        unit.append(document)
        size += sum(map(len, document))
    if ready and len(unit) == 1:
        yield ready + unit
        return
    yield from (part for part in (ready, unit) if part)


def _made(
    make: Any,
    units: Iterator[list[list[str]]],
    folder: Path,
    layout: Layout,
    processes: int | None,
    console: Console | None,
) -> list[Any]:
    """Makes shards in several processes; if an earlier run made a shard, only its record is read."""
    workers = processes or os.cpu_count() or 1
    done: dict[int, Any] = {}
    in_flight: dict[Any, int] = {}
    # Not forked: the threads of JAX and of the tokenizers do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        Progress("{task.description}", console=console or Console(quiet=True), transient=True) as progress,
    ):
        bar = progress.add_task("tokenizing", total=None)
        for number, unit in enumerate(units):
            if number == 0 and len(unit) == 1 and layout.next_sentence:
                raise InputError(
                    "The texts are one document, and next-sentence prediction needs another. Put empty lines between "
                    "documents, or set data.next_sentence=false."
                )
            record = _shard(folder, number).with_suffix(".json")
            if record.exists():
                done[number] = json.loads(record.read_text(encoding="utf-8"))
                continue
            in_flight[pool.submit(make, number, unit)] = number
            if len(in_flight) >= 2 * workers:
                finished, _ = concurrent.futures.wait(in_flight, return_when=concurrent.futures.FIRST_COMPLETED)
                done |= {in_flight.pop(future): future.result() for future in finished}
                progress.update(bar, description=f"tokenizing: {len(done)} shards")
        done |= {number: future.result() for future, number in in_flight.items()}
    return [done[number] for number in sorted(done)]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def _make_shard(
    folder: Path,
    backend: str,
    layout: Layout,
    special: tuple[int, int, int],
    seed: int,
    number: int,
    unit: list[list[str]],
) -> dict[str, Any]:
    """Tokenizes some documents and writes their shard; returns its record. Runs in its own process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = tokenizers.Tokenizer.from_str(backend)
    documents = []
    for lines in unit:
        texts = [sentence for line in lines for sentence in sentences(line)]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        document = [encoding.ids for encoding in encodings if encoding.ids]
        if document:
            documents.append(document)
    dtype = np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.int32
    random = np.random.default_rng((seed, number))
    usable = documents if len(documents) > 1 or not layout.next_sentence else []
    table = rows(usable, layout, special, dtype, random)
    path = _shard(folder, number)
    staged = path.with_suffix(".new")
    with open(staged, "wb") as file:
        np.save(file, table)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    record = {
        "documents": len(documents),
        "rows": len(table),
        "tokens": int(table[:, 0].sum(dtype=np.int64)),
        "sha256": _digest(path),
    }
    _write_json(path.with_suffix(".json"), record)
    return record


@dataclass(frozen=True)
class Shards:
    """The rows of a folder's shards.

    Attributes:
        tables: Memory-mapped arrays, each [n, len(HEADER) + max_length].
        manifest: The contents of `manifest.json`.
    """

    tables: Sequence[np.ndarray]
    manifest: dict[str, Any]

    @classmethod
    def opened(cls, folder: Path) -> "Shards":
        """Opens the shards of a folder and compares each with its hash.

        Raises:
            CheckpointError: If a shard is damaged or missing.
        """
        manifest = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        tables = []
        for number, record in enumerate(manifest["shards"]):
            path = _shard(folder, number)
            if not path.exists() or _digest(path) != record["sha256"]:
                how, record_name = "damaged" if path.exists() else "missing", path.with_suffix(".json").name
                raise CheckpointError(
                    f"{path} is {how}. Remove it, {record_name} and {WHOLE}; the same command makes it anew."
                )
            tables.append(np.load(path, mmap_mode="r"))
        return cls(tables, manifest)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Number of rows before each shard, and in all shards: int64 [shards + 1]."""
        return np.cumsum([0, *map(len, self.tables)])

    def column(self, name: str) -> np.ndarray:
        """One entry of the header, for all rows: int32 [rows]."""
        n = HEADER.index(name)
        return np.concatenate([table[:, n].astype(np.int32) for table in self.tables])

    def ids(self, row: int) -> np.ndarray:
        """The token ids of a row, padding included."""
        shard = int(np.searchsorted(self.starts, row, "right")) - 1
        return self.tables[shard][row - self.starts[shard], len(HEADER) :]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: Any) -> None:
    staged = path.with_name(path.name + ".new")
    with open(staged, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
