"""Random bits for dropout, from the chip's own generator on TPUs and otherwise Threefry, four elements per block."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bert_jax import sharding


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws 16 random bits per element, as uint32 of `shape`. This meets a dropout rate to within 1e-5.

    The generator depends on the platform.
    """
    key = jax.random.key_data(key)[:2]
    bits: jax.Array = jax.lax.platform_dependent(
        key, tpu=functools.partial(_rbg, shape=shape), default=functools.partial(_threefry, shape=shape)
    )
    return bits


def _rbg(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The TPU's own generator, `jax.random`'s "rbg". It needs less temporary memory than Threefry on TPUs.

    The bits depend on the layout of the devices.
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        _, bits = jax.lax.rng_bit_generator(jnp.concatenate([key, key]), shape, dtype=jnp.uint16)
        return jax.lax.convert_element_type(bits, jnp.uint32)

    return draw_by_rows(draw, key, shape)


def _threefry(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2).

    The algorithm is that of jax.random. It is applied to the position in the batch and within the row. One block of 64
    bits serves four elements. jax.random uses one block per element and, on CPU, a loop of passes over memory. That
    takes five times as long, a tenth of a training step.
    """
    first, second = key
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    batch, *middle, last = shape
    rows = math.prod(middle)
    # The four quarters lie along the middle axis. Each is contiguous in memory there, and the batch can be sharded.
    i, j, k = (jax.lax.broadcasted_iota(jnp.uint32, (batch, -(-rows // 4), last), axis) for axis in range(3))
    x, y = i + keys[0], j * np.uint32(last) + k + keys[1]
    for n in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[n % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x = x + keys[(n + 1) % 3]
        y = y + keys[(n + 2) % 3] + np.uint32(n + 1)
    bits = jnp.concatenate([x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16], axis=1)
    return bits[:, :rows].reshape(shape)


def draw_by_rows(draw: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `draw(key, shape)`. If rows are sharded, each device draws its own rows with its own key.

    Compilers do not shard random generators, so every device would otherwise draw the bits of the whole batch.

    Args:
        draw: A function of a key and a shape.
        key: uint32 [2].
        shape: The shape of the result, rows first.
    """
    shares = sharding.shares()
    if shares == 1 or shape[0] % shares:
        return draw(key, shape)

    axes = sharding.BATCH_AXES

    @jax.shard_map(in_specs=PartitionSpec(), out_specs=PartitionSpec(axes), axis_names=set(axes), check_vma=False)
    def part(key: jax.Array) -> jax.Array:
        own = key.at[1].add(jax.lax.axis_index(axes).astype(key.dtype))
        return draw(own, (shape[0] // shares, *shape[1:]))

    return part(key)
