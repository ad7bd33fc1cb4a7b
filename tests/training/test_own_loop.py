"""The loop of docs/training_loop.md: two heads on one encoder, any optax transformation, eight devices, no settings."""

import re
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx

import bert_jax
from bert_jax import sharding

DOCS = Path(__file__).parents[2] / "docs" / "training_loop.md"


def test_two_heads_learn_on_eight_devices(tokenizer, capsys):
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0], names)
    random = np.random.RandomState(0)
    topics, sentiments = random.randint(5, size=16), random.randint(2, size=16)
    texts = [f"The {('tea', 'sea', 'war', 'law', 'art')[t]} is {('bad', 'good')[s]}."
             for t, s in zip(topics, sentiments, strict=True)]  # fmt: skip
    batch = {"inputs": dict(tokenizer(texts)), "sentiment": sentiments, "topic": topics}
    config = bert_jax.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                 hidden_dropout_prob=0.0, initializer_range=0.1)  # fmt: skip
    model = names["TwoHeads"](bert_jax.BertModel(config, rngs=nnx.Rngs(0)), nnx.Rngs(1))
    mesh = sharding.mesh(data=4, fsdp=2)
    trained = names["train"](model, optax.lion(3e-3), [batch] * 60, mesh)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] == pytest.approx(np.log(2) + np.log(5), rel=0.1)
    assert losses[-1] < 0.3
    assert trained.topic.weight[...].sharding.mesh == mesh
    assert len(trained.bert.layers[0].intermediate.weight[...].addressable_shards) == 8
