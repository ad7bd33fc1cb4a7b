"""Outputs by name, key and index, and as pytrees."""

import jax
import numpy as np
import pytest

import bert_jax

IDS = np.array([[2, 5, 3]])


def test_by_name_key_and_index(checkpoint):
    out = bert_jax.BertForPreTraining.from_pretrained(checkpoint("BertForPreTraining"))(IDS)
    names = ["prediction_logits", "seq_relationship_logits", "hidden_states", "attentions"]
    assert list(out) == list(out.keys()) == names
    assert len(out) == 4
    for i, name in enumerate(names):
        assert out[i] is out[name] is getattr(out, name)
    assert out[-1] is out.attentions
    assert [a is b for a, b in zip(out[:2], out.to_tuple(), strict=False)] == [True, True]
    assert type(out[:2]) is tuple
    assert dict(**out)["hidden_states"] is out.hidden_states
    assert "logits" not in out
    with pytest.raises(KeyError, match="logits"):
        out["logits"]
    with pytest.raises(IndexError):
        out[4]


def test_entries_that_are_none_are_left_out(checkpoint):
    model = bert_jax.BertModel.from_pretrained(checkpoint("BertModel"), add_pooling_layer=False)
    out = model(IDS)
    assert out.pooler_output is None
    assert list(out) == ["last_hidden_state", "hidden_states", "attentions"]
    assert out[1] is out.hidden_states
    assert "pooler_output" not in out
    with pytest.raises(KeyError, match="pooler_output"):
        out["pooler_output"]


def test_under_jit_and_as_a_pytree(checkpoint):
    model = bert_jax.BertForMaskedLM.from_pretrained(checkpoint("BertForMaskedLM"))
    plain, jitted = model(IDS), jax.jit(model)(IDS)
    assert type(jitted) is type(plain)
    np.testing.assert_allclose(jitted["logits"], plain[0], atol=1e-5)
    np.testing.assert_array_equal(jax.jit(lambda ids: model(ids)[0])(IDS), jitted.logits)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, plain)
    np.testing.assert_array_equal(doubled[0], 2 * plain.logits)
    assert jax.tree.structure(doubled) == jax.tree.structure(plain)
