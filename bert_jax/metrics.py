"""Metrics: predictions against labels, by scikit-learn and scipy."""

from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


def classification(labels: np.ndarray, predictions: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Of one label an example.

    Args:
        labels: int [N].
        predictions: int [N].
        names: Of the labels.

    Returns:
        accuracy, f1 (macro, micro, weighted and, of two labels, of the second), matthews; `per_class` with precision,
        recall, f1 and support; `confusion`, rows being labels and columns predictions.
    """
    present = list(range(len(names)))
    table = metrics.precision_recall_fscore_support(labels, predictions, labels=present, zero_division=0.0)
    scores = _f1(labels, predictions, present)
    if len(names) == 2:
        scores["f1"] = float(table[2][1])
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        **scores,
        "matthews": float(metrics.matthews_corrcoef(labels, predictions)),
        "per_class": _per_class(table, names),
        "confusion": metrics.confusion_matrix(labels, predictions, labels=present).tolist(),
    }


def multi_label(labels: np.ndarray, predictions: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Of any number of labels an example.

    Args:
        labels: [N, C], 0 or 1.
        predictions: [N, C], 0 or 1.
        names: Of the labels.

    Returns:
        accuracy (all labels of an example right), f1 (macro, micro, weighted), and `per_class`.
    """
    # With a column more, or scikit-learn would read a single one as two classes.
    present = list(range(len(names)))
    labels, predictions = (np.pad(array, ((0, 0), (0, 1))).astype(int) for array in (labels, predictions))
    table = metrics.precision_recall_fscore_support(labels, predictions, labels=present, zero_division=0.0)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        **_f1(labels, predictions, present),
        "per_class": _per_class(table, names),
    }


def regression(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Of numbers: pearson, spearman, and mean squared error (`mse`, the unit squared).

    Args:
        labels: float [N].
        predictions: float [N].

    Returns:
        The three; a correlation is 0 where either side does not vary.
    """
    varied = len(labels) > 1 and np.ptp(labels) > 0 and np.ptp(predictions) > 0
    return {
        "pearson": float(stats.pearsonr(labels, predictions)[0]) if varied else 0.0,
        "spearman": float(stats.spearmanr(labels, predictions)[0]) if varied else 0.0,
        "mse": float(metrics.mean_squared_error(labels, predictions)),
    }


def _per_class(table: Any, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(names, *table, strict=True)
    }


def _f1(labels: np.ndarray, predictions: np.ndarray, present: list[int]) -> dict[str, float]:
    options: dict[str, Any] = {"labels": present, "zero_division": 0.0}
    return {
        f"f1_{average}": float(metrics.f1_score(labels, predictions, average=average, **options))
        for average in ("macro", "micro", "weighted")
    }
