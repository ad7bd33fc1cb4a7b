"""Rows of files and of the Hub's data sets, as dicts by column."""

import ast
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from bert_jax.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".txt": "text;label",
}
"""By a file's name, without a `.gz` behind it."""

TEXT = ("text", "sentence", "sentence1", "question1", "premise", "question", "review", "content", "input_string")
"""Usual names of the column of texts: the model catalogue's, GLUE's, and those of most data sets of the Hub."""

Row = dict[str, Any]


class Entry(NamedTuple):
    """What stands at one place of a file.

    Attributes:
        line: Of the file, from 1; of Parquet, the row.
        row: By column or, where there is none to be read, why.
        position: Bytes of the file that have been read.
    """

    line: int
    row: Row | InputError
    position: int


def read(path: str | Path, format: str | None = None, *, labelled: bool = True) -> Iterator[Row]:
    """Streams the rows of a file; see `entries`.

    Raises:
        InputError: If the file cannot be read, or names the line that cannot.
    """
    for line, row, _ in entries(path, format, labelled=labelled):
        if isinstance(row, InputError):
            raise InputError(f"{path}, line {line}: {row}")
        yield row


def entries(path: str | Path, format: str | None = None, *, labelled: bool = True) -> Iterator[Entry]:
    """Streams a file: its rows, and the places where there is something else.

    Args:
        path: JSONL, CSV, TSV (both with a header), Parquet, or text; all but Parquet may be gzipped. Or a folder, whose
            .txt files, in subfolders too, are a row's `text` each.
        format: "jsonl", "csv", "tsv", "parquet", "text" (a line is a row's `text`) or "text;label" (a line is a text,
            and its label behind the last semicolon; a header `text;…` is passed over), or "conll" (a line is a word,
            its tag in the last column; a blank line ends a row of `tokens` and `tags`), or "squad" (SQuAD's JSON, read
            whole; a question is a row). By the file's name by default; .json is SQuAD's if it begins so, or JSONL.
        labelled: A name in .txt says "text;label", and "text" otherwise.

    Raises:
        InputError: If the file cannot be read.
    """
    path = Path(path)
    if path.is_dir() and format in (None, "text"):
        yield from _folder(path)
        return
    parse: Any = {"jsonl": _jsonl, "csv": _csv, "tsv": _tsv, "text": _text, "text;label": _text_and_label,
                  "conll": _conll, "squad": _squad}  # fmt: skip
    if format is None:
        format = "squad" if _begins_as_squad(path) else format_of(path, labelled)
    if format not in (*parse, "parquet"):
        raise InputError(f"the format {format!r} is unknown; expected one of {', '.join((*parse, 'parquet'))}.")
    try:
        with open(path, "rb") as file:
            if format == "parquet":
                yield from _parquet(file)
                return
            unpacked: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            undecodable: list[str] = []
            with io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline="") as text:
                for line, row in parse[format](_lines(text, undecodable)):
                    if undecodable:
                        row = InputError("this is not UTF-8 text.")
                        undecodable.clear()
                    yield Entry(line, row, file.tell() if file.seekable() else 0)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def format_of(path: Path, labelled: bool) -> str:
    """What a file holds, by its name.

    Raises:
        InputError: If that does not say.
    """
    suffix = Path(path.stem if path.suffix == ".gz" else path).suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: what is in it? Its name ends in none of {', '.join(FORMATS)}; give the format.")
    return "text" if suffix == ".txt" and not labelled else FORMATS[suffix]


def _begins_as_squad(path: Path) -> bool:
    if not path.name.endswith((".json", ".json.gz")):
        return False
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(2000)
    except (OSError, EOFError, zlib.error):
        return False
    return re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"(version|data)"\s*:', start) is not None and b'"paragraphs"' in start


def _folder(path: Path) -> Iterator[Entry]:
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise InputError(f"{path} holds no .txt files.")
    for number, file in enumerate(files, 1):
        try:
            yield Entry(number, {"text": file.read_text(encoding="utf-8-sig")}, 0)
        except OSError as error:
            raise InputError(f"Cannot read {file}: {error.strerror}.") from None
        except UnicodeDecodeError:
            yield Entry(number, InputError(f"{file.name} is not UTF-8 text."), 0)


def _lines(file: IO[str], undecodable: list[str]) -> Iterator[str]:
    """Lines, those with bytes that are no text noted down."""
    for line in file:
        try:
            line.encode()
        except UnicodeEncodeError:
            undecodable.append(line)
        yield line


