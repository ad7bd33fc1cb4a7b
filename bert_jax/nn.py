"""BERT's building blocks: linear maps, LayerNorm, embeddings, activations and dropout.

Letters in shapes:
    B batch · T tokens · S tokens attended to · D hidden_size · N heads · H head size · F intermediate_size
    V vocab_size · C labels · K selected positions
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.nn.initializers import ones, truncated_normal, zeros

from bert_jax import sharding
from bert_jax.random import random_bits


class Linear(nnx.Module):
    """An affine map of the last axis, `x @ weight.T + bias`. The result has the dtype of x.

    The weight has the shape [out, in], as in published checkpoints, so loading and saving need no transpose. On CPUs,
    matrix products are also faster with this layout than with [in, out].
    """

    def __init__(self, in_features: int, out_features: int, std: float, rngs: nnx.Rngs | None):
        # As in the original BERT code, weights are drawn from a normal distribution that is truncated at two standard
        # deviations.
        self.weight = new_param(rngs, (out_features, in_features), truncated_normal(std))
        self.bias = new_param(rngs, (out_features,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the map: [..., in] -> [..., out]."""
        tokens = x.reshape(-1, x.shape[-1])
        # In an exported program, the number of tokens is symbolic.
        if isinstance(tokens.shape[0], int) and tokens.shape[0] <= 128:
            # With few tokens, CPUs are faster if the weight is the left operand: 31 ms instead of 35 ms for BERT-base
            # on 16 tokens. With many tokens, transposing the result takes more time than the faster matrix product
            # saves. On GPUs and TPUs, the order of the operands makes no difference.
            y = jnp.moveaxis(product("ni,oi->on", tokens, self.weight[...]).reshape(-1, *x.shape[:-1]), 0, -1)
        else:
            y = product("ni,oi->no", tokens, self.weight[...]).reshape(*x.shape[:-1], -1)
        return (y + last_axis(self.bias[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalizes the last axis to zero mean and unit variance (Ba et al. 2016), then applies a weight and a bias.

    The computation is in float32.
    """

    def __init__(self, features: int, eps: float, rngs: nnx.Rngs | None):
        self.eps = eps
        self.weight = new_param(rngs, (features,), ones)
        self.bias = new_param(rngs, (features,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x: [..., D] -> [..., D]."""
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.eps)
        return (y * last_axis(self.weight[...], y) + last_axis(self.bias[...], y)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors [entries, D], looked up by id."""

    def __init__(self, entries: int, features: int, std: float, rngs: nnx.Rngs | None):
        self.weight = new_param(rngs, (entries, features), truncated_normal(std))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks up vectors: int [...] -> float32 [..., D].

        An id past the end of the table yields a vector of NaNs. A negative id counts from the end.
        """
        return jnp.take(self.weight[...], ids, axis=0).astype(jnp.float32)

    def attend(self, x: jax.Array) -> jax.Array:
        """Computes the dot product of x and each vector in the table: [..., D] -> float32 [..., V].

        The tied decoder uses this method.
        """
        return product("nd,vd->nv", x.reshape(-1, x.shape[-1]), self.weight[...]).reshape(*x.shape[:-1], -1)


def new_param(rngs: nnx.Rngs | None, shape: tuple[int, ...], init: Callable[..., jax.Array]) -> nnx.Param:
    """Creates an initialized parameter.

    If `rngs` is None, the parameter has a shape but no values until it is loaded.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))
    return nnx.Param(init(rngs.params(), shape, jnp.float32))


class Keys:
    """Draws the same keys as `nnx.Rngs(key)`, for use under jit.

    This class counts the keys with a Python integer, whereas the count of `nnx.Rngs` would be traced. Whenever a traced
    count changes, JAX composes an error message that Flax discards. Composing it takes 5 ms per parameter.
    """

    def __init__(self, key: jax.Array):
        self.key, self.counts = key, itertools.count()

    def params(self) -> jax.Array:
        """Returns the next key."""
        return jax.random.fold_in(self.key, next(self.counts))


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes an einsum of two matrices or of two batches of matrices.

    Both operands are converted to the dtype of x, and the result is float32. The same applies to the backward pass.

    If x is float32, the multiplication is also in float32. By default, TPUs would multiply in bfloat16 and recent GPUs
    in TF32.
    """
    if x.dtype != jnp.float32:
        return _low_product(equation, x, y)
    return jnp.einsum(equation, x, y.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Implements `product` for dtypes narrower than float32.

    The backward pass is defined explicitly, because automatic differentiation would multiply in float32.
    """
    y = y.astype(x.dtype)
    if sharding.platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        return _low_product_on_cpu(equation, x, y)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _low_product_on_cpu(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Implements `_low_product` on CPUs, with operands rearranged so that XLA multiplies in bfloat16.

    The contracted axis becomes the last axis of the left operand, and all batch axes are merged into one. With any
    other arrangement, XLA would multiply in float32, which takes twice as long.
    """
    left, right, result = equation.replace("->", ",").split(",")
    if result[-2] in right:
        left, right, x, y = right, left, y, x
    if left[-1] in result:  # the layout makes XLA transpose the data in memory
        x, left = with_layout_constraint(x.mT, Layout(tuple(range(x.ndim)))), left[:-2] + left[:-3:-1]
    batch = x.shape[:-2]
    x, y = (array.reshape((-1,) * bool(batch) + array.shape[-2:]) for array in (x, y))
    z = "z" if batch else ""
    matrices = f"{z}{left[-2:]},{z}{right[-2:]}->{z}{result[-2:]}"
    out = jnp.einsum(matrices, x, y, preferred_element_type=jnp.float32)
    return out.reshape(batch + out.shape[-2:])


def _low_product_forward(equation: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _low_product(equation, x, y), (x, y)


def _low_product_backward(
    equation: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = operands
    of_x, of_y, of_result = equation.replace("->", ",").split(",")
    gradient = gradient.astype(x.dtype)
    to_x = _low_product(f"{of_result},{of_y}->{of_x}", gradient, y)
    to_y = _low_product(f"{of_x},{of_result}->{of_y}", x, gradient)
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


_low_product.defvjp(_low_product_forward, _low_product_backward)


def last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Prepends axes of size 1 to a vector until it has the rank of `like`. This avoids implicit rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _gelu(x: jax.Array) -> jax.Array:
    if x.dtype != jnp.float32 and sharding.platform() == "cpu":
        # CPUs would convert between bfloat16 and float32 for each operation, so all operations are in float32.
        # `checkpoint` stores x in bfloat16 for the backward pass.
        y: jax.Array = jax.checkpoint(lambda x: _gelu(x.astype(jnp.float32)).astype(x.dtype))(x)
        return y
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


# The activation functions, keyed by their names in config.json. `_gelu` is exact. By default, `jax.nn.gelu` uses the
# tanh approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a random fraction `rate` of the elements of x to zero and scales the others to preserve the mean.

    If `key` is None, returns x unchanged.
    """
    if key is None or rate == 0.0:
        return x
    dropped = round(rate * 2**16)
    keep = random_bits(key, x.shape) >= dropped
    return jnp.where(keep, x / (1.0 - dropped / 2**16), 0.0).astype(x.dtype)


def split_key(key: jax.Array | None, n: int) -> Sequence[jax.Array | None]:
    """Splits a key into n keys. If `key` is None, returns a list of n None values."""
    return [None] * n if key is None else list(jax.random.split(key, n))
