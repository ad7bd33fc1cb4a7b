"""Makes predictions for the rows of files, in order and in constant memory. A killed run can be resumed.

In addition to the output file, called `OUT` below, a run writes up to three files next to it. `OUT.partial` contains
the rows predicted so far and is removed at the end of the run. `OUT.run.json` identifies the run and records its
progress. `OUT.rejected.jsonl` contains the rows that could not be used, if there are any.
"""

import contextlib
import csv
import fcntl
import functools
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bert_jax import tree
from bert_jax.data import sources
from bert_jax.data.formats import Row, Table, literal
from bert_jax.errors import InputError, check_extra, listed, quoted
from bert_jax.inference.catalog import jsonable
from bert_jax.inference.pipelines import READ_AHEAD, Pipeline
from bert_jax.tasks.base import Request, Task

WHOLE = 2**28
"""The maximum size, in bytes, of a file that is hashed in full. Hashing such a file takes at most 0.6 s.

For a larger file, only `SAMPLES` blocks of `BLOCK` bytes are hashed, which takes 0.2 s.
"""
SAMPLES, BLOCK = 64, 2**20
PREDICTION = "prediction"
"""Name of the column that is added to each row."""
OUTPUTS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class Counts:
    """The numbers of predicted and rejected rows."""

    predicted: int
    rejected: int