def _jsonl(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, InputError(f"no JSON ({error}); expected an object a line.")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, InputError(f"a {type(row).__name__}; expected an object with columns.")


def _csv(lines: Iterator[str], **dialect: Any) -> Iterator[tuple[int, Row | InputError]]:
    csv.field_size_limit(2**24)  # characters; the default's 131,072 are fewer than a book has
    reader = csv.DictReader(lines, strict=True, **dialect)
    names = list(reader.fieldnames or ())
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        yield 1, InputError(f"the header has {repeated[0]!r} twice.")
        return
    if any(re.search("[\ud800-\udfff]", name) for name in names):
        yield 1, InputError("the header is not UTF-8 text.")
        return
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield begin, InputError(f"{error}.")
            continue
        if None in row or None in row.values():
            count = f"{'more' if None in row else 'fewer'} fields than the header's {len(names)}."
            yield begin, InputError(count)
        else:
            yield begin, row


def _tsv(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    return _csv(lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _text(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    for number, line in enumerate(lines, 1):
        yield number, {"text": line.rstrip("\r\n")}


def _text_and_label(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    for number, line in enumerate(lines, 1):
        text, semicolon, label = line.strip().rpartition(";")
        if not line.strip() or (number == 1 and text == "text"):
            continue
        yield number, {"text": text, "label": label} if semicolon else InputError("no semicolon; expected text;label.")


def _conll(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    tokens: list[str] = []
    tags: list[str] = []
    number, columns, wrong = 0, 0, ""
    for number, line in enumerate(itertools.chain(lines, [""]), 1):
        fields = line.split("\t") if "\t" in line.strip() else line.split(" ")
        fields = [field.strip() for field in fields if field.strip()]
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2 or len(fields) != (columns or len(fields)):
                wrong = wrong or f"{len(fields)} columns in line {number}; expected {columns or 'a word and its tag'}."
            columns = columns or len(fields)
            tokens.append(fields[0])
            tags.append(fields[-1])
        elif tokens:
            yield number, InputError(wrong) if wrong else {"tokens": tokens, "tags": tags}
            tokens, tags, wrong = [], [], ""


def _squad(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    try:
        paragraphs = [
            paragraph for article in json.loads("".join(lines))["data"] for paragraph in article["paragraphs"]
        ]
        rows = [
            {"id": question["id"], "question": question["question"], "context": paragraph["context"],
             "answers": question.get("answers")}
            for paragraph in paragraphs for question in paragraph["qas"]
        ]  # fmt: skip
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        yield 1, InputError(f"not SQuAD's JSON ({type(error).__name__}: {error}).")
        return
    yield from enumerate(rows, 1)


def _parquet(file: IO[bytes]) -> Iterator[Entry]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError("Parquet needs pyarrow: pip install 'bert-jax[data]'.") from None
    number, size = 0, os.fstat(file.fileno()).st_size
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        for batch in parquet.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield Entry(number, row, size * number // parquet.metadata.num_rows)
    except pyarrow.lib.ArrowException as error:
        raise InputError(f"Cannot read {file.name}: {error}.") from None


def read_hub(id: str, name: str | None, split: str, revision: str | None) -> Iterator[Row]:
    """Rows of a split of a data set on the Hub; labels that it stores as numbers come by their names.

    Raises:
        InputError: If there is no such data set or split, or the extra `data` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError("Data sets of the Hub need the extra `data`: pip install 'bert-jax[data]'.") from None
    try:
        found = datasets.load_dataset(id, name, split=split, revision=revision)
    except Exception as error:  # the library raises all kinds
        raise InputError(f"Cannot load {split} of {id}{f' ({name})' if name else ''}: {error}") from None
    names = {column: kind for column, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)}
    lists = {column: kind.feature for column, kind in found.features.items()
             if isinstance(getattr(kind, "feature", None), datasets.ClassLabel)}  # fmt: skip
    for row in found:
        # The Hub's test sets without labels have -1.
        yield (
            row
            | {column: kind.int2str(n) for column, kind in names.items() if (n := row[column]) is not None and n >= 0}
            | {
                column: None if row[column] is None or min(row[column], default=0) < 0 else kind.int2str(row[column])
                for column, kind in lists.items()
            }
        )


def literal(text: str) -> Any:
    """What a cell of a table stands for, in JSON or in Python's form; an empty one for an empty list.

    Raises:
        InputError: If it is neither.
    """
    try:
        return json.loads(text) if text.strip() else []
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise InputError(f"{text[:80]!r} is no list or object, in JSON or Python's form.") from None


def column(there: Collection[str], name: str | None, usual: Iterable[str]) -> str | None:
    """The column to take: the one that is named or else the first usual one that is there, None if none is.

    Raises:
        InputError: If the one that is named is not there.
    """
    if name is None:
        return next((candidate for candidate in usual if candidate in there), None)
    if name not in there:
        raise InputError(f"There is no column {name!r}; there are {', '.join(map(repr, there))}.")
    return name
