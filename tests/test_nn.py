"""The layers' building blocks: keys for new parameters, and dropout."""

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
