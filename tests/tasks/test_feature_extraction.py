"""feature-extraction with the embedded model, against the model called directly."""

import re

import numpy as np
import pytest

import bert_jax
from bert_jax.errors import InputError

TEXTS = ["Paris is the capital of France.", "no", "A longer text, of " + "many " * 20 + "words."]


@pytest.fixture(scope="module")
def pipe():
    return bert_jax.pipeline("feature-extraction", "bert-mini-cased")


@pytest.fixture(scope="module")
def states():
    model = bert_jax.BertModel.from_pretrained("bert-mini-cased", add_pooling_layer=False)
    tokenizer = bert_jax.Tokenizer.from_pretrained("bert-mini-cased")
    return [np.asarray(model(**tokenizer(text)).last_hidden_state[0]) for text in TEXTS]


def test_tokens(pipe, states):
    for ours, theirs in zip(pipe(TEXTS), states, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("pooling", [None, "cls", "mean", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(pipe, states, pooling, normalize):
    for ours, theirs in zip(pipe(TEXTS, pooling=pooling, normalize=normalize), states, strict=True):
        pooled = {None: theirs, "cls": theirs[0], "mean": theirs.mean(0), "max": theirs.max(0)}[pooling]
        if normalize:
            pooled = pooled / np.sqrt(np.square(pooled).sum(-1, keepdims=True))
        np.testing.assert_allclose(ours, pooled, atol=1e-5)


def test_layers(pipe):
    """The layers of each text are those of the model, whatever layers the other texts of its batch want."""
    model = bert_jax.BertModel.from_pretrained("bert-mini-cased", add_pooling_layer=False)
    tokenizer = bert_jax.Tokenizer.from_pretrained("bert-mini-cased")
    hidden = [[np.asarray(states[0]) for states in model(**tokenizer(text)).hidden_states] for text in TEXTS]
    for text, states in zip(TEXTS, hidden, strict=True):
        np.testing.assert_allclose(pipe(text, layers=[3, -1]), [states[3], states[-1]], atol=1e-5)
    wanted = [[0], [-7, 6, 2], None]
    requests = [
        pipe.task.request(text, layers=layers, pooling="mean") for text, layers in zip(TEXTS, wanted, strict=True)
    ]
    for states, layers, found in zip(hidden, wanted, pipe.run(requests), strict=True):
        expected = states[-1].mean(0) if layers is None else [states[layer].mean(0) for layer in layers]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_gives_float32(states):
    pipe = bert_jax.pipeline("feature-extraction", "bert-mini-cased", dtype="bfloat16")
    found = pipe(TEXTS[0], layers=[-1])
    assert found.dtype == np.float32
    assert np.linalg.norm(found[0] - states[0]) < 0.03 * np.linalg.norm(states[0])


def test_a_long_text_is_cut(pipe):
    assert pipe("word " * 600).shape[0] == 512


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        (("a", "b"), {}, "expected a text, got ('a', 'b') (tuple)"),
        ("a", {"pooling": "sum"}, "pooling is 'sum'; expected one of None, 'cls', 'mean', 'max', 'auto'"),
        ("a", {"layers": []}, "layers is []; expected a list of numbers from 0 (the embeddings) to 6"),
        ("a", {"layers": [7]}, "layers is [7]; expected"),
        ("a", {"layers": [-8]}, "layers is [-8]; expected"),
        ("a", {"layers": 6}, "layers is 6; expected"),
        ("a", {"layers": [True]}, "layers is [True]; expected"),
    ],
)
def test_bad_input(pipe, text, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pipe(text, **options)
