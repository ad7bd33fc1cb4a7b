"""Prepares texts for pretraining: splits documents into sentences, tokenizes them, and saves the rows in shards.

A shard is a NumPy file of rows. Each row contains the three numbers named in `HEADER`, followed by the token ids of one
example. The `corpus.json` file in the shard folder records the input files, the tokenizer and the settings used to
make the shards. `manifest.json`, which is written last, records the size and the hash of each shard. A shard gets
its final name only when it is complete. After an interruption, `tokenize` therefore makes only the missing shards.
"""

import collections
import concurrent.futures
import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import Progress

from bert_jax.data.sources import reading
from bert_jax.errors import CheckpointError, InputError, listed
from bert_jax.tokenizer import Tokenizer

HEADER = ("tokens", "tokens of the first segment", "whether the second is of another document")
SHARD = 2**24
"""A shard is full when its documents contain at least this number of characters in total."""
PIECE = 100_000
"""Maximum number of characters in a sentence.

A longer sentence is split after the last space within this length, or exactly at this length if there is no such space.
"""
WHOLE, PARTS = "manifest.json", "corpus.json"
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'’”)\]]*(?=\s+[\"'‘“(\[]*[A-Z0-9])")

Document = list[list[int]]
"""A list of sentences, each of which is a list of token ids."""


