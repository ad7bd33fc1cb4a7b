"""Rows of files and of data sets on the Hub, as dicts from column to value."""

import ast
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from bert_jax.errors import InputError, listed, quoted

FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".txt": "text;label",
}
"""The format of a file by the extension of its name, without a final `.gz`."""

TEXT = ("text", "sentence", "sentence1", "question1", "premise", "question", "review", "content", "input_string")
"""Usual names of the text column: those of the model catalogue, of GLUE, and of most data sets on the Hub."""
TEXTS: tuple[tuple[str, ...], ...] = tuple((name,) for name in TEXT)
PAIRS: tuple[tuple[str, ...], ...] = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"),
)  # fmt: skip
"""Usual names of the two columns of pairs of texts."""

Row = dict[str, Any]
ClassLabels = dict[str, tuple[str, ...]]
"""Column of class ids, as `datasets` stores labels -> the names of the classes in the order of their ids."""


class Entry(NamedTuple):
    """A row of a file, or the error in its place.

    Attributes:
        line: The line in the file, counted from 1; in Parquet, the row.
        row: The row by column, or an error that says why it cannot be read.
        position: Number of bytes of the file that have been read.
    """

    line: int
    row: Row | InputError
    position: int


def read(path: str | Path, format: str | None = None, *, labelled: bool = True) -> Iterator[Row]:
    """Streams the rows of a file; see `entries`. Class ids become names if `datasets` wrote the file, as Parquet.

    Raises:
        InputError: If the file or a line of it cannot be read; the message names the line.
    """
    names = class_labels(path, format)
    for line, row, _ in entries(path, format, labelled=labelled):
        try:
            if isinstance(row, InputError):
                raise row
            yield _named(row, names)
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None


def class_labels(path: str | Path, format: str | None = None) -> ClassLabels:
    """The columns of class ids of a Parquet file that `datasets` wrote; empty for other files.

    Raises:
        InputError: If a Parquet file cannot be read.
    """
    path = Path(path)
    if (format or FORMATS.get(path.suffix)) != "parquet":
        return {}
    try:
        with open(path, "rb") as file, _opened_parquet(file) as parquet:
            metadata = parquet.schema_arrow.metadata or {}
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    try:
        return _class_labels(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, AttributeError):  # not written by `datasets`
        return {}


def _class_labels(features: Mapping[str, Any]) -> ClassLabels:
    """The columns of class ids, or lists of them, among the features that `datasets.Features.to_dict` returns."""
    found = {}
    for column, kind in features.items():
        kind = kind[0] if isinstance(kind, list) and kind else kind  # lists, as earlier versions wrote them
        kind = kind.get("feature", kind) if isinstance(kind, Mapping) else {}
        if isinstance(kind, Mapping) and kind.get("_type") == "ClassLabel" and kind.get("names"):
            found[column] = tuple(map(str, kind["names"]))
    return found


def _named(row: Row, labels: ClassLabels) -> Row:
    """The row with class names instead of class ids; None instead of -1, which unlabelled test sets have."""
    named: Row = {}
    for column, names in labels.items():
        ids: Any = row.get(column)
        each = ids if isinstance(ids, list) else [ids]
        if wrong := [n for n in each if n is not None and not (isinstance(n, int) and n < len(names))]:
            raise InputError(f"the class id {quoted(wrong[0])} of {column!r} has no name; there are {len(names)}.")
        if any(n is None or n < 0 for n in each):
            named[column] = None
        else:
            named[column] = [names[n] for n in each] if isinstance(ids, list) else names[ids]
    return row | named


def entries(path: str | Path, format: str | None = None, *, labelled: bool = True) -> Iterator[Entry]:
    """Streams a file: its rows, and an error in place of each row that cannot be read.

    Args:
        path: A file of JSONL, CSV, TSV (both with a header), Parquet, or text; all but Parquet may be gzipped. Or a
            folder; each of its .txt files, also in subfolders, is the `text` of one row.
        format: "jsonl", "csv", "tsv", "parquet", "text" (a line is the `text` of a row), "text;label" (a line is a text
            and, after the last semicolon, its label; a header that begins with a usual name of the text column is
            skipped), "conll" (a line is a word with its tag in the last column; a blank line ends a row of `tokens` and
            `tags`), or "squad" (SQuAD's JSON, read whole; a question is a row). None infers it from the file's name;
            a .json file is "squad" if it begins like SQuAD's JSON, else "jsonl".
        labelled: Whether a .txt file without a given format is "text;label" instead of "text".

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
        raise InputError(f"the format {quoted(format)} is unknown; expected one of {', '.join((*parse, 'parquet'))}.")
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
    """The format of a file according to its name.

    Raises:
        InputError: If the name does not tell the format.
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
    """Yields the lines; adds those with bytes that are not UTF-8 to `undecodable`."""
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
    csv.field_size_limit(2**24)  # characters; the default of 131,072 is too few for a book
    record: list[str] = []  # the lines that the reader has read for the current row

    def noted() -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    reader = csv.reader(noted(), strict=True, **dialect)
    names: list[str] | None = None
    while True:
        begin = reader.line_num + 1
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield from _swallowed(begin, reader.line_num, begin + _open_quote(record, reader.dialect), error)
            if names is None:
                return
            continue
        if names is None:
            names = fields
            if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
                yield 1, InputError(f"the header has {quoted(repeated[0])} twice.")
                return
            if any(re.search("[\ud800-\udfff]", name) for name in names):
                yield 1, InputError("the header is not UTF-8 text.")
                return
        elif fields and len(fields) != len(names):
            count = "more" if len(fields) > len(names) else "fewer"
            yield begin, InputError(f"{count} fields than the header's {len(names)}.")
        elif fields:
            yield begin, dict(zip(names, fields, strict=True))


