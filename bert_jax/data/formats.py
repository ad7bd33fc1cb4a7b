"""Parsers that convert the lines of text files to rows. Each row is a dict that maps column names to values."""

import ast
import bisect
import contextlib
import csv
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from bert_jax.errors import InputError, quoted

logger = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
"""The usual delimiters between the cells of a table."""
COMMENT = re.compile(r"# +(?:[\w.:-]+ *=|newdoc\b|newpar\b|(?P<id>id) )")
"""Matches the beginning of a comment in a CoNLL file. Any other line that begins with # contains a word."""

TEXT = ("text", "sentence", "sentence1", "question1", "premise", "question", "review", "content", "input_string")
"""Usual names of the text column. If several of these columns exist, the one that is listed first is used."""

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | InputError]]
"""The rows of a file, each preceded by its location (see `sources.Entry.line`).

A row that cannot be read is replaced with an error.
"""


class Table(NamedTuple):
    """Options for reading the lines of a table (CSV or TSV).

    Attributes:
        delimiter: The character between cells. None means a comma for CSV and a tab for TSV.
        quoting: With "minimal", a cell may be enclosed in double quotes. Within the quotes, delimiters and line breaks
            are part of the text, and two consecutive quotes represent one quote character. With "none", quotes are part
            of the text. None means "minimal" for CSV and "none" for TSV.
        columns: The names of the columns, if the file has no header line.
    """

    delimiter: str | None = None
    quoting: Literal["minimal", "none"] | None = None
    columns: tuple[str, ...] = ()


def decoded_lines(file: IO[str], undecodable: list[str]) -> Iterator[str]:
    """Yields the lines of a file. Each line that contains invalid UTF-8 is also appended to `undecodable`."""
    for line in file:
        try:
            line.encode()
        except UnicodeEncodeError:
            undecodable.append(line)
        yield line


