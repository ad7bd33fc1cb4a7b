"""Rows of files and of the Hub's data sets, as dicts by column."""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from bert_jax.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
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
            and its label behind the last semicolon; a header `text;…` is passed over). By the file's name by default.
        labelled: A name in .txt says "text;label", and "text" otherwise.

    Raises:
        InputError: If the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        yield from _folder(path)
        return
    format = format or format_of(path, labelled)
    parse = {"jsonl": _jsonl, "csv": _csv, "tsv": _tsv, "text": _text, "text;label": _text_and_label}
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


def _folder(path: Path) -> Iterator[Entry]:
    for number, file in enumerate(sorted(path.rglob("*.txt")), 1):
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
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, InputError(f"no JSON ({error}); expected an object a line.")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, InputError(f"a {type(row).__name__}; expected an object with columns.")


def _csv(lines: Iterator[str], **dialect: Any) -> Iterator[tuple[int, Row | InputError]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the default's 131,072 characters
    reader = csv.DictReader(lines, strict=True, **dialect)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.reader.line_num, InputError(f"{error}.")
            continue
        if None in row or None in row.values():
            count = f"{'more' if None in row else 'fewer'} fields than the header's {len(reader.fieldnames or ())}."
            yield reader.line_num, InputError(count)
        else:
            yield reader.line_num, row


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
    for row in found:
        # The Hub's test sets without labels have -1.
        yield row | {column: kind.int2str(row[column]) for column, kind in names.items() if row[column] >= 0}


def column(rows: Sequence[Row], name: str | None, usual: Iterable[str]) -> str | None:
    """The column to take: the one that is named or else the first usual one that is there, None if none is.

    Raises:
        InputError: If the one that is named is not there.
    """
    if name is None:
        return next((candidate for candidate in usual if candidate in rows[0]), None)
    if name not in rows[0]:
        raise InputError(f"There is no column {name!r}; there are {', '.join(map(repr, rows[0]))}.")
    return name
