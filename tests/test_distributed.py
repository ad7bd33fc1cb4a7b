"""Several processes of one run, over loopback: what they learn, and what becomes of the rest when one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import bert_jax
from bert_jax import distributed, recipes, sharding
from bert_jax.errors import InputError
from bert_jax.settings import Pretraining, Settings

LONGEST = 180  # seconds that any of these may take

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """A model, and examples for three steps an epoch."""
    folder = tmp_path_factory.mktemp("data")
    config = bert_jax.BertConfig(
        vocab_size=28996, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(0)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    lines = [f"{' '.join(random.choice(['good', 'bad', 'film'], n))};{n % 2}" for n in random.integers(1, 40, 48)]
    (folder / "train.txt").write_text("\n".join(lines))
    (folder / "validation.txt").write_text("\n".join(lines[:20]))
    return folder


def write_settings(place, folder, name="settings.yaml", **changes):
    (place / name).write_text(
        json.dumps({
            "task": "text-classification", "model": {"id": str(place / "model")}, "output": {"folder": str(folder)},
            "data": {"train": str(place / "train.txt"), "validation": str(place / "validation.txt")},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"epochs": 2, "batch_size": 16, "log_every": 1}, **changes,
        })
    )  # fmt: skip
    return place / name


def start(files, command=("finetune",), folders=(None, None)):
    """Processes of a run, each with settings, and a folder to work in, of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
    return [
        subprocess.Popen([sys.executable, "-m", "bert_jax.cli", *command, file, "--processes", f"{i}/2@{address}"],
                         env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i, (file, folder) in enumerate(zip(files, folders, strict=True), 1)
    ]  # fmt: skip


def finish(children):
    """Exit statuses and stderrs; nobody is left behind."""
    try:
        errors = [child.communicate(timeout=LONGEST)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], errors


def journal(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("validation")) for line in lines]


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_two_processes_learn_what_one_does(data, tmp_path, mesh):
    # Without dropout, whose masks depend on how many rows a batch is padded to.
    off = {"id": str(data / "model"), "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    options = {"epochs": 4, "batch_size": 16, "log_every": 1}
    file = write_settings(data, tmp_path / "two", mesh=mesh, model=off, training=options)
    statuses, errors = finish(start([file, file]))
    assert statuses == [0, 0], errors
    one = Settings.from_file(file, [f"output.folder={tmp_path / 'one'}", "mesh={data: 1, fsdp: 1, tensor: 1}"])
    recipes.finetune(one)
    steps, found = journal(tmp_path / "one"), journal(tmp_path / "two")
    assert len(steps) == len(found) == 17
    assert steps[1][1] != pytest.approx(steps[-2][1], rel=1e-3)
    for (step, loss, validation), other in zip(steps, found, strict=True):
        assert other[0] == step
        assert (other[1] is None) == (loss is None)
        assert loss is None or other[1] == pytest.approx(loss, rel=1e-6)
        assert bool(other[2]) == bool(validation)
        if validation:
            assert other[2]["loss"] == pytest.approx(validation["loss"], rel=1e-6)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(weights) == set(others)
    for name, weight in weights.items():
        np.testing.assert_allclose(others[name], weight, atol=1e-5, err_msg=name)
    predictions = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["prediction"]["label"] for line in predictions[0]] == [
        json.loads(line)["prediction"]["label"] for line in predictions[1]
    ]


