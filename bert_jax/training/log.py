"""Writes a run's metrics to a journal and to loggers, and shows its progress on a console."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bert_jax import tree

METRICS = "metrics.jsonl"


def in_words(metrics: Mapping[str, Any]) -> str:
    """Formats the float metrics on one line. If `f1_label` is, for example, "yes", `f1` is shown as "f1 of yes"."""
    names = {"f1": f"f1 of {metrics['f1_label']}"} if "f1_label" in metrics else {}
    return "  ".join(f"{names.get(name, name)} {x:.4f}" for name, x in metrics.items() if isinstance(x, float))


class Logger(Protocol):
    """The interface of a logger. Any object with such a `write` method can receive the metrics of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Receives a set of values for a step.

        A step may have two sets of values, which are passed in separate calls. One set contains the metrics of an
        evaluation, such as `validation/accuracy`. The other contains the means of training metrics, such as `loss`.
        These means cover the steps since the previous set of means.

        Args:
            step: Number of completed steps.
            values: The values, keyed by name. Slashes separate the parts of a name.
        """


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the floats in a possibly nested dict as a flat dict for a `Logger`."""
    return {name.replace(".", "/"): x for name, x in tree.flatten(values).items() if isinstance(x, float)}


class Journal:
    """Writes the metrics of a run's steps as JSON lines and forwards them to loggers.

    Args:
        folder: The run's folder; if None, no file is written.
        start: Number of steps already completed. If an existing `metrics.jsonl` file contains lines for later steps,
            these lines are dropped, because the steps are computed again.
        loggers: Objects that receive the float metrics.
    """

    def __init__(self, folder: Path | None, start: int, loggers: Sequence[Logger]):
        self._loggers, self._file = loggers, None
        if folder:
            path = folder / METRICS
            # A run that starts from the beginning keeps no lines, because the initial model is evaluated again.
            kept = [json.dumps(line) + "\n" for line in read_journal(path) if start and line["step"] <= start]
            path.write_text("".join(kept), encoding="utf-8")
            self._file = path.open(
                "a", buffering=1, encoding="utf-8"
            )  # line-buffered: each line is written immediately

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values of a step. `values` may contain nested dicts."""
        if self._file:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        for logger in self._loggers:
            logger.write(step, scalars(values))

    def close(self) -> None:
        """Closes the file. The loggers stay open; the code that opened them must close them."""
        if self._file:
            self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl` file. Skips invalid lines, such as a partial line from a killed process."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def progress_bar(console: Console, start: int, steps: int) -> Iterator[Callable[[int, str | None], None]]:
    """Shows a progress bar.

    Yields a function that sets the number of completed steps and the text next to the bar. If the text is None, the
    previous text remains.
    """
    with Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=steps, completed=start, text="")

        def show(step: int, text: str | None) -> None:
            fields: dict[str, Any] = {} if text is None else {"text": text}
            bar.update(task, completed=step, **fields)

        yield show
