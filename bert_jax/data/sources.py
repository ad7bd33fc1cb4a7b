"""Reads rows from files and Hugging Face Hub data sets. Each row is a dict that maps column names to values."""

import contextlib
import functools
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from bert_jax.data import formats
from bert_jax.data.formats import TEXT, Row, Table
from bert_jax.errors import InputError, check_extra, listed, quoted

logger = logging.getLogger(__name__)

FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".txt": "text;label",
}
"""Maps file name extensions to file formats.

A final `.gz` in the name is ignored. For `.json` and `.txt`, `format_of` may choose a different format.
"""

TEXTS: tuple[tuple[str, ...], ...] = tuple((name,) for name in TEXT)
PAIRS: tuple[tuple[str, ...], ...] = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"),
)  # fmt: skip
"""Usual names of the two columns for a pair of texts."""

ClassLabels = dict[str, tuple[str, ...]]
"""Maps each column of class ids to the names of the classes, in the order of the ids."""


class Entry(NamedTuple):
    """A row of a file, or an error if the row cannot be read.

    Attributes:
        line: The location of the row, counted from 1. For most formats, this is the number of the line on which the row
            begins. For CoNLL, this is the number of the line after the row. For Parquet, JSON and SQuAD, this is the
            row number. For a folder, this is the file number.
        row: The row as a dict that maps column names to values, or an error that states why the row cannot be read.
        position: Number of bytes read from the file so far, for progress bars; 0 if unknown.
    """

    line: int
    row: Row | InputError
    position: int


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Re-raises file errors as `InputError`.

    Raises:
        InputError: If the body of the `with` statement raises a file system error or a gzip error.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def read(
    path: str | Path,
    format: str | None = None,
    *,
    labeled: bool = True,
    table: Table = Table(),  # noqa: B008
) -> Iterator[Row]:
    """Streams the rows of a file (see `entries`) and replaces class ids (see `class_labels`) with class names.

    Raises:
        InputError: If the file or a line in it cannot be read. The message gives the line number.
    """
    names = class_labels(path, format)
    for line, row, _ in entries(path, format, labeled=labeled, table=table):
        try:
            if isinstance(row, InputError):
                raise row
            yield _named(row, names)
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None


def class_labels(path: str | Path, format: str | None = None) -> ClassLabels:
    """Finds the class-id columns and their class names in a Parquet file written by the `datasets` library.

    For other files, the result is empty.

    Raises:
        InputError: If a Parquet file cannot be read.
    """
    if (format or FORMATS.get(Path(path).suffix)) != "parquet":
        return {}
    with reading(path), open(path, "rb") as file, _opened_parquet(file) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    try:
        return _class_labels(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, AttributeError):  # not written by `datasets`
        return {}


def _class_labels(features: Mapping[str, Any]) -> ClassLabels:
    """Finds the columns that contain class ids or lists of class ids.

    Args:
        features: The result of `datasets.Features.to_dict`.
    """
    found = {}
    for column, kind in features.items():
        # Earlier versions of `datasets` describe a column of lists as a list that contains the type of the items.
        kind = kind[0] if isinstance(kind, list) and kind else kind
        kind = kind.get("feature", kind) if isinstance(kind, Mapping) else {}
        if isinstance(kind, Mapping) and kind.get("_type") == "ClassLabel" and kind.get("names"):
            found[column] = tuple(map(str, kind["names"]))
    return found


def _named(row: Row, labels: ClassLabels) -> Row:
    """Replaces class ids with class names. The id -1, which unlabeled test sets contain, becomes None."""
    named: Row = dict.fromkeys(labels)
    for column, names in labels.items():
        ids: Any = row.get(column)
        each = ids if isinstance(ids, list) else [ids]
        if wrong := [n for n in each if n is not None and not (isinstance(n, int) and n < len(names))]:
            raise InputError(f"{column!r} holds {quoted(wrong[0])}; expected a class id below {len(names)}.")
        if all(n is not None and n >= 0 for n in each):
            named[column] = [names[n] for n in each] if isinstance(ids, list) else names[ids]
    return row | named


