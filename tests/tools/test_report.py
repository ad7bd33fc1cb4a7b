import numpy as np
import pytest
import yaml

from bert_jax.recipes import runs
from bert_jax.settings import Settings
from bert_jax.tools import report

JOURNAL = [
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
    figure = report.learning_curve(JOURNAL, "accuracy")
    left, right = figure.axes
    losses = lines(left)
    assert losses.keys() == {"training loss", "validation loss"}
    np.testing.assert_array_equal(losses["training loss"], [[10, 2.0], [20, 1.5], [30, 1.0]])
    np.testing.assert_array_equal(losses["validation loss"], [[25, 1.6], [50, 1.2]])
    np.testing.assert_array_equal(lines(right)["validation accuracy"], [[25, 0.5], [50, 0.75]])
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("step", "loss", "validation accuracy")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 3


def test_learning_curve_where_the_metric_is_the_loss():
    (axes,) = report.learning_curve(JOURNAL, "loss").axes
    assert lines(axes).keys() == {"training loss", "validation loss"}


@pytest.mark.parametrize("journal", [[], JOURNAL[:2]])
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


def card(results=RESULTS, **tree):
    settings = Settings.from_dict({"task": "text-classification", "output": {"folder": "runs/mine"}} | tree)
    text = runs.model_card(settings, results)
    _, front, body = text.split("---\n", 2)
    return settings, yaml.safe_load(front), body


def test_model_card():
    settings, front, body = card(data={"id": "dair-ai/emotion", "train": "train"}, training={"epochs": 1.5})
    assert front == {
        "pipeline_tag": "text-classification",
        "library_name": "transformers",
        "tags": ["bert", "jax"],
        "base_model": "google-bert/bert-base-cased",
        "datasets": ["dair-ai/emotion"],
    }
    assert body.startswith("\n# mine\n")
    assert "`google-bert/bert-base-cased` fine-tuned for text-classification on dair-ai/emotion with " in body
    assert 'bert_jax.pipeline("text-classification", "runs/mine")' in body
    assert f"## Validation\n\n{report.markdown(METRICS)}\n" in body
    assert "## Test" not in body
    assert "](curve.png)" in body
    assert body.endswith("Step 25 of 50, 12 s on 8 × cpu; bert-jax 0.9, jax 1.2.\n")
    stored = body.split("```yaml\n")[1].split("```")[0]
    assert Settings.from_dict(yaml.safe_load(stored)) == settings


def test_model_card_with_a_test_set_alone():
    _, _, body = card(RESULTS | {"validation": {}, "test": {"accuracy": 0.123}})
    assert "## Validation" not in body
    assert "## Test\n\n| metric |  |\n| --- | --- |\n| accuracy | 0.1230 |\n" in body


def test_model_card_of_files_and_a_local_model(tmp_path):
    _, front, body = card(model={"id": str(tmp_path)}, data={"train": "train.txt", "validation": "val.txt"})
    assert "base_model" not in front  # would be an id of the Hub
    assert "datasets" not in front
    assert "on train.txt with " in body


def test_the_card_of_a_model_that_may_say_nothing_tells_its_threshold():
    _, _, body = card(RESULTS | {"validation": {"f1": 50.0, "null_threshold": -0.25}}, task="question-answering")
    assert 'answer(("question", "context"), null_threshold=-0.2500)' in body


def test_model_card_of_several_files():
    _, _, body = card(data={"train": ["one.csv", "two.csv"]})
    assert "on one.csv, two.csv with " in body
