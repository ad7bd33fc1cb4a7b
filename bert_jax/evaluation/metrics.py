"""Metrics: predictions against labels, by scikit-learn and scipy."""

import re
import string
from collections import Counter
from collections.abc import Sequence
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
        accuracy, f1 (macro, micro, weighted and, of two labels, of the second, whose name is `f1_label`), matthews;
        `per_class` with precision, recall, f1 and support; `confusion`, rows being labels and columns predictions.
    """
    present = list(range(len(names)))
    table = metrics.precision_recall_fscore_support(labels, predictions, labels=present, zero_division=0.0)
    scores: dict[str, Any] = dict(_f1(labels, predictions, present))
    if len(names) == 2:
        scores |= {"f1": float(table[2][1]), "f1_label": names[1]}
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


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of a sentence, as conlleval and seqeval read IOB1, IOB2 and BIOES, also where they are ill-formed.

    Args:
        tags: "O", or B-, I-, E- or S- and a type, or these letters alone: their type is "_", as seqeval has it.

    Returns:
        (type, first word, last word), in order.
    """
    found: list[tuple[str, int, int]] = []
    begin = 0
    before, kind_before = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        kind = kind or "_"
        ended = before in ("E", "S") or prefix in ("B", "S", "O") or kind != kind_before
        if before != "O" and ended:
            found.append((kind_before, begin, i - 1))
        if prefix in ("B", "S") or (prefix != "O" and (before in ("O", "E", "S") or kind != kind_before)):
            begin = i
        before, kind_before = prefix, kind
    return found


def tagging(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Of sentences' tags.

    Returns:
        precision, recall and f1 over all entities (an entity counts if its type and both ends are right), accuracy of
        the tags, and `per_class` with precision, recall, f1 and support of each type.
    """
    truth, found = ({(n, *span) for n, tags in enumerate(side) for span in entities(tags)}
                    for side in (labels, predictions))  # fmt: skip
    per_class = {}
    for kind in sorted({span[1] for span in truth | found}):
        per_class[kind] = _span_scores(*({span for span in side if span[1] == kind} for side in (truth, found)))
    words = [a == b for pair in zip(labels, predictions, strict=True) for a, b in zip(*pair, strict=True)]
    overall = _span_scores(truth, found)
    del overall["support"]
    return {**overall, "accuracy": float(np.mean(words)), "per_class": per_class}


def _span_scores(truth: set[Any], found: set[Any]) -> dict[str, Any]:
    right = len(truth & found)
    precision, recall = (right / len(side) if side else 0.0 for side in (found, truth))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": len(truth)}


def normalized(answer: str) -> str:
    """An answer as the official script of SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answering(
    golds: Sequence[Sequence[str]], answers: Sequence[str], null_over_best: Sequence[float] | None = None
) -> dict[str, Any]:
    """Of answers to questions, by the definitions of evaluate-v2.0.py of SQuAD 2.0 (and of 1.1, where all have one).

    Args:
        golds: Accepted answers of each question; of one that has none, none.
        answers: What was answered, "" for nothing.
        null_over_best: By how much nothing was better than the best answer; of `answers` then each has to be that best
            answer. Finds the threshold above which nothing is answered, with the highest f1, and reports it too.

    Returns:
        exact_match and f1, means over questions from 0 to 100; where some have no answer, also `has_answer_…` and
        `no_answer_…`; with null_over_best `best_f1`, `best_exact_match` and `null_threshold`, that of best_f1.
    """
    has_answer = np.array([bool(gold) for gold in golds])
    golds = [[answer for answer in gold if normalized(answer)] or [""] for gold in golds]

    def scores(given: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        exact = [max(normalized(a) == normalized(g) for g in gold) for a, gold in zip(given, golds, strict=True)]
        f1 = [max(_overlap(a, g) for g in gold) for a, gold in zip(given, golds, strict=True)]
        return 100 * np.array(exact, float), 100 * np.array(f1, float)

    exact, f1 = scores(answers)
    result = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    if not has_answer.all():
        for name, which in (("has_answer", has_answer), ("no_answer", ~has_answer)):
            for measure, values in (("exact_match", exact), ("f1", f1)):
                result[f"{name}_{measure}"] = float(values[which].mean()) if which.any() else 0.0
    if null_over_best is None:
        return result
    # From answering nothing at all, the questions one by one, those first that are surest of an answer.
    order = np.argsort(null_over_best, kind="stable")
    for name, values in (("exact_match", exact), ("f1", f1)):
        gains = np.where(has_answer, values, np.where(np.array(answers) == "", 0.0, -100.0))[order]
        totals = np.concatenate([[0.0], np.cumsum(gains)]) + 100.0 * (~has_answer).sum()
        best = int(np.argmax(totals))
        result[f"best_{name}"] = float(totals[best] / len(golds))
        if name == "f1":
            ordered = np.asarray(null_over_best)[order]
            result["null_threshold"] = float(ordered[best - 1]) if best else float(ordered[0]) - 1.0
    return result


def _overlap(answer: str, gold: str) -> float:
    found, truth = normalized(answer).split(), normalized(gold).split()
    if not found or not truth:
        return float(found == truth)
    shared = sum((Counter(found) & Counter(truth)).values())
    return 2 * shared / (len(found) + len(truth))
