"""Loggers that send the metrics of a run to TensorBoard, Weights & Biases, MLflow or Trackio.

For example::

    with loggers.opened(["wandb"], folder, {"learning_rate": 2e-5}) as opened:
        bert_jax.train(model, task, examples, optimizer, steps=500, folder=folder, loggers=opened)
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from bert_jax.errors import InputError
from bert_jax.training.log import METRICS, Logger, read_journal, scalars

logger = logging.getLogger(__name__)

TENSORBOARD, IDS, PROJECT = "tensorboard", "loggers.json", "bert-jax"
BATCH, LONGEST_NAME = 100, 250
"""Maximum number of parameters or metrics in a request to MLflow, and maximum length of a name in characters."""

Value = TypeVar("Value")


class OpenLogger(Logger, Protocol):
    """A logger that must be closed.

    Attributes:
        id: The run's id in the logger's service. When training resumes, the logger passes this id to the service to
            continue the same run.
    """

    id: str

    def close(self, *, failed: bool) -> None:
        """Sends the remaining values and marks the run as finished or failed."""


class TensorBoard:
    """Writes event files to the `tensorboard` subfolder of a run's folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], id: str | None):
        self.id, self._folder = "", str(folder / TENSORBOARD)
        self._events: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step. The first call makes TensorBoard drop existing events from this step onward."""
        from tensorboardX import SummaryWriter

        self._events = self._events or SummaryWriter(self._folder, purge_step=step)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the event file."""
        if self._events:
            self._events.close()


