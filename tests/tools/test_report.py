import re

import hub_server
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from matplotlib.colors import to_hex

from bert_jax.recipes import runs
from bert_jax.settings import Pretraining, Settings
from bert_jax.tasks.registry import TRAINABLE
from bert_jax.tools import report

JOURNAL = [
    {"step": 0, "validation": {"loss": 2.5, "accuracy": 0.25}},
    {"step": 10, "loss": 2.0, "learning_rate": 1e-5},
    {"step": 20, "loss": 1.5, "learning_rate": 2e-5},
    {"step": 25, "validation": {"loss": 1.6, "accuracy": 0.5}},
    {"step": 30, "loss": 1.0, "learning_rate": 1e-5},
    {"step": 50, "validation": {"loss": 1.2, "accuracy": 0.75}},
]
METRICS = {
    "loss": 0.5,
    "accuracy": 0.75,
    "per_class": {
        "joy": {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2},
        "anger": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 12},
    },
    "confusion": [[1, 1], [0, 12]],
}
RESULTS = {
    "step": 25, "steps": 50, "seconds": 12.4, "device": "8 × cpu", "versions": {"bert-jax": "0.9", "jax": "1.2"},
    "validation": METRICS,
}  # fmt: skip


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


# ── The curve ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_learning_curve():
    figure = report.learning_curve(JOURNAL, "accuracy", best=50)
    left, right = figure.axes
    losses = lines(left)
    assert losses.keys() == {"training loss", "validation loss", "best: step 50"}
    np.testing.assert_array_equal(losses["best: step 50"][:, 0], [50, 50])
    np.testing.assert_array_equal(losses["training loss"], [[10, 2.0], [20, 1.5], [30, 1.0]])
    np.testing.assert_array_equal(losses["validation loss"], [[0, 2.5], [25, 1.6], [50, 1.2]])
    np.testing.assert_array_equal(lines(right)["validation accuracy"], [[0, 0.25], [25, 0.5], [50, 0.75]])
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("step", "loss (nats)", "validation accuracy")
    assert right.yaxis.get_major_formatter()(0.5) == "50%"
    assert right.get_ylim() == (0, 1.02)  # small differences look small
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4


def test_learning_curve_of_a_regression():
    journal = [line | {"validation": {"loss": 1.0, "mse": 1.0}} for line in JOURNAL]
    left, right = report.learning_curve(journal, "mse", unit="squared unit of the labels").axes
    assert (left.get_ylabel(), right.get_ylabel()) == (
        "loss (squared unit of the labels)",
        "validation mse (squared unit of the labels)",
    )
    assert right.yaxis.get_major_formatter()(0.5) != "50%"


def test_learning_curve_where_the_metric_is_the_loss():
    (axes,) = report.learning_curve(JOURNAL, "loss").axes
    assert lines(axes).keys() == {"training loss", "validation loss"}


@pytest.mark.parametrize("journal", [[], JOURNAL[1:3]])
def test_learning_curve_without_validation(journal, tmp_path):
    figure = report.learning_curve(journal, "accuracy")
    assert lines(figure.axes[0]).keys() == {"training loss"}
    figure.savefig(tmp_path / "curve.png", dpi=20)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_markdown():
    assert report.markdown(METRICS) == "\n".join([
        "| metric |  |",
        "| --- | --- |",
        "| loss | 0.5000 |",
        "| accuracy | 0.7500 |",
        "",
        "| label | precision | recall | f1 | support |",
        "| --- | --- | --- | --- | --- |",
        "| joy | 1.0000 | 0.5000 | 0.6667 | 2 |",
        "| anger | 0.5000 | 1.0000 | 0.6667 | 12 |",
        "",
        "| true \\ predicted | joy | anger |",
        "| --- | --- | --- |",
        "| joy | 1 | 1 |",
        "| anger | 0 | 12 |",
    ])  # fmt: skip


def test_markdown_of_numbers_alone():
    assert report.markdown({"pearson": 0.25, "mse": 2}) == (
        "| metric |  |\n| --- | --- |\n| pearson | 0.2500 |\n| mse | 2.0000 |"
    )