# ── From texts to documents ──────────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """Reads the documents of several files, one after another.

    Attributes:
        replaced: Number of U+FFFD characters that have replaced invalid UTF-8 in the lines read so far.
    """

    def __init__(self, paths: Sequence[Path], format: str | None, column: str):
        self.paths, self.format, self.column, self.replaced = paths, format, column, 0

    def __iter__(self) -> Iterator[list[str]]:
        """Yields each document as a list of lines.

        In JSON Lines files, each row is a document. In text files, empty lines separate the documents.
        """
        for path in self.paths:
            lines = self._lines(path)
            if (self.format or ("jsonl" if ".jsonl" in path.suffixes else "text")) == "jsonl":
                yield from (self._row(path, number, line).splitlines() for number, line in enumerate(lines, 1) if line)
            else:
                yield from (list(document) for filled, document in itertools.groupby(lines, bool) if filled)

    def _lines(self, path: Path) -> Iterator[str]:
        with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line in file:
                text = line.decode("utf-8", "replace")
                self.replaced += text.count("\ufffd") - line.count("\ufffd".encode())
                yield text.removeprefix("\ufeff").strip()

    def _row(self, path: Path, number: int, line: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
            raise InputError(f"{path}, line {number}: expected an object with text under the key {self.column!r}.")
        return str(row[self.column])


def sentences(line: str) -> Iterator[str]:
    """Splits a line into sentences at punctuation. No sentence has more than `PIECE` characters."""
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    for start, end in itertools.pairwise([0, *ends, len(line)]):
        sentence = line[start:end]
        while len(sentence) > PIECE:
            cut = sentence.rfind(" ", 1, PIECE) + 1 or PIECE
            yield sentence[:cut]
            sentence = sentence[cut:]
        if sentence.strip():
            yield sentence


# ── From documents to rows ───────────────────────────────────────────────────────────────────────────────────────────


def pairs(
    documents: Sequence[Document], room: int, short: float, random: np.random.Generator
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Makes pairs of segments for next-sentence prediction, as `create_instances_from_document` in BERT's code does.

    Args:
        documents: Two or more documents, none of which is empty.
        room: Maximum total number of tokens in the two segments.
        short: Share of pairs whose target length is a random number of tokens from 2 to `room`. The target length of
            all other pairs is `room`.
        random: The random generator.

    Yields:
        The first segment, the second segment, and whether the second segment is from a different document than the
        first. Normally, the second segment comes from a different document with probability 1/2. The probability is 1
        if the first segment's document has only one unused sentence left, or if the next unused sentence in that
        document is at least as long as the target length.
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
            else:
                second = [token for sentence in document[first_end:end] for token in sentence]
            first_cut, second_cut = _trimmed(len(first), len(second), room, random)
            yield first[first_cut], second[second_cut], other
            start = first_end if other else end  # the next pair starts at the document's first unused sentence


def _trimmed(first: int, second: int, room: int, random: np.random.Generator) -> tuple[slice, slice]:
    """Shortens two segments until they have at most `room` tokens in total.

    Each step removes either the first or the last token of the longer segment, chosen at random.

    Args:
        first: The length of the first segment.
        second: The length of the second segment.
        room: Maximum total number of tokens in the two segments.
        random: The random generator.

    Returns:
        The slice of each segment that is kept.
    """
    lengths, fronts = [first, second], [0, 0]
    while sum(lengths) > room:
        longer = 0 if lengths[0] > lengths[1] else 1
        lengths[longer] -= 1
        fronts[longer] += int(random.random() < 0.5)
    return slice(fronts[0], fronts[0] + lengths[0]), slice(fronts[1], fronts[1] + lengths[1])


def runs(documents: Iterable[Document], room: int) -> Iterator[list[int]]:
    """Joins the sentences of each document into texts of at most `room` tokens. Longer sentences are split."""
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
    """Options for converting documents to examples.

    Attributes:
        max_length: Maximum number of tokens in an example, including special tokens.
        next_sentence: Whether to make pairs of segments for next-sentence prediction instead of single texts.
        short: Share of pairs whose target length is a random number of tokens from 2 to `max_length - 3`. The target
            length of all other pairs is `max_length - 3`. Special tokens are not counted.
    """

    max_length: int = 128
    next_sentence: bool = True
    short: float = 0.1


def rows(
    documents: Sequence[Document], layout: Layout, special: tuple[int, ...], dtype: Any, random: np.random.Generator
) -> np.ndarray:
    """Makes the rows of a shard from documents.

    Args:
        documents: The documents.
        layout: Options for converting documents to examples.
        special: The ids of [CLS], [SEP] and [PAD].
        dtype: The dtype of the rows.
        random: The random generator.

    Returns:
        The rows, [rows, len(HEADER) + max_length].
    """
    cls, sep, pad = special
    if layout.next_sentence:
        found = [
            [len(first) + len(second) + 3, len(first) + 2, int(other), cls, *first, sep, *second, sep]
            for first, second, other in pairs(documents, layout.max_length - 3, layout.short, random)
        ]
    else:
        texts = runs(documents, layout.max_length - 2)
        found = [[len(tokens) + 2, len(tokens) + 2, 0, cls, *tokens, sep] for tokens in texts]
    table = np.full((len(found), len(HEADER) + layout.max_length), pad, dtype)
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
    """Creates the shards that do not exist yet and opens all shards.

    Args:
        files: Text files with empty lines between documents, or JSON Lines files. Files of both kinds may be gzipped.
        folder: The shard folder.
        tokenizer: The model's tokenizer.
        layout: Options for converting documents to examples.
        seed: The seed for the random choices made when creating pairs.
        format: The format of the files; None to infer it from the file names.
        text: The key of the text in JSON Lines files.
        processes: Number of tokenization processes; by default, the number of processors.
        console: The console for a progress bar; None for no progress bar.

    Raises:
        InputError: If the tokenizer lacks a special token, if a file cannot be read, if the files contain no text, or
            if pairs are requested but there is only one document. Also raised if writing to the folder fails, if the
            folder contains files that are not shards, or if it contains shards that were made with different arguments.
            Finished shards are kept.
        CheckpointError: If a shard is damaged or missing.
    """
    special: Any = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    if missing := [name for name, id in zip(("[CLS]", "[SEP]", "[PAD]"), special, strict=True) if id is None]:
        raise InputError(f"Pretraining needs [CLS], [SEP] and [PAD]; the tokenizer has no {', '.join(missing)}.")
    backend = tokenizer.backend.to_str()
    try:
        made_of = {
            "files": [[str(path), path.stat().st_size] for path in files],
            "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
            "seed": seed,
            "format": format,
            "text": text,
            **asdict(layout),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / PARTS).exists():
            before = json.loads((folder / PARTS).read_text(encoding="utf-8"))
            if different := [name for name in made_of if before.get(name) != made_of[name]]:
                raise InputError(
                    f"{folder} holds shards with other values of {' and '.join(different)}. Remove the folder, or set "
                    "data.shards to another."
                )
        elif any(path != _staged(folder / PARTS) for path in folder.iterdir()):
            raise InputError(f"{folder} holds files that are not shards. Set data.shards to another folder.")
        else:
            _write(folder / PARTS, json.dumps(made_of, indent=1).encode())
        if not (folder / WHOLE).exists():
            reader = Reader(files, format, text)
            make = functools.partial(_make_shard, folder, backend, layout, special, seed)
            shards = _make_shards(make, _units(reader), layout, processes, console)
            if not any(shard["rows"] for shard in shards):
                raise InputError(f"There is no text in {listed(files)}.")
            _write(folder / WHOLE, json.dumps({"replaced": reader.replaced, "shards": shards}, indent=1).encode())
    except OSError as error:
        raise InputError(f"Cannot access {error.filename or folder}: {error.strerror}. Finished shards stay.") from None
    return Shards.opened(folder)


def _units(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Groups documents into one group per shard.

    If possible, each group contains at least `SHARD` characters and at least two documents, the minimum for making
    pairs.
    """
    unit: list[list[str]] = []
    # A full group. It is held back so that, if only one document remains at the end, that document can join it.
    ready: list[list[str]] = []
    size = 0
    for document in documents:
        if size >= SHARD and len(unit) > 1:
            if ready:
                yield ready
            ready, unit, size = unit, [], 0
        unit.append(document)
        size += sum(map(len, document))
    if len(unit) == 1:
        ready, unit = ready + unit, []
    yield from filter(None, (ready, unit))