class WandB:
    """Sends the metrics to a Weights & Biases run.

    The project is `bert-jax`, unless the environment variable `WANDB_PROJECT` names another project. Local files are
    written to the `wandb` subfolder of the run's folder, unless the environment variable `WANDB_DIR` names another
    folder.

    Raises:
        InputError: If `wandb` cannot start the run, for example because there is no API key.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], id: str | None):
        import wandb

        self.id = id or uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=_run_name(folder),
                id=self.id,
                resume="allow",
                config=dict(settings),
                dir=None if "WANDB_DIR" in os.environ else str(folder),
            )
        except wandb.Error as error:
            raise InputError(
                f"wandb cannot start a run: {_sentence(error)}. Log in with `wandb login`, or set WANDB_MODE=offline."
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the values of a step to `wandb`, which sends them in a separate process."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Waits until `wandb` has sent all values."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """Sends the metrics to an MLflow run.

    The environment variables `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`, or the functions
    `mlflow.set_tracking_uri` and `mlflow.set_experiment`, determine where the run is stored.

    Raises:
        InputError: If MLflow cannot start the run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], id: str | None):
        import mlflow

        self._mlflow = mlflow
        try:
            active = mlflow.active_run() is not None
            self.id: str = mlflow.start_run(id, run_name=_run_name(folder), nested=active).info.run_id
            if id is None:  # MLflow does not allow a run's parameters to be changed
                for part in _parts(_named_for_mlflow({name: str(value) for name, value in settings.items()})):
                    mlflow.log_params(part)
        except mlflow.MlflowException as error:
            raise InputError(f"MLflow cannot start a run: {_sentence(error)}.") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step. Logs a warning if the server rejects the values."""
        with self._warns(f"the metrics of step {step}"):
            for part in _parts(_named_for_mlflow(values)):
                self._mlflow.log_metrics(part, step=step, run_id=self.id)

    def close(self, *, failed: bool) -> None:
        """Marks the run as finished or failed."""
        with self._warns("the end of the run"):
            self._mlflow.end_run("FAILED" if failed else "FINISHED")

    @contextlib.contextmanager
    def _warns(self, what: str) -> Iterator[None]:
        # Training continues if the server is temporarily unavailable. The journal contains all metrics.
        try:
            yield
        except self._mlflow.MlflowException as error:
            logger.warning("MLflow did not take %s: %s. %s has all metrics.", what, _sentence(error), METRICS)


class Trackio:
    """Sends the metrics to a Trackio run in the `bert-jax` project. Trackio's environment variables apply."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], id: str | None):
        import trackio

        # Trackio identifies a run to resume by its name, so the name must be unique.
        self.id = id or f"{_run_name(folder).replace('/', '-')}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(PROJECT, self.id, resume="allow", config=dict(settings), embed=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the values of a step to Trackio, which sends them in a separate thread."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Waits until Trackio has sent all values."""
        self._run.finish()


class Kind(NamedTuple):
    """A kind of logger.

    Attributes:
        make: Creates a logger. The arguments are the run's folder, the run's settings and, if the run is resumed, the
            run's id in the logger's service (otherwise None).
        module: The module that the logger requires.
        package: The pip package that provides this module.
    """

    make: Callable[[Path, Mapping[str, Any], str | None], OpenLogger]
    module: str
    package: str


LOGGERS = {
    "tensorboard": Kind(TensorBoard, "tensorboardX", "bert-jax[train]"),
    "wandb": Kind(WandB, "wandb", "wandb"),
    "mlflow": Kind(MLflow, "mlflow", "mlflow"),
    "trackio": Kind(Trackio, "trackio", "trackio"),
}
"""Maps the name of each logger to its kind. The names are the same as in the `report_to` argument of `transformers`."""


def check(names: Sequence[str]) -> None:
    """Raises `InputError` if the package for any of these loggers is not installed."""
    for name in names:
        spec = importlib.util.find_spec(LOGGERS[name].module)
        # `find_spec` also finds a folder of the same name, such as the `wandb` folder in which runs are stored.
        if spec is None or spec.origin is None:
            raise InputError(f"The logger {name} is not installed: pip install '{LOGGERS[name].package}'.")


@contextlib.contextmanager
def opened(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Logger]]:
    """Opens loggers by name and closes them when the `with` block ends.

    If training is resumed, each logger continues the run that it created earlier in its service. The ids of these runs
    are stored in `loggers.json` in the run's folder. When steps are recomputed, their values are not sent a second
    time. If the process was killed, a logger lacks the values that it had not yet stored (for an offline W&B run, up to
    15 seconds of values). However, `metrics.jsonl` contains all values.

    Args:
        names: The names of the loggers. Each must be a key of `LOGGERS`.
        folder: The folder of the run, which must exist. The last two components of its path form the run's name (for
            example, "runs/emotion").
        settings: The settings of the run, which the loggers display.

    Raises:
        InputError: If a logger is not installed or cannot start.
    """
    check(names)
    path, failed = folder / IDS, True
    made: list[OpenLogger] = []
    before: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ids = dict(before)
    sent = {(line.pop("step"), frozenset(scalars(line))) for line in read_journal(folder / METRICS)}
    try:
        for name in names:
            made.append(LOGGERS[name].make(folder, settings, before.get(name)))
            if made[-1].id:
                ids[name] = made[-1].id
                path.write_text(json.dumps(ids) + "\n", encoding="utf-8")
        yield [_Unsent(each, sent) if name in before else each for name, each in zip(names, made, strict=True)]
        failed = False
    finally:
        for each in made:
            each.close(failed=failed)


@dataclass(frozen=True)
class _Unsent:
    """Forwards to a logger only the values that it did not receive before the run was resumed.

    Attributes:
        logger: The logger.
        sent: For each set of values that the logger has already received, the step and the names of the values.
    """

    logger: Logger
    sent: Collection[tuple[int, frozenset[str]]]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if (step, frozenset(values)) not in self.sent:
            self.logger.write(step, values)


def _run_name(folder: Path) -> str:
    return "/".join(folder.absolute().parts[-2:])


def _named_for_mlflow(values: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the values, keyed by names that MLflow accepts. (MLflow itself truncates long parameter values.)

    An accepted name has at most `LONGEST_NAME` characters and contains only letters, digits and the characters
    `_-. :/`. The name is also a normalized relative path, because MLflow may use it as a file name. If several values
    would get the same name, a number is appended to the later names.
    """
    named: dict[str, Value] = {}
    for name, value in values.items():
        parts = [part.lstrip(".") for part in re.sub(r"[^\w\-. :/]", "_", name).split("/")]
        base, end, n = "/".join(filter(None, parts)) or "_", "", 1
        while (accepted := base[: LONGEST_NAME - len(end)].rstrip("/") + end) in named:
            n += 1
            end = f"_{n}"
        named[accepted] = value
    return named


def _parts(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    entries = list(values.items())
    for start in range(0, len(entries), BATCH):
        yield dict(entries[start : start + BATCH])


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