def test_two_processes_pretrain_as_one_does(data, tmp_path):
    """The first one makes the shards, and both read them."""
    words = np.random.default_rng(1).choice(["good", "bad", "film", "day", "Paris"], (30, 3, 8))
    texts = "\n\n".join("\n".join(" ".join(line) + "." for line in document) for document in words)
    (data / "texts.txt").write_text(texts)
    tree = {
        "task": "pretraining", "output": {"folder": str(tmp_path / "two")},
        "model": {"id": str(data / "model"), "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
        "data": {"train": str(data / "texts.txt"), "validation": str(data / "texts.txt"), "max_length": 32,
                 "processes": 1},
        "training": {"max_steps": 6, "batch_size": 8, "log_every": 1, "evaluate_every": 6},
    }  # fmt: skip
    (data / "pretrain.yaml").write_text(json.dumps(tree))
    statuses, errors = finish(start([data / "pretrain.yaml"] * 2, command=["pretrain"]))
    assert statuses == [0, 0], errors
    recipes.pretrain(Pretraining.from_dict(tree | {"mesh": {"data": 1}, "output": {"folder": str(tmp_path / "one")}}))
    for (step, loss, validation), other in zip(journal(tmp_path / "one"), journal(tmp_path / "two"), strict=True):
        assert other[0] == step
        assert (other[1] or other[2]["loss"]) == pytest.approx(loss or validation["loss"], rel=1e-6)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in weights.items():
        np.testing.assert_allclose(others[name], weight, atol=1e-5, err_msg=name)


def test_all_stop_at_the_same_step_and_go_on(data, tmp_path):
    """SIGTERM, and Ctrl-C, to one of them alone."""
    files = [write_settings(data, tmp_path / name, f"{name}.yaml",
                            training={"epochs": 20, "batch_size": 16, "log_every": 1, "evaluate_every": 1000})
             for name in ("whole", "parts")]  # fmt: skip
    assert finish(start([files[0]] * 2))[0] == [0, 0]
    stopped = set()
    for number, victim in ((signal.SIGTERM, 1), (signal.SIGINT, 0)):
        children = start([files[1]] * 2)
        before = len(journal(tmp_path / "parts")) if stopped else 0
        while not (tmp_path / "parts" / "metrics.jsonl").exists() or len(journal(tmp_path / "parts")) < before + 3:
            assert all(child.poll() is None for child in children), finish(children)
            time.sleep(0.02)
        children[victim].send_signal(number)
        statuses, errors = finish(children)
        assert statuses == [128 + signal.SIGTERM] * 2, errors
        steps = {error.rpartition("stopped at step ")[2].partition(",")[0] for error in errors}
        assert len(steps) == 1
        stopped |= steps
    assert len(stopped) == 2
    assert finish(start([files[1]] * 2))[0] == [0, 0]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_processes_share_the_rows_of_files(data, tmp_path):
    rows = [{"n": n, "text": f"number {n} is [MASK]."} for n in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["predict", "--task", "fill-mask", "--input", "in.jsonl", "--output", "out.jsonl"]
    assert finish(start([data / "model"] * 2, command, [tmp_path] * 2))[0] == [0, 0]
    numbers = [
        [json.loads(line)["n"] for line in (tmp_path / f"out-{i}-of-2.jsonl").read_text().splitlines()] for i in (1, 2)
    ]
    assert numbers == [list(range(0, 20, 2)), list(range(1, 20, 2))]


def test_one_that_is_lost_ends_the_other(data, tmp_path):
    file = write_settings(data, tmp_path / "run", training={"epochs": 1000, "batch_size": 16, "log_every": 1})
    children = start([file, file])
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(journal(tmp_path / "run")) < 3:
        assert all(child.poll() is None for child in children), finish(children)
        time.sleep(0.02)
    children[1].kill()
    began = time.monotonic()
    statuses, errors = finish(children)
    assert time.monotonic() - began < 2 * distributed.HEARTBEAT
    # Either the collective fails, or JAX hears no heartbeat any more and ends the process itself.
    assert statuses in ([2, -signal.SIGKILL], [-signal.SIGABRT, -signal.SIGKILL]), errors
    said = "Another process has ended" if statuses[0] == 2 else "indicates that another task died"
    assert said in errors[0]
    assert "Traceback" not in errors[0]


def test_what_is_not_the_same_is_refused(data, tmp_path):
    one = write_settings(data, tmp_path / "run")
    two = write_settings(data, tmp_path / "run", "two.yaml", precision={"compute_dtype": "bfloat16"})
    statuses, errors = finish(start([one, two]))
    assert statuses == [2, 2]
    for error in errors:
        assert "The settings of process 2 differ from those of process 1" in error
        assert "-   compute_dtype: float32" in error
        assert "+   compute_dtype: bfloat16" in error
        assert "Traceback" not in error
    (data / "other.txt").write_text((data / "train.txt").read_text().replace("film", "book"))
    for name in ("one", "two"):  # the same settings, and another file behind the same name
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text((data / ("train.txt", "other.txt")[name == "two"]).read_text())
    same = write_settings(data, tmp_path / "run", "same.yaml", data={"train": "train.txt"})
    statuses, errors = finish(start([same, same], folders=[tmp_path / "one", tmp_path / "two"]))
    assert statuses == [2, 2]
    assert "The training examples of process 2 differ from those of process 1" in errors[1]
    assert not (tmp_path / "run").exists()
    missing = write_settings(data, tmp_path / "run", "missing.yaml", mesh={"data": 2})
    statuses, errors = finish(start([missing] * 2))
    assert statuses == [2, 2]
    assert "a mesh of all devices" in errors[1]


def test_bad_arguments(data, tmp_path, monkeypatch):
    for given in ("2", "0/2@h:1", "3/2@h:1", "1/2@h", "all"):
        with pytest.raises(InputError, match="expected auto, or i/n@host:port"):
            distributed.start(given)
    monkeypatch.setattr(distributed, "JOIN", 0.2)
    with pytest.raises(InputError, match=r"2/2@127.0.0.1:1: cannot join the other processes: .*refused"):
        distributed.start("2/2@127.0.0.1:1")
    command = [sys.executable, "-m", "bert_jax.cli", "finetune", write_settings(data, tmp_path / "run")]
    done = subprocess.run([*command, "--processes", "auto"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--processes auto: cannot join the other processes" in done.stderr
    assert "Traceback" not in done.stderr


def test_parts_of_one_process():
    for axes in ({}, {"fsdp": 4}, {"tensor": 2}, {"data": 1}):
        assert sharding.part(sharding.mesh(**axes)) == (0, 1)