def _make_shards(
    make: Any, units: Iterator[list[list[str]]], layout: Layout, processes: int | None, console: Console | None
) -> list[Any]:
    """Makes one shard per group of documents, using several processes. Returns the record of each shard."""
    workers = processes or os.cpu_count() or 1
    records: list[Any] = []
    pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    # The processes are not forked, because the threads of JAX and of the tokenizers do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        Progress("{task.description}", console=console or Console(quiet=True), transient=True) as progress,
    ):
        bar = progress.add_task("tokenizing", total=None)
        for number, unit in enumerate(units):
            if number == 0 and len(unit) == 1 and layout.next_sentence:
                raise InputError(
                    "Pairs need two documents, not one. Put empty lines between them or set data.next_sentence=false."
                )
            pending.append(pool.submit(make, number, unit))
            if len(pending) >= 2 * workers:
                records.append(pending.popleft().result())
                progress.update(bar, description=f"tokenizing: {len(records)} shards")
        return records + [future.result() for future in pending]


def _make_shard(
    folder: Path, backend: str, layout: Layout, special: tuple[int, ...], seed: int, number: int, unit: list[list[str]]
) -> Any:
    """Tokenizes documents and writes them to a shard, unless the shard already exists. Returns the shard's record.

    The record becomes an entry of `manifest.json`. This function runs in a worker process.
    """
    path = folder / f"{number:05d}.npy"
    record = path.with_suffix(".json")
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads, because worker processes run in parallel
    tokenizer = tokenizers.Tokenizer.from_str(backend)
    documents = []
    for lines in unit:
        texts = [sentence for line in lines for sentence in sentences(line)]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        if document := [encoding.ids for encoding in encodings if encoding.ids]:
            documents.append(document)
    dtype = np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.int32
    usable = documents if len(documents) > 1 or not layout.next_sentence else []
    table = rows(usable, layout, special, dtype, np.random.default_rng((seed, number)))
    content = io.BytesIO()
    np.save(content, table)
    _write(path, content.getvalue())
    found = {
        "documents": len(documents),
        "rows": len(table),
        "tokens": int(table[:, 0].sum(dtype=np.int64)),
        "sha256": _digest(path),
    }
    _write(record, json.dumps(found, indent=1).encode())
    return found


@dataclass(frozen=True)
class Shards:
    """All rows of the shards in a folder.

    Attributes:
        tables: A memory-mapped array for each shard, [rows, len(HEADER) + max_length].
        manifest: The contents of `manifest.json`.
    """

    tables: Sequence[np.ndarray]
    manifest: dict[str, Any]

    @classmethod
    def opened(cls, folder: Path) -> "Shards":
        """Opens the shards in a folder and checks their hashes.

        Raises:
            CheckpointError: If a shard is damaged or missing.
        """
        manifest = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        tables = []
        for number, record in enumerate(manifest["shards"]):
            path = folder / f"{number:05d}.npy"
            if not path.exists() or _digest(path) != record["sha256"]:
                raise CheckpointError(f"{path} is damaged or missing. Remove {path.stem}.* and {WHOLE}, then rerun.")
            tables.append(np.load(path, mmap_mode="r"))
        return cls(tables, manifest)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The index of each shard's first row, followed by the total number of rows: int64 [shards + 1]."""
        return np.cumsum([0, *map(len, self.tables)])

    def column(self, name: str) -> np.ndarray:
        """Returns the values of one `HEADER` field for all rows: int32 [rows]."""
        return np.concatenate([table[:, HEADER.index(name)].astype(np.int32) for table in self.tables])

    def ids(self, row: int) -> np.ndarray:
        """The token ids of a row, including padding."""
        shard = int(np.searchsorted(self.starts, row, "right")) - 1
        return self.tables[shard][row - self.starts[shard], len(HEADER) :]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it when it is complete."""
    staged = _staged(path)
    with open(staged, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def _staged(path: Path) -> Path:
    return path.with_suffix(".new")
