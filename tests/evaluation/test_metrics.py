import collections
import random
import re
import string
import warnings

import numpy as np
import pytest

from bert_jax.evaluation import metrics
from bert_jax.tools import report
from bert_jax.training import log

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
    assert result["f1_label"] == "yes"
    assert "f1 of yes 0.4000" in log.in_words(result)
    assert "| f1 of yes | 0.4000 |" in report.markdown(result)
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
    assert result.pop("f1_label", "b") == "b"
    assert {type(value) for value in result.values()} == {float}
    assert all(type(row["support"]) is int for row in per_class.values())
    assert all(type(value) is int for row in confusion for value in row)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("I-A I-A B-A", [("A", 0, 1), ("A", 2, 2)]),
        ("B-A I-B", [("A", 0, 0), ("B", 1, 1)]),
        ("S-A B-A I-A E-A E-A", [("A", 0, 0), ("A", 1, 3), ("A", 4, 4)]),
        ("B-x-y I-x-y", [("x-y", 0, 1)]),
        ("O O", []),
        ("B I O B B I", [("_", 0, 1), ("_", 3, 3), ("_", 4, 5)]),
        ("O I I S E", [("_", 1, 2), ("_", 3, 3), ("_", 4, 4)]),
        ("", []),
    ],
)
def test_entities(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_tagging():
    truth = [["B-A", "I-A", "O"], ["B-B", "O", "B-A"]]
    found = [["B-A", "I-A", "O"], ["B-B", "I-B", "B-B"]]
    scores = metrics.tagging(truth, found)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(1 / 3)
    assert scores["per_class"] == {
        "A": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
        "B": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
    }


def official(golds, answers, null_over_best):
    """A literal reading of evaluate-v2.0.py: exact, f1, and their best with the threshold of the best f1."""

    def normalize_answer(text):
        text = text.lower()
        text = "".join(ch for ch in text if ch not in set(string.punctuation))
        text = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text)
        return " ".join(text.split())

    def compute_f1(gold, pred):
        gold_toks, pred_toks = normalize_answer(gold).split(), normalize_answer(pred).split()
        common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
        num_same = sum(common.values())
        if len(gold_toks) == 0 or len(pred_toks) == 0:
            return int(gold_toks == pred_toks)
        if num_same == 0:
            return 0
        precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
        return (2 * precision * recall) / (precision + recall)

    def raw(compute):
        scores = {}
        for qid, (gold, pred) in enumerate(zip(golds, answers, strict=True)):
            gold_answers = [a for a in gold if normalize_answer(a)] or [""]
            scores[qid] = max(compute(a, pred) for a in gold_answers)
        return scores

    def best(scores):
        cur = best_score = sum(1 for gold in golds if not gold)
        threshold = min(null_over_best) - 1.0  # 0.0 in the script, which then answers some
        for qid in sorted(range(len(golds)), key=lambda k: null_over_best[k]):
            cur += scores[qid] if golds[qid] else (-1 if answers[qid] else 0)
            if cur > best_score:
                best_score, threshold = cur, null_over_best[qid]
        return 100.0 * best_score / len(scores), threshold

    exact = raw(lambda gold, pred: int(normalize_answer(gold) == normalize_answer(pred)))
    f1 = raw(compute_f1)
    found = {"exact_match": 100.0 * sum(exact.values()) / len(exact), "f1": 100.0 * sum(f1.values()) / len(f1)}
    for name, keep in (("has_answer", lambda gold: bool(gold)), ("no_answer", lambda gold: not gold)):
        which = [qid for qid, gold in enumerate(golds) if keep(gold)]
        if len(which) not in (0, len(golds)):
            found[f"{name}_exact_match"] = 100.0 * sum(exact[qid] for qid in which) / len(which)
            found[f"{name}_f1"] = 100.0 * sum(f1[qid] for qid in which) / len(which)
    found["best_exact_match"], _ = best(exact)
    found["best_f1"], found["null_threshold"] = best(f1)
    return found


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_answers_are_scored_as_by_the_official_script(share):
    source = random.Random(0)
    words = ["The", "a", "an", "castle", "Castle!", "of", "Norman", "1,066", "U.S.", "é", "-", "in the", "\u2013"]

    def text():
        return " ".join(source.choices(words, k=source.randint(1, 4)))

    for _ in range(20):
        golds = [[] if source.random() < share else [text() for _ in range(source.randint(1, 3))] for _ in range(50)]
        answers = [source.choice([text(), source.choice(gold) if gold else "", "", text()]) for gold in golds]
        over = [round(source.gauss(0, 3), 1) for _ in golds]  # with equal ones
        expected = official(golds, answers, over)
        found = metrics.answering(golds, answers, over)
        for name, value in expected.items():
            of = 1 if name == "null_threshold" else 100  # the script's percentages are shares here
            assert of * found[name] == pytest.approx(value), name


def entities_of_seqeval(tags):
    """A literal reading of get_entities in seqeval 1.2.2, metrics/sequence_labeling.py."""

    def end_of_chunk(prev_tag, tag, prev_type, type_):
        chunk_end = prev_tag in ("E", "S")
        chunk_end |= prev_tag == "B" and tag in ("B", "S", "O")
        chunk_end |= prev_tag == "I" and tag in ("B", "S", "O")
        return chunk_end or (prev_tag not in ("O", ".") and prev_type != type_)

    def start_of_chunk(prev_tag, tag, prev_type, type_):
        chunk_start = tag in ("B", "S")
        chunk_start |= prev_tag in ("E", "S", "O") and tag in ("E", "I")
        return chunk_start or (tag not in ("O", ".") and prev_type != type_)

    prev_tag, prev_type, begin_offset, chunks = "O", "", 0, []
    for i, chunk in enumerate([*tags, "O"]):
        tag, type_ = chunk[0], chunk[1:].split("-", maxsplit=1)[-1] or "_"
        if end_of_chunk(prev_tag, tag, prev_type, type_):
            chunks.append((prev_type, begin_offset, i - 1))
        if start_of_chunk(prev_tag, tag, prev_type, type_):
            begin_offset = i
        prev_tag, prev_type = tag, type_
    return chunks


def test_entities_are_those_of_seqeval():
    source = random.Random(0)
    tags = ["O", "O", *"BIES", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("A", "B-c"))]
    for _ in range(2000):
        sentence = source.choices(tags, k=source.randint(0, 12))
        assert metrics.entities(sentence) == entities_of_seqeval(sentence), sentence