def _swallowed(begin: int, end: int, opening: int, error: csv.Error) -> Iterator[tuple[int, InputError]]:
    """Yields an error for each line of a broken row, from `begin` to `end`; its last quote opens in line `opening`."""
    if opening >= end:
        yield begin, InputError(f"{error}.")
    else:
        count = f"{end - opening:,} line{'s' * (end > opening + 1)}"
        yield begin, InputError(f"the quote that opens in line {opening} swallows the {count} behind it ({error}).")
    for line in range(begin + 1, end + 1):
        yield line, InputError(f"it belongs to the row of line {begin}, whose quote of line {opening} is not closed.")


def _open_quote(record: list[str], dialect: Any) -> int:
    """The line of a record, counted from 0, in which its last quote opens."""
    opening, quote, inside, before = 0, dialect.quotechar, False, dialect.delimiter
    for number, line in enumerate(record):
        for character in line:
            if character == quote and (inside or before in (dialect.delimiter, "\n", quote)):
                inside = not inside
                opening = number if inside else opening
            before = character
    return opening


def _tsv(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    return _csv(lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _text(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    for number, line in enumerate(lines, 1):
        yield number, {"text": line.rstrip("\r\n")}


def _text_and_label(lines: Iterator[str]) -> Iterator[tuple[int, Row | InputError]]:
    for number, line in enumerate(lines, 1):
        text, semicolon, label = line.strip().rpartition(";")
        if not line.strip() or (number == 1 and text.strip().lower() in TEXT):
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
             "answers": question.get("answers"), "is_impossible": question.get("is_impossible")}
            for paragraph in paragraphs for question in paragraph["qas"]
        ]  # fmt: skip
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        yield 1, InputError(f"not SQuAD's JSON ({type(error).__name__}: {error}).")
        return
    yield from enumerate(rows, 1)


@contextlib.contextmanager
def _opened_parquet(file: IO[bytes]) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError("Parquet needs pyarrow: pip install 'bert-jax[data]'.") from None
    try:
        yield pyarrow.parquet.ParquetFile(file)
    except pyarrow.lib.ArrowException as error:
        raise InputError(f"Cannot read {file.name}: {error}.") from None


def _parquet(file: IO[bytes]) -> Iterator[Entry]:
    number, size = 0, os.fstat(file.fileno()).st_size
    with _opened_parquet(file) as parquet:
        for batch in parquet.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield Entry(number, row, size * number // parquet.metadata.num_rows)


def read_hub(id: str, name: str | None, split: str, revision: str | None) -> tuple[ClassLabels, Iterator[Row]]:
    """The columns of class ids of a data set on the Hub, and the rows of a split with class names instead of ids.

    Raises:
        InputError: If there is no such data set or split, or the extra `data` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError("Data sets of the Hub need the extra `data`: pip install 'bert-jax[data]'.") from None
    try:
        found = datasets.load_dataset(id, name, split=split, revision=revision)
    except Exception as error:  # the library raises all kinds of exceptions
        raise InputError(f"Cannot load {split} of {id}{f' ({name})' if name else ''}: {error}") from None
    labels = _class_labels(found.features.to_dict())
    return labels, (_named(row, labels) for row in found)


def literal(text: str) -> Any:
    """Parses a cell of a table: a list or object in JSON, in Python's form, or in numpy's form without commas.

    An empty cell is an empty list.

    Raises:
        InputError: If the cell has none of these forms.
    """
    if not text.strip():
        return []
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text, parse_constant=_no_number)
    try:
        return ast.literal_eval(_with_commas(text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise InputError(f"{quoted(text)} is no list or object, in JSON, Python's or numpy's form.") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


_LITERAL = re.compile(
    r"""\s*(?:
    (?P<value>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])
    |\b(?:True|False|None|true|false|null)\b)
    |(?P<dtype>,\s*dtype=(?:\w+|'[<>|]?\w+'))
    |(?P<opening>(?:(?:np\.)?array|np\.\w+)\(|[\[({])|(?P<closing>[])}])|(?P<sign>[,:])
    )""",
    re.VERBOSE,
)
_CONSTANTS = {"true": "True", "false": "False", "null": "None"}


def _with_commas(text: str) -> str:
    """Converts a literal in numpy's form to Python's. Python itself would join the strings in `['a' 'b']`.

    Raises:
        ValueError: If the text is not a literal, or only some items of a list are separated by commas.
    """
    written, separators, place, ended = "", [{","}], 0, False
    while text[place:].strip():
        if not (match := _LITERAL.match(text, place)):
            raise ValueError(f"no literal at {place}")
        kind, part = match.lastgroup, match[match.lastgroup or 0]
        if ended and kind in ("value", "opening"):
            separators[-1].add(" ")
            written += ","
        if part == ",":
            separators[-1].add(part)
        if kind == "opening":
            separators.append(set() if part == "[" else {","})  # only the items of lists may lack commas
        if kind == "closing" and (len(separators) == 1 or len(separators.pop()) > 1):
            raise ValueError("commas or brackets are missing")
        written += {"opening": part[-1], "dtype": ""}.get(kind or "", _CONSTANTS.get(part, part))
        place, ended = match.end(), kind in ("value", "closing")
    if separators != [{","}]:
        raise ValueError("it is more than one value, or ends too soon")
    return written


def column(there: Collection[str], name: str | None, usual: Iterable[str]) -> str | None:
    """The column to use: the named one or, if `name` is None, the first usual one that exists; None if none exists.

    Raises:
        InputError: If the named column does not exist.
    """
    if name is None:
        return next((candidate for candidate in usual if candidate in there), None)
    if name not in there:
        raise InputError(f"There is no column {quoted(name)}; there are {listed(map(repr, there))}.")
    return name
