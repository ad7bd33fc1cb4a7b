"""Metrics that compare predictions with labels, computed with scikit-learn and SciPy.

Accuracy, precision, recall, F1 and exact match are between 0 and 1 for all tasks.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


def classification(labels: np.ndarray, predictions: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Computes metrics for classification with one label per example.

    Args:
        labels: int [N].
        predictions: int [N].
        names: The names of the labels.

    Returns:
        `accuracy`, `f1_macro`, `f1_micro`, `f1_weighted`, `matthews`, `per_class` (precision, recall, F1 and support of
        each label) and `confusion` (one row per true label, one column per predicted label). If there are two labels,
        the dict also contains `f1`, the F1 of the second label, and `f1_label`, the name of that label.
    """
    scores, per_class = _scores(labels, predictions, names)
    if len(names) == 2:
        scores |= {"f1": per_class[names[1]]["f1"], "f1_label": names[1]}
    return {
        **scores,
        "matthews": float(metrics.matthews_corrcoef(labels, predictions)),
        "per_class": per_class,
        "confusion": metrics.confusion_matrix(labels, predictions, labels=range(len(names))).tolist(),
    }


def multi_label(labels: np.ndarray, predictions: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Computes metrics for classification with any number of labels per example.

    Args:
        labels: [N, C], 0 or 1.
        predictions: [N, C], 0 or 1.
        names: The names of the labels.

    Returns:
        `accuracy` (the share of examples for which all labels are correct), `f1_macro`, `f1_micro`, `f1_weighted`, and
        `per_class` (precision, recall, F1 and support of each label).
    """
    # A column of zeros is added, because scikit-learn would read a single column as two classes.
    labels, predictions = (np.pad(array, ((0, 0), (0, 1))).astype(int) for array in (labels, predictions))
    scores, per_class = _scores(labels, predictions, names)
    return {**scores, "per_class": per_class}


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Finds the threshold with the highest `f1_micro`. Each label with a score above the threshold counts as predicted.

    Args:
        labels: [N, C], 0 or 1.
        scores: float [N, C], at least 0.

    Returns:
        The threshold, which is midway between two neighboring scores, and its `f1_micro`.
    """
    flat = scores.ravel().astype(np.float64)
    order = np.argsort(-flat, kind="stable")
    ranked = np.append(flat[order], 0.0)
    right = np.cumsum(labels.ravel()[order])
    # A threshold can select exactly the labels with the n highest scores only if the next score is lower.
    f1 = np.where(ranked[:-1] > ranked[1:], 2 * right / (np.arange(1, len(flat) + 1) + right[-1]), 0.0)
    best = int(np.argmax(f1))
    return float(ranked[best] + ranked[best + 1]) / 2, float(f1[best])


def _scores(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns two dicts: the accuracy with the F1 averages, and the metrics of each label (`per_class`)."""
    options: dict[str, Any] = {"labels": list(range(len(names))), "zero_division": 0.0}
    scores = {"accuracy": float(metrics.accuracy_score(labels, predictions))}
    for average in ("macro", "micro", "weighted"):
        scores[f"f1_{average}"] = float(metrics.f1_score(labels, predictions, average=average, **options))
    table = zip(names, *metrics.precision_recall_fscore_support(labels, predictions, **options), strict=True)
    return scores, {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in table
    }


def regression(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Computes metrics for regression.

    Args:
        labels: float [N].
        predictions: float [N].

    Returns:
        `pearson`, `spearman` and `mse` (mean squared error, in squared label units). Both correlations are 0 if all
        labels or all predictions are equal.
    """
    varied = len(labels) > 1 and np.ptp(labels) > 0 and np.ptp(predictions) > 0
    return {
        "pearson": float(stats.pearsonr(labels, predictions)[0]) if varied else 0.0,
        "spearman": float(stats.spearmanr(labels, predictions)[0]) if varied else 0.0,
        "mse": float(metrics.mean_squared_error(labels, predictions)),
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Finds the entities in a sentence in the same way as `conlleval` and `seqeval`.

    The tags follow the IOB1, IOB2 or BIOES scheme and may be malformed.

    Args:
        tags: The tag of each word: "O", or one of the prefixes B-, I-, E- and S- followed by a type, such as "B-PER". A
            tag without a type, such as "B", gets the type "_", as in `seqeval`.

    Returns:
        One tuple (type, index of the first word, index of the last word) per entity, in sentence order.
    """
    found: list[tuple[str, int, int]] = []
    before, kind_before, begin = "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        kind = kind or "_"
        if prefix in ("B", "S", "O") or before in ("E", "S", "O") or kind != kind_before:
            if before != "O":
                found.append((kind_before, begin, i - 1))
            begin = i
        before, kind_before = prefix, kind
    return found


def tagging(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Computes metrics for token classification from the tags of each sentence.

    Returns:
        `precision`, `recall` and `f1` over all entities, `accuracy` over all tags, and `per_class` (precision, recall,
        F1 and support of each type). An entity is correct if its type, its first word and its last word are correct.
    """
    truth, found = ({(n, *span) for n, tags in enumerate(side) for span in entities(tags)}
                    for side in (labels, predictions))  # fmt: skip
    per_class = {}
    for kind in sorted({span[1] for span in truth | found}):
        right, given = ({span for span in side if span[1] == kind} for side in (truth, found))
        per_class[kind] = _span_scores(right, given) | {"support": len(right)}
    words = [a == b for pair in zip(labels, predictions, strict=True) for a, b in zip(*pair, strict=True)]
    return {**_span_scores(truth, found), "accuracy": float(np.mean(words)), "per_class": per_class}


def _span_scores(truth: set[Any], found: set[Any]) -> dict[str, Any]:
    right = len(truth & found)
    precision, recall = (right / len(side) if side else 0.0 for side in (found, truth))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def normalized(answer: str) -> str:
    """Normalizes an answer as SQuAD's official script does: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answering(
    golds: Sequence[Sequence[str]], answers: Sequence[str], null_over_best: Sequence[float] | None = None
) -> dict[str, Any]:
    """Computes the question-answering metrics of `evaluate-v2.0.py`, the official SQuAD 2.0 script.

    If all questions have an answer, the metrics are the SQuAD 1.1 metrics.

    Args:
        golds: The accepted answers of each question; empty if the question has no answer.
        answers: The predicted answer to each question, or "" for no answer.
        null_over_best: For each question, the score of "no answer" minus the score of the best non-empty answer. If
            `null_over_best` is given, `answers` must contain the best non-empty answer to each question, and the best
            threshold is also computed. "No answer" is predicted for each question whose score difference is above the
            threshold.

    Returns:
        `exact_match` and `f1`, which are means over the questions. All means are between 0 and 1, but those of the
        official script are between 0 and 100. If some questions have no answer, the `has_answer_…` metrics are means
        over the questions with an answer, and the `no_answer_…` metrics are means over the questions without one. If
        `null_over_best` is given, `best_f1` and `best_exact_match` are the highest values that any threshold achieves,
        and `null_threshold` is the threshold that achieves `best_f1`.
    """
    has_answer = np.array([bool(gold) for gold in golds])
    golds = [[answer for answer in gold if normalized(answer)] or [""] for gold in golds]

    pairs = list(zip(answers, golds, strict=True))
    scores = {
        "exact_match": np.array([max(normalized(a) == normalized(g) for g in gold) for a, gold in pairs], float),
        "f1": np.array([max(_overlap(a, g) for g in gold) for a, gold in pairs], float),
    }
    result = {name: float(values.mean()) for name, values in scores.items()}
    if not has_answer.all():
        for group, which in (("has_answer", has_answer), ("no_answer", ~has_answer)):
            for name, values in scores.items():
                result[f"{group}_{name}"] = float(values[which].mean()) if which.any() else 0.0
    if null_over_best is None:
        return result
    # totals[n] below is the sum of the scores if only the n questions with the lowest `null_over_best` are answered.
    order = np.argsort(null_over_best, kind="stable")
    thresholds = np.asarray(null_over_best)[order]
    for name, values in scores.items():  # f1 is last, so that `best` belongs to f1 after the loop
        gains = np.where(has_answer, values, np.where(np.array(answers) == "", 0.0, -1.0))[order]
        totals = np.concatenate([[0.0], np.cumsum(gains)]) + (~has_answer).sum()
        best = int(np.argmax(totals))
        result[f"best_{name}"] = float(totals[best] / len(golds))
    result["null_threshold"] = float(thresholds[best - 1]) if best else float(thresholds[0]) - 1.0
    return result


def _overlap(answer: str, gold: str) -> float:
    found, truth = normalized(answer).split(), normalized(gold).split()
    if not found or not truth:
        return float(found == truth)
    shared = sum((Counter(found) & Counter(truth)).values())
    return 2 * shared / (len(found) + len(truth))
