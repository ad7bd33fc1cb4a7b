"""BERT (Devlin et al. 2018, arXiv:1810.04805) in Flax NNX, top to bottom: layers, encoder, heads.

Shapes, in trailing comments:
    B batch · T tokens · S tokens attended to · D hidden_size · N heads · H head size · F intermediate_size
    V vocab_size · C labels · K masked positions

The modules hold nothing but `nnx.Param`, in float32. Dropout happens if and only if a `dropout_key` is passed.
The dtype of the activations is decided once, behind the embeddings (`compute_dtype`): products take operands of that
dtype and accumulate in float32; softmax, LayerNorm and logits are float32 throughout.

Reference: google-research/bert modeling.py, and transformers' modeling_bert.py, whose class names these are.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from bert_jax import hub, kernels, sharding, tree, weights
from bert_jax.config import BertConfig
from bert_jax.errors import InputError, quoted
from bert_jax.kernels import Attended

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = ("float32", "bfloat16")
FIRST = np.zeros((1, 1), np.int32)
"""The `positions` of a head that reads [CLS] alone."""


# ── What a model returns ─────────────────────────────────────────────────────────────────────────────────────────────
# Under jit, what the caller does not return is never computed.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BertModelOutput:
    """What the encoder returns.

    Attributes:
        last_hidden_state: [B, T, D], in the compute dtype; [B, K, D] of `positions`.
        pooler_output: float32 [B, D] of the first token, or [B, K, D] of `positions`; None from a model without a
            pooler.
        hidden_states: The embeddings' output and then each layer's, L + 1 times [B, T, D], the last as above.
        attentions: Each layer's attention probabilities, L times float32 [B, N, T, S], the last [B, N, K, S] of
            `positions`; None from a fused kernel.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadOutput:
    """What a model with one head returns: float32 logits, shaped as the model says, and the encoder's inside."""

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreTrainingOutput:
    """What `BertForPreTraining` returns.

    Attributes:
        prediction_logits: float32 [B, T, V], or [B, P, V] at the chosen positions.
        seq_relationship_logits: float32 [B, 2], or [B, K, 2] of the chosen first tokens; 0 is "B follows A".
        hidden_states: As in `BertModelOutput`.
        attentions: As in `BertModelOutput`.
    """

    prediction_logits: jax.Array
    seq_relationship_logits: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuestionAnsweringOutput:
    """What `BertForQuestionAnswering` returns: float32 [B, T] logits of an answer's first and of its last token."""

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


# ── Layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Linear(nnx.Module):
    """An affine map of the last axis, `x @ weight.T + bias`, in the dtype of x.

    The weight is [out, in], as it is published: nothing is transposed on the way in and out, and CPUs multiply it
    faster that way (1.2 times at 16 tokens).
    """

    def __init__(self, in_features: int, out_features: int, std: float, rngs: nnx.Rngs | None):
        self.weight = _new_param(rngs, (out_features, in_features), _truncated_normal(std))
        self.bias = _new_param(rngs, (out_features,), jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        if x.size <= 128 * x.shape[-1]:
            # Of few tokens, CPUs take the weight faster as the left operand: BERT-base on 16 tokens in 31 ms, not 35.
            # Of many, turning the activations around costs more than that gains. Other compilers see no difference.
            y = jnp.moveaxis(_product("...i,oi->o...", x, self.weight[...]), 0, -1)
        else:
            y = _product("...i,oi->...o", x, self.weight[...])
        return (y + _last_axis(self.bias[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the last axis (Ba et al. 2016), then weight and bias; float32 inside."""

    def __init__(self, features: int, eps: float, rngs: nnx.Rngs | None):
        self.eps = eps
        self.weight = _new_param(rngs, (features,), jax.nn.initializers.ones)
        self.bias = _new_param(rngs, (features,), jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * _last_axis(self.weight[...], y) + _last_axis(self.bias[...], y)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors [entries, D], looked up by id."""

    def __init__(self, entries: int, features: int, std: float, rngs: nnx.Rngs | None):
        self.weight = _new_param(rngs, (entries, features), _truncated_normal(std))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [...] -> float32 [..., D]; an id outside the table gives NaN, not its neighbour."""
        return jnp.take(self.weight[...], ids, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with every entry: the decoder that is tied to the embedding. [..., D] -> float32 [..., V]."""
        return _product("...d,vd->...v", x, self.weight[...])


def _new_param(rngs: nnx.Rngs | None, shape: tuple[int, ...], init: Callable[..., jax.Array]) -> nnx.Param:
    """A parameter drawn anew or, without `rngs`, its shape alone, for a checkpoint to fill."""
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))
    return nnx.Param(init(rngs.params(), shape, jnp.float32))


class _Keys:
    """Draws the keys that `nnx.Rngs(key)` draws, to be used under jit.

    The count is a Python integer. Flax prints the program so far whenever a traced count changes, 5 ms per parameter.
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count += 1
        return key


def _truncated_normal(std: float) -> Callable[..., jax.Array]:
    return jax.nn.initializers.truncated_normal(std)  # cut at two standard deviations, as the original


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum with operands in the dtype of x and a float32 result, forward and backward.

    Where x is float32, so is the product: left to the default, TPUs take bfloat16 and recent GPUs TF32.
    """
    if x.dtype != jnp.float32:
        return _low_product(equation, x, y)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, x, y.astype(x.dtype), precision=highest, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum in x's dtype, less than float32; left to itself, the backward pass multiplies in the result's."""
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _low_product_forward(equation: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _low_product(equation, x, y), (x, y)


def _low_product_backward(
    equation: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = operands
    axes = equation.replace("...", "ABCDEF"[: x.ndim + 3 - len(equation.split(",")[0])])
    (of_x, of_y), of_result = axes.split("->")[0].split(","), axes.split("->")[1]
    gradient = gradient.astype(x.dtype)
    to_x = _low_product(f"{of_result},{of_y}->{of_x}", gradient, y)
    to_y = _low_product(f"{of_x},{of_result}->{of_y}", x, gradient)
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


_low_product.defvjp(_low_product_forward, _low_product_backward)


def _last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector of features laid along the last axis, without an implicit promotion of rank."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


# By config.json's names. `gelu` is the exact one; jax.nn.gelu would be the tanh approximation by default.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
}


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    dropped = round(rate * 2**16)
    keep = _random_bits(key, x.shape) >= dropped
    return jnp.where(keep, x / (1.0 - dropped / 2**16), 0.0).astype(x.dtype)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """16 random bits an element, uint32 of `shape`: enough to meet a rate to 1e-5. Whose depends on the platform."""
    key = jax.random.key_data(key)[:2]
    return jax.lax.platform_dependent(
        key, tpu=functools.partial(_rbg, shape=shape), default=functools.partial(_threefry, shape=shape)
    )


def _rbg(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The TPU's own generator, `jax.random`'s "rbg", which its compiler gives less temporary memory than threefry.

    Other layouts of devices draw other bits.
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        _, bits = jax.lax.rng_bit_generator(jnp.concatenate([key, key]), shape, dtype=jnp.uint16)
        return bits.astype(jnp.uint32)

    return sharding.draw_by_rows(draw, key, shape)


def _threefry(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2), as jax.random has
    it, over the place in the batch and within the row. A block of 64 bits serves four elements; jax.random spends one
    on each and, on CPU, a loop of passes over memory on all of them: five times as long, a tenth of a training step.
    """
    first, second = key
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    batch, *middle, last = shape
    rows = math.prod(middle)
    # The four quarters lie along the middle: there each is one piece of memory, and the batch can be shared out.
    blocks = (batch, -(-rows // 4), last)
    i, j, k = (jax.lax.broadcasted_iota(jnp.uint32, blocks, axis) for axis in range(3))
    x, y = i + keys[0], j * np.uint32(last) + k + keys[1]
    for n in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[n % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x = x + keys[(n + 1) % 3]
        y = y + keys[(n + 2) % 3] + np.uint32(n + 1)
    bits = jnp.concatenate([x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16], axis=1)
    return bits[:, :rows].reshape(shape)


def _split(key: jax.Array | None, n: int) -> Sequence[jax.Array | None]:
    return [None] * n if key is None else list(jax.random.split(key, n))


# ── Attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: Attended | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention, written out (Vaswani et al. 2017, section 3.2.1).

    Args:
        query: [B, T, N, H].
        key: [B, S, N, H].
        value: [B, S, N, H].
        attended: Who attends to whom; None for all to all. A row without any attends to all alike.
        dropout_rate: Share of the probabilities that is dropped where there is a `dropout_key`.
        dropout_key: PRNG key, or None.

    Returns:
        The context [B, T, N, H] in the dtype of value, and the probabilities, float32 [B, N, T, S], before dropout.
    """
    # Heads first, once and for all: left inside the products, CPUs turn them around anew in the backward pass.
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))  # [B, N, T, H]
    scores = _product("bnth,bnsh->bnts", query, key) * query.shape[-1] ** -0.5
    if attended is not None:
        scores = jnp.where(attended.mask(), scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    dropped = _dropout(probabilities, dropout_rate, dropout_key).astype(value.dtype)
    context = _product("bnts,bnsh->bnth", dropped, value).astype(value.dtype)
    return jnp.moveaxis(context, 1, 2), probabilities


# Name -> kernel. A fused kernel has the same signature and returns None for the probabilities that it never holds.
ATTENTION: dict[str, Callable[..., tuple[jax.Array, jax.Array | None]]] = {
    "plain": plain_attention,
    "splash": kernels.splash,
    "cudnn": kernels.cudnn,
}


class SelfAttention(nnx.Module):
    """Multi-head self-attention and its output projection (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, config: BertConfig, attention: str, rngs: nnx.Rngs | None):
        self.config = config
        self.attention = attention
        size, std = config.hidden_size, config.initializer_range
        self.query = Linear(size, size, std, rngs)
        self.key = Linear(size, size, std, rngs)
        self.value = Linear(size, size, std, rngs)
        self.output = Linear(size, size, std, rngs)

    def __call__(
        self, x: jax.Array, states: jax.Array, attended: Attended | None, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What x [B, T, D] gathers from states [B, S, D]: [B, T, D] and the probabilities [B, N, T, S].

        Where x is not all of the states there is little to fuse, and attention is plain.
        """
        rate = self.config.attention_probs_dropout_prob
        if dropout_key is not None:
            kernels.check_dropout(self.attention, rate)
        query, key, value = (
            linear(source).reshape(*source.shape[:-1], self.config.num_attention_heads, -1)  # [B, T, N, H]
            for linear, source in ((self.query, x), (self.key, states), (self.value, states))
        )
        kernel = ATTENTION[self.attention if x is states else "plain"]
        context, probabilities = kernel(query, key, value, attended, rate, dropout_key)
        return self.output(context.reshape(x.shape)), probabilities


class BertLayer(nnx.Module):
    """One block of the encoder: attention and feed-forward, each with dropout, residual and then LayerNorm."""

    def __init__(self, config: BertConfig, attention: str, rngs: nnx.Rngs | None):
        self.config = config
        std, eps = config.initializer_range, config.layer_norm_eps
        self.attention = SelfAttention(config, attention, rngs)
        self.attention_norm = LayerNorm(config.hidden_size, eps, rngs)
        self.intermediate = Linear(config.hidden_size, config.intermediate_size, std, rngs)
        self.output = Linear(config.intermediate_size, config.hidden_size, std, rngs)
        self.output_norm = LayerNorm(config.hidden_size, eps, rngs)

    def __call__(
        self,
        x: jax.Array,
        attended: Attended | None = None,
        dropout_key: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """One layer.

        Args:
            x: [B, S, D].
            attended: Who attends to whom; None for all to all.
            dropout_key: PRNG key; without one nothing is dropped.
            positions: int [B, T] or [1, T], the tokens to go on with; None for all. All are attended to.

        Returns:
            [B, T, D] in the dtype of x, and the attention probabilities [B, N, T, S].
        """
        rate = self.config.hidden_dropout_prob
        attention_key, context_key, output_key = _split(dropout_key, 3)
        states = x
        if positions is not None:
            x = jnp.take_along_axis(states, positions[..., None], axis=1)
            if attended is not None and attended.queries.shape[1] > 1:  # documents of their own
                attended = attended._replace(queries=jnp.take_along_axis(attended.queries, positions, axis=1))
        with jax.named_scope("attention"):
            context, probabilities = self.attention(x, states, attended, attention_key)
            x = self.attention_norm(x + _dropout(context, rate, context_key))
        with jax.named_scope("feed_forward"):
            inner = ACTIVATIONS[self.config.hidden_act](self.intermediate(x))  # [B, T, F]
            x = self.output_norm(x + _dropout(self.output(inner), rate, output_key))
        return x, probabilities


# ── Encoder ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, then LayerNorm and dropout (Devlin et al. 2018, figure 2)."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs | None):
        self.config = config
        size, std = config.hidden_size, config.initializer_range
        self.word_embeddings = Embedding(config.vocab_size, size, std, rngs)
        self.position_embeddings = Embedding(config.max_position_embeddings, size, std, rngs)
        self.token_type_embeddings = Embedding(config.type_vocab_size, size, std, rngs)
        self.layer_norm = LayerNorm(size, config.layer_norm_eps, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """int [B, T] each, or [1, T] -> float32 [B, T, D]."""
        words = self.word_embeddings(input_ids)
        if self.config.pad_token_id is not None:
            # The padding's vector learns nothing from being looked up: torch.nn.Embedding(padding_idx=…).
            padding = (input_ids == self.config.pad_token_id)[..., None]
            words = jnp.where(padding, jax.lax.stop_gradient(words), words)
        x = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)  # [B, T, D]
        return _dropout(self.layer_norm(x), self.config.hidden_dropout_prob, dropout_key)


class BertPreTrainedModel(nnx.Module):
    """What all models share: a config, and checkpoints in and out.

    Args of every model:
        config: Sizes and rates.
        rngs: Draws the parameters; without it the model holds their shapes alone, for a checkpoint to fill.
        compute_dtype: Of the activations, "float32" or "bfloat16"; the parameters are float32.
        attention: Name of the kernel in `ATTENTION`.
        remat: Keeps of each layer only its input for the backward pass and computes the inside again.
        scan_layers: Compiles the layers as one loop; the parameters stay per layer.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        raise TypeError(f"{type(self).__name__} is no network by itself; take one of the models.")

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        new: Sequence[str] = (),
        ignore: Sequence[str] = (),
        rngs: nnx.Rngs | None = None,
        compute_dtype: str = "float32",
        attention: str = "plain",
        remat: bool = False,
        scan_layers: bool = False,
        add_pooling_layer: bool | None = None,
        **config_changes: Any,
    ) -> Self:
        """The model of a checkpoint. What became of each tensor is logged (INFO); `bert-jax info` shows it too.

        Args:
            model_id: A folder, an id on the Hugging Face Hub, or `bert-mini-cased`.
            revision: Branch, tag or commit on the Hub.
            new: Regular expressions of parameter paths that are drawn anew, whatever the file holds:
                `[r"classifier\\..*"]` for a head to be trained. Any other parameter the file lacks is an error.
            ignore: Regular expressions of tensors in the file, by their whole names, that are left out:
                `[r"loss_fct\\..*"]`. A tensor that no BERT has is an error otherwise.
            rngs: Draws the new parameters; `nnx.Rngs(0)` by default.
            compute_dtype: See the class.
            attention: See the class.
            remat: See the class.
            scan_layers: See the class.
            add_pooling_layer: Of `BertModel` alone: False leaves out the pooler, which some checkpoints lack.
            config_changes: Fields of the config to change: `num_labels=6` where the head is new or the config
                contradicts the file, `hidden_dropout_prob=0.0`.

        Raises:
            ModelNotFoundError: If there is no such model, or the Hub does not answer.
            ConfigError: If its config is not of a BERT, or a change is to no field of it.
            CheckpointError: If its weights are damaged, or do not fit; lists all that is wrong.
        """
        folder = hub.download(model_id, revision=revision)
        config = BertConfig.from_file(folder / hub.CONFIG_FILE).replace(**config_changes)
        options: dict[str, Any] = {"compute_dtype": compute_dtype, "attention": attention}
        options |= {"remat": remat, "scan_layers": scan_layers}
        if add_pooling_layer is not None:
            options["add_pooling_layer"] = add_pooling_layer
        _, skeleton = tree.split(cls(config, **options))
        arrays, report = weights.load(folder, skeleton.specs, new=new, ignore=ignore)
        logger.info("%s: %s", model_id, report)
        if report.new:

            @jax.jit  # computes the new ones alone
            def drawn(key: jax.Array) -> dict[str, jax.Array]:
                params, _ = tree.split(cls(config, rngs=_Keys(key), **options))
                flat = tree.flatten(params)
                return {path: flat[path] for path in report.new}

            arrays |= drawn((rngs or nnx.Rngs(0)).params())
        return tree.merge(skeleton, tree.unflatten(arrays))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.safetensors` and `config.json`, which PyTorch transformers loads, bit for bit.

        Raises:
            CheckpointError: If the folder cannot be written; what stood there before stands still.
        """
        params, _ = tree.split(self)
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        weights.save(Path(folder), tree.flatten(params), config)


class BertModel(BertPreTrainedModel):
    """The encoder, with the pooler that next-sentence prediction and classification read."""

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs | None = None,
        compute_dtype: str = "float32",
        attention: str = "plain",
        remat: bool = False,
        scan_layers: bool = False,
        add_pooling_layer: bool = True,
    ):
        if compute_dtype not in COMPUTE_DTYPES:
            raise InputError(f"compute_dtype is {quoted(compute_dtype)}; expected one of {', '.join(COMPUTE_DTYPES)}.")
        if attention not in ATTENTION:
            raise InputError(f"attention is {quoted(attention)}; expected one of {', '.join(ATTENTION)}.")
        self.config = config
        self.compute_dtype = compute_dtype
        self.attention = attention
        self.remat = remat
        self.scan_layers = scan_layers
        self.embeddings = BertEmbeddings(config, rngs)
        self.layers = nnx.List([BertLayer(config, attention, rngs) for _ in range(config.num_hidden_layers)])
        self.pooler = (
            Linear(config.hidden_size, config.hidden_size, config.initializer_range, rngs)
            if add_pooling_layer
            else None
        )

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        document_ids: ArrayLike | None = None,
        *,
        positions: ArrayLike | None = None,
        dropout_key: jax.Array | None = None,
    ) -> BertModelOutput:
        """Encodes tokens. All models take these arguments.

        Args:
            input_ids: int [B, T], T at most `max_position_embeddings`.
            attention_mask: [B, T], 1 for tokens, 0 for padding; None where there is no padding.
            token_type_ids: int [B, T], 0 for the first text and 1 for the second; None for zeros.
            position_ids: int [B, T], or [1, T] for all rows; None for 0, 1, 2, …
            document_ids: int [B, T], for rows that hold several texts: a token attends to its own document alone.
            positions: int [B, K], or [1, K] for all rows: the tokens that the caller reads. The last layer is computed
                for these alone, and the last hidden state, the pooler's output and the attention are [B, K, D],
                [B, K, D] and [B, N, K, S]. None for all tokens.
            dropout_key: PRNG key; without one nothing is dropped.

        Raises:
            InputError: If T is too long, shapes differ, or (outside jit) an id is outside its table.
        """
        input_ids = jnp.asarray(input_ids)
        _check_inputs(
            self.config,
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            positions=positions,
        )
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        attended = None
        if attention_mask is not None:
            keys = jnp.asarray(attention_mask).astype(bool).astype(jnp.int32)
            attended = Attended(jnp.ones_like(keys[:, :1]), keys)
        if document_ids is not None:
            documents = jnp.asarray(document_ids)
            keys = documents if attended is None else jnp.where(attended.keys > 0, documents, documents.min() - 1)
            attended = Attended(documents, keys)
        kernels.check(
            self.attention,
            platform=kernels.platform(),
            compute_dtype=self.compute_dtype,
            packed=document_ids is not None,
            length=input_ids.shape[1],
        )
        embeddings_key, layers_key = _split(dropout_key, 2)
        with jax.named_scope("embeddings"):
            x = self.embeddings(input_ids, jnp.asarray(token_type_ids), jnp.asarray(position_ids), embeddings_key)
        x = sharding.by_rows(x.astype(self.compute_dtype))
        hidden_states, attentions = self._encode(
            x, attended, layers_key, None if positions is None else jnp.asarray(positions)
        )
        x = hidden_states[-1]
        pooled: Any = None
        if self.pooler is not None:
            with jax.named_scope("pooler"):
                first = x[:, 0] if positions is None else x
                pooled = jnp.tanh(self.pooler(first.astype(jnp.float32)))  # [B, D] or [B, K, D]
        return BertModelOutput(x, pooled, hidden_states, attentions)

    def _encode(
        self, x: jax.Array, attended: Attended | None, key: jax.Array | None, positions: jax.Array | None
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
        """The layers, one after another: all hidden states, x before them, and attentions."""

        def run(layer: BertLayer, x: jax.Array, i: ArrayLike, *positions: Any) -> tuple[jax.Array, jax.Array | None]:
            return layer(x, attended, None if key is None else jax.random.fold_in(key, i), *positions)

        if self.remat:
            run = jax.checkpoint(run)
        n = len(self.layers)
        # Those that compute all tokens; a last layer that does not has shapes of its own.
        full = n if positions is None else n - 1
        hidden_states, probabilities = [x], []
        if self.scan_layers and full:

            def body(x: jax.Array, inputs: Any) -> Any:
                with jax.named_scope("layer"):
                    y, probabilities = run(inputs[0], x, inputs[1])
                y = sharding.by_rows(y)
                return y, (y, probabilities)

            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.layers[:full])
            _, (states, attentions) = jax.lax.scan(body, x, (stacked, jnp.arange(full)))
            hidden_states += [states[i] for i in range(full)]
            probabilities += [None if attentions is None else attentions[i] for i in range(full)]
        for i in range(len(probabilities), n):
            with jax.named_scope(f"layer_{i}"):
                y, p = run(self.layers[i], hidden_states[-1], i, *([] if i < full else [positions]))
            hidden_states.append(sharding.by_rows(y))
            probabilities.append(p)
        return tuple(hidden_states), tuple(probabilities)


def _check_inputs(config: BertConfig, input_ids: jax.Array, **others: Any) -> None:
    """Refuses shapes that do not go together and, where the values can be seen, numbers outside their tables."""
    if input_ids.ndim != 2:
        raise InputError(f"input_ids has the shape {input_ids.shape}; expected [batch, tokens].")
    rows, tokens = input_ids.shape
    if tokens > config.max_position_embeddings:
        raise InputError(
            f"input_ids has {tokens} tokens a row; the model has {config.max_position_embeddings} "
            "positions (max_position_embeddings). Truncate the texts or cut them into windows."
        )
    limits = {
        "input_ids": config.vocab_size,
        "token_type_ids": config.type_vocab_size,
        "position_ids": config.max_position_embeddings,
        "positions": tokens,
    }
    for name, array in {"input_ids": input_ids, **others}.items():
        if array is None:
            continue
        shape = np.shape(array)
        fits = {
            "position_ids": shape in ((rows, tokens), (1, tokens)),
            "positions": len(shape) == 2 and shape[0] in (1, rows),
        }.get(name, shape == (rows, tokens))
        if not fits:
            raise InputError(f"{name} has the shape {shape}; input_ids has {input_ids.shape}.")
        if name not in limits or isinstance(array, jax.core.Tracer):
            continue
        outside = np.argwhere((np.asarray(array) < 0) | (np.asarray(array) >= limits[name]))
        if len(outside):
            row, token = outside[0]
            hint = " Was the text tokenized for another model?" if name == "input_ids" else ""
            raise InputError(
                f"{name}[{row}, {token}] is {np.asarray(array)[row, token]}; expected 0 to {limits[name] - 1}.{hint}"
            )


# ── Heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class MaskedLMHead(nnx.Module):
    """Scores of the vocabulary: dense, activation, LayerNorm, and the decoder tied to the word embeddings."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs | None):
        self.config = config
        self.transform = Linear(config.hidden_size, config.hidden_size, config.initializer_range, rngs)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)
        self.bias = _new_param(rngs, (config.vocab_size,), jax.nn.initializers.zeros)

    def __call__(self, hidden: jax.Array, word_embeddings: Embedding) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        with jax.named_scope("predictions"):
            x = self.layer_norm(ACTIVATIONS[self.config.hidden_act](self.transform(hidden)))
            logits = word_embeddings.attend(x)
            return logits + _last_axis(self.bias[...], logits)


class BertForPreTraining(BertPreTrainedModel):
    """The encoder with both of its pretraining heads (Devlin et al. 2018, section 3.1)."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        self.config = config
        self.bert = BertModel(config, rngs=rngs, **options)
        self.predictions = MaskedLMHead(config, rngs)
        self.seq_relationship = Linear(config.hidden_size, 2, config.initializer_range, rngs)

    def __call__(
        self,
        input_ids: ArrayLike,
        *args: Any,
        masked_positions: ArrayLike | None = None,
        first_positions: ArrayLike | None = None,
        **kwargs: Any,
    ) -> PreTrainingOutput:
        """Arguments of `BertModel`, and where to read the two heads.

        Args:
            input_ids: int [B, T].
            args: See `BertModel`.
            masked_positions: int [B, P], where to score the vocabulary; None for all tokens.
            first_positions: int [B, K], where each example of a row begins; the next-sentence logits are [B, K, 2].
                None reads the first token alone, and they are [B, 2].
            kwargs: See `BertModel`.
        """
        if masked_positions is None and first_positions is None:
            out = self.bert(input_ids, *args, **kwargs)
            hidden, pooled = out.last_hidden_state, out.pooler_output
        else:
            input_ids = jnp.asarray(input_ids)
            _check_inputs(self.config, input_ids)
            rows, tokens = input_ids.shape
            masked = jnp.arange(tokens)[None] if masked_positions is None else jnp.asarray(masked_positions)
            first = jnp.zeros((rows, 1), int) if first_positions is None else jnp.asarray(first_positions)
            n = first.shape[1]
            positions = jnp.concatenate([first, jnp.broadcast_to(masked, (rows, masked.shape[1]))], axis=1)
            out = self.bert(input_ids, *args, positions=positions, **kwargs)
            hidden = out.last_hidden_state[:, n:]
            pooled = out.pooler_output[:, 0] if first_positions is None else out.pooler_output[:, :n]
        logits = self.predictions(hidden, self.bert.embeddings.word_embeddings)
        with jax.named_scope("seq_relationship"):
            return PreTrainingOutput(logits, self.seq_relationship(pooled), out.hidden_states, out.attentions)


class BertForMaskedLM(BertPreTrainedModel):
    """The encoder with the masked-language-model head."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        self.config = config
        self.bert = BertModel(config, rngs=rngs, add_pooling_layer=False, **options)
        self.predictions = MaskedLMHead(config, rngs)

    def __call__(self, *args: Any, masked_positions: ArrayLike | None = None, **kwargs: Any) -> HeadOutput:
        """Arguments of `BertModel`, and `masked_positions`: int [B, K], where to score the vocabulary; None for all.

        Returns:
            Logits float32 [B, T, V], or [B, K, V].
        """
        out = self.bert(*args, positions=masked_positions, **kwargs)
        logits = self.predictions(out.last_hidden_state, self.bert.embeddings.word_embeddings)
        return HeadOutput(logits, out.hidden_states, out.attentions)


class BertForNextSentencePrediction(BertPreTrainedModel):
    """The encoder with the next-sentence head: logits float32 [B, 2], or [B, K, 2]; 0 is "B follows A"."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        self.config = config
        self.bert = BertModel(config, rngs=rngs, **options)
        self.seq_relationship = Linear(config.hidden_size, 2, config.initializer_range, rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> HeadOutput:
        """Arguments of `BertModel`."""
        out = self.bert(*args, **kwargs)
        with jax.named_scope("seq_relationship"):
            return HeadOutput(self.seq_relationship(out.pooler_output), out.hidden_states, out.attentions)


class BertForSequenceClassification(BertPreTrainedModel):
    """The encoder with a classifier over the pooled first token, or `positions`: logits float32 [B, C] or [B, K, C]."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        self.config = config
        self.bert = BertModel(config, rngs=rngs, **options)
        self.classifier = Linear(config.hidden_size, config.num_labels, config.initializer_range, rngs)

    def __call__(self, *args: Any, dropout_key: jax.Array | None = None, **kwargs: Any) -> HeadOutput:
        """Arguments of `BertModel`."""
        bert_key, classifier_key = _split(dropout_key, 2)
        out = self.bert(*args, dropout_key=bert_key, **kwargs)
        with jax.named_scope("classifier"):
            pooled = _dropout(out.pooler_output, _classifier_dropout(self.config), classifier_key)
            return HeadOutput(self.classifier(pooled), out.hidden_states, out.attentions)


class BertForTokenClassification(BertPreTrainedModel):
    """The encoder with a classifier over each token: logits float32 [B, T, C]."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        self.config = config
        self.bert = BertModel(config, rngs=rngs, add_pooling_layer=False, **options)
        self.classifier = Linear(config.hidden_size, config.num_labels, config.initializer_range, rngs)

    def __call__(self, *args: Any, dropout_key: jax.Array | None = None, **kwargs: Any) -> HeadOutput:
        """Arguments of `BertModel`."""
        bert_key, classifier_key = _split(dropout_key, 2)
        out = self.bert(*args, dropout_key=bert_key, **kwargs)
        with jax.named_scope("classifier"):
            hidden = _dropout(out.last_hidden_state, _classifier_dropout(self.config), classifier_key)
            return HeadOutput(self.classifier(hidden.astype(jnp.float32)), out.hidden_states, out.attentions)


class BertForQuestionAnswering(BertPreTrainedModel):
    """The encoder with two scores a token, for an answer's start and end (Devlin et al. 2018, section 4.2)."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs | None = None, **options: Any):
        self.config = config
        self.bert = BertModel(config, rngs=rngs, add_pooling_layer=False, **options)
        self.qa_outputs = Linear(config.hidden_size, 2, config.initializer_range, rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> QuestionAnsweringOutput:
        """Arguments of `BertModel`."""
        out = self.bert(*args, **kwargs)
        with jax.named_scope("qa_outputs"):
            logits = self.qa_outputs(out.last_hidden_state.astype(jnp.float32))  # [B, T, 2]
        return QuestionAnsweringOutput(logits[..., 0], logits[..., 1], out.hidden_states, out.attentions)


def _classifier_dropout(config: BertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
