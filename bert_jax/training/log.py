"""What a run reports: the metrics of its steps in a journal and in TensorBoard, and its progress on a console."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bert_jax import tree

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


def in_words(metrics: Mapping[str, Any]) -> str:
    """Formats the float metrics on one line. If there is an `f1_label`, such as "yes", `f1` is named "f1 of yes"."""
    names = {"f1": f"f1 of {metrics['f1_label']}"} if "f1_label" in metrics else {}
    return "  ".join(f"{names.get(name, name)} {x:.4f}" for name, x in metrics.items() if isinstance(x, float))


class Journal:
    """Writes the metrics of the steps of a run, as lines of JSON and as TensorBoard events.

    Args:
        folder: The folder of the run.
        start: Number of steps already done. If `metrics.jsonl` has lines of later steps, these lines are dropped,
            because the steps are computed again.
        tensorboard: Whether to write TensorBoard events.
    """

    def __init__(self, folder: Path, start: int, *, tensorboard: bool):
        path = folder / METRICS
        kept = [json.dumps(line) + "\n" for line in read_journal(path) if line["step"] <= start]
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered: each line is written immediately
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values of a step. `values` may contain nested dicts. TensorBoard gets only the floats."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events:
            for name, value in tree.flatten(values).items():
                if isinstance(value, float):
                    self._events.add_scalar(name.replace(".", "/"), value, step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events:
            self._events.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl`. Drops invalid lines, such as one that a killed process did not finish."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def progress_bar(console: Console, start: int, steps: int) -> Iterator[Callable[[int, str | None], None]]:
    """Shows a progress bar.

    Yields a function that sets the number of steps done and the text beside the bar; if the text is None, the previous
    text stays.
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
