"""What we save, PyTorch transformers loads: every key, every bit, the same answers."""

import numpy as np
import pytest
import reference
import torch
import transformers
from flax import nnx

import bert_jax


@pytest.mark.parametrize("architecture", reference.HEADS)
@torch.no_grad()
def test_saved_models_load_in_transformers(close, tmp_path, architecture):
    config = bert_jax.BertConfig.from_dict(reference.config(architecture))
    model = getattr(bert_jax, architecture)(config, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert tuple(loaded.config.id2label.values()) == config.labels
    if architecture != "BertModel":
        np.testing.assert_array_equal(
            loaded.bert.encoder.layer[11].output.dense.weight, model.bert.layers[11].output.weight[...]
        )
    given = reference.inputs()
    expected = loaded.eval()(**{name: torch.tensor(value).long() for name, value in given.items()})
    out = model(**given)
    for name in expected:
        if hasattr(out, name):
            close(f"saved {architecture}", getattr(out, name), expected[name])


def test_a_saved_model_answers_in_transformers(tmp_path):
    bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased").save_pretrained(tmp_path)
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(tmp_path)
    theirs = transformers.pipeline("fill-mask", model=str(tmp_path))("Paris is the [MASK] of France.")
    ours = bert_jax.pipeline("fill-mask", tmp_path)("Paris is the [MASK] of France.")
    assert [entry["token"] for entry in ours] == [entry["token"] for entry in theirs]
    np.testing.assert_allclose([e["score"] for e in ours], [e["score"] for e in theirs], atol=1e-5)