def parse_jsonl(lines: Iterator[str]) -> Rows:
    """Parses JSON Lines. Each line is a JSON object that represents a row."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, InputError(f"not JSON ({error}); expected one object per line.")
        else:
            yield number, row if isinstance(row, dict) else InputError(f"{type(row).__name__}; expected a JSON object.")


def parse_json(lines: Iterator[str]) -> Rows:
    """Parses a JSON array of objects, or an object whose `data` field is such an array. Each object is a row."""
    try:
        rows = json.loads("".join(lines))
        rows = rows["data"] if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise TypeError(f"a {type(rows).__name__}")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        yield 1, InputError(f'expected an array of JSON objects, or an object whose "data" is one ({error}).')
        return
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else InputError(f"{type(row).__name__}; expected a JSON object.")


def parse_table(lines: Iterator[str], *, table: Table, sure: bool, path: Path | None) -> Rows:
    """Parses CSV or TSV. The first line contains the column names, unless `table` specifies them.

    Args:
        lines: The lines.
        table: The delimiter, the quoting style and, if there is no header line, the column names.
        sure: Whether the caller chose the delimiter. If false, the delimiter is the format's default.
        path: The file path to show in warnings. If None, no warnings are logged.
    """
    csv.field_size_limit(2**24)  # a field may contain a book; the default limit is 131,072 characters
    record: list[str] = []  # the lines that the reader has read for the current row

    def noted() -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    delimiter: Any = table.delimiter
    quotes = table.quoting == "minimal"
    reader = csv.reader(
        noted(), strict=True, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    )
    names = list(table.columns)
    source = "the list of columns" if names else "the header"
    first, quoted_cells = True, False
    while True:
        begin = reader.line_num + 1
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end, quote = reader.line_num, begin + _last_quote(record)
            where = f" in lines {begin} to {end}; the last quote opens in line {quote}" if end > begin else ""
            for line in range(begin, end + 1):
                yield line, InputError(f"{error}{where}.")
            if not names:
                return
            continue
        if path and not quotes and not quoted_cells and any(re.fullmatch('".+"', field) for field in fields):
            quoted_cells = True
            logger.warning(
                "%s: in line %d, a cell begins and ends with a quote, and both quotes are read as text. If quotes "
                "enclose cells in this file, set quoting to minimal.",
                path, begin,
            )  # fmt: skip
        if not fields:
            continue
        if first and (problem := _misfit(fields, names, None if sure else delimiter)):
            yield begin, InputError(problem)
            return
        if first and not names:
            names = fields
        elif len(fields) != len(names):
            hint = " If cells are in quotes, set quoting to minimal." if not quotes and '"' in record[0] else ""
            yield begin, InputError(f"the number of fields is {len(fields)}; {source} has {len(names)}.{hint}")
        else:
            yield begin, dict(zip(names, fields, strict=True))
        first = False


def _misfit(fields: list[str], names: list[str], delimiter: str | None) -> str:
    """Returns a description of the problem with the first line of a table, or an empty string if there is no problem.

    Args:
        fields: The cells of the first line.
        names: The column names that the caller specified; empty if the first line should contain them.
        delimiter: The format's default delimiter; None if the caller chose a delimiter.
    """
    others = [character for character in DELIMITERS if character != delimiter and character in fields[0]]
    if delimiter and len(fields) == 1 and others and len(names) != 1:
        return (
            f"the delimiter {delimiter!r} does not split the first line, {quoted(fields[0])}. Set the delimiter, for "
            f"example to {others[0]!r}; if there is only one column, set it to {delimiter!r}."
        )
    if names and fields == names:
        return "the first line already has the names of the columns; do not set the columns."
    wrong = [name for n, name in enumerate(fields) if name in fields[:n] or re.search("[\ud800-\udfff]", name)]
    if wrong and not names:  # if a name is not UTF-8 text, `entries` yields a different error instead
        return f"the header has {quoted(wrong[0])} twice. If the file has no header, set the columns."
    return ""


def _last_quote(record: list[str]) -> int:
    """Returns the index of the line that contains the last opening quote. `record` contains the lines of a row."""
    # An opening quote is at the beginning of the row or follows a comma, a line break or another quote.
    openings = [match.start() for match in re.finditer(r'(?<![^,\n"])"[^"]*"?', "".join(record))]
    return bisect.bisect(list(itertools.accumulate(map(len, record))), max(openings, default=0))


def parse_text(lines: Iterator[str]) -> Rows:
    """Parses plain text. Each line becomes the `text` column of one row."""
    for number, line in enumerate(lines, 1):
        yield number, {"text": line.rstrip("\r\n")}


def parse_text_and_label(lines: Iterator[str]) -> Rows:
    """Parses lines of the form `text;label`. Each line is a row. A header in the first line is skipped."""
    for number, line in enumerate(lines, 1):
        text, semicolon, label = line.strip().rpartition(";")
        if not line.strip() or (number == 1 and text.strip().lower() in TEXT):
            continue
        yield number, {"text": text, "label": label} if semicolon else InputError("no semicolon; expected text;label.")


def parse_conll(lines: Iterator[str]) -> Rows:
    """Parses CoNLL. Each line contains a word in the first column and the word's tag in the last column.

    A blank line ends a row. Each row has the columns `tokens` and `tags`.
    """
    words: list[list[str]] = []  # the columns of each word in the row
    columns, wrong = 0, ""
    ambiguous: set[int] = set()  # column counts of lines that may be comments
    for number, line in enumerate(itertools.chain(lines, [""]), 1):
        fields = [field.strip() for field in line.split("\t" if "\t" in line.strip() else " ") if field.strip()]
        if not words and (comment := COMMENT.match(line)):
            if comment["id"]:  # `# id O` may also be the word "#" and its other columns
                ambiguous.add(len(fields))
            continue
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2 or len(fields) != (columns or len(fields)):
                wrong = wrong or f"{len(fields)} columns in line {number}; expected {columns or 'a word and its tag'}."
            columns = columns or len(fields)
            if columns in ambiguous:
                wrong = f"a line before line {number} may be a comment, `# id …`, or a word; remove or change it."
            words.append(fields)
        elif words:
            row: Row = {"tokens": [word[0] for word in words], "tags": [word[-1] for word in words]}
            yield number, InputError(wrong) if wrong else row
            words, wrong, ambiguous = [], "", set()


def parse_squad(lines: Iterator[str]) -> Rows:
    """Parses JSON in the SQuAD format, or a JSON array of SQuAD articles. Each question is a row."""
    try:
        content = json.loads("".join(lines))
        rows = [
            {"id": question["id"], "question": question["question"], "context": paragraph["context"],
             "answers": question.get("answers"), "is_impossible": question.get("is_impossible")}
            for article in (content["data"] if isinstance(content, dict) else content)
            for paragraph in article["paragraphs"] for question in paragraph["qas"]
        ]  # fmt: skip
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        yield 1, InputError(f"not SQuAD's JSON ({type(error).__name__}: {error}).")
    else:
        yield from enumerate(rows, 1)


PARSERS: dict[str, Callable[[Iterator[str]], Rows]] = {
    "jsonl": parse_jsonl,
    "json": parse_json,
    "text": parse_text,
    "text;label": parse_text_and_label,
    "conll": parse_conll,
    "squad": parse_squad,
}
"""Maps each format to the function that parses the lines of a file. For tables, use `parse_table` instead."""


def literal(text: str) -> Any:
    """Parses a table cell that contains a list or an object in JSON, Python or NumPy notation.

    For an empty cell, the result is an empty list.

    Raises:
        InputError: If the cell cannot be parsed in any of these notations.
    """
    if not text.strip():
        return []
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text, parse_constant=ast.literal_eval)  # `literal_eval` rejects NaN and Infinity
    try:
        return ast.literal_eval(_with_commas(text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise InputError(f"{quoted(text)} is not a list or object as JSON, Python or numpy writes it.") from None


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
    """Converts NumPy notation to a Python literal by adding the commas that NumPy omits.

    Without the added commas, Python would join the strings in `['a' 'b']`.

    Raises:
        ValueError: If the text is not a literal, or if only some items of a list are separated by commas.
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
            # For each open bracket, `separators` contains the set of separators found in it so far. If a set contains
            # both a comma and a space, the error below is raised. Only list items may be separated by spaces, so
            # the set for any other bracket initially contains a comma.
            separators.append(set() if part == "[" else {","})
        if kind == "closing" and (len(separators) == 1 or len(separators.pop()) > 1):
            raise ValueError("commas or brackets are missing")
        written += {"opening": part[-1], "dtype": ""}.get(kind or "", _CONSTANTS.get(part, part))
        place, ended = match.end(), kind in ("value", "closing")
    if separators != [{","}]:
        raise ValueError("it is more than one value, or ends too soon")
    return written
