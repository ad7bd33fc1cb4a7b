"""Random bits: a formula for each, and each device's own rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from bert_jax import random, sharding


def test_random_bits_are_those_of_threefry():
    key, batch, rows, columns = jax.random.key(7), 2, 3, 5
    ours = np.asarray(random.random_bits(key, (batch, 4, rows, columns)))
    i, j = np.indices((batch, rows * columns), np.uint32).reshape(2, -1)
    blocks = threefry_2x32(jax.random.key_data(key), jnp.concatenate([i, j]))
    x, y = np.asarray(blocks).reshape(2, batch, rows, columns)
    np.testing.assert_array_equal(ours, np.stack([x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16], axis=1))


def test_devices_draw_for_their_own_rows():
    def draw(key, shape):
        return jnp.broadcast_to(key[None, :, None], shape)

    key = jnp.array([7, 1], jnp.uint32)
    whole = jax.jit(lambda key: random.draw_by_rows(draw, key, (8, 2, 3)))
    np.testing.assert_array_equal(whole(key), jnp.broadcast_to(key[None, :, None], (8, 2, 3)))
    with jax.set_mesh(sharding.mesh(data=2, fsdp=2, tensor=2)):
        found = np.asarray(jax.jit(lambda key: random.draw_by_rows(draw, key, (8, 2, 3)))(key))
        odd = jax.jit(lambda key: random.draw_by_rows(draw, key, (6, 2, 3)))(key)
    np.testing.assert_array_equal(found[:, 0], 7)
    np.testing.assert_array_equal(found[:, 1, 0], [1, 1, 2, 2, 3, 3, 4, 4])
    assert odd.shape == (6, 2, 3)  # rows that do not divide are drawn whole