def entries(
    path: str | Path,
    format: str | None = None,
    *,
    labeled: bool = True,
    table: Table = Table(),  # noqa: B008
    warn: bool = True,
) -> Iterator[Entry]:
    """Streams the rows of a file. A row that cannot be read is replaced with an error.

    Args:
        path: A file or a folder. A file may be gzipped, unless it is a Parquet file. If `path` is a folder, each `.txt`
            file in it or its subfolders contains the `text` of one row.
        format: The format of the file. If None, the format is inferred from the file's name. For names that end in
            `.json`, the beginning of the file determines whether the format is "json", "squad" or "jsonl".

            - "jsonl": Each line is a JSON object that represents a row.
            - "json": An array of objects, or an object whose `data` field is such an array. Each object in the array is
              a row. The whole file is read before the first row is returned.
            - "csv", "tsv": A table. The first line contains the column names, unless `table` specifies them.
            - "parquet": A Parquet file.
            - "text": Each line is the `text` of one row.
            - "text;label": Each line contains the `text` of a row, a semicolon, and the `label` of the row. If a line
              contains several semicolons, the last one is the separator. The first line is skipped as a header if its
              text is one of the column names in `TEXT`.
            - "conll": Each line contains a word in the first column and the word's tag in the last. Each row has the
              columns `tokens` and `tags` and ends at a blank line. The first word of a row may be preceded by comments,
              such as `# id 3b1c` or `# text = A sentence.`
            - "squad": JSON in the SQuAD format, or a JSON array of SQuAD articles. Each question is a row. The whole
              file is read before the first row is returned.
        labeled: Whether a `.txt` file is read as "text;label" rather than "text" if `format` is None.
        table: Options for reading a table. For other formats, only the default is allowed.
        warn: Whether to log warnings. A caller that reads a file twice passes False for one of the reads, so that each
            warning is logged only once.

    Raises:
        InputError: If the file cannot be read, if its format is unknown, if `table` is invalid, or if `table` is given
            and the format is neither "csv" nor "tsv".
    """
    path = Path(path)
    if path.is_dir() and format in (None, "text"):
        yield from _folder(path)
        return
    tables = {"csv": Table(",", "minimal"), "tsv": Table("\t", "none")}
    parse: Any = {**formats.PARSERS, "parquet": _parquet}
    format = format_of(path, labeled) if format is None else format
    if format in tables:
        usual = tables[format]
        delimiter = usual.delimiter if table.delimiter is None else table.delimiter
        if len(delimiter or "") != 1:
            raise InputError(f"the delimiter is {quoted(delimiter)}; expected one character, such as ';'.")
        if table.quoting not in (None, "minimal", "none"):
            raise InputError(f"quoting is {quoted(table.quoting)}; expected 'minimal' or 'none'.")
        if repeated := [name for n, name in enumerate(table.columns) if name in table.columns[:n]]:
            raise InputError(f"the list of columns has {quoted(repeated[0])} twice; expected distinct names.")
        sure = table.delimiter is not None
        table = Table(delimiter, table.quoting or usual.quoting, table.columns)
        parse[format] = functools.partial(formats.parse_table, table=table, sure=sure, path=path if warn else None)
    elif table != Table():
        raise InputError(f"{path} has the format {format}; delimiter, quoting and columns apply only to csv and tsv.")
    if format not in parse:
        raise InputError(f"the format {quoted(format)} is unknown; expected one of {', '.join([*tables, *parse])}.")
    with reading(path), open(path, "rb") as file:
        if format == "parquet":
            yield from _parquet(file)
            return
        unpacked: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        undecodable: list[str] = []
        with io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline="") as text:
            for line, row in parse[format](formats.decoded_lines(text, undecodable)):
                if undecodable and format in ("json", "squad"):  # these are read as a whole
                    yield Entry(line, InputError("this is not UTF-8 text."), 0)
                    return
                row = InputError("this is not UTF-8 text.") if undecodable else row
                undecodable.clear()
                yield Entry(line, row, file.tell() if file.seekable() else 0)


