import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sentiments
from tensorboardX.proto import event_pb2

import bert_jax
from bert_jax import sharding
from bert_jax.errors import InputError
from bert_jax.training import log, loggers, optim

SETTINGS = {f"data.option_{n}": n for n in range(120)} | {
    "optimizer.learning_rate": 1e-3
}  # more than MLflow takes at once


class Memory:
    def __init__(self):
        self.lines = []

    def write(self, step, values):
        self.lines.append((step, dict(values)))


class Killer:
    """Ends the process as the system does, with one second for what sends in the background."""

    def __init__(self, at):
        self.at = at

    def write(self, step, values):
        if step == self.at:
            subprocess.run(["sleep", "1"], check=True)
            os.kill(os.getpid(), signal.SIGKILL)


def train(tokenizer, folder, opened):
    """Twenty steps: a line every second one, an evaluation and a checkpoint every fifth."""
    model, task = sentiments.classifier(tokenizer, layers=1)
    examples = task.featurize(sentiments.rows(32))
    return bert_jax.train(
        model, task, examples, optim.adamw(1e-3), steps=20, batch_size=16, folder=folder, log_every=2,
        validation=examples, evaluate_every=5, loggers=opened, mesh=sharding.mesh(data=1),
    )  # fmt: skip


TRAINING, EVALUATIONS = list(range(2, 21, 2)), [0, 5, 10, 15, 20]


def main(name, folder, kill):
    """One process of the runs that are killed: `python test_loggers.py NAME FOLDER STEP`."""
    Path(folder).mkdir(exist_ok=True)
    with loggers.opened([name], Path(folder), SETTINGS) as opened:
        train(bert_jax.Tokenizer.from_pretrained("bert-mini-cased"), folder, [*opened, Killer(int(kill))])


# ── What each logger has ──


def records(path):
    """The records of an event file of TensorBoard."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size


def tensorboard(folder):
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        for event in records(path):
            if event.session_log.status == event_pb2.SessionLog.START:  # TensorBoard drops what it makes invalid
                found = [each for each in found if each[0] < event.step]
            found += [
                (event.step, each.tag, pytest.approx(each.simple_value, rel=1e-6)) for each in event.summary.value
            ]
    return found


def wandb(folder):
    """Reads `run-ID.wandb`, the log of records that `wandb sync` sends: LevelDB's format with another header."""
    from wandb.proto import wandb_internal_pb2

    found, folders = [], sorted((folder / "wandb").glob("offline-run-*"))
    for path in folders:
        (file,) = path.glob("*.wandb")
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 2**15 - at % 2**15 < 7:  # the end of a block
                at += 2**15 - at % 2**15
            _, size, kind = struct.unpack_from("<IHB", data, at)
            parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # a whole record, or its last part
                record, parts = wandb_internal_pb2.Record.FromString(parts), b""
                if record.HasField("run"):
                    run = record.run
                    assert run.display_name == f"{folder.parent.name}/run"
                    config = {item.key: json.loads(item.value_json) for item in run.config.update}
                    assert config.items() >= SETTINGS.items()
                    assert run.run_id == json.loads((folder / "loggers.json").read_text())["wandb"]
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found += [(values["_step"], name, value) for name, value in values.items() if name[0] != "_"]
    return found


