"""Inference-only models whose large weights (layer weights and word embeddings) are bfloat16 or int8.

In BERT-base, the large weights make up 99% of the parameters. All other parameters stay float32.

With bfloat16, the activations are also bfloat16, as in a model whose `compute_dtype` is bfloat16.

With int8, each row of a weight has a scale: the largest absolute value in the row divided by 127. At run time, each
token's activation vector also gets a scale ("vector-wise quantization", Dettmers et al. 2022, arXiv:2208.07339, section
2.1). The vector also gets a zero point, so the 255 levels cover the range from the vector's smallest to its largest
value ("zeropoint quantization", same section). The int8 matrix products accumulate exactly in int32. Each accumulated
sum is multiplied by both scales in float32. Then the product of the zero point and the sum of the weight row is added.
The sums of the weight rows are stored with the weights. Everything else is float32.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from bert_jax.errors import InputError
from bert_jax.nn import Embedding, Linear, last_axis

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "int8")


class QuantizedLinear(Linear):
    """A `Linear` for inference only, with an int8 weight [out, in], and a float32 scale and row sum (`total`) [out]."""

    def __init__(self, linear: Linear):
        self.weight, self.scale, self.total = _int8(linear.weight)
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the linear map: [..., in] -> [..., out], in the dtype of x."""
        y = quantized_product(x, self.weight[...], self.scale[...], self.total[...])
        return (y + last_axis(self.bias[...], y)).astype(x.dtype)


class QuantizedEmbedding(Embedding):
    """An `Embedding` for inference only, with an int8 table [V, D], and a float32 scale and row sum (`total`) [V]."""

    def __init__(self, embedding: Embedding):
        self.weight, self.scale, self.total = _int8(embedding.weight)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks up vectors: int [...] -> float32 [..., D].

        An id past the end of the table yields a vector of NaNs. A negative id counts from the end of the table.
        """
        return jnp.take(self.weight[...], ids, axis=0) * jnp.take(self.scale[...], ids)[..., None]

    def attend(self, x: jax.Array) -> jax.Array:
        """Computes the dot product of x with each vector in the table: [..., D] -> float32 [..., V].

        The tied decoder uses this method.
        """
        return quantized_product(x, self.weight[...], self.scale[...], self.total[...])


@jax.custom_jvp
def quantized_product(x: jax.Array, weight: jax.Array, scale: jax.Array, total: jax.Array) -> jax.Array:
    """Computes `x @ (scale[:, None] * weight).T`, with x rounded to 255 levels per token.

    Args:
        x: float [..., in].
        weight: int8 [out, in].
        scale: float32 [out].
        total: float32 [out], the sum of each row of `scale[:, None] * weight`.

    Returns:
        float32 [..., out].

    Raises:
        InputError: If the function is differentiated. The derivative of rounding is 0, so all gradients would be 0.
    """
    x32 = x.astype(jnp.float32)
    # Each token's minimum and maximum are halved, because the difference of the full values may overflow.
    low, high = jnp.min(x32, axis=-1, keepdims=True) / 2, jnp.max(x32, axis=-1, keepdims=True) / 2
    middle, half = low + high, jnp.maximum(high - low, 1e-30)
    levels = jnp.round((x32 - middle) * (127 / half)).astype(jnp.int8)
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(levels, weight, contracted, preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * (half / 127) * last_axis(scale, y) + middle * last_axis(total, y)


@quantized_product.defjvp
def _no_gradients(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    raise InputError("int8 models do not support gradients. Load the model with dtype='float32'.")


def hold(encoder: Any, dtype: Dtype) -> None:
    """Prepares an abstract `BertModel` (shapes without values) so that `weights.load` can load it in `dtype`."""
    encoder.compute_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    embeddings = encoder.embeddings
    if dtype == "bfloat16":
        linear = [module for _, module in nnx.iter_modules(encoder.layers) if isinstance(module, Linear)]
        for module in (embeddings.word_embeddings, *linear):
            module.weight = _abstract(module.weight.shape, jnp.bfloat16)
    elif dtype == "int8":
        embeddings.word_embeddings = QuantizedEmbedding(embeddings.word_embeddings)
        for _, module in list(nnx.iter_modules(encoder.layers)):
            for name, child in list(vars(module).items()):
                if isinstance(child, Linear):
                    setattr(module, name, QuantizedLinear(child))


def _int8(weight: nnx.Param) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
    of_rows = weight.shape[:1]
    return _abstract(weight.shape, jnp.int8), _abstract(of_rows, jnp.float32), _abstract(of_rows, jnp.float32)


def _abstract(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
