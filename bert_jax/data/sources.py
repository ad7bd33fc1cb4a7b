"""Rows of files and of the Hub's data sets, as dicts by column."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

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

Row = dict[str, Any]


def read(path: str | Path, format: str | None = None) -> Iterator[Row]:
    """Streams the rows of a file.

    Args:
        path: JSONL, CSV, TSV (both with a header), Parquet, or text; all but Parquet may be gzipped.
        format: "jsonl", "csv", "tsv", "parquet", "text" (a line is a row's `text`) or "text;label" (a line is a text,
            and its label behind the last semicolon; a header `text;…` is passed over). By the file's name by default.

    Raises:
        InputError: If the file cannot be read, or names the line that cannot.
    """
    path = Path(path)
    suffix = Path(path.stem if path.suffix == ".gz" else path).suffix
    format = format or FORMATS.get(suffix)
    if format is None:
        raise InputError(f"{path}: what is in it? Its name ends in none of {', '.join(FORMATS)}; give data.format.")
    if format == "parquet":
        yield from _parquet(path)
        return
    opened: Any = gzip.open if path.suffix == ".gz" else open
    parse = {"jsonl": _jsonl, "csv": _csv, "tsv": _tsv, "text": _text, "text;label": _text_and_label}[format]
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            yield from parse(path, lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}).") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def _jsonl(path: Path, lines: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: no JSON ({error}); expected an object a line.") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a {type(row).__name__}; expected an object with columns.")
        yield row


def _csv(path: Path, lines: IO[str], **dialect: Any) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the default's 131,072 characters
    reader = csv.DictReader(lines, strict=True, **dialect)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, line {reader.line_num}: {'more' if None in row else 'fewer'} fields than the header's "
                    f"{len(reader.fieldnames or ())}."
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: {error}.") from None


def _tsv(path: Path, lines: IO[str]) -> Iterator[Row]:
    return _csv(path, lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _text(path: Path, lines: IO[str]) -> Iterator[Row]:
    for line in lines:
        yield {"text": line.rstrip("\r\n")}


def _text_and_label(path: Path, lines: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        text, semicolon, label = line.strip().rpartition(";")
        if not line.strip() or (number == 1 and text == "text"):
            continue
        if not semicolon:
            raise InputError(f"{path}, line {number}: no semicolon; expected text;label.")
        yield {"text": text, "label": label}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError("Parquet needs pyarrow: pip install 'bert-jax[data]'.") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise InputError(f"Cannot read {path}: {error}.") from None


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