def predict_files(
    pipe: Pipeline[Task],
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str,
    columns: tuple[str, ...] = (),
    format: str | None = None,
    table: Table = Table(),  # noqa: B008
    shard: tuple[int, int] = (1, 1),
    parameters: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Counts:
    """Makes a prediction for each row of the input files and writes each row with its prediction to the output.

    If a run is interrupted, repeating the call with the same arguments resumes it. A row whose input cannot be used is
    written to `{output}.rejected.jsonl` with the reason, and the run continues.

    Args:
        pipe: The pipeline that makes the predictions.
        inputs: Files or folders in the formats that `sources.entries` reads.
        output: The output file. Its name determines the format: JSONL or CSV (both optionally gzipped), or Parquet.
        model: The name of the model. The run records this name and a hash of the weights and the tokenizer. The run can
            be resumed only with the same model.
        columns: The columns that form an input: one column, two columns for a pair, or the columns of a context and its
            choices. The default is the first tuple in the task's `columns_of_input` whose columns all exist in the row.
        format: The format of the inputs. If None, the format is inferred from each file's name, and a `.txt` file is
            read as one text per line.
        table: Options for reading tabular inputs.
        shard: A pair (i, n) that selects every n-th row, starting with the i-th. Rows are counted from 1.
        parameters: The task's parameters.
        console: The console for a progress bar; None for no progress bar.

    Raises:
        InputError: If a file cannot be read or written, if an argument is invalid, if none of the first 100 rows of a
            file can be used, or if the output belongs to another run.
    """
    output, paths = Path(output), [Path(path) for path in inputs]
    if not output.name.endswith(OUTPUTS):
        raise InputError(f"{output}: expected a name that ends in {', '.join(OUTPUTS)}.")
    if output.suffix == ".parquet":
        check_extra("data", "pyarrow")
    parameters = dict(parameters or {})
    try:
        files = [(str(path), _size(path), _digest(path)) for path in paths]
    except OSError as error:
        raise InputError(f"Cannot read {error.filename}: {error.strerror}.") from None
    try:
        # Conversion to JSON and back turns tuples into lists. `run` can then be compared with the journal.
        run = json.loads(json.dumps({
            "task": pipe.task.name, "model": model, "dtype": pipe.dtype,
            "inputs": files, "columns": columns, "format": format, "table": table, "shard": shard,
            "parameters": parameters, "weights": _weights_digest(pipe),
        }))  # fmt: skip
    except TypeError as error:
        raise InputError(f"A parameter is not a number, text or list: {error}.") from None
    check_request(pipe, columns, parameters)  # before anything is written
    request = functools.partial(pipe.request, parameters=parameters)
    candidates = [columns] if columns else pipe.task.columns_of_input
    flat = not output.name.endswith(OUTPUTS[:2])
    for path in paths:
        begin = sources.entries(path, format, labeled=False, table=table, warn=False)  # the later read warns
        first = ((path, 0, entry) for entry in islice(begin, 100))
        window = _window(lambda entry: entry, first, candidates, flat)
        if window and not window.requests:
            raise InputError(f"{path}: {window.rejected[0]['reason']}")
    entries = (
        (path, before, entry)
        for path, before in zip(paths, accumulate((size for _, size, _ in files), initial=0), strict=False)
        for entry in sources.entries(path, format, labeled=False, table=table)
    )
    try:
        journal = _Journal.opened(output, run)
        if not journal.complete:
            rest = islice(entries, shard[0] - 1 + shard[1] * journal.read, None, shard[1])
            windows = iter(lambda: _window(request, islice(rest, pipe.read_ahead), candidates, flat), None)
            _predict(pipe, windows, journal, console)
            journal.complete = True
            journal.commit()
        if journal.partial.exists():
            _convert(journal.partial, output)
            journal.partial.unlink(missing_ok=True)
        elif not output.exists():
            raise InputError(f"{output} was complete but is missing. Remove {journal.path} to start again.")
    except OSError as error:
        raise InputError(f"Cannot write {error.filename or output}: {error.strerror}.") from None
    return Counts(journal.predicted, journal.read - journal.predicted)


def check_request(pipe: Pipeline[Task], columns: tuple[str, ...], parameters: Mapping[str, Any]) -> Request[Any]:
    """Checks the columns and parameters, and returns a request made from the task's example.

    Raises:
        InputError: If the columns or parameters are invalid for every row.
    """
    sizes = sorted({len(names) for names in pipe.task.columns_of_input})
    if columns and len(columns) not in sizes:
        raise InputError(f"There are {len(columns)} columns; {pipe.task.name} expects {' or '.join(map(str, sizes))}.")
    return pipe.request(pipe.task.example, parameters)


@dataclass
class _Journal:
    """The contents of `OUT.run.json`: the data that identifies a run, and the run's progress.

    A resumed run truncates `OUT.partial` and `OUT.rejected.jsonl` to the recorded sizes, so no row is lost or repeated.
    """

    output: Path
    run: dict[str, Any]
    read: int = 0
    predicted: int = 0
    partial_bytes: int = 0
    rejected_bytes: int = 0
    complete: bool = False

    @property
    def partial(self) -> Path:
        return Path(f"{self.output}.partial")

    @property
    def path(self) -> Path:
        return Path(f"{self.output}.run.json")

    @classmethod
    def opened(cls, output: Path, run: dict[str, Any]) -> "_Journal":
        journal = cls(output, run)
        try:
            journal = cls(**json.loads(journal.path.read_text(encoding="utf-8")) | {"output": output})
            differences = [_difference(key, journal.run[key], run[key]) for key in run if journal.run[key] != run[key]]
        except FileNotFoundError:
            if output.exists():
                raise InputError(f"{output} exists, and there is no run to resume. Use another output.") from None
            journal.path.parent.mkdir(parents=True, exist_ok=True)
            journal.commit()
            return journal
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{journal.path} is damaged or outdated. Remove it and the output.") from None
        if differences:
            raise InputError(f"{output} belongs to another run ({'; '.join(differences)}). Use another output.")
        return journal

    def commit(self) -> None:
        with _replacing(self.path) as staged:
            staged.write_text(json.dumps(vars(self) | {"output": self.output.name}, indent=1), encoding="utf-8")


def _difference(key: str, before: Any, now: Any) -> str:
    """Describes how an argument differs from the corresponding argument of the run to resume."""
    if key == "inputs":
        names = [[name for name, _, _ in files] for files in (before, now)]
        if names[0] == names[1]:
            changed = (new[0] for old, new in zip(before, now, strict=True) if old != new)
            return f"the content of {listed(changed)} has changed"
        before, now = names
    if key == "weights":
        return "the weights or the tokenizer of the model have changed"
    return f"{key}: {quoted(before)}, now {quoted(now)}"


@dataclass
class _Window:
    """Rows that are predicted together, and rejected rows with the reasons for their rejection."""

    position: int
    rows: list[Row]
    requests: list[Request[Any]]
    rejected: list[dict[str, Any]]


def _predict(pipe: Pipeline[Task], windows: Iterator[_Window], journal: _Journal, console: Console | None) -> None:
    began = journal.read
    columns = BarColumn(), TextColumn("{task.percentage:.0f}% {task.fields[rate]}"), TimeRemainingColumn()
    with (
        Progress(*columns, console=console or Console(quiet=True), disable=console is None, transient=True) as progress,
        open(journal.partial, "ab") as partial,
        open(f"{journal.output}.rejected.jsonl", "ab") as rejected,
        ThreadPoolExecutor(1) as ahead,  # while one window is computed, the next is read and tokenized
    ):
        try:
            # The lock is taken before the files are truncated, because another process may be writing them.
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{journal.output} is being written by another process.") from None
        for file, size in ((partial, journal.partial_bytes), (rejected, journal.rejected_bytes)):
            if file.tell() < size:
                raise InputError(f"{file.name} is shorter than recorded. Remove it and {journal.path} to start again.")
            file.truncate(size)
            file.seek(size)
        bar = progress.add_task("", total=sum(size for _, size, _ in journal.run["inputs"]), rate="")
        coming = ahead.submit(next, windows, None)
        while window := coming.result():
            coming = ahead.submit(next, windows, None)
            results = pipe.run(window.requests)
            predicted = zip(window.rows, results, strict=True)
            partial.writelines(_line(row | {PREDICTION: jsonable(result)}) for row, result in predicted)
            # Rejected rows may contain lone surrogates, which UTF-8 cannot encode. ASCII JSON escapes them.
            rejected.writelines(_line(row, ascii=True) for row in window.rejected)
            for file in (partial, rejected):
                file.flush()
                os.fsync(file.fileno())
            journal.read += len(results) + len(window.rejected)
            journal.predicted += len(results)
            journal.partial_bytes, journal.rejected_bytes = partial.tell(), rejected.tell()
            journal.commit()
            seconds = progress.tasks[bar].elapsed or 1e-9
            rate = f"{journal.read:,} rows, {(journal.read - began) / seconds:,.0f} a second"
            progress.update(bar, completed=window.position, rate=rate)
    if not journal.rejected_bytes:
        Path(rejected.name).unlink()


def _window(
    request: Callable[[Any], Any],
    entries: Iterator[tuple[Path, int, sources.Entry]],
    candidates: Sequence[tuple[str, ...]],
    flat: bool,
) -> _Window | None:
    window = _Window(0, [], [], [])
    for path, before, (line, row, position) in entries:
        window.position = before + position
        try:
            if isinstance(row, InputError):
                raise row
            if taken := [name for name in row if name == PREDICTION or (flat and name.startswith(f"{PREDICTION}_"))]:
                raise InputError(f"there is already a column {quoted(taken[0])}; rename it.")
            _line(row)  # raises an error if the row cannot be written
            window.requests.append(request(input_of(row, candidates)))
            window.rows.append(row)
        except InputError as error:
            content = {} if isinstance(row, InputError) else {"row": row}
            window.rejected.append({"file": str(path), "line": line, "reason": str(error), **content})
    return window if window.requests or window.rejected else None


def _size(path: Path) -> int:
    """Returns the size of a file, or the total size of the text files in a folder, in bytes."""
    return sum(file.stat().st_size for file in path.rglob("*.txt")) if path.is_dir() else path.stat().st_size


def _weights_digest(pipe: Pipeline[Any]) -> str:
    """Returns a hash of a model's parameters and tokenizer. For BERT-base, computing the hash takes 0.4 s."""
    digest = hashlib.sha256(pipe.tokenizer.backend.to_str().encode())
    for path, leaf in sorted(tree.flatten(pipe.params).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """Returns the SHA-256 hash of the contents of a file, or of the names and contents of the text files in a folder.

    If a file has more than `WHOLE` bytes, only `SAMPLES` blocks, evenly spaced from the first to the last byte, are
    hashed.
    """
    if path.is_dir():
        content = "".join(f"{file.relative_to(path)}\0{_digest(file)}\0" for file in sorted(path.rglob("*.txt")))
        return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder. Save the input to a file: it is read several times.")
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for n in range(SAMPLES):
            file.seek((size - BLOCK) * n // (SAMPLES - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def input_of(row: Row, candidates: Sequence[tuple[str, ...]]) -> Any:
    """Returns a row's input for the task.

    Each candidate is a tuple of column names. The first candidate whose columns all exist in the row is used.
    """
    for names in candidates:
        if all(name in row for name in names):
            cells = [row[name] for name in names]
            if names in (("tokens",), ("words",)) and isinstance(cells[0], str):  # CSV files contain lists as strings
                cells[0] = literal(cells[0])
            values = tuple(tuple(cell) if isinstance(cell, list) else cell for cell in cells)
            return values if len(names) > 1 else values[0]
    wanted = " or ".join(" and ".join(map(repr, names)) for names in sorted(candidates, key=len)[:3])
    raise InputError(f"there is no column {wanted}; the columns are {listed(map(repr, row))}.")


def _line(row: Mapping[str, Any], *, ascii: bool = False) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=ascii, default=str) + "\n").encode()
    except UnicodeEncodeError:
        raise InputError("the row holds lone surrogates, like \\udc80, which are not valid characters.") from None


def _convert(partial: Path, output: Path) -> None:
    """Writes the rows in the format determined by the output file's name. The file appears only when it is complete."""
    if output.suffix == ".jsonl":
        os.replace(partial, output)
        return
    opened: Any = gzip.open if output.suffix == ".gz" else open
    with _replacing(output) as staged, open(partial, "rb") as rows:
        if output.name.endswith(".jsonl.gz"):
            with opened(staged, "wb") as file:
                shutil.copyfileobj(rows, file)
        else:
            # The rows are read twice, because the columns and their types are known only after the last row.
            kinds: dict[str, set[type]] = {}
            for row in map(flat, map(json.loads, rows)):
                for name, value in row.items():
                    kind = str if isinstance(value, int) and abs(value) >= 2**63 else type(value)
                    kinds.setdefault(name, set()).add(kind)
            rows.seek(0)
            if output.suffix == ".parquet":
                _write_parquet(map(flat, map(json.loads, rows)), kinds, staged)
            else:
                with opened(staged, "wt", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, list(kinds))
                    writer.writeheader()
                    writer.writerows(map(flat, map(json.loads, rows)))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `path` after the `with` block. `path` is never incomplete."""
    staged = Path(f"{path}.new")
    yield staged
    with open(staged, "rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, path)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Converts a row with its prediction to a table row, in which no value is a list or an object.

    A prediction that is an object, such as `{label, score}`, becomes one column per field. Lists and all other objects
    become JSON strings.
    """
    if isinstance(row[PREDICTION], dict):
        fields = {f"{PREDICTION}_{name}": value for name, value in row[PREDICTION].items()}
        row = {name: value for name, value in row.items() if name != PREDICTION} | fields
    return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}


def _write_parquet(rows: Iterator[dict[str, Any]], kinds: Mapping[str, set[type]], path: Path) -> None:
    import pyarrow.parquet

    types = {}
    for name, found in kinds.items():
        found = found - {type(None)}
        types[name] = found.pop() if len(found) == 1 else float if found == {int, float} else str
    numbers = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema({name: numbers.get(kind, pyarrow.string()) for name, kind in types.items()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, READ_AHEAD)):
            for row in chunk:
                for name, value in row.items():
                    if value is not None and type(value) is not types[name]:
                        row[name] = float(value) if types[name] is float else json.dumps(value)
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))
