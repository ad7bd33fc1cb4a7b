"""next-sentence-prediction on a small model against the model called directly."""

import re

import numpy as np
import pytest
import reference

import bert_jax
from bert_jax.errors import InputError

ARCHITECTURE = "BertForNextSentencePrediction"
CONFIG = reference.config(ARCHITECTURE) | {"num_hidden_layers": 2}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
PAIRS = [("w1 w2 w3", "w4 w5"), ("w10", "w11 w12 w13 w14"), ("w54 w0", "w54 w0"), ("w7 " * 14, "w8 " * 15)]


def write(path, bias, scale):
    """A checkpoint whose head has this bias and a kernel times this."""
    tensors = reference.tensors(ARCHITECTURE, CONFIG)
    tensors["cls.seq_relationship.weight"] *= np.float32(scale)
    tensors["cls.seq_relationship.bias"] = np.array(bias, np.float32)
    (path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in VOCABULARY))
    return reference.write(path, tensors, CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("nsp"), [3.15, -3.15], 10)  # each label comes to be


@pytest.fixture(scope="module")
def pipe(folder):
    return bert_jax.pipeline("next-sentence-prediction", folder)


def probabilities(folder, pair):
    model = bert_jax.BertForNextSentencePrediction.from_pretrained(folder)
    inputs = bert_jax.Tokenizer.from_pretrained(folder)(*pair)
    logits = np.asarray(model(**inputs).logits[0], np.float64)
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize("pair", PAIRS)
def test_label_and_score_are_the_models(pipe, folder, pair):
    p = probabilities(folder, pair)
    result = pipe(pair)
    assert result == {"label": ["IsNext", "NotNext"][p.argmax()], "score": pytest.approx(p.max(), abs=1e-5)}
    assert type(result["score"]) is float


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_label_is_is_next(tmp_path, sign):
    folder = write(tmp_path, [sign, -sign], 0)
    result = bert_jax.pipeline("next-sentence-prediction", folder)(("w1", "w2"))
    assert result == {"label": "IsNext" if sign > 0 else "NotNext", "score": pytest.approx(1 / (1 + np.exp(-2)))}


def test_a_list_of_pairs(pipe):
    assert {result["label"] for result in pipe(PAIRS)} == {"IsNext", "NotNext"}
    assert pipe(PAIRS) == [
        {"label": alone["label"], "score": pytest.approx(alone["score"], abs=1e-5)} for alone in map(pipe, PAIRS)
    ]
    assert pipe([list(pair) for pair in PAIRS]) == pipe(PAIRS)
    assert pipe([]) == []


def test_the_order_of_a_pair_counts(pipe):
    assert pipe(PAIRS[0])["score"] != pytest.approx(pipe(PAIRS[0][::-1])["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("w1 w2", "expected a pair of texts, got 'w1 w2'"),
        (("w1",), "expected a pair of texts"),
        (("w1", "w2", "w3"), "expected a pair of texts"),
        (("w1", 2), "expected a text, got 2 (int)"),
        (("", "w2"), "the first text is empty"),
        (("w1", " "), "the second text is empty"),
        (("w1 " * 15, "w2 " * 15), "the pair has 33 tokens; the model reads at most 32. Shorten the beginning"),
    ],
)
def test_bad_input(pipe, pair, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        pipe(pair)
    with pytest.raises(InputError, match=f"^{re.escape(f'inputs[1]: {message}')}"):
        pipe([PAIRS[0], pair])