def mlflow(folder):
    import mlflow

    client, run_id = mlflow.MlflowClient(), json.loads((folder / "loggers.json").read_text())["mlflow"]
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == (f"{folder.parent.name}/run", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    return [
        (each.step, name, each.value) for name in run.data.metrics for each in client.get_metric_history(run_id, name)
    ]


def trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((folder / "loggers.json").read_text())["trackio"]
    assert re.fullmatch(rf"{folder.parent.name}-run-\w{{8}}", name)
    assert SQLiteStorage.get_run_config("bert-jax", name).items() >= SETTINGS.items()
    return [
        (line["step"], key, value)
        for line in SQLiteStorage.get_logs("bert-jax", name)
        for key, value in line.items()
        if key not in ("step", "timestamp")
    ]


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture
def environment(tmp_path, monkeypatch, trackio_folder):
    """No network; every package writes to a temporary folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.2")  # seconds; 15 by default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", trackio_folder)  # which is read once, on import
    monkeypatch.chdir(tmp_path)  # MLflow's folder for artifacts
    return tmp_path


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(name, marks=pytest.mark.loggers) for name in ("wandb", "mlflow", "trackio"))]
)
def test_a_logger_has_what_the_journal_has(tokenizer, environment, name):
    folder = environment / "run"
    folder.mkdir()
    with loggers.opened([name], folder, SETTINGS) as opened:
        train(tokenizer, folder, opened)
    expected = [
        (line["step"], key, value)
        for line in log.read_journal(folder / log.METRICS)
        for key, value in log.scalars(line).items()
    ]
    assert [step for step, key, _ in expected if key == "loss"] == TRAINING
    assert [step for step, key, _ in expected if key == "validation/per_class/yes/f1"] == EVALUATIONS
    assert sorted(READERS[name](folder), key=lambda each: each[:2]) == sorted(expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tensorboard", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.loggers) for name in ("wandb", "mlflow", "trackio")),
    ],
)
def test_after_a_kill_the_loggers_continue_without_repeating_a_step(environment, name):
    folder = environment / "run"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    variables.pop("WANDB_SERVICE", None)  # wandb's process of this one
    for kill in (14, 0):  # the checkpoint is that of step 10
        done = subprocess.run([sys.executable, __file__, name, str(folder), str(kill)], capture_output=True, text=True,
                              timeout=200, env=variables)  # fmt: skip
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    found = READERS[name](folder)
    lost = {14} if name == "wandb" else set()  # wandb keeps the values of a step until the next one
    for key, steps in {"loss": TRAINING, "validation/accuracy": EVALUATIONS}.items():
        assert sorted(step for step, found_key, _ in found if found_key == key) == sorted({*steps} - lost)


def test_any_object_with_a_method_write_is_a_logger(tokenizer, tmp_path):
    memory = Memory()
    train(tokenizer, None, [memory])
    assert [step for step, values in memory.lines if "loss" in values] == TRAINING
    assert [step for step, values in memory.lines if "validation/accuracy" in values] == EVALUATIONS
    assert all(type(value) is float for _, values in memory.lines for value in values.values())


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_a_logger_that_is_not_installed(tmp_path, monkeypatch, folder_of_that_name):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", loggers.LOGGERS["wandb"]._replace(module="not_installed"))
    if folder_of_that_name:
        (tmp_path / "not_installed").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"^The logger wandb is not installed: pip install 'wandb'\.$"):
        loggers.check(["tensorboard", "wandb"])


@pytest.mark.loggers
def test_wandb_without_a_key(environment, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(environment / "none"))
    import wandb

    wandb.teardown()  # so that it reads the environment
    with pytest.raises(InputError, match=r"^wandb cannot start a run: .* or set WANDB_MODE=offline\.$"):
        loggers.WandB(environment, {}, None)
    wandb.teardown()


@pytest.mark.loggers
def test_mlflow_that_cannot_start_or_is_lost(environment, monkeypatch, caplog):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with pytest.raises(InputError, match=r"^MLflow cannot start a run: .*nothing"):
        loggers.MLflow(environment, {}, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{environment}/mlflow.db")
    logger = loggers.MLflow(environment, {}, None)
    logger.write(1, {"validation/per_class/O'Neil/f1": 0.5})
    assert mlflow.MlflowClient().get_run(logger.id).data.metrics == {"validation/per_class/O_Neil/f1": 0.5}
    mlflow.MlflowClient().delete_run(logger.id)
    logger.write(2, {"loss": 0.5})
    assert "MLflow did not take the metrics of step 2: " in caplog.text
    logger.close(failed=False)


@pytest.mark.loggers
def test_mlflow_takes_every_name_and_value(environment, caplog):
    import mlflow

    names = {
        "optimizer.lr_multipliers.bert\\.layers\\.(0|1)\\..*": "optimizer.lr_multipliers.bert_.layers_._0_1__.._",
        "a+": "a_", "a*": "a__2", "a_": "a__3",
        "per_class///f1": "per_class/f1", "per_class/f1": "per_class/f1_2", "../b": "b", "./": "_", "": "__2",
        "n" * 300: "n" * 250, "n" * 301: "n" * 248 + "_2", f"{'m' * 249}/n": "m" * 249, "Größe": "Größe",
    }  # fmt: skip
    logger = loggers.MLflow(environment, dict.fromkeys(names, "v" * 7000), None)
    logger.write(1, {name: float(n) for n, name in enumerate(names)})
    logger.close(failed=False)
    data = mlflow.MlflowClient().get_run(logger.id).data
    assert data.metrics == {name: float(n) for n, name in enumerate(names.values())}
    assert data.params == dict.fromkeys(names.values(), "v" * 6000)
    assert "MLflow did not take" not in caplog.text


if __name__ == "__main__":
    main(*sys.argv[1:])
