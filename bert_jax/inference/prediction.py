"""Files -> predictions: row by row, in order, in constant memory, with resume after a kill.

A run writes these files next to the output. `….partial` has the rows so far and is removed at the end. `….run.json`
identifies the run and records its progress. `….rejected.jsonl` has the rows that could not be used, if any.
"""

import csv
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bert_jax.data import sources
from bert_jax.errors import InputError, listed, quoted
from bert_jax.inference.catalogue import jsonable
from bert_jax.inference.pipelines import READ_AHEAD, Pipeline
from bert_jax.tasks.base import Request, Task

WHOLE = 2**28
"""Bytes up to which an input is hashed completely (0.6 s). If it is larger, `SAMPLES` blocks are hashed (0.2 s)."""
SAMPLES, BLOCK = 64, 2**20
PREDICTION = "prediction"
"""The column that is added to each row."""
OUTPUTS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class Counts:
    """How many rows were predicted, and how many were rejected."""

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
    shard: tuple[int, int] = (1, 1),
    parameters: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Counts:
    """Predicts each row of the input files and writes the row, with its prediction, to the output.

    After a kill, the same call resumes. A row with an unusable input is written to `….rejected.jsonl` with the reason,
    and the run continues.

    Args:
        pipe: The pipeline that predicts.
        inputs: Files that `sources.entries` reads.
        output: The output file. Its name gives the format: JSONL or CSV, both optionally gzipped, or Parquet.
        model: Name of the model; a run that resumes must have the same name.
        columns: The columns that make up an input: one, or two for a pair. By default, the usual names.
        format: Format of the inputs. By default it follows from their names; .txt has one text per line.
        shard: (i, n): every n-th row, starting with the i-th, counted from 1.
        parameters: The parameters of the task.
        console: Shows progress.

    Raises:
        InputError: If a file cannot be read or written, a table lacks the column, or the output belongs to another run.
    """
    output, paths = Path(output), [Path(path) for path in inputs]
    if not output.name.endswith(OUTPUTS):
        raise InputError(f"{output}: expected a name that ends in {', '.join(OUTPUTS)}.")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("Parquet needs pyarrow: pip install 'bert-jax[data]'.")
    parameters = dict(parameters or {})
    try:
        sizes = [_size(path) for path in paths]
        files = [[str(path), size, _digest(path)] for path, size in zip(paths, sizes, strict=True)]
    except OSError as error:
        raise InputError(f"Cannot read {error.filename}: {error.strerror}.") from None
    run: dict[str, Any] = {
        "task": pipe.task.name, "model": model, "inputs": files, "columns": columns, "format": format, "shard": shard,
        "parameters": parameters,
    }  # fmt: skip
    try:
        run = json.loads(json.dumps(run))  # the form in which the journal is read back
    except TypeError as error:
        raise InputError(f"a parameter is no number, text or list: {error}.") from None
    usual = pipe.task.columns_of_input
    candidates = [columns] if columns else usual
    # Errors that would reject all rows are raised before anything is written.
    pair = all(len(names) == 2 for names in usual)
    if columns and len(columns) not in {len(names) for names in usual}:
        raise InputError(f"{len(columns)} columns; {pipe.task.name} takes {'two' if pair else 'one'}.")
    example = f"a {pipe.tokenizer.mask_token}"
    pipe.request((example, example) if pair else example, parameters)
    table = not output.name.endswith(OUTPUTS[:2])
    for path in paths:
        tried = [
            _usable(row, candidates, table) for _, row, _ in islice(sources.entries(path, format, labelled=False), 100)
        ]
        if tried and all(tried):
            raise InputError(f"{path}: {tried[0]}")
    try:
        journal = _Journal.opened(output, run)
        if not journal.complete:
            with _progress(console, sum(sizes)) as progress:
                bar = progress.add_task("", total=sum(sizes), rate="")
                rows = _entries(paths, format, shard)
                for _ in islice(rows, journal.read):
                    pass
                next_window = functools.partial(_window, pipe, rows, candidates, parameters, table)
                _predict(pipe, next_window, journal, progress, bar)
            journal.complete = True
            journal.commit()
        if journal.partial.exists():
            _convert(journal.partial, output)
            journal.partial.unlink(missing_ok=True)
        elif not output.exists():
            raise InputError(f"{output} was finished and is gone. Remove {journal.path} to begin anew.")
    except OSError as error:
        raise InputError(f"Cannot write {error.filename or output}: {error.strerror}.") from None
    return Counts(journal.predicted, journal.read - journal.predicted)


