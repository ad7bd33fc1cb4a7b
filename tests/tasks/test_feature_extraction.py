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


@pytest.mark.parametrize("pooling", [None, "cls", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(pipe, states, pooling, normalize):
    for ours, theirs in zip(pipe(TEXTS, pooling=pooling, normalize=normalize), states, strict=True):
        pooled = {None: theirs, "cls": theirs[0], "mean": theirs.mean(0)}[pooling]
        if normalize:
            pooled = pooled / np.sqrt(np.square(pooled).sum(-1, keepdims=True))
        np.testing.assert_allclose(ours, pooled, atol=1e-5)


def test_a_long_text_is_cut(pipe):
    assert pipe("word " * 600).shape[0] == 512


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        (("a", "b"), {}, "expected a text, got ('a', 'b') (tuple)"),
        ("a", {"pooling": "max"}, "pooling is 'max'; expected one of None, 'cls', 'mean', 'auto'"),
    ],
)
def test_bad_input(pipe, text, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pipe(text, **options)
