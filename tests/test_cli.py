"""The command line as a user meets it: in a process of its own, offline."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  the embedded weights are bfloat16
import numpy as np
import pytest
import reference
from safetensors.numpy import load_file
from typer.testing import CliRunner

from bert_jax import __version__, hub
from bert_jax.cli import app

EMOTION = str(Path(__file__).parents[1] / "configs" / "finetune" / "emotion.yaml")
TEXT = "Paris is the [MASK] of France."
FILLINGS = {case["text"]: case["fillings"] for case in reference.golden("embedded_fill_mask.json")}


def run(*arguments, stdin="", **environment):
    command = [sys.executable, "-m", "bert_jax.cli", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=120)


def test_fill_mask_as_a_table():
    done = run("fill-mask", TEXT, "The [MASK] of the [MASK].", "--model", "bert-mini-cased", "--top-k", 2)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].strip() == TEXT
    assert lines[1].split()[0] == FILLINGS[TEXT][0]["token_str"]
    assert lines[1].split()[-1] == f"{FILLINGS[TEXT][0]['score']:.4f}"
    assert "█" in lines[1]
    assert "The [MASK] of the [MASK].  (mask 2 of 2)" in done.stdout


def test_fill_mask_as_json():
    done = run("fill-mask", TEXT, "--json", "--model", "bert-mini-cased", "--target", "king", "--target", "capital")
    answer = json.loads(done.stdout)
    assert answer["model"] == "bert-mini-cased"
    assert answer["inputs"] == [TEXT]
    assert [entry["token_str"] for entry in answer["outputs"][0]] == ["capital", "king"]
    done = run("fill-mask", "The president of the [MASK] [MASK] spoke.", "--json", "--joint", "--top-k", 1)
    assert json.loads(done.stdout)["outputs"][0][0]["token_str"] == ["United", "States"]


def test_info():
    done = run("info", "bert-mini-cased")
    assert done.returncode == 0
    assert "BertForPreTraining" in done.stdout
    assert "22,305,606" in done.stdout
    assert "loaded 110 tensors" in done.stdout
    assert "stored as BF16" in done.stdout
    assert re.search(r"\nall +22,305,606 +89.2 +45.7 +24.4", done.stdout)  # MB in float32, bfloat16 and int8
    assert re.search(r"On this machine, bfloat16 .*\nOn this machine, int8 ", done.stdout)


@pytest.mark.slow
def test_dtype(tmp_path):
    done = run("fill-mask", TEXT, "--model", "bert-mini-cased", "--dtype", "int8", "--json")
    (filling, *_), exact = json.loads(done.stdout)["outputs"][0], FILLINGS[TEXT][0]
    assert filling["token_str"] == exact["token_str"]
    assert 0.001 < abs(filling["score"] - exact["score"]) < 0.05
    refused = run("fill-mask", TEXT, "--dtype", "int4")
    assert refused.returncode == 2
    assert "int4" in refused.stderr
    request = json.dumps({"inputs": {"input_string": [TEXT]}, "parameters": {"top_k": 1}})
    for answer in (
        CliRunner().invoke(app, ["predict", "bert-mini-cased", "--task", "fill-mask", TEXT, "--dtype", "int8"]).stdout,
        CliRunner().invoke(app, ["score", "--model", "bert-mini-cased", "--dtype", "int8"], input=request).stdout,
    ):
        assert f'"score": {filling["score"]}' in answer or f'"score":{filling["score"]}' in answer
    (tmp_path / "texts.txt").write_text("Paris is the capital of France.\nShe went to school.\n")
    (tmp_path / "run.yaml").write_text(f"task: fill-mask\ndata: {{test: {tmp_path}/texts.txt}}\nresamples: 2\n")
    nll = {}
    for options in ([], ["--dtype", "int8"]):
        measured = run("evaluate", "bert-mini-cased", tmp_path / "run.yaml", "--json", *options)
        nll[len(options)] = json.loads(measured.stdout)["bert-mini-cased"]["nll"]["value"]
    assert 1e-4 < abs(nll[0] - nll[2]) < 0.1


@pytest.mark.slow
def test_tensors_to_ignore(tmp_path):
    embedded = hub.EMBEDDED / "bert-mini-cased"
    tensors = load_file(embedded / hub.WEIGHTS_FILE)
    reference.write(tmp_path, tensors | {"crf.transitions": np.zeros((3, 3), np.float32)},
                    json.loads((embedded / hub.CONFIG_FILE).read_text()))  # fmt: skip
    shutil.copy(embedded / "vocab.txt", tmp_path)
    refused = run("info", tmp_path)
    assert refused.returncode == 2
    assert "crf.transitions" in refused.stderr
    assert r"ignore=[r'crf\..*']" in refused.stderr
    for command in (["fill-mask", TEXT, "--model", tmp_path], ["info", tmp_path]):
        done = run(*command, "--ignore", r"crf\..*")
        assert done.returncode == 0, done.stderr


def test_version_and_help():
    assert run("--version").stdout.strip() == __version__
    assert "fill-mask" in run("--help").stdout
    assert run().returncode == 2


@pytest.fixture
def broken(tmp_path):
    folder = reference.write(tmp_path / "broken", reference.tensors("BertForMaskedLM"))
    shutil.copy(hub.EMBEDDED / "bert-mini-cased" / "vocab.txt", folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fill-mask", "no mask"], "inputs[0]: the text has no [MASK]"),
        (["info", "owner/nothing"], "owner/nothing (revision main) is not in the cache"),
        (["finetune", EMOTION, "--seeds", "1"], "--seeds is '1'; expected at least two different whole numbers"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (["fill-mask", TEXT, ""], "inputs[1]: the text is empty"),
                (["fill-mask", TEXT, "--top-k", "0"], "top_k is 0"),
                (["fill-mask", TEXT, "--target", ""], "targets has ''"),
                (["info", "./not/here/at/all"], "neither a folder nor a model id"),
                (
                    ["finetune", EMOTION, "--target", "v5e:2x4"],
                    "--target is 'v5e:2x4', but a target can only compile; add --dry-run",
                ),
                (
                    ["finetune", EMOTION, "--seeds", "1,2", "--dry-run"],
                    "--seeds is given, which --dry-run does not support",
                ),
                (["finetune", EMOTION, "output.folder=" + 300 * "x"], "File name too long"),
                (
                    ["finetune", EMOTION, "--dry-run", "--target", "v4"],
                    "The target 'v4' is unknown; expected a chip and a topology",
                ),
            ]
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, named):
    model = ["--model", "bert-mini-cased"] if arguments[0] == "fill-mask" else []
    done = run(*arguments, *model)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("bert-jax: ")
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_broken_models(broken):
    done = run("fill-mask", TEXT, "--model", broken)
    assert (done.returncode, "Use the model's tokenizer" in done.stderr) == (2, True)
    weights = broken / hub.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run("info", broken)
    assert (done.returncode, "model.safetensors is damaged" in done.stderr) == (2, True)
    (broken / "config.json").write_text(json.dumps(reference.CONFIG | {"model_type": "roberta"}))
    done = run("info", broken)
    assert (done.returncode, "model_type is 'roberta'" in done.stderr) == (2, True)
    (broken / "config.json").unlink()
    done = run("info", broken)
    assert (done.returncode, "expected a folder that contains config.json" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compilation_cache(tmp_path):
    def fill(cache, flags=""):
        done = run(
            "fill-mask", TEXT, "--model", "bert-mini-cased", BERT_JAX_COMPILATION_CACHE=str(cache), XLA_FLAGS=flags
        )
        assert done.returncode == 0

    for _ in range(2):
        fill(tmp_path / "cache")
        programs = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name.endswith("-cache"))
        assert len(programs) >= 1
        first = locals().get("first", programs)
        assert programs == first  # the second run adds none
    fill(tmp_path / "simulated", "--xla_force_host_platform_device_count=2")
    assert not (tmp_path / "simulated").exists()
    switched_off = {"BERT_JAX_COMPILATION_CACHE": "off", "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert run("fill-mask", TEXT, "--model", "bert-mini-cased", **switched_off).returncode == 0
    assert not (tmp_path / "xdg" / "bert_jax").exists()


@pytest.mark.slow
def test_verify_out_of_reach():
    done = run("verify", "google-bert/bert-base-cased")
    assert done.returncode == 2
    assert "not verified: google-bert/bert-base-cased (revision main) is not in the cache" in done.stderr
    assert run("verify", "bert-mini-cased").returncode == 2


def test_verify_reports_a_miss(tmp_path):
    shutil.copytree(hub.EMBEDDED / "bert-mini-cased", tmp_path / "bert-base-cased")
    done = run("verify", tmp_path / "bert-base-cased")
    assert done.returncode == 1
    assert "3 outputs differ" in done.stderr
    assert "fashion" in done.stdout
    assert "✗" in done.stdout


@pytest.mark.slow
def test_score(tmp_path):
    texts = [TEXT, "Today is a [MASK] day!"]
    request = {"inputs": {"input_string": texts}, "parameters": {"top_k": 2}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = run("score", tmp_path / "request.json", "--model", "bert-mini-cased")
    assert done.returncode == 0
    response = json.loads(done.stdout)
    assert [[entry["token_str"] for entry in entries] for entries in response] == [
        [entry["token_str"] for entry in FILLINGS[text][:2]] for text in texts
    ]
    done = run("score", "--model", "bert-mini-cased", stdin=json.dumps({"input_data": [TEXT]}))
    assert json.loads(done.stdout)[0][0]["sequence"] == "Paris is the capital of France."
    for content, message in [("{", "stdin is not JSON"), ("[" * 100_000, "stdin is not JSON"), ("{}", "no inputs")]:
        done = run("score", "--model", "bert-mini-cased", stdin=content)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert "No such file or directory: 'nowhere.json'" in run("score", "nowhere.json").stderr