def test_a_label_with_a_bar_stays_one_cell():
    per_class = {"a|b": {"f1": 1.0, "support": 1}, "c": {"f1": 1.0, "support": 1}}
    table = report.markdown({"loss": 1.0, "per_class": per_class, "confusion": [[1, 0], [0, 1]]})
    assert "| a\\|b | 1.0000 | 1 |" in table
    assert "| true \\ predicted | a\\|b | c |" in table


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────────────


PAIR = {"data": {"id": "nyu-mll/glue", "name": "mrpc", "train": "train", "validation": "validation", "test": "test"}}


def card(results=RESULTS, kind=Settings, folder="runs/mine", **tree):
    """The settings, the metadata and the text of a card; its metadata are valid."""
    settings = kind.from_dict({"task": "text-classification", "output": {"folder": folder}} | tree)
    text = runs.model_card(settings, results)
    assert hub_server.problems(text) == []
    card = ModelCard(text)
    return settings, card.data, card.text


def test_model_card():
    settings, data, body = card(**PAIR, training={"epochs": 1.5})
    assert data.to_dict() | {"model-index": None} == {
        "pipeline_tag": "text-classification",
        "library_name": "transformers",
        "tags": ["bert", "jax"],
        "base_model": "google-bert/bert-base-cased",
        "datasets": ["nyu-mll/glue"],
        "model-index": None,
    }
    assert body.startswith("\n# mine\n")
    assert "`google-bert/bert-base-cased` fine-tuned for text-classification on nyu-mll/glue with " in body
    assert 'model = "OWNER/mine"\npipe = bert_jax.pipeline("text-classification", model)' in body
    assert 'model = "OWNER/mine"\npipe = transformers.pipeline("text-classification", model)' in body
    assert f"## Validation\n\n{report.markdown(METRICS)}\n" in body
    assert "## Test" not in body
    assert "](curve.png)" in body
    assert body.endswith("Step 25 of 50, 12 s on 8 × cpu; bert-jax 0.9, jax 1.2.\n")
    stored = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert stored == {"task": "text-classification", **PAIR, "training": {"epochs": 1.5}}
    assert Settings.from_dict(stored | {"output": {"folder": "runs/mine"}}) == settings


def test_the_metrics_of_a_card():
    """Each metric by the Hub's name and ours, for each split; no loss, and no number that JSON does not have."""
    metrics = {
        "loss": 0.5, "accuracy": 0.75, "f1": 0.5, "f1_label": "yes", "f1_macro": 0.25, "matthews": float("nan"),
        "pearson": 1.0, "best_exact_match": 50.0, "null_threshold": -2.5,
    }  # fmt: skip
    _, data, _ = card(RESULTS | {"validation": metrics, "test": {"nsp_accuracy": 0.5}}, **PAIR)
    found = {(result.dataset_split, result.metric_name): (result.metric_type, result.metric_value)
             for result in data.eval_results}  # fmt: skip
    assert found == {
        ("validation", "accuracy"): ("accuracy", 0.75),
        ("validation", "f1 of yes"): ("f1", 0.5),
        ("validation", "f1_macro"): ("f1", 0.25),
        ("validation", "pearson"): ("pearsonr", 1.0),
        ("validation", "best_exact_match"): ("exact_match", 50.0),
        ("test", "nsp_accuracy"): ("accuracy", 0.5),
    }
    sources = {(result.dataset_type, result.dataset_name, result.dataset_config) for result in data.eval_results}
    assert sources == {("nyu-mll/glue", "nyu-mll/glue", "mrpc")}


def test_model_card_with_a_test_set_alone():
    _, _, body = card(RESULTS | {"validation": {}, "test": {"accuracy": 0.123}}, **PAIR)
    assert "## Validation" not in body
    assert "## Test\n\n| metric |  |\n| --- | --- |\n| accuracy | 0.1230 |\n" in body