@dataclass
class _Journal:
    """The progress of a run. A resume truncates both files to the recorded sizes, so no row is lost or repeated."""

    output: Path
    run: dict[str, Any]
    read: int = 0
    predicted: int = 0
    partial_bytes: int = 0
    rejected_bytes: int = 0
    complete: bool = False

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def rejected(self) -> Path:
        return self.output.with_name(self.output.name + ".rejected.jsonl")

    @property
    def path(self) -> Path:
        return self.output.with_name(self.output.name + ".run.json")

    @classmethod
    def opened(cls, output: Path, run: dict[str, Any]) -> "_Journal":
        journal = cls(output, run)
        try:
            before = json.loads(journal.path.read_text(encoding="utf-8"))
            before, journal = dict(before["run"]), cls(**before | {"output": output})
        except FileNotFoundError:
            if output.exists():
                raise InputError(f"{output} is there already and of no run that could go on; take another.") from None
            journal.path.parent.mkdir(parents=True, exist_ok=True)
            journal.commit()
            before = run
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{journal.path} is damaged; remove it and begin anew.") from None
        inputs = before.get("inputs")
        if isinstance(inputs, list) and any(isinstance(entry, list) and len(entry) == 2 for entry in inputs):
            raise InputError(
                f"{journal.path} is of an earlier version, which noted no digest of the inputs, so that they may have "
                "changed since. Remove it, and what there is of the output, and begin anew."
            )
        if different := [key for key in run if before.get(key) != run[key]]:
            shown = "; ".join(_difference(key, before.get(key), run[key]) for key in different)
            raise InputError(f"{output} belongs to another run ({shown}). Take another output, or these arguments.")
        return journal

    def commit(self) -> None:
        staged = self.path.with_name(self.path.name + ".new")
        with open(staged, "w", encoding="utf-8") as file:
            json.dump(vars(self) | {"output": self.output.name}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, self.path)


def _difference(key: str, before: Any, now: Any) -> str:
    """Describes how an argument of a run has changed."""
    if key == "inputs" and isinstance(before, list):
        names = [[entry[0] for entry in files] for files in (before, now)]
        if names[0] == names[1]:
            changed = [new[0] for old, new in zip(before, now, strict=True) if old != new]
            return f"the content of {listed(changed)} has changed"
        before, now = names
    return f"{key}: {quoted(before)}, now {quoted(now)}"


@dataclass
class _Window:
    """Rows that are predicted together, and the rejected rows with their reasons."""

    read: int
    position: int
    rows: list[sources.Row]
    requests: list[Request[Any]]
    rejected: list[dict[str, Any]]


def _predict(
    pipe: Pipeline[Task], next_window: Callable[[], _Window | None], journal: _Journal, progress: Progress, bar: Any
) -> None:
    began = journal.read
    with (
        open(journal.partial, "ab") as partial,
        open(journal.rejected, "ab") as rejected,
        ThreadPoolExecutor(1) as ahead,  # while one window is computed, the next is read and tokenized
    ):
        try:
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before anything is truncated
        except OSError:
            raise InputError(f"{journal.output} is being written by another process.") from None
        for file, size in ((partial, journal.partial_bytes), (rejected, journal.rejected_bytes)):
            if file.tell() < size:
                raise InputError(f"{file.name} is shorter than it was; remove {journal.path} and it, and begin anew.")
            file.truncate(size)
            file.seek(size)
        coming = ahead.submit(next_window)
        while window := coming.result():
            coming = ahead.submit(next_window)
            results = pipe.run(window.requests)
            for row, result in zip(window.rows, results, strict=True):
                partial.write(_line(row | {PREDICTION: jsonable(result)}))
            for row in window.rejected:
                rejected.write(_line(row, ascii=True))  # ASCII can hold any content
            for file in (partial, rejected):
                file.flush()
                os.fsync(file.fileno())
            journal.read += window.read
            journal.predicted += len(results)
            journal.partial_bytes, journal.rejected_bytes = partial.tell(), rejected.tell()
            journal.commit()
            seconds = progress.tasks[bar].elapsed or 1e-9
            rate = f"{journal.read:,} rows, {(journal.read - began) / seconds:,.0f} a second"
            progress.update(bar, completed=window.position, rate=rate)
    if not journal.rejected_bytes:
        journal.rejected.unlink()


def _window(
    pipe: Pipeline[Task],
    entries: Iterator[tuple[Path, int, sources.Entry]],
    candidates: Sequence[tuple[str, ...]],
    parameters: dict[str, Any],
    table: bool,
) -> _Window | None:
    window = _Window(0, 0, [], [], [])
    for path, before, (line, row, position) in islice(entries, READ_AHEAD):
        window.read += 1
        window.position = before + position
        try:
            if problem := _usable(row, candidates, table):
                raise problem
            assert not isinstance(row, InputError)
            request = pipe.request(_input(row, candidates), parameters)
        except InputError as error:
            content = {} if isinstance(row, InputError) else {"row": row}
            window.rejected.append({"file": str(path), "line": line, "reason": str(error), **content})
        else:
            window.rows.append(row)
            window.requests.append(request)
    return window if window.read else None


def _entries(
    paths: Sequence[Path], format: str | None, shard: tuple[int, int]
) -> Iterator[tuple[Path, int, sources.Entry]]:
    """The rows of all files, each with its file and the total size of the preceding files in bytes."""

    def every() -> Iterator[tuple[Path, int, sources.Entry]]:
        before = 0
        for path in paths:
            for entry in sources.entries(path, format, labelled=False):
                yield path, before, entry
            before += _size(path)

    return islice(every(), shard[0] - 1, None, shard[1])


