import warnings

import numpy as np
import pytest

from bert_jax import metrics

NAMES = ("a", "b", "c")


def test_classification():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 1, 0, 1, 0])
    result = metrics.classification(labels, predictions, NAMES)
    assert result["confusion"] == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert result["accuracy"] == 4 / 8
    a, b = 2 * 3 / (4 + 5), 2 * 1 / (2 + 3)  # 2 tp / (labels + predictions)
    assert result["per_class"] == {
        "a": {"precision": pytest.approx(3 / 5), "recall": 3 / 4, "f1": pytest.approx(a), "support": 4},
        "b": {"precision": pytest.approx(1 / 3), "recall": 1 / 2, "f1": pytest.approx(b), "support": 2},
        "c": {"precision": 0, "recall": 0, "f1": 0, "support": 2},  # is never predicted
    }
    assert result["f1_macro"] == pytest.approx((a + b) / 3)
    assert result["f1_weighted"] == pytest.approx((4 * a + 2 * b) / 8)
    assert result["f1_micro"] == 4 / 8
    # (c s - Σ p t) / √((s² - Σ p²) (s² - Σ t²)), Gorodkin 2004: 4 right of 8, labels 4 2 2, predictions 5 3 0.
    assert result["matthews"] == pytest.approx((4 * 8 - 26) / np.sqrt((64 - 34) * (64 - 24)))
    assert "f1" not in result


def test_of_two_labels_f1_is_the_second_ones():
    labels, predictions = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 0, 0, 1, 0, 0, 0, 0])
    result = metrics.classification(labels, predictions, ("no", "yes"))
    assert result["f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert result["f1"] == result["per_class"]["yes"]["f1"]
    assert result["confusion"] == [[4, 1], [2, 1]]
    assert result["matthews"] == pytest.approx((1 * 4 - 1 * 2) / np.sqrt(2 * 3 * 5 * 6))


def test_labels_that_do_not_occur_keep_their_place():
    result = metrics.classification(np.array([2, 2]), np.array([2, 2]), NAMES)
    assert result["confusion"] == [[0, 0, 0], [0, 0, 0], [0, 0, 2]]
    assert list(result["per_class"]) == list(NAMES)
    assert (result["accuracy"], result["f1_micro"], result["f1_weighted"]) == (1, 1, 1)
    assert result["f1_macro"] == pytest.approx(1 / 3)
    assert result["per_class"]["c"] == {"precision": 1, "recall": 1, "f1": 1, "support": 2}


def test_multi_label():
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    predictions = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]], bool)
    result = metrics.multi_label(labels, predictions, NAMES)
    assert result["accuracy"] == 1 / 4
    assert result["per_class"] == {
        "a": {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2},
        "b": {"precision": 1, "recall": 1, "f1": 1, "support": 2},
        "c": {"precision": 0, "recall": 0, "f1": 0, "support": 0},
    }
    assert result["f1_micro"] == pytest.approx(2 * 3 / (4 + 5))
    assert result["f1_macro"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["f1_weighted"] == pytest.approx((2 * 1 / 2 + 2 * 1) / 4)


def test_multi_label_of_one_example():
    result = metrics.multi_label(np.array([[1.0, 0.0, 1.0]]), np.array([[True, False, False]]), NAMES)
    assert result["f1_micro"] == pytest.approx(2 / 3)
    assert result["accuracy"] == 0


def test_multi_label_of_one_label():
    labels, predictions = np.array([[1.0], [1.0], [0.0], [0.0]]), np.array([[True], [False], [True], [False]])
    result = metrics.multi_label(labels, predictions, ("a",))
    assert result["per_class"] == {"a": {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}}
    assert (result["accuracy"], result["f1_micro"]) == (1 / 2, 1 / 2)


def test_regression():
    result = metrics.regression(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 4.0, 3.0]))
    assert result == {
        "pearson": pytest.approx(0.8),
        "spearman": pytest.approx(0.8),
        "mse": pytest.approx(0.5),
    }
    result = metrics.regression(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 10.0]))
    assert result["spearman"] == pytest.approx(1)
    assert result["pearson"] == pytest.approx(10 / np.sqrt(2 * (182 / 3)))
    assert result["mse"] == pytest.approx(64 / 3)


@pytest.mark.parametrize(
    ("labels", "predictions", "mse"),
    [([1, 2, 3], [2, 2, 2], 2 / 3), ([2, 2], [1, 3], 1), ([1], [3], 4), ([0, 0], [0, 0], 0)],
)
def test_a_correlation_of_what_does_not_vary_is_zero(labels, predictions, mse):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.regression(np.array(labels, np.float32), np.array(predictions, np.float32))
    assert result == {"pearson": 0, "spearman": 0, "mse": pytest.approx(mse)}


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_metrics_are_pythons_numbers(task):
    """As JSON wants them."""
    if task == "classification":
        result = metrics.classification(np.array([0, 1]), np.array([0, 1]), ("a", "b"))
    elif task == "multi_label":
        result = metrics.multi_label(np.eye(2), np.eye(2, dtype=bool), ("a", "b"))
    else:
        result = metrics.regression(np.float32([1, 2]), np.float32([1, 3]))
    per_class = result.pop("per_class", {})
    confusion = result.pop("confusion", [])
    assert {type(value) for value in result.values()} == {float}
    assert all(type(row["support"]) is int for row in per_class.values())
    assert all(type(value) is int for row in confusion for value in row)