def test_a_card_has_no_local_path(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\nbase_model: x/y\n---\n")
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation")}
    settings, data, body = card(folder=str(tmp_path / "mine"), model={"id": str(tmp_path / "base")}, data=files)
    assert str(tmp_path) in settings.to_yaml()
    assert str(tmp_path) not in f"{data}{body}"
    assert "base_model" not in data.to_dict()  # would be an id of the Hub
    assert "datasets" not in data.to_dict()
    assert "A local checkpoint fine-tuned for text-classification on train.csv with " in body
    assert "task: text-classification\n```" in body
    (source,) = {(result.dataset_type, result.dataset_name) for result in data.eval_results}
    assert source == ("unknown", "validation.csv")
    assert (data.license, data.language) == ("mit", "de")  # as the card of the base says


@pytest.mark.parametrize(
    ("declared", "output", "license", "language"),
    [
        ("license: other\nlicense_name: mine\nlanguage: [de, en]", {}, "other", None),
        ("license: [mit, apache-2.0]\nlanguage: no", {}, None, None),  # YAML reads "no" as a boolean
        ("language: de", {"license": "apache-2.0", "language": ["de", "en"]}, "apache-2.0", ["de", "en"]),
        ("license: mit", {"license": "apache-2.0"}, "apache-2.0", None),
        ("[", {}, None, None),
        ("- a list", {}, None, None),
    ],
)
def test_license_and_language(tmp_path, declared, output, license, language):
    (tmp_path / "README.md").write_text(f"---\n{declared}\n---\n")
    files = {"train": "a", "validation": "b"}
    _, data, _ = card(model={"id": str(tmp_path)}, data=files, output={"folder": "mine", **output})
    assert (data.license, data.language) == (license, language)
    assert (data.license_name == "mine") == (license == "other")


@pytest.mark.parametrize(("tokenizer", "language"), [(None, "en"), ("some/tokenizer", None)])
def test_model_card_of_pretraining(tmp_path, tokenizer, language):
    texts = str(tmp_path / "train.txt")
    tree = {"model": {"id": "bert-mini-cased", "tokenizer": tokenizer}, "data": {"train": texts, "shards": texts}}
    _, data, body = card(RESULTS | {"validation": {}}, Pretraining, task="pretraining", **tree)
    assert (data.pipeline_tag, data.license, data.language) == ("fill-mask", "apache-2.0", language)
    assert "base_model" not in data.to_dict()  # the Hub has no bert-mini-cased
    assert "`bert-mini-cased`, pretrained on train.txt with " in body
    assert str(tmp_path) not in body
    _, data, body = card(RESULTS | {"validation": {}}, Pretraining, task="pretraining", data={"train": texts},
                         model={"tokenizer": str(tmp_path)})  # fmt: skip
    assert (data.pipeline_tag, data.license, data.language) == ("fill-mask", None, None)
    assert "A new network, pretrained on train.txt with " in body
    assert "task: pretraining\n```" in body


@pytest.mark.parametrize("task", TRAINABLE)
def test_the_task_of_a_card(task):
    _, data, body = card(RESULTS, task=task, **PAIR)
    assert data.pipeline_tag == task
    assert {result.task_type for result in data.eval_results} == {task}
    for snippet in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(snippet, "snippet", "exec")


def test_the_card_of_a_model_that_may_say_nothing_tells_its_threshold():
    found = {"validation": {"f1": 50.0, "null_threshold": -0.25}}
    _, _, body = card(RESULTS | found, task="question-answering", **PAIR)
    assert '"Anna moved to Oslo."}, null_threshold=-0.2500)' in body


def test_the_card_of_a_model_with_a_tuned_threshold_applies_it():
    _, _, body = card(RESULTS | {"validation": {"f1_micro": 0.5, "threshold": 0.3125}}, **PAIR)
    ours, theirs = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    scores = [{"label": "a", "score": 0.32}, {"label": "b", "score": 0.31}]
    for snippet in (ours, theirs):
        compile(snippet, "snippet", "exec")
        assert eval(snippet.splitlines()[-1], {"pipe": lambda text, top_k: scores}) == ["a"]


def test_model_card_of_several_files():
    _, _, body = card(data={"train": ["one.csv", "two.csv"], "validation": "three.csv"})
    assert "on one.csv, two.csv with " in body


def test_the_first_model_of_a_held_out_figure_has_the_first_colour():
    classes = [{"from": 1, "to": None, "tokens": 4, "nll": 1.0, "accuracy@1": 0.5}]
    figure = report.held_out_figure({name: {"by_frequency": classes} for name in ("a", "b")})
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert [to_hex(colours[name]) for name in ("a", "b")] == [to_hex("C0"), to_hex("C1")]
