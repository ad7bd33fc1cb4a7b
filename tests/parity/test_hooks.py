"""Interventions, beside PyTorch hooks at the same places, and gradients with respect to the input embeddings."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax.interventions import SITES

LAYERS = 3
CHANGES = {"scaled": 0.7, "zeroed": 0.0}
IDS = np.random.RandomState(0).randint(5, 200, (3, 11))
MASK = np.array([[1] * 11, [1] * 8 + [0] * 3, [1] * 3 + [0] * 8])
MODULES = {
    "embeddings": "embeddings",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "intermediate": "intermediate",
    "output": "output.dense",
    "": "",
    "pooler": "pooler",
}
"""Maps our names to those of PyTorch's modules, each within a layer or the encoder."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("interventions")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32, num_labels=3, initializer_range=0.1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


@contextlib.contextmanager
def hooked(model, site, change, monkeypatch):
    """Multiplies a PyTorch activation by a number."""
    layer, _, name = site.removeprefix("layers.").partition(".") if site.startswith("layers.") else ("", "", site)
    base = model.bert.encoder.layer[int(layer)] if layer else model.bert
    if name == "attention.heads":  # what the output projection is given
        handle = base.attention.output.dense.register_forward_pre_hook(lambda _, given: (given[0] * change,))
    elif name == "attention.probabilities":
        softmax, calls = torch.nn.functional.softmax, iter(range(LAYERS))
        changed = lambda x, **options: softmax(x, **options) * (change if next(calls) == int(layer) else 1)  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "softmax", changed)
        yield
        monkeypatch.undo()
        assert next(calls, None) is None
        return
    else:
        module = base.get_submodule(MODULES[name])
        handle = module.register_forward_hook(lambda _, given, found: found * change)
    yield
    handle.remove()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("site", SITES)
def test_sites_beside_hooks(folder, site, change, close, monkeypatch):
    ours = bert_jax.BertForSequenceClassification.from_pretrained(folder)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    factor, weights = CHANGES[change], np.arange(9, dtype=np.float32).reshape(3, 3) - 4
    for i in range(LAYERS) if "{i}" in site else [0]:
        place = site.replace("{i}", str(i))

        def run(vectors, place=place):
            functions = {place: lambda x: x * factor}
            out = ours(attention_mask=MASK, inputs_embeds=vectors, interventions=functions)
            return (out.logits * weights).sum(), out.logits

        vectors = ours.bert.embeddings.word_embeddings(jnp.asarray(IDS))
        (_, logits), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(vectors)
        given = torch.tensor(np.array(vectors), requires_grad=True)
        with hooked(theirs, place, factor, monkeypatch):
            expected = theirs(inputs_embeds=given, attention_mask=torch.tensor(MASK)).logits
        (expected * torch.tensor(weights)).sum().backward()
        close(f"interventions {change} {site} logits", logits, expected.detach())
        close(f"interventions {change} {site} gradients", gradient, given.grad)
