"""Compares this package's outputs for published checkpoints with outputs that others have published.

The published scores are from model cards and were computed in float32 by an older version of PyTorch. The published
hidden states are from a test in `transformers`. Token ids and their order must be identical. Numbers may differ by up
to 1e-4.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bert_jax.errors import InputError
from bert_jax.heads import BertForTokenClassification
from bert_jax.inference.pipelines import pipeline
from bert_jax.model import BertModel
from bert_jax.tokenizer import Tokenizer

TOLERANCE = 1e-4

# For each model and text, the top tokens on the model card, with their ids and scores.
FILL_MASK: dict[str, dict[str, list[tuple[str, int, float]]]] = {
    "google-bert/bert-base-cased": {
        "Hello I'm a [MASK] model.": [
            ("fashion", 4633, 0.09019174426794052),
            ("new", 1207, 0.06349995732307434),
            ("male", 2581, 0.06228214129805565),
            ("professional", 1848, 0.0441727414727211),
            ("super", 7688, 0.03326151892542839),
        ],
        "The man worked as a [MASK].": [
            ("lawyer", 4545, 0.04804691672325134),
            ("waiter", 17989, 0.037494491785764694),
            ("cop", 9947, 0.035512614995241165),
            ("detective", 9140, 0.031271643936634064),
            ("doctor", 3995, 0.027423162013292313),
        ],
        "The woman worked as a [MASK].": [
            ("nurse", 7439, 0.16927455365657806),
            ("waitress", 15098, 0.1501094549894333),
            ("maid", 13487, 0.05600163713097572),
            ("housekeeper", 26458, 0.04838843643665314),
            ("cook", 9834, 0.029980547726154327),
        ],
    },
    "google-bert/bert-large-cased": {
        "Paris is the [MASK] of France.": [
            ("capital", 2364, 0.9576897025108337),
            ("Capital", 6299, 0.025112619623541832),
        ],
        "Today is a [MASK] day!": [("special", 1957, 0.21417436003684998), ("great", 1632, 0.1488540917634964)],
        "Hello I'm a [MASK] model.": [
            ("male", 2581, 0.22748498618602753),
            ("fashion", 4633, 0.09146175533533096),
            ("new", 1207, 0.05823173746466637),
            ("super", 7688, 0.04488750174641609),
            ("famous", 2505, 0.03271442651748657),
        ],
        "The man worked as a [MASK].": [
            ("doctor", 3995, 0.0645911768078804),
            ("cop", 9947, 0.057450827211141586),
            ("mechanic", 19459, 0.04392256215214729),
            ("waiter", 17989, 0.03755280375480652),
            ("teacher", 3218, 0.03458863124251366),
        ],
        "The woman worked as a [MASK].": [
            ("nurse", 7439, 0.2572779953479767),
            ("waitress", 15098, 0.16706500947475433),
            ("teacher", 3218, 0.04587847739458084),
            ("secretary", 4848, 0.03577028587460518),
            ("maid", 13487, 0.03298963978886604),
        ],
    },
}

UNCASED = "google-bert/bert-base-uncased"
NER = "dbmdz/bert-large-cased-finetuned-conll03-english"
MODELS = (*FILL_MASK, UNCASED, NER)


@dataclass(frozen=True)
class Check:
    """A published output, compared with this package's output.

    Attributes:
        what: The input, or a short name for the output.
        expected: The published output.
        got: This package's output.
        difference: The largest absolute difference between the numbers.
        passed: Whether ids or labels (if any) are equal and the difference is at most `TOLERANCE`.
    """

    what: str
    expected: str
    got: str
    difference: float
    passed: bool


def verify(model: str) -> Iterator[Check]:
    """Compares this package's outputs for a model with the published outputs, one by one.

    Args:
        model: One of `MODELS`, or a folder named after one of them, such as `./bert-base-cased`.

    Raises:
        InputError: If there are no published outputs for the model.
        ModelNotFoundError: If the model does not exist, or if the Hub does not respond.
    """
    names = [name for name in MODELS if model == name or Path(model).resolve().name == name.partition("/")[2]]
    if not names:
        raise InputError(f"No published outputs are known for {model}; expected one of {', '.join(MODELS)}.")
    if names[0] in FILL_MASK:
        return _fill_mask(model, FILL_MASK[names[0]])
    return _uncased(model) if names[0] == UNCASED else _ner(model)


def _fill_mask(model: str, published: dict[str, list[tuple[str, int, float]]]) -> Iterator[Check]:
    fill_mask = pipeline("fill-mask", model)
    for text, card in published.items():
        ours: Any = fill_mask(text, top_k=len(card))  # a flat list of predictions, because each text has one mask
        difference = max(abs(entry["score"] - score) for entry, (_, _, score) in zip(ours, card, strict=True))
        yield Check(
            text,
            " ".join(f"{token} {score:.4f}" for token, _, score in card),
            " ".join(f"{entry['token_str']} {entry['score']:.4f}" for entry in ours),
            difference,
            difference <= TOLERANCE and [entry["token"] for entry in ours] == [token_id for _, token_id, _ in card],
        )


def _uncased(model: str) -> Iterator[Check]:
    # The inputs and `expected` are from `test_inference_no_head_absolute_embedding` in the file `test_modeling_bert.py`
    # of `transformers`.
    bert = BertModel.from_pretrained(model)
    out = bert(
        np.array([[0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2]]),
        np.array([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]),
    )
    expected = np.array([[0.4249, 0.1008, 0.7531], [0.3771, 0.1188, 0.7467], [0.4152, 0.1098, 0.7108]])
    yield _numbers("hidden states [1:4, 1:4]", expected, np.asarray(out.last_hidden_state[0, 1:4, 1:4]))


def _ner(model: str) -> Iterator[Check]:
    classifier = BertForTokenClassification.from_pretrained(model)
    tokenizer = Tokenizer.from_pretrained(model)
    text = "My name is Amy. I live in Paris."
    tokens = tokenizer.encode([text])[0][0].tokens
    logits = np.asarray(classifier(**tokenizer([text])).logits[0], np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for word, label in [("Amy", "I-PER"), ("Paris", "I-LOC")]:
        row = p[tokens.index(word)]
        ours = classifier.config.labels[row.argmax()]
        check = _numbers(f"{text} {word} {label}", np.array([0.9986]), row.max()[None])
        passed = check.passed and ours == label
        yield replace(check, expected=f"{label} {check.expected}", got=f"{ours} {check.got}", passed=passed)


def _numbers(what: str, expected: Any, got: Any) -> Check:
    """Compares numbers that were published with four decimal places. `TOLERANCE` allows for this rounding."""
    difference = float(np.max(np.abs(expected - got)))
    return Check(what, str(expected.tolist()), str(np.round(got, 4).tolist()), difference, difference <= TOLERANCE)
