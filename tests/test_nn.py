"""The layers' building blocks: keys for new parameters, and dropout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bert_jax import nn


def test_keys_are_those_of_nnx():
    ours, flax = nn.Keys(jax.random.key(3)), nnx.Rngs(jax.random.key(3))
    for _ in range(3):
        np.testing.assert_array_equal(jax.random.key_data(ours.params()), jax.random.key_data(flax.params()))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_rate_and_scale(rate):
    dropped = np.asarray(nn.dropout(jnp.ones((100, 100, 100)), rate, jax.random.key(0)))
    assert sorted(set(dropped.ravel().tolist())) == [0.0, pytest.approx(1 / (1 - rate), rel=2e-5)]
    assert abs((dropped == 0).mean() - rate) < 0.002  # four standard deviations at most, as below
    # No plane stands out, and no quarter (the four have bits of one block) goes with another.
    zeros = (dropped == 0) - rate
    for axes in [(0, 1), (0, 2), (1, 2)]:
        assert abs(zeros.mean(axes)).max() < 0.02
    quarters = np.split(zeros, 4, axis=1)
    together = [(a * b).mean() for i, a in enumerate(quarters) for b in quarters[:i]]
    assert max(map(abs, together)) < 0.003


@pytest.mark.parametrize(
    ("equation", "x", "y"),
    [
        ("ni,oi->no", (130, 16), (8, 16)),
        ("ni,oi->on", (6, 16), (8, 16)),
        ("bnth,bnsh->bnts", (2, 3, 5, 8), (2, 3, 7, 8)),
        ("bnts,bnsh->bnth", (2, 3, 5, 7), (2, 3, 7, 8)),
    ],
)
def test_cpus_multiply_bfloat16_in_a_form_that_the_compiler_keeps(equation, x, y):
    x, y = (jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i, shape in enumerate((x, y)))

    def weighted(product):
        def total(x, y):
            z = product(x, y)
            return jnp.sum(z * jnp.arange(z.size).reshape(z.shape).astype(jnp.bfloat16).astype(jnp.float32) % 7)

        return jax.value_and_grad(total, argnums=(0, 1))

    run = jax.jit(weighted(lambda x, y: nn.product(equation, x, y)))
    exact = weighted(lambda x, y: jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32)))
    for found, expected in zip(jax.tree.leaves(run(x, y)), jax.tree.leaves(exact(x, y)), strict=True):
        expected = np.asarray(expected, np.float32)
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=8e-3 * np.abs(expected).max())
    dots = [line for line in run.lower(x, y).as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 3
    for line in dots:
        contracted, left = re.search(
            r"contracting_dims = \[(\d)\].* : \(tensor<([\dx]*)xbf16>, tensor<\w*xbf16>", line
        ).groups()
        assert int(contracted) == left.count("x")  # the last axis
        assert "batching_dims = [0, 1]" not in line
    jax.vmap(jax.grad(lambda x, y: nn.product(equation, x, y).sum()))(jnp.stack([x, x]), jnp.stack([y, y]))
