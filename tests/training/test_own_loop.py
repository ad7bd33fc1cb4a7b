"""The loops in the documentation, without settings: two heads on eight devices, and the one of run_flax_glue.py."""

import re
from pathlib import Path

import numpy as np
import optax
import pytest
import sentiments
from flax import nnx

import bert_jax
from bert_jax import sharding

DOCS = Path(__file__).parents[2] / "docs"


def defined(page):
    """What the first block of Python in a page defines."""
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)[0], names)
    return names


@pytest.mark.slow
def test_two_heads_learn_on_eight_devices(tokenizer, capsys):
    names = defined("training_loop.md")
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


@pytest.mark.slow
def test_the_loop_of_run_flax_glue(tokenizer, capsys):
    rows = [row | {"label": int(row["label"] == "yes")} for row in sentiments.rows(400)]
    model, _ = sentiments.classifier(tokenizer, layers=1, width=16, hidden_dropout_prob=0.1, initializer_range=0.1)
    trained = defined("porting.md")["train"](
        model, tokenizer, rows[:352], rows[352:], epochs=8, max_length=16, learning_rate=1e-2, warmup_steps=10,
        weight_decay=0.01,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"epoch {n}" for n in range(1, 9)]
    accuracy = float(lines[-1].split()[-1])
    assert accuracy > 0.9
    found = trained(**tokenizer([row["text"] for row in rows[352:]])).logits.argmax(-1)
    assert np.mean(np.asarray(found) == [row["label"] for row in rows[352:]]) == pytest.approx(accuracy, abs=1e-3)
