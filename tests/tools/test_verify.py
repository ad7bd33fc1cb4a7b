import numpy as np
import pytest

from bert_jax.errors import InputError
from bert_jax.tools import verify


def test_published_ids_are_the_vocabularys(tokenizer):
    cards = [entry for card in verify.FILL_MASK.values() for entries in card.values() for entry in entries]
    assert len(cards) == 34
    for token, token_id, score in cards:
        assert tokenizer.token_to_id(token) == token_id
        assert 0 < score < 1


def test_models():
    assert len(verify.MODELS) == 4
    with pytest.raises(InputError, match="No published outputs are known for bert-mini-cased"):
        verify.verify("bert-mini-cased")


def test_a_number_passes_within_the_tolerance_alone():
    expected = np.array([0.5, 0.25])
    assert verify._numbers("", expected, expected + 9e-5).passed
    assert not verify._numbers("", expected, expected + 2e-4).passed


def test_a_card_passes_with_the_same_ids_and_scores_alone(fill_mask, monkeypatch):
    ours = fill_mask("Paris is the [MASK] of France.")
    card = [(entry["token_str"], entry["token"], entry["score"] + 5e-5) for entry in ours]
    monkeypatch.setattr(verify, "pipeline", lambda *_: fill_mask)

    def check(card):
        (found,) = verify._fill_mask("bert-mini-cased", {"Paris is the [MASK] of France.": card})
        return found

    assert check(card).passed
    assert not check([(token, token_id, score + 1e-3) for token, token_id, score in card]).passed
    assert not check([card[1], card[0], *card[2:]]).passed