def _size(path: Path) -> int:
    """Size of a file, or of the texts in a folder, in bytes."""
    return sum(file.stat().st_size for file in path.rglob("*.txt")) if path.is_dir() else path.stat().st_size


def _digest(path: Path) -> str:
    """SHA-256 of the content of a file, or of the texts in a folder and their names.

    If a file has more than `WHOLE` bytes, only `SAMPLES` blocks are hashed, evenly spread from first to last byte.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            digest.update(f"{file.relative_to(path)}\0{_digest(file)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder; an input is read more than once.")
    size = path.stat().st_size
    with open(path, "rb") as content:
        if size <= WHOLE:
            return hashlib.file_digest(content, "sha256").hexdigest()
        for n in range(SAMPLES):
            content.seek((size - BLOCK) * n // (SAMPLES - 1))
            digest.update(content.read(BLOCK))
    return digest.hexdigest()


def _usable(row: sources.Row | InputError, candidates: Sequence[tuple[str, ...]], table: bool) -> InputError | None:
    """What makes a row unusable before its input is examined; None if it is usable."""
    try:
        if isinstance(row, InputError):
            return row
        taken = [name for name in row if name == PREDICTION or (table and name.startswith(f"{PREDICTION}_"))]
        if taken:
            return InputError(f"there is a column {quoted(taken[0])} already.")
        _line(row)
        _input(row, candidates)
    except UnicodeEncodeError:
        return InputError("it holds lone surrogates, like \\udc80, which are not valid characters.")
    except InputError as error:
        return error
    return None


def _input(row: sources.Row, candidates: Sequence[tuple[str, ...]]) -> Any:
    """The task's input in a row, read from the first candidate columns that the row has."""
    for names in candidates:
        if all(name in row for name in names):
            cells = [row[name] for name in names]
            if names == ("tokens",) and isinstance(cells[0], str):  # a list written as text, as in tables
                cells[0] = sources.literal(cells[0])
            values = tuple(tuple(cell) if isinstance(cell, list) else cell for cell in cells)
            return values if len(names) > 1 else values[0]
    wanted = " or ".join(" and ".join(map(repr, names)) for names in sorted(candidates, key=len)[:3])
    raise InputError(f"there is no column {wanted}; there are {listed(map(repr, row))}.")


def _line(row: Mapping[str, Any], *, ascii: bool = False) -> bytes:
    return (json.dumps(row, ensure_ascii=ascii, default=str) + "\n").encode()


def _progress(console: Console | None, total: int) -> Progress:
    return Progress(
        BarColumn(), TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        console=console or Console(quiet=True), disable=console is None, transient=True,
    )  # fmt: skip


def _convert(partial: Path, output: Path) -> None:
    """Writes the rows in the format of the output's name. The output appears only when it is complete."""
    if output.suffix == ".jsonl":
        os.replace(partial, output)
        return
    staged = output.with_name(output.name + ".new")
    opened: Any = gzip.open if output.suffix == ".gz" else open
    with open(partial, "rb") as rows:
        if ".jsonl" in output.suffixes:
            with opened(staged, "wb") as file:
                shutil.copyfileobj(rows, file)
        else:
            # Two passes over the rows: the columns and their types are known only after the last row.
            kinds: dict[str, set[type]] = {}
            for row in map(_flat, rows):
                for name, value in row.items():
                    kind = str if isinstance(value, int) and abs(value) >= 2**63 else type(value)
                    kinds.setdefault(name, set()).add(kind)
            rows.seek(0)
            if output.suffix == ".parquet":
                _write_parquet(map(_flat, rows), kinds, staged)
            else:
                with opened(staged, "wt", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, list(kinds))
                    writer.writeheader()
                    writer.writerows(map(_flat, rows))
    with open(staged, "rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, output)


def _flat(line: bytes) -> dict[str, Any]:
    """A row of a table: `{label, score}` becomes two columns, and lists and objects are written as JSON."""
    row = json.loads(line)
    prediction = row.pop(PREDICTION)
    parts = prediction if isinstance(prediction, dict) else {"": prediction}
    row |= {f"{PREDICTION}_{name}".rstrip("_"): value for name, value in parts.items()}
    return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}


def _write_parquet(rows: Iterator[dict[str, Any]], kinds: Mapping[str, set[type]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    fields = {}
    for name, found in kinds.items():
        found = found - {type(None)}
        numbers = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
        one = next(iter(found)) if len(found) == 1 else float if found == {int, float} else str
        fields[name] = numbers.get(one, pyarrow.string())
    schema = pyarrow.schema(fields)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, READ_AHEAD)):
            for row in chunk:
                for name, value in row.items():
                    if fields[name] == pyarrow.string() and value is not None:
                        row[name] = value if isinstance(value, str) else json.dumps(value)
                    elif fields[name] == pyarrow.float64() and value is not None:
                        row[name] = float(value)
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))
