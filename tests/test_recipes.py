import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import jax
import numpy as np
import optax
import pytest
import sentiments
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

import bert_jax
from bert_jax import hub, recipes, sharding
from bert_jax import tree as tree_module
from bert_jax.cli import app
from bert_jax.data.loader import Loader
from bert_jax.errors import CheckpointError, ConfigError, InputError, ModelNotFoundError
from bert_jax.recipes import preparation, runs
from bert_jax.recipes import pretraining as pretraining_recipe
from bert_jax.settings import Pretraining, Settings
from bert_jax.tasks import registry
from bert_jax.tasks.pretraining import PreTraining


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small pretrained model with the published vocabulary."""
    return save_model(tmp_path_factory.mktemp("models") / "base", layers=1)


def save_model(folder, layers):
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32)
    bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(1)).save_pretrained(folder)
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tree(base, tmp_path):
    """Settings of a run of a few steps."""
    return {
        "task": "text-classification",
        "model": {"id": str(base)},
        "data": {
            "train": write(tmp_path / "train.jsonl", sentiments.rows(40)),
            "validation": write(tmp_path / "validation.jsonl", sentiments.rows(12, seed=1)),
            "max_length": 32,
        },
        "training": {"epochs": 2, "batch_size": 16},
        "mesh": {"data": 1},
        "output": {"folder": str(tmp_path / "run")},
    }


def run(tree):
    return recipes.finetune(Settings.from_dict(tree))


def validation(folder):
    return json.loads((folder / "results.json").read_text())["validation"]


@pytest.mark.parametrize(
    ("optimizer", "problem"),
    [
        ({"name": "lion", "epsilon": 1e-6}, "optimizer.epsilon is 1e-06, but lion has no epsilon. Remove the setting."),
        ({"name": "lamb", "bias_correction": False}, "lamb has no bias_correction"),
        ({"name": "adafactor", "beta1": 0.9}, "adafactor has no beta1"),
    ],
)
def test_a_setting_that_the_optimizer_does_not_have_is_refused(tree, optimizer, problem):
    with pytest.raises(InputError, match=problem):
        runs.make_optimizer(Settings.from_dict(tree | {"optimizer": optimizer}), 10)


@pytest.mark.usefixtures("uninstalled")
def test_a_run_leaves_a_model_and_all_about_it(tree, tmp_path):
    folder = run(tree)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "checkpoints", "config.json", "curve.png", "metrics.jsonl", "model.safetensors",
        "predictions.jsonl", "results.json", "settings.yaml", "tensorboard", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt",
    }  # fmt: skip
    assert Settings.from_file(folder / "settings.yaml") == Settings.from_dict(tree)
    results = json.loads((folder / "results.json").read_text())
    assert results["versions"]["bert-jax"] == bert_jax.__version__
    assert [results[name] for name in ("steps", "planned_steps", "stopped_early")] == [6, 6, None]
    assert (
        results["validation"]["accuracy"]
        == recipes.evaluate(str(folder), Settings.from_dict(tree), "validation")["accuracy"]
    )
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    rows = sentiments.rows(12, seed=1)
    assert [line["text"] for line in predictions] == [row["text"] for row in rows]
    right = [line["prediction"]["label"] == row["label"] for line, row in zip(predictions, rows, strict=True)]
    assert np.mean(right) == pytest.approx(results["validation"]["accuracy"])
    # The folder is a model: our pipeline answers as the predictions say.
    classify = bert_jax.pipeline("text-classification", folder)
    for line in predictions[:3]:
        assert classify(line["text"])["label"] == line["prediction"]["label"]
        assert classify(line["text"])["score"] == pytest.approx(line["prediction"]["score"], abs=1e-5)
    assert classify.config.id2label == ("no", "yes")
    card = (folder / "README.md").read_text()
    assert "| accuracy |" in card
    assert str(tmp_path) not in card
    assert hub_server.problems(card) == []

    weights = (folder / "model.safetensors").stat()
    assert run(tree) == folder  # is finished: nothing happens
    assert (folder / "model.safetensors").stat() == weights


def test_the_models_options_are_those_of_the_settings(tree, pretraining, tokenizer):
    sections = {
        "training": {"remat": True, "scan_layers": True, "batch_size": 16},
        "precision": {"compute_dtype": "bfloat16"},
    }
    model = tree["model"] | {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.5}
    settings = Settings.from_dict(tree | sections | {"model": model | {"classifier_dropout": 0.75}})
    fine = preparation.prepare(settings).model
    assert fine.config.classifier_dropout == 0.75
    settings = Pretraining.from_dict(pretraining | sections | {"model": model})
    for found in (fine, pretraining_recipe.starting_model(settings, tokenizer, bert_jax.BertForMaskedLM)[0]):
        assert (found.bert.remat, found.bert.scan_layers, found.bert.compute_dtype) == (True, True, "bfloat16")
        assert (found.config.hidden_dropout_prob, found.config.attention_probs_dropout_prob) == (0.25, 0.5)
    plain = preparation.prepare(Settings.from_dict(tree)).model.bert
    assert (plain.remat, plain.scan_layers, plain.compute_dtype) == (False, False, "float32")


@pytest.mark.slow
def test_several_seeds(tree, tmp_path, monkeypatch):
    settings = Settings.from_dict(tree | {"training": {"max_steps": 1, "batch_size": 16}})
    told = io.StringIO()
    end = runs.end

    def stops(settings, *given):
        if settings.training.seed == 7:
            raise ZeroDivisionError
        end(settings, *given)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "end", stops)
        with pytest.raises(ZeroDivisionError):
            recipes.finetune_seeds(settings, [3, 7])
    finished = (tmp_path / "run" / "seed-3" / "results.json").stat()
    folder = recipes.finetune_seeds(settings, [3, 7], console=Console(file=told, width=200))
    assert (folder / "seed-3" / "results.json").stat() == finished
    values = [validation(folder / f"seed-{seed}")["loss"] for seed in (3, 7)]
    assert values[0] != values[1]
    found = json.loads((folder / "seeds.json").read_text())
    assert found["seeds"] == [3, 7]
    assert found["metrics"]["validation"]["loss"] == {
        "mean": pytest.approx(np.mean(values)),
        "standard_deviation": pytest.approx(np.std(values, ddof=1)),
        "n": 2,
        "values": values,
    }
    assert f"{np.mean(values):.4f} {np.std(values, ddof=1):.4f}" in re.sub(" +", " ", told.getvalue())
    assert not (folder / "settings.yaml").exists()
    with pytest.raises(InputError, match=r"seed-3 contains a single run; use another folder for several seeds\.$"):
        recipes.finetune_seeds(Settings.from_dict(tree | {"output": {"folder": str(folder / "seed-3")}}), [3, 7])


@pytest.mark.parametrize("text", ["", "1", "1,1", "1,-2", "1,b", "1,,2", "1.0,2", "1,99999999999"])
def test_seeds_that_are_refused(text):
    with pytest.raises(
        InputError, match=rf"^--seeds is '{re.escape(text)}'; expected at least two different whole numb"
    ):
        recipes.read_seeds(text)


def test_other_settings_in_a_run_s_folder_are_refused(tree):
    run(tree)
    tree["optimizer"] = {"learning_rate": 1e-3}
    with pytest.raises(InputError, match="contains a run with other settings") as error:
        run(tree)
    assert "optimizer.learning_rate: 2e-05, 0.001" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.slow
def test_more_steps_than_a_finished_run_had(tree, tmp_path):
    folder = run(tree)
    told = io.StringIO()
    recipes.finetune(Settings.from_dict(tree), console=Console(file=told, width=1000))
    assert f"to train this model further, set model.id={folder} as well" in told.getvalue()
    tree["training"]["epochs"] = 3
    with pytest.raises(InputError, match=rf"cannot be made longer.* set model\.id={folder} and another output\.folder"):
        run(tree)
    (folder / "results.json").unlink()  # a run that is not finished has no model to start from
    with pytest.raises(InputError, match=r"Use another folder, or the old settings\.$"):
        run(tree)
    # The model is trained further with its head, unless the labels differ or the head is to be new.
    tree["model"]["id"], tree["output"]["folder"] = str(folder), str(tmp_path / "further")
    trained = bert_jax.BertForSequenceClassification.from_pretrained(folder).classifier.weight[...]
    for change, kept in [({}, True), ({"new": [r"classifier\..*"]}, False)]:
        prepared = preparation.prepare(Settings.from_dict(tree | {"model": tree["model"] | change}))
        assert np.array_equal(prepared.model.classifier.weight[...], trained) == kept
        assert ("head: that of the checkpoint" in prepared.found) == kept
    tree["data"]["labels"] = ["no", "yes", "maybe"]
    prepared = preparation.prepare(Settings.from_dict(tree))
    assert prepared.model.classifier.weight.shape == (3, 16)
    assert "head" not in prepared.found


def test_a_run_that_stops_early_says_so(tree):
    tree["training"] |= {"epochs": 30, "patience": 1}
    tree["optimizer"] = {"learning_rate": 1e-12}
    told = io.StringIO()
    folder = recipes.finetune(Settings.from_dict(tree), console=Console(file=told))
    results = json.loads((folder / "results.json").read_text())
    why = "accuracy was not better in the last evaluation than at step 3"
    assert [results[name] for name in ("steps", "planned_steps", "stopped_early")] == [6, 90, why]
    assert f"stopped early at step 6 of 90: {why}" in told.getvalue()
    assert f"Step 3 of 6 (stopped early: {why})" in (folder / "README.md").read_text()


def test_a_folder_of_something_else_is_refused(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="contains other files"):
        run(tree)
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_a_folder_that_cannot_be_made(tree, tmp_path):
    (tmp_path / "file").write_text("")
    tree["output"]["folder"] = str(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="cannot write"):
        run(tree)


@pytest.mark.slow
def test_pairs_regression_and_several_labels(tree, tmp_path):
    rows = sentiments.rows(24)
    tree["data"]["train"] = write(tmp_path / "pairs.jsonl", [r | {"other": r["text"][::-1]} for r in rows])
    tree["data"]["validation"] = tree["data"]["train"]
    tree["data"]["text_pair"] = "other"
    tree["training"] = {"max_steps": 1, "batch_size": 16}
    assert json.loads((run(tree) / "results.json").read_text())["validation"].keys() >= {"accuracy", "matthews"}

    tree["data"]["train"] = write(
        tmp_path / "numbers.jsonl", [{"text": r["text"], "label": i / 7} for i, r in enumerate(rows)]
    )
    tree["data"] |= {"validation": tree["data"]["train"], "text_pair": None}
    tree["output"]["folder"] = str(tmp_path / "regression")
    tree["data"]["test"] = write(tmp_path / "unknown.jsonl", [{"text": r["text"]} for r in rows])
    folder = run(tree)
    assert json.loads((folder / "results.json").read_text())["test"] == {}
    assert "score" in (folder / "predictions.jsonl").read_text()
    tree["data"]["test"] = None
    assert json.loads((folder / "results.json").read_text())["validation"].keys() == {
        "loss",
        "pearson",
        "spearman",
        "mse",
    }
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"

    tree["data"]["train"] = write(
        tmp_path / "sets.jsonl", [{"text": r["text"], "labels": ["a", "b"][: i % 3]} for i, r in enumerate(rows)]
    )
    tree["data"]["validation"] = tree["data"]["train"]
    tree["output"]["folder"] = str(tmp_path / "sets")
    folder = run(tree)
    assert "f1_micro" in validation(folder)
    assert bert_jax.BertConfig.from_file(folder / "config.json").problem_type == "multi_label_classification"


def sets(tree, tmp_path):
    """Settings of a run with several labels a row; b is rare."""
    texts = [row["text"] for row in sentiments.rows(40)]
    rows = [{"text": text, "labels": ["a"] * (i % 2) + ["b"] * (i % 4 == 3)} for i, text in enumerate(texts)]
    tree["data"] |= {"train": write(tmp_path / "sets.jsonl", rows), "validation": str(tmp_path / "sets.jsonl")}
    return tree


def test_a_threshold_found_on_validation_is_used_from_then_on(tree, tmp_path):
    settings = Settings.from_dict(sets(tree, tmp_path) | {"decision": {"tune": True}, "training": {"max_steps": 2}})
    folder = recipes.finetune(settings)
    results = json.loads((folder / "results.json").read_text())
    threshold = results["validation"]["threshold"]
    assert threshold != 0.5
    assert results["validation"]["f1_micro"] == results["validation"]["best_f1_micro"]
    again = recipes.evaluate(str(folder), settings, "validation")
    assert again["f1_micro"] == results["validation"]["f1_micro"]
    for line in map(json.loads, (folder / "predictions.jsonl").read_text().splitlines()):
        scores = line["prediction"]["scores"]
        assert line["prediction"]["labels"] == [name for name, score in scores.items() if score > threshold]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_threshold(tree, tmp_path):
    changes = {"decision": {"tune": True}, "training": {"max_steps": 4, "evaluate_every": 1}}
    expected = validation(recipes.finetune(Settings.from_dict(sets(tree, tmp_path) | changes)))
    # As after a kill between the last checkpoint and the results: the outputs of the best evaluation are lost.
    (Path(tree["output"]["folder"]) / "results.json").unlink()
    assert validation(recipes.finetune(Settings.from_dict(tree | changes))) == expected
    assert expected["threshold"]


def test_a_threshold_that_no_run_has_found(tree, tmp_path):
    folder = run(sets(tree, tmp_path) | {"training": {"max_steps": 1}})
    (folder / "results.json").unlink()
    settings = Settings.from_dict(tree | {"decision": {"tune": True}})
    with pytest.raises(InputError, match=r"has no results.json with the threshold of a run. Set decision.threshold"):
        recipes.evaluate(str(folder), settings, "validation")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("balanced", [1.0, 3.0]), ({"b": 5.0, "a": 2.0}, [2.0, 5.0]), (None, None)],
)
def test_the_loss_of_the_settings(tree, tmp_path, weights, expected):
    settings = Settings.from_dict(sets(tree, tmp_path) | {"loss": {"class_weights": weights, "focal_gamma": 1}})
    prepared = preparation.prepare(settings)
    options = preparation.training_loss(settings, prepared.task, prepared.examples["train"]).keywords
    assert options.pop("focal_gamma") == 1
    if expected:
        np.testing.assert_array_equal(options.pop("class_weights"), expected)
    assert options == {}
    plain = Settings.from_dict(tree)
    assert preparation.training_loss(plain, prepared.task, prepared.examples["train"]) is None


def first_loss(tree):
    """The loss of the first training step of a run."""
    lines = (Path(tree["output"]["folder"]) / "metrics.jsonl").read_text().splitlines()
    return next(line["loss"] for line in map(json.loads, lines) if "loss" in line)


@pytest.mark.slow
def test_a_run_with_a_loss_of_the_settings(tree):
    tree |= {"training": {"max_steps": 1}}
    plain = validation(run(tree))["loss"]
    first = first_loss(tree)
    tree["output"] = {"folder": tree["output"]["folder"] + "-weighted"}
    tree["loss"] = {"class_weights": {"yes": 5, "no": 1}, "label_smoothing": 0.2}
    tree["optimizer"] = {"learning_rate": 1e-12}
    weighted = validation(run(tree))["loss"]
    assert weighted == pytest.approx(plain, abs=1e-3)  # the evaluation's loss has no weights
    assert abs(first_loss(tree) - first) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"class_weights": {"yes": 1.0}}}, "'no' is in only one of these lists"),
        ({"loss": {"class_weights": {"yes": 1.0, "no": 1, "maybe": 2}}}, "'maybe' is in only one of these lists"),
        ({"loss": {"class_weights": "balanced"}, "data": {"labels": ["no", "yes", "maybe"]}}, "label 'maybe' in no"),
        ({"decision": {"threshold": 0.3}}, "decision is for multi_label_classification"),
        ({"decision": {"tune": True}, "data": {"validation": None}}, "decision.tune requires data.validation"),
        ({"answers": {"n_best": 3}}, "The settings of answers are for question-answering"),
    ],
)
def test_options_of_losses_and_decisions_that_do_not_fit(tree, change, message):
    settings = Settings.from_dict(tree | change | {"data": tree["data"] | change.get("data", {})})
    with pytest.raises(InputError, match=re.escape(message)):
        recipes.finetune(settings)
    assert not Path(tree["output"]["folder"]).exists()


def test_a_regression_has_no_options_of_a_loss(tree, tmp_path):
    rows = [{"text": r["text"], "label": i / 7} for i, r in enumerate(sentiments.rows(24))]
    tree["data"] |= {"train": write(tmp_path / "numbers.jsonl", rows), "validation": None}
    with pytest.raises(InputError, match=r"loss\.label_smoothing is set, but regression has none"):
        recipes.finetune(Settings.from_dict(tree | {"loss": {"label_smoothing": 0.1}}))


# ── The order of labels ──


MRPC = ("not_equivalent", "equivalent")


def paraphrases():
    """Labels and predictions of 68 pairs: 43 of the equivalent and 5 of the others are right, 20 are wrong."""
    found = [(1, 1)] * 43 + [(0, 0)] * 5 + [(1, 0)] * 8 + [(0, 1)] * 12
    return np.array(found).T


def parquet(path, ids, names=MRPC):
    import datasets

    kinds = {"sentence1": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    rows = [{"sentence1": f"text {n}", "label": int(i)} for n, i in enumerate(ids)]
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("hub_id", [False, True])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_f1_of_mrpc_is_that_of_the_equivalent(tree, tmp_path, hub_id, split):
    """By the order of ClassLabel; sorted names gave 0.3333, that of the pairs that are not equivalent."""
    labels, predictions = paraphrases()
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / f"{split}.parquet", labels)
    place = (
        {"id": str(tmp_path / "data"), split: split} if hub_id else {split: str(tmp_path / "data" / f"{split}.parquet")}
    )
    settings = Settings.from_dict(tree | {"data": {"max_length": 32} | place})
    loaded = preparation.read_split(settings, split)
    assert loaded.labels == MRPC
    fields = registry.TASKS[settings.task].config(loaded.rows, settings.data, loaded.labels)
    task = preparation.make_task(settings, bert_jax.Tokenizer.from_pretrained(settings.model.id),
                             bert_jax.BertConfig().replace(**fields))  # fmt: skip
    scores = np.array([[name == MRPC[p] for name in task.labels] for p in predictions], float)
    found = task.evaluate({"scores": scores}, task.featurize(loaded.rows))
    assert (round(found["f1"], 4), found["f1_label"]) == (0.8113, "equivalent")
    assert round(found["per_class"]["not_equivalent"]["f1"], 4) == 0.3333


@pytest.mark.slow
def test_a_run_keeps_the_order_of_class_ids(tree, tmp_path):
    labels, _ = paraphrases()
    for split in ("train", "validation"):
        tree["data"][split] = parquet(tmp_path / f"{split}.parquet", labels)
    tree["training"] = {"max_steps": 1, "batch_size": 16, "metric": "f1"}
    told = io.StringIO()
    folder = recipes.finetune(Settings.from_dict(tree), console=Console(file=told))
    assert bert_jax.BertConfig.from_file(folder / "config.json").id2label == MRPC
    assert validation(folder)["f1_label"] == "equivalent"
    assert "f1 of equivalent 0." in told.getvalue()
    assert "| f1 of equivalent |" in (folder / "README.md").read_text()

    # A model of another order, as sorted names made it, is refused where the order matters.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": MRPC[1], "1": MRPC[0]}, "label2id": {MRPC[1]: 0, MRPC[0]: 1}}
    (other / "config.json").write_text(json.dumps(config))
    for order in (None, list(MRPC)):
        tree["data"]["labels"] = order
        with pytest.raises(
            InputError, match=r"Set data\.labels='\[equivalent, not_equivalent\]' to keep the order of the model"
        ):
            recipes.evaluate(str(other), Settings.from_dict(tree), "validation")
    tree["data"]["labels"] = [MRPC[1], MRPC[0]]
    assert recipes.evaluate(str(other), Settings.from_dict(tree), "validation")["f1_label"] == "not_equivalent"
    # To go on from it is as well, unless the order is given.
    tree |= {"model": {"id": str(other)}, "output": {"folder": str(tmp_path / "again")}}
    tree["data"]["labels"] = None
    with pytest.raises(
        InputError, match=r"are, in the order of their ids, equivalent, not_equivalent, but those of the data"
    ):
        run(tree)
    tree["data"]["labels"] = list(MRPC)
    assert bert_jax.BertConfig.from_file(run(tree) / "config.json").id2label == MRPC
    # Other labels, or a model of another task, are.
    tree["output"]["folder"], tree["data"]["labels"] = str(tmp_path / "more"), None
    tree["data"] |= {"train": parquet(tmp_path / "t.parquet", labels, ("no", "yes")), "validation": None}
    assert bert_jax.BertConfig.from_file(run(tree) / "config.json").id2label == ("no", "yes")


def test_files_whose_class_ids_differ(tree, tmp_path):
    a, b = (parquet(tmp_path / f"{n}.parquet", [0, 1], names) for n, names in enumerate((MRPC, MRPC[::-1])))
    tree["data"] |= {"train": [a, b], "validation": None}
    with pytest.raises(
        InputError,
        match=r"mean not_equivalent, equivalent in .*, but equivalent, not_equivalent in .* Set data\.labels",
    ):
        run(tree)
    settings = Settings.from_dict(tree | {"data": tree["data"] | {"labels": MRPC}})
    assert [row["label"] for row in preparation.read_split(settings, "train").rows] == [*MRPC, *MRPC[::-1]]
    mixed = [a, write(tmp_path / "c.jsonl", [{"sentence1": "x", "label": "equivalent"}])]
    found = preparation.read_split(Settings.from_dict(tree | {"data": {"train": mixed}}), "train")
    assert (len(found.rows), found.labels) == (3, MRPC)


def test_labels_without_names_get_those_that_are_given(tree, tmp_path, base):
    model = tmp_path / "unnamed"
    config = bert_jax.BertConfig.from_file(base / "config.json")
    bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0)).save_pretrained(model)
    bert_jax.Tokenizer.from_pretrained(base).save_pretrained(model)
    with pytest.raises(InputError, match=r"unknown; the model has LABEL_0, LABEL_1; set data\.labels to name them"):
        recipes.evaluate(str(model), Settings.from_dict(tree), "validation")
    found = {}
    for names in (("no", "yes"), ("yes", "no")):
        tree["data"]["labels"] = names
        metrics = recipes.evaluate(str(model), Settings.from_dict(tree), "validation")
        assert metrics["f1_label"] == names[1]
        found[names] = metrics["accuracy"]
    assert sum(found.values()) == pytest.approx(1)
    tree["data"]["labels"] = ["no", "yes", "maybe"]
    with pytest.raises(InputError, match=r"data\.labels has 3 names; the model has 2 labels, LABEL_0, LABEL_1\."):
        recipes.evaluate(str(model), Settings.from_dict(tree), "validation")


@pytest.mark.slow
def test_vectors_from_a_table_to_a_model(tree, tmp_path):
    rows = [f'"good {n}","[{n % 2} {n % 3 // 2} 0]"' for n in range(24)]
    (tmp_path / "vectors.csv").write_text("\n".join(["text,label", *rows]))
    tree["data"] |= {"train": str(tmp_path / "vectors.csv"), "validation": str(tmp_path / "vectors.csv")}
    tree["training"] = {"max_steps": 1, "batch_size": 16}
    folder = run(tree)
    config = bert_jax.BertConfig.from_file(folder / "config.json")
    assert (config.problem_type, config.labels) == ("multi_label_classification", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert [entry["support"] for entry in validation(folder)["per_class"].values()] == [12, 8, 0]
    again = recipes.evaluate(str(folder), Settings.from_dict(tree), "validation")
    assert again["per_class"] == validation(folder)["per_class"]
    # Places have the names of the settings, whatever the order of the model's.
    tree["data"]["labels"], tree["output"]["folder"] = ["a", "b", "c"], str(tmp_path / "named")
    folder = run(tree)
    before = validation(folder)["per_class"]
    assert {name: entry["support"] for name, entry in before.items()} == {"a": 12, "b": 8, "c": 0}
    tree["data"]["labels"] = ["b", "a", "c"]
    (tmp_path / "vectors.csv").write_text(
        "\n".join(["text,label", *(f"{r[:-7]}{r[-5]} {r[-7]}{r[-4:]}" for r in rows)])
    )
    assert recipes.evaluate(str(folder), Settings.from_dict(tree), "validation")["per_class"] == before


def test_impossible_questions_of_rows(tree, tmp_path):
    row = {"question": "Where?", "context": "In Rome.", "answers": {"text": ["Rome"], "answer_start": [3]}}
    path = write(tmp_path / "q.jsonl", [row | {"is_impossible": True}, row | {"is_impossible": False}, row])
    settings = Settings.from_dict(tree | {"task": "question-answering", "data": {"train": path}})
    rows = preparation.read_split(settings, "train").rows
    found, _ = registry.TASKS[settings.task].clean({"train": rows}, preparation.read_options(settings))
    assert [entry["answers"]["text"] for entry in found["train"]] == [[], ["Rome"], ["Rome"]]


@pytest.mark.slow
def test_lora_is_saved_merged_and_apart(tree, tmp_path):
    tree["model"] = {"id": str(save_model(tmp_path / "two", layers=2)), "lora": {"rank": 2, "alpha": 3}}
    folder = run(tree | {"optimizer": {"learning_rate": 1e-2}})
    adapters = load_file(folder / "adapters" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in adapters
    assert len(adapters) == 2 * 2 * 2 + 2
    merged = bert_jax.BertForSequenceClassification.from_pretrained(folder)
    name = "bert.encoder.layer.0.attention.self.query"
    a, b = (adapters[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    before = load_file(Path(tree["model"]["id"]) / "model.safetensors")[f"{name}.weight"]
    assert np.abs(b @ a).max() > 1e-3
    np.testing.assert_allclose(merged.bert.layers[0].attention.query.weight[...], before + 3 / 2 * b @ a, atol=1e-6)

    # The folder of the adapters is a model as well: its weights are those of the base, with the adapters merged.
    place = folder / "adapters"
    settings = Settings.from_dict(tree | {"model": {"id": str(place), "lora": {"rank": 2}}})
    with pytest.raises(InputError, match=re.escape(f"model.lora is set, but {place} contains adapters")):
        preparation.prepare(settings)
    shown = CliRunner().invoke(app, ["info", str(place)])
    assert isinstance(shown.exception, InputError)
    assert "contains adapters. Show the model of the run instead" in str(shown.exception)
    assert not (place / "model.safetensors").exists()
    loaded = bert_jax.BertForSequenceClassification.from_pretrained(place, mesh=sharding.mesh(data=1, fsdp=2, tensor=2))
    expected, found = (tree_module.flatten(tree_module.split(model)[0]) for model in (merged, loaded))
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6, err_msg=path)
    texts = ["good", "bad and dull"]
    one, other = (bert_jax.pipeline("text-classification", model)(texts) for model in (folder, place))
    assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
    assert {entry["label"] for entry in other} <= {"no", "yes"}
    np.testing.assert_allclose([entry["score"] for entry in one], [entry["score"] for entry in other], atol=1e-6)
    new = bert_jax.BertForSequenceClassification.from_pretrained(place, new=[r"classifier\..*"], rngs=nnx.Rngs(5))
    assert np.abs(new.classifier.weight[...] - merged.classifier.weight[...]).max() > 1e-3
    with pytest.raises(
        InputError, match=r"adapters contains adapters, which are merged in float32; expected dtype='floa"
    ):
        bert_jax.BertForSequenceClassification.from_pretrained(place, dtype="int8")
    shutil.rmtree(tree["model"]["id"])
    with pytest.raises(ModelNotFoundError, match=r"^The base model of the adapters in .*adapters is missing: "):
        bert_jax.BertForSequenceClassification.from_pretrained(place)
    (place / "merged_config.json").unlink()  # as peft writes adapters
    with pytest.raises(
        ModelNotFoundError, match=r"then call bert_jax\.lora\.load_adapters\(Path\('.*adapters'\), model\)\.$"
    ):
        bert_jax.BertForSequenceClassification.from_pretrained(place)


def test_top_layers_drawn_anew(tree, tmp_path):
    tree["model"] = {"id": str(save_model(tmp_path / "two", layers=2)), "new": [r"bert\.layers\.1\..*"]}
    prepared = preparation.prepare(Settings.from_dict(tree))
    stored = load_file(Path(tree["model"]["id"]) / "model.safetensors")
    weights = [layer.attention.query.weight[...] for layer in prepared.model.bert.layers]
    names = [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2)]
    assert np.array_equal(weights[0], stored[names[0]])
    assert not np.array_equal(weights[1], stored[names[1]])


def test_a_dry_run_says_what_would_happen(tree, tmp_path):
    report = recipes.dry_run(Settings.from_dict(tree))
    for part in [
        "learning_rate: 2.0e-05",
        "[CLS]",
        "labels: no, yes",
        "6 steps, 3 per epoch",
        "MB: state and batch",
        "MB: libraries, data, model and programs",
        "temporaries of a step of [",
        "temporaries of an evaluation of [",
        "no_decay",
    ]:
        assert part in report
    total, *counted = re.findall(r"([\d,]+) MB", report[report.index("memory of the process") :])[:4]
    assert abs(int(total.replace(",", "")) - sum(int(size.replace(",", "")) for size in counted)) <= 3  # rounded each
    assert not (tmp_path / "run").exists()


# ── Refused ──


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"attention": "splash"}, "'splash', which is a fused kernel for TPUs; these devices are cpu"),
        (
            "model",
            {"attention": "flash"},
            "model.attention: Input should be 'plain', 'auto', 'splash', 'triton' or 'cudnn', got 'flash'",
        ),
        ("mesh", {"data": 9}, "mesh is {data: 9, fsdp: 1, tensor: 1}; there are 8 devices"),
        ("training", {"metric": "bleu"}, "metric is 'bleu'; expected one of loss, accuracy"),
    ],
)
def test_settings_that_do_not_fit(tree, section, change, message):
    tree[section] = tree.get(section, {}) | change
    with pytest.raises(InputError, match=message):
        run(tree)
    assert not Path(tree["output"]["folder"]).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "data.train is not set"),
        ({"train": "nowhere.jsonl"}, "Cannot read nowhere.jsonl: No such file"),
        (
            {"test": "test"},
            r"data\.test: there is no file 'test'. For a split of .* set data\.id; for none, data\.test=null",
        ),
        (
            {"id": "dair-ai/emotion"},
            r"data\.train is the file .*, but data\.id is dair-ai/emotion; for files, set data\.id=null",
        ),
        ({"text": "body"}, r"data.train .*There is no column 'body'; the columns are 'text', 'label'"),
        ({"label": "mood"}, "There is no column 'mood'"),
        ({"labels": ["no", "maybe"]}, "data.train: row .*the label 'yes' is unknown; the labels are no, maybe"),
        ({"max_length": 1000}, "data.max_length is 1000; the model has 512 positions"),
    ],
)
def test_data_that_cannot_be_used(tree, change, message):
    tree["data"] |= change
    with pytest.raises(InputError, match=message):
        run(tree)
    assert not Path(tree["output"]["folder"]).exists()


def test_splits_that_cannot_be_used(tree, tmp_path):
    tree["data"]["validation"] = write(
        tmp_path / "v.jsonl", [{"text": "good", "label": "yes"}, {"text": "bad", "label": "never"}]
    )
    with pytest.raises(
        InputError, match=r"data.validation: row 2: the label 'never' is unknown; the labels are no, yes"
    ):
        run(tree)
    tree["data"]["validation"] = write(tmp_path / "v.jsonl", [])
    with pytest.raises(InputError, match=r"data.validation .* has no examples"):
        run(tree)
    del tree["data"]["validation"]
    tree["data"]["train"] = write(tmp_path / "t.jsonl", [{"text": "good", "label": "yes"}] * 3)
    with pytest.raises(InputError, match="expected at least 2"):
        run(tree)
    tree["data"]["train"] = write(tmp_path / "t.jsonl", [{"text": "good", "mood": "yes"}] * 3)
    with pytest.raises(InputError, match=r"has no column for the label; the columns are text, mood\. Set data\.label"):
        run(tree)
    with pytest.raises(InputError, match=r"data.test is not set"):
        recipes.evaluate(tree["model"]["id"], Settings.from_dict(tree), "test")


def test_labels_are_not_taken_for_markup(tree, tmp_path):
    tree["data"] |= {
        "train": write(tmp_path / "tags.jsonl", [{"text": "a", "label": "[/s]"}, {"text": "b", "label": "s"}])
    }
    tree["data"]["validation"], tree["training"] = None, {"max_steps": 1}
    told = io.StringIO()
    recipes.finetune(Settings.from_dict(tree), console=Console(file=told))
    assert "labels: [/s], s" in told.getvalue()


def test_patience_without_validation_is_refused(tree):
    tree["data"]["validation"], tree["training"]["patience"] = None, 2
    with pytest.raises(InputError, match=r"training\.patience counts evaluations; set data\.validation"):
        run(tree)
    assert not Path(tree["output"]["folder"]).exists()


def test_columns_that_the_first_row_lacks(tree, tmp_path):
    rows = [{"text": "good"}, *sentiments.rows(12)]
    tree["data"]["validation"] = write(tmp_path / "v.jsonl", rows)
    found = preparation.read_split(Settings.from_dict(tree), "validation").rows
    assert [row["label"] for row in found] == [row.get("label") for row in rows]


def test_a_run_of_another_kind_is_named(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text("task: pretraining\n")
    with pytest.raises(InputError, match="contains a run of another kind, or of an earlier version; use a new folder"):
        run(tree)


def test_validation_without_labels_is_refused_before_a_step(tree, tmp_path):
    tree["data"]["validation"] = write(tmp_path / "v.jsonl", [{"text": "good"}, {"text": "bad"}])
    with pytest.raises(InputError, match=r"data\.validation .* has no labels to choose the best checkpoint by"):
        run(tree)
    assert not Path(tree["output"]["folder"]).exists()
    tree["data"] |= {"validation": None, "test": tree["data"]["validation"]}
    tree["training"] = {"max_steps": 1}
    folder = run(tree)
    with pytest.raises(InputError, match=r"data\.test has no labels; expected some. Use `bert-jax predict`"):
        recipes.evaluate(str(folder), Settings.from_dict(tree), "test")


def test_a_body_without_a_pooler_says_how_to_draw_one(tree, base, tmp_path):
    bert_jax.BertForMaskedLM.from_pretrained(base).save_pretrained(tmp_path / "mlm")
    for name in hub.TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copy(base / name, tmp_path / "mlm")
    tree["model"]["id"] = str(tmp_path / "mlm")
    with pytest.raises(CheckpointError, match=r"To reinitialize .*, pass new=\[r'bert\\.pooler\\\.\.\*'\]"):
        run(tree)
    tree["model"]["new"] = [r"bert\.pooler\..*"]
    tree["training"] = {"max_steps": 1}
    run(tree)


# ── The command line ──


def command(*arguments, **options):
    script = [sys.executable, "-m", "bert_jax.cli", *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_the_command_line(tree, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(tree))  # JSON is YAML
    wrong = command("finetune", str(tmp_path / "run.yaml"), "training.epoch=1")
    assert wrong.returncode == 2
    assert "training.epoch: there is no such setting; did you mean epochs?" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    done = command("finetune", str(tmp_path / "run.yaml"), "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "40 train, 12 validation" in done.stdout
    metrics = command("evaluate", str(tmp_path / "run"), str(tmp_path / "run.yaml"), "--json")
    assert json.loads(metrics.stdout)["per_class"].keys() == {"no", "yes"}


@pytest.mark.slow
def test_the_script(tree, tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "finetune.py"
    data = [tree["data"]["train"], tree["data"]["validation"]]
    arguments = [sys.executable, str(script), *data, str(tmp_path / "mine"), tree["model"]["id"]]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bert_jax.pipeline("text-classification", tmp_path / "mine")("good")["label"] in ("no", "yes")


@pytest.mark.slow
def test_names(tree, tmp_path):
    """Token classification, from CoNLL columns to a model that answers."""
    lines = []
    for n in range(60):
        person, place = ("Anna", "Peter", "Mary")[n % 3], ("Paris", "Rome", "Berlin")[n // 3 % 3]
        lines.append(f"{person} I-PER\nwent O\nto O\n{place} I-LOC\n. O\n")
    for name, part in (("train", lines[:48]), ("validation", lines[48:])):
        (tmp_path / f"{name}.conll").write_text("\n".join(part))
        tree["data"][name] = str(tmp_path / f"{name}.conll")
    tree |= {"task": "token-classification", "optimizer": {"learning_rate": 2e-2}}
    tree["data"]["max_length"] = 8  # two windows a sentence or more
    tree["training"] = {"epochs": 12, "batch_size": 16, "metric": "f1"}
    overview = recipes.dry_run(Settings.from_dict(tree))
    assert "tags: IOB1, read as IOB2" in overview
    assert "labels: O, B-LOC, I-LOC, B-PER, I-PER" in overview
    folder = run(tree)
    results = validation(folder)
    assert results["f1"] == 1.0
    assert results["per_class"]["PER"]["support"] == 12
    assert recipes.evaluate(str(folder), Settings.from_dict(tree), "validation")["f1"] == 1.0
    first = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    assert first["prediction"]["tags"] == ["B-PER", "O", "O", "B-LOC", "O"]
    found = bert_jax.pipeline("token-classification", folder)("Mary went to Rome .", aggregation_strategy="first")
    assert [(entity["entity_group"], entity["word"]) for entity in found] == [("PER", "Mary"), ("LOC", "Rome")]


@pytest.mark.slow
@pytest.mark.parametrize("unanswerable", [True, False])
def test_answers(tree, tmp_path, unanswerable):
    """Question answering, from SQuAD's form to a model that answers."""
    questions = []
    for n in range(60):
        person, place = ("Anna", "Peter", "Mary")[n % 3], ("Paris", "Rome", "Berlin")[n // 3 % 3]
        context = f"{person} went to {place}."
        entry = {
            "id": f"q{n}",
            "question": "Where?",
            "answers": [{"text": place, "answer_start": context.index(place)}],
        }
        if unanswerable and n % 4 == 3:
            entry |= {"question": "Why not?", "answers": []}
        questions.append({"context": context, "qas": [entry]})
    for name, part in (("train", questions[:48]), ("validation", questions[48:])):
        content = {"version": "x", "data": [{"title": "t", "paragraphs": part}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        tree["data"][name] = str(tmp_path / f"{name}.json")
    tree |= {"task": "question-answering", "optimizer": {"learning_rate": 2e-2}}
    tree["answers"] = {"unanswerable": unanswerable, "stride": 4}
    tree["training"] = {"epochs": 15, "batch_size": 16, "metric": "best_f1"}
    assert "tokens: [CLS] Where ?" in recipes.dry_run(Settings.from_dict(tree))
    folder = run(tree)
    results = validation(folder)
    assert results["best_f1"] == 1.0
    assert ("no_answer_f1" in results) == unanswerable
    answers = json.loads((folder / "answers.json").read_text())
    assert list(answers) == [f"q{n}" for n in range(48, 60)]
    again = recipes.evaluate(str(folder), Settings.from_dict(tree), "validation")  # at the threshold found
    assert {name: again[name] for name in again if name != "loss"} == {
        name: results[name] for name in results if name != "loss"
    }
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    expected = [row["answers"]["text"][0] if row["answers"]["text"] else "" for row in rows]
    assert [row["prediction"]["answer"] for row in rows] == expected
    found = bert_jax.pipeline("question-answering", folder)(("Where?", "Mary went to Rome."))
    assert found["answer"].rstrip(".") == "Rome"


# ── Pretraining ──


TEXTS = [
    f"The {n}th house stands here. It is {'big ' * (n % 5)}.\nNobody lives in house {n}. Why is that?"
    for n in range(40)
]


@pytest.fixture
def pretraining(base, tmp_path):
    """Settings of a run of a few steps."""
    (tmp_path / "train.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "validation.txt").write_text("\n\n".join(TEXTS[::3]))
    return {
        "task": "pretraining",
        "model": {"id": str(base)},
        "data": {name: str(tmp_path / f"{name}.txt") for name in ("train", "validation")}
        | {"max_length": 32, "processes": 1},
        "training": {"max_steps": 4, "batch_size": 8, "evaluate_every": 2},
        "mesh": {"data": 1},
        "output": {"folder": str(tmp_path / "run")},
    }


def pretrain(tree):
    return recipes.pretrain(Pretraining.from_dict(tree))


@pytest.mark.parametrize("next_sentence", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pretraining_leaves_a_model_that_fills_masks(pretraining, next_sentence):
    pretraining["data"]["next_sentence"] = next_sentence
    folder = pretrain(pretraining)
    found = validation(folder)
    assert found.keys() >= {"loss", "mlm_loss", "mlm_accuracy", "pseudo_perplexity"}
    assert ("nsp_accuracy" in found) == next_sentence
    assert found["loss"] == pytest.approx(found["mlm_loss"] + found.get("nsp_loss", 0.0), rel=1e-2)
    assert bert_jax.pipeline("fill-mask", folder)("The house is [MASK].", top_k=2)[1]["score"] > 0
    stored = load_file(folder / "model.safetensors")
    assert ("cls.seq_relationship.weight" in stored) == next_sentence
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "pretrained on" in card
    weights = (folder / "model.safetensors").stat()
    assert pretrain(pretraining) == folder
    assert (folder / "model.safetensors").stat() == weights


@pytest.mark.slow
def test_pretraining_a_new_network(pretraining, base):
    pretraining["model"] = {"tokenizer": str(base)}
    with pytest.raises(ConfigError, match="layers"):
        pretrain(pretraining | {"model": {"tokenizer": str(base), "config": {"layers": 2}}})
    pretraining["model"]["config"] = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    }  # fmt: skip
    assert bert_jax.BertForPreTraining.from_pretrained(pretrain(pretraining)).config.num_hidden_layers == 1
    with pytest.raises(InputError, match=r"model.tokenizer is not set"):
        pretrain(pretraining | {"model": {}, "output": {"folder": f"{base}.other"}})


@pytest.mark.slow
def test_pretraining_with_another_vocabulary(pretraining, base, tmp_path):
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "config.json").write_text("{}")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "house", "House", "houseboatman", ".", "##s", "The", "here"]
    (tmp_path / "vocabulary" / "vocab.txt").write_text("\n".join(pieces))
    pretraining["model"] |= {"tokenizer": str(tmp_path / "vocabulary"), "new": [r"predictions\..*"]}
    settings = Pretraining.from_dict(pretraining)
    tokenizer = bert_jax.Tokenizer.from_pretrained(tmp_path / "vocabulary")
    model, notes = pretraining_recipe.starting_model(settings, tokenizer, bert_jax.BertForPreTraining)
    assert "11 copied, 0 copied from lower case, 1 averaged over old pieces, 0 averaged over all" in notes
    assert model.config.vocab_size == len(pieces)
    before = bert_jax.BertForPreTraining.from_pretrained(base)
    old = bert_jax.Tokenizer.from_pretrained(base)
    rows, old_rows = (m.bert.embeddings.word_embeddings.weight[...] for m in (model, before))
    np.testing.assert_array_equal(rows[6], old_rows[old.token_to_id("House")])
    np.testing.assert_array_equal(model.predictions.transform.weight[...], np.eye(16))
    assert bert_jax.BertConfig.from_file(pretrain(pretraining) / "config.json").vocab_size == len(pieces)


def test_tables_of_other_kinds(tree, tmp_path):
    (tmp_path / "rows.csv").write_text('"good; ""very"" good";yes\nbad;no\n')
    tree["data"] |= {"train": str(tmp_path / "rows.csv"), "validation": None, "delimiter": ";"}
    tree["data"]["columns"] = ["text", "label"]
    split = preparation.read_split(Settings.from_dict(tree), "train")
    assert [row["text"] for row in split.rows] == ['good; "very" good', "bad"]
    tree["data"]["quoting"] = "none"
    with pytest.raises(InputError, match="the number of fields is 3; the list of columns has 2"):
        preparation.read_split(Settings.from_dict(tree), "train")
    tree["data"]["id"] = "owner/name"
    tree["data"]["train"] = "train"
    with pytest.raises(InputError, match=r"data.columns are for files, but data.id is owner/name"):
        preparation.read_split(Settings.from_dict(tree), "train")


@pytest.mark.slow
def test_added_tokens(tree):
    tree["model"]["add_tokens"] = ["[E1]", "[E2]"]
    rows = [row | {"text": f"[E1] {row['text']}"} for row in sentiments.rows(40)]
    Path(tree["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = preparation.prepare(Settings.from_dict(tree))
    assert {int(ids[1]) for ids in prepared.examples["train"].input_ids} == {28996}
    table = np.asarray(prepared.model.encoder.embeddings.word_embeddings.weight[...])
    assert table.shape == (28998, 16)
    np.testing.assert_array_equal(table[28996], table[28997])
    folder = run(tree)
    tokenizer, model = (c.from_pretrained(folder) for c in (bert_jax.Tokenizer, bert_jax.BertForSequenceClassification))
    assert tokenizer.token_to_id("[E2]") == 28997
    assert model.config.vocab_size == 28998
    trained = np.asarray(model.encoder.embeddings.word_embeddings.weight[...])
    assert not np.array_equal(trained[28996], trained[28997])  # only [E1] is in the texts
    metrics = recipes.evaluate(str(folder), Settings.from_dict(tree), "validation")
    assert metrics["loss"] == pytest.approx(validation(folder)["loss"])


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("model", {"add_tokens": ["[E1]"], "lora": {}}, "with model.lora, embeddings are neither trained nor saved"),
        ("model", {"add_tokens": [" "]}, "expected a list of strings that are not blank"),
        ("optimizer", {"frozen": [r"bert\.embeddings\..*"]}, "optimizer.frozen matches bert.embeddings.word_emb"),
    ],
)
def test_added_tokens_that_would_not_be_trained(tree, section, settings, message):
    tree["model"]["add_tokens"] = ["[E1]"]
    tree[section] = tree.get(section, {}) | settings
    with pytest.raises(InputError, match=message):
        run(tree)


@pytest.mark.slow
def test_pretraining_with_added_tokens(pretraining, base):
    pretraining["model"]["add_tokens"] = ["neurotransmitter"]
    folder = pretrain(pretraining)
    model, before = (bert_jax.BertForPreTraining.from_pretrained(place) for place in (folder, base))
    assert model.config.vocab_size == before.config.vocab_size + 1
    assert bert_jax.Tokenizer.from_pretrained(folder).token_to_id("neurotransmitter") == 28996


@pytest.mark.slow
def test_pretraining_refuses(pretraining, base, tmp_path):
    pretraining["data"]["max_length"] = 1000
    with pytest.raises(InputError, match=r"data.max_length is 1000; the model has 512 positions"):
        pretrain(pretraining)
    pretraining["data"]["max_length"] = 32
    (tmp_path / "train.txt").write_bytes(b"One document. \xff Of some sentences. And one more.")
    pretraining["data"]["shards"] = str(tmp_path / "shards")
    with pytest.raises(InputError, match=r"Pairs need two documents.*data.next_sentence=false"):
        pretrain(pretraining)
    assert not Path(pretraining["output"]["folder"]).exists()
    pretraining["data"] |= {"next_sentence": False, "shards": str(tmp_path / "shards2")}
    console = Console(file=io.StringIO(), width=200)
    recipes.pretrain(Pretraining.from_dict(pretraining), console=console)
    assert "data.train: 1 characters are not UTF-8 and were replaced by U+FFFD" in console.file.getvalue()


@pytest.mark.slow
def test_the_command_line_pretrains(pretraining, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(pretraining))
    wrong = command("pretrain", str(tmp_path / "run.yaml"), "data.masked.mots=3")
    assert (wrong.returncode, "did you mean most?" in wrong.stderr) == (2, True)
    done = command("pretrain", str(tmp_path / "run.yaml"), "data.processes=2", "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "step 2: loss" in done.stdout


@pytest.mark.slow
def test_sixty_four_examples_are_learnt_by_heart(pretraining, tmp_path):
    """Masks that are drawn once, a constant rate: both losses go to nothing."""
    texts = "\n\n".join(f"{name} {does} the {thing}.\nThen {name} slept." for name in ("Anna", "Peter", "Mary", "John")
                       for does in ("sees", "takes") for thing in ("house", "boat", "dog", "book"))  # fmt: skip
    (tmp_path / "train.txt").write_text(texts)
    pretraining["model"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = Pretraining.from_dict(pretraining)
    tokenizer = bert_jax.Tokenizer.from_pretrained(pretraining["model"]["id"])
    examples = pretraining_recipe.read_corpus(settings, "train", tokenizer, Console(quiet=True))
    fixed = Loader(examples, 64, seed=0, packing=64).batch_at(0)
    config = bert_jax.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    params, skeleton = tree_module.split(bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(0)))
    optimizer, task = optax.adam(1e-2), PreTraining()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: task.loss(tree_module.merge(skeleton, p), fixed, None)[0])(
            params
        )
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(150):
        params, state, _ = step(params, state)
    outputs = task.outputs(tree_module.merge(skeleton, params), fixed)
    weights = fixed["weights"]
    assert float((outputs["mlm_nll"] * weights).sum() / (outputs["masked"] * weights).sum()) < 0.05
    assert float((outputs["nsp_correct"] * weights).sum()) == weights.sum()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["finetune", "pretrain"])
def test_killed_at_random_moments_it_ends_bit_for_bit(tree, pretraining, tmp_path, task):
    """SIGKILL, again and again, the same command each time."""
    kills = int(os.environ.get("BERT_JAX_KILLS", "5"))
    tree = tree if task == "finetune" else pretraining
    tree["training"] = {"max_steps": 400, "batch_size": 8, "save_every": 10, "evaluate_every": 100, "keep": 2}
    tree["output"]["report_to"] = []
    environment = os.environ | {"XLA_FLAGS": "", "BERT_JAX_COMPILATION_CACHE": str(tmp_path / "cache")}  # as users' are
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    arguments = [sys.executable, "-m", "bert_jax.cli", task, str(tmp_path / "run.yaml")]
    unbroken = command(task, str(tmp_path / "run.yaml"), f"output.folder={tmp_path}/unbroken", env=environment)
    assert unbroken.returncode == 0, unbroken.stderr
    moment, killed = random.Random(0), 0
    journal = tmp_path / "run" / "metrics.jsonl"
    while killed < kills and not (tmp_path / "run" / "results.json").exists():
        size = journal.stat().st_size if journal.exists() else 0
        child = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while child.poll() is None and (not journal.exists() or journal.stat().st_size == size):
            time.sleep(0.01)  # until it trains
        time.sleep(moment.uniform(0, 1.5))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    last = command(task, str(tmp_path / "run.yaml"), env=environment)
    assert last.returncode == 0, last.stderr
    assert killed == kills
    names = ["model.safetensors", "predictions.jsonl"] if task == "finetune" else ["model.safetensors"]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