def format_of(path: Path, labeled: bool) -> str:
    """Infers the format of a file from its name and, for a `.json` file, from the beginning of its content.

    `entries` lists the formats.

    Raises:
        InputError: If the format cannot be inferred from the name.
    """
    suffix = Path(path.stem if path.suffix == ".gz" else path).suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: the format is unknown. Give it, or a name that ends in {', '.join(FORMATS)}.")
    if suffix == ".json":
        with (
            contextlib.suppress(OSError, EOFError, zlib.error, ValueError, RecursionError),
            (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file,
        ):
            start = file.read(2000).decode("utf-8-sig", "replace").lstrip()
            if re.match(r'\[|\{\s*"(version|data)"\s*:', start) and '"paragraphs"' in start:
                return "squad"
            if start.startswith("["):
                return "json"
            if re.match(r'\{\s*"(version|data)"\s*:', start):
                file.seek(0)
                line, more = file.readline(), file.read(1000)
                # If an object ends on the first line and more lines follow, each line is a row.
                if not (line.rstrip().endswith(b"}") and more.strip()):
                    content = json.loads(line if line.rstrip().endswith(b"}") else line + more + file.read())
                    return "json" if content.keys() <= {"version", "data"} else "jsonl"
    return "text" if suffix == ".txt" and not labeled else FORMATS[suffix]


def _folder(path: Path) -> Iterator[Entry]:
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise InputError(f"{path} holds no .txt files.")
    for number, file in enumerate(files, 1):
        try:
            with reading(file):
                yield Entry(number, {"text": file.read_text(encoding="utf-8-sig")}, 0)
        except UnicodeDecodeError:
            yield Entry(number, InputError(f"{file.name} is not UTF-8 text."), 0)


@contextlib.contextmanager
def _opened_parquet(file: IO[bytes]) -> Iterator[Any]:
    check_extra("data", "pyarrow")
    import pyarrow.parquet

    try:
        yield pyarrow.parquet.ParquetFile(file)
    except pyarrow.lib.ArrowException as error:
        raise InputError(f"Cannot read {file.name}: {error}.") from None


def _parquet(file: IO[bytes]) -> Iterator[Entry]:
    size = os.fstat(file.fileno()).st_size
    with _opened_parquet(file) as parquet:
        rows = (row for batch in parquet.iter_batches(1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield Entry(number, row, size * number // parquet.metadata.num_rows)


def read_hub(id: str, name: str | None, split: str, revision: str | None) -> tuple[ClassLabels, Iterator[Row]]:
    """Reads a split of a data set on the Hugging Face Hub.

    Returns:
        A dict that maps each class-id column to its class names, and an iterator over the rows. In the rows, class ids
        are replaced with class names.

    Raises:
        InputError: If the split cannot be loaded, or if the `data` extra is not installed.
    """
    check_extra("data", "datasets")
    import datasets

    try:
        found = datasets.load_dataset(id, name, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds of exceptions
        raise InputError(f"Cannot load {split} of {id}{f' ({name})' if name else ''}: {error}") from None
    labels = _class_labels(found.features.to_dict())
    return labels, (_named(row, labels) for row in found)


def column(there: Collection[str], name: str | None, usual: Iterable[str]) -> str | None:
    """Chooses a column: `name`, or the first existing column in `usual` if `name` is None.

    If none of the usual columns exists, the result is None.

    Raises:
        InputError: If `name` is given and no column has this name.
    """
    if name is None:
        return next((candidate for candidate in usual if candidate in there), None)
    if name not in there:
        raise InputError(f"There is no column {quoted(name)}; the columns are {listed(map(repr, there))}.")
    return name
