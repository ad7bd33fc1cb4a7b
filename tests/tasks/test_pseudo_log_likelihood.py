"""pseudo-log-likelihood with the embedded model, against the logits of the model called directly."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax.errors import InputError

TEXTS = ["Paris is the capital of France.", "no", "The unbelievably souvenir-laden traveller hooted."]


@pytest.fixture(scope="module")
def pipe():
    return bert_jax.pipeline("pseudo-log-likelihood", "bert-mini-cased")


@pytest.fixture(scope="module")
def log_p():
    """A function that masks places of a text, and returns the log-probability of the token at the first of them."""
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
    tokenizer = bert_jax.Tokenizer.from_pretrained("bert-mini-cased")

    def log_p(text, places):
        given = tokenizer(text, length=24)
        token = given["input_ids"][0, places[0]]
        given["input_ids"][0, places] = tokenizer.mask_token_id
        return float(jax.nn.log_softmax(model(**given).logits[0, places[0]])[token])

    return log_p


@pytest.mark.slow
def test_each_token_is_masked_in_turn(pipe, log_p):
    for text, found in zip(TEXTS, pipe(TEXTS, per_token=True), strict=True):
        ids = pipe.tokenizer.encode([text])[0][0].ids
        expected = [log_p(text, [place]) for place in range(1, len(ids) - 1)]
        assert [entry["token"] for entry in found["token_scores"]] == ids[1:-1]
        np.testing.assert_allclose([entry["score"] for entry in found["token_scores"]], expected, atol=1e-4)
        assert found["score"] == pytest.approx(sum(expected), abs=1e-3)
        assert (found["tokens"], found["windows"]) == (len(ids) - 2, False)
        assert pipe(text).keys() == {"score", "tokens", "windows"}


def test_later_pieces_of_the_word_are_masked_too(pipe, log_p):
    encoding = pipe.tokenizer.encode([TEXTS[2]])[0][0]
    words = encoding.word_ids
    expected = [
        log_p(TEXTS[2], [place, *(i for i in range(place + 1, len(words)) if words[i] == words[place])])
        for place in range(1, len(words) - 1)
    ]
    found = pipe(TEXTS[2], metric="within_word_l2r", per_token=True)
    np.testing.assert_allclose([entry["score"] for entry in found["token_scores"]], expected, atol=1e-4)
    assert found["score"] < pipe(TEXTS[2])["score"]
    assert pipe(TEXTS[0], metric="within_word_l2r")["score"] == pytest.approx(pipe(TEXTS[0])["score"], abs=1e-4)


@pytest.mark.slow
def test_a_long_text_is_scored_in_windows(pipe):
    config = bert_jax.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=16
    )
    model = bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0))
    short = bert_jax.pipeline("pseudo-log-likelihood", model, tokenizer=pipe.tokenizer)
    text = "The cat sat on the mat. " * 4
    found = short(text, per_token=True)
    assert found["windows"]
    assert found["tokens"] == len(found["token_scores"]) == 28
    assert short.task.request(text).tokens == 28 * 16
    ids = pipe.tokenizer.encode([text])[0][0].ids
    window = np.array([[ids[0], *ids[8:22], ids[-1]]])  # around token 15
    window[0, 8] = pipe.tokenizer.mask_token_id
    expected = jax.nn.log_softmax(model(window).logits[0, 8])[ids[15]]
    assert found["token_scores"][14]["score"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
def test_all_programs_are_known_before(pipe):
    """`warm_up` compiles what inputs need."""
    pipe(TEXTS * 20)
    assert set(pipe.programs) <= set(pipe.buckets)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        ("\u200b", {}, "the text has no tokens"),
        ("a [MASK]", {}, "the text contains [MASK]; expected no mask tokens"),
        ("a", {"metric": "l2r"}, "metric is 'l2r'; expected one of 'original', 'within_word_l2r'"),
    ],
)
def test_bad_input(pipe, text, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pipe(text, **options)
