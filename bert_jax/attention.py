"""Attention kernels: plain attention, and fused kernels for TPUs and GPUs.

A kernel takes the query [B, T, N, H], the key [B, S, N, H], the value [B, S, N, H], an `Attended` or None, the dropout
rate and the dropout key. The query, key and value are in the compute dtype. A kernel returns the context [B, T, N, H]
and the attention probabilities, float32 [B, N, T, S]. Fused kernels never store the probabilities, so they return
None instead.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from bert_jax import sharding
from bert_jax.config import BertConfig
from bert_jax.errors import InputError
from bert_jax.interventions import NONE, Interventions, intervene
from bert_jax.nn import Linear, dropout, product

FUSED = {"splash": ("TPUs", "tpu"), "triton": ("NVIDIA GPUs", "gpu"), "cudnn": ("NVIDIA GPUs", "gpu")}
"""Maps each fused kernel to a pair: the name of its hardware, as used in messages, and JAX's name for its platform."""
AUTO = {"tpu": "splash", "gpu": "triton"}
"""The fused kernel that "auto" uses on each platform. "auto" does not use "cudnn", because that kernel returns
wrong results if padding precedes tokens, and this condition cannot be checked under jit."""
UNPACKED = ("cudnn",)
"""The fused kernels that do not support packed rows (rows that contain several texts)."""
BLOCKS = {"splash": 128, "triton": 128}
"""Maps each kernel that computes in blocks to its smallest block size in tokens. Row lengths must be multiples of this
size."""


class Attended(NamedTuple):
    """Specifies which tokens attend to which: a query attends to all keys with the same segment id.

    The segment ids correspond to `SegmentIds` in JAX's fused kernels and are independent of `token_type_ids`.

    Attributes:
        queries: The segment ids of the queries, int32 [B, T]; [B, 1] if all queries in a row have the same id.
        keys: The segment ids of the keys, int32 [B, S].
    """

    queries: jax.Array
    keys: jax.Array

    def mask(self) -> jax.Array:
        """Returns a mask that is True where a query attends to a key.

        The mask is bool [B, 1, T, S], or [B, 1, 1, S] if `queries` is [B, 1].
        """
        return (self.queries[:, :, None] == self.keys[:, None, :])[:, None]


def check(name: str, *, platform: str, compute_dtype: str, packed: bool, length: int | None = None) -> None:
    """Raises `InputError` if a kernel cannot run or would return wrong results.

    Args:
        name: The name of the kernel.
        platform: JAX's name for the devices' platform, for example, "gpu".
        compute_dtype: The dtype of the activations.
        packed: Whether rows contain several texts.
        length: The number of tokens per row; None if it is not known yet.
    """
    if name not in FUSED:
        return
    kind, needed = FUSED[name]
    block = multiple(name)
    problems = [
        (platform != needed, f"is a fused kernel for {kind}; these devices are {platform}. Run on {kind}"),
        (
            compute_dtype != "bfloat16",
            f"computes in bfloat16; compute_dtype is {compute_dtype}. Load the model with "
            "dtype='bfloat16' or, to train, set precision.compute_dtype to bfloat16",
        ),
        (packed and name in UNPACKED, "does not support packed rows. Set data.packing to false (pass no document_ids)"),
        (length and length % block, f"requires rows of a multiple of {block} tokens; these have {length}. Pad them"),
    ]
    for found, problem in problems:
        if found:
            raise InputError(f"attention is {name!r}, which {problem}, or use attention 'plain'.")


def multiple(name: str) -> int:
    """Returns the block size of a kernel, in tokens. Row lengths must be multiples of this size."""
    return BLOCKS.get(name, 1)


def choose(
    name: str, *, platform: str, compute_dtype: str, dropout_rate: float = 0.0, length: int | None = None
) -> tuple[str, str]:
    """Resolves "auto" to a fused kernel if one can run, and to "plain" otherwise.

    Args:
        name: "auto" or the name of a kernel. A kernel's name is returned unchanged.
        platform: JAX's name for the devices' platform, for example, "gpu".
        compute_dtype: The dtype of the activations.
        dropout_rate: The attention dropout rate; 0 for inference.
        length: The number of tokens per row; None if it is not known yet.

    Returns:
        The name of the kernel, and the reason for the choice.
    """
    if name != "auto":
        return name, "it was requested"
    kernel = AUTO.get(platform, "plain")
    if kernel == "plain":
        return "plain", f"there is no fused kernel for {platform} devices"
    if platform == "gpu" and not _supports_fused():
        return "plain", "fused kernels need an NVIDIA GPU of compute capability 8.0 or more"
    if compute_dtype != "bfloat16":
        return "plain", f"fused kernels compute in bfloat16, not in {compute_dtype}"
    if dropout_rate > 0:
        return "plain", (
            f"fused kernels do not support attention dropout, and attention_probs_dropout_prob is {dropout_rate}"
        )
    if length and length % multiple(kernel):
        return "plain", f"{kernel} requires rows of a multiple of {multiple(kernel)} tokens, and these have {length}"
    return kernel, f"the devices are {FUSED[kernel][0]}"


def _supports_fused() -> bool:
    """Whether this machine's GPUs support the fused kernels.

    If the machine has no GPU, the result is true, because programs are then only compiled, not run.
    """
    try:
        (device, *_) = jax.devices("gpu")
    except RuntimeError:
        return True
    capability = str(getattr(device, "compute_capability", "0"))
    return "rocm" not in device.client.platform_version.lower() and int(capability.partition(".")[0]) >= 8


def check_dropout(name: str, rate: float) -> None:
    """Raises `InputError` if `rate` > 0 and the kernel is fused, because fused kernels store no probabilities."""
    if name != "plain" and rate > 0:
        raise InputError(
            f"attention is {name!r}, which does not support attention dropout; the config has "
            f"attention_probs_dropout_prob {rate}. Set it to 0, or use attention 'plain'."
        )


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: Attended | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, None]:
    """Splash attention: JAX's Pallas kernel for TPUs, which computes in blocks (Dao et al. 2022, "FlashAttention").

    Args:
        query: [B, T, N, H], where T is a multiple of 128.
        key: [B, S, N, H], where S is a multiple of 128.
        value: [B, S, N, H].
        attended: Segment ids that specify which tokens attend to which; if None, every token attends to all tokens.
        dropout_rate: Unused, because `check_dropout` rejects attention dropout with fused kernels.
        dropout_key: Unused.
        interpret: Whether to interpret the kernel instead of compiling it. Interpretation is slow, but it lets tests
            run without a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, length, _, size = query.shape
    if attended is None:
        attended = Attended(jnp.ones((rows, 1), jnp.int32), jnp.ones((rows, key.shape[1]), jnp.int32))
    block = next(block for block in (512, 384, 256, 128) if length % block == 0 and key.shape[1] % block == 0)

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array, numbers: Any) -> jax.Array:
        run = library.make_splash_mha_single_device(
            masks.MultiHeadMask([masks.FullMask((length, key.shape[1]))] * query.shape[2]),
            block_sizes=library.BlockSizes(
                block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
                block_kv_dq=block,
            ),
            interpret=interpret,
        )  # fmt: skip
        by_head = (jnp.moveaxis(x, 2, 1) for x in (query * size**-0.5, key, value))  # [B, N, T, H]
        return jnp.moveaxis(jax.vmap(run)(*by_head, numbers), 1, 2).astype(value.dtype)

    numbers = library.SegmentIds(jnp.broadcast_to(attended.queries, (rows, length)), attended.keys)
    return _on_each_device(kernel)(query, key, value, numbers), None


def triton(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: Attended | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, None]:
    """JAX's Pallas kernel for GPUs, compiled by Triton (Dao et al. 2022, "FlashAttention"). It supports packed rows.

    JAX recommends the `tokamax` package instead of this kernel, but `tokamax` kernels do not compile without a GPU.

    Args:
        query: [B, T, N, H], where T is a multiple of 128.
        key: [B, T, N, H].
        value: [B, T, N, H].
        attended: Segment ids that specify which tokens attend to which; if None, every token attends to all tokens. A
            token attends to the tokens whose keys have the same segment id as its own key. The segment ids of the
            queries are not used, so the context at padding positions differs from that of the other kernels.
        dropout_rate: Unused, because `check_dropout` rejects attention dropout with fused kernels.
        dropout_key: Unused.
        interpret: Whether to interpret the kernel instead of compiling it. Interpretation is slow, but it lets tests
            run without a GPU.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array, numbers: jax.Array | None) -> jax.Array:
        context: jax.Array = mha(query, key, value, numbers, sm_scale=query.shape[-1] ** -0.5, interpret=interpret)
        return context

    numbers = jnp.ones(query.shape[:2], jnp.int32) if attended is None else attended.keys
    return _on_each_device(kernel)(query, key, value, numbers), None


def _on_each_device(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wraps a kernel so that each device of the current mesh runs it on the rows and heads that the device holds.

    The wrapper is necessary because compilers do not shard custom kernels.

    Args:
        kernel: A function that maps a query, a key and a value, each [B, T, N, H], and segment ids [B, T] to an array
            [B, T, N, H].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(sharding.BATCH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return kernel
    by_head, by_row = PartitionSpec(sharding.BATCH_AXES, None, "tensor"), PartitionSpec(sharding.BATCH_AXES)
    sharded: Callable[..., jax.Array] = jax.shard_map(
        kernel, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False
    )
    return sharded


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: Attended | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, None]:
    """cuDNN's fused attention (Dao et al. 2022) for rows that contain one text each and are padded on the right.

    Args:
        query: bfloat16 [B, T, N, H].
        key: bfloat16 [B, S, N, H].
        value: bfloat16 [B, S, N, H].
        attended: Segment ids that specify which tokens attend to which; if None, every token attends to all tokens.
            `attended.keys` must be 1 for tokens and 0 for padding, because the kernel uses only the sum of each row,
            which is the number of tokens.
        dropout_rate: Unused, because `check_dropout` rejects attention dropout with fused kernels.
        dropout_key: Unused.

    Raises:
        InputError: If cuDNN is not installed, or if padding precedes tokens (not checked under jit).
    """
    lengths = None
    if attended is not None:
        if not isinstance(attended.keys, jax.core.Tracer) and np.any(np.diff(attended.keys, axis=1) > 0):
            raise InputError(
                "attention is 'cudnn', which expects padding on the right; attention_mask has it before tokens."
            )
        lengths = jnp.sum(attended.keys, axis=1, dtype=jnp.int32)
    try:
        context = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    except RuntimeError as error:
        if "cuDNN not found" not in str(error):
            raise
        raise InputError(
            "attention is 'cudnn', but cuDNN is not installed: pip install 'bert-jax[cuda]', or only nvidia-cudnn-cu13 "
            "to compile for a GPU that is not present."
        ) from None
    return context, None


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attended: Attended | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    interventions: Interventions = NONE,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention, implemented with separate JAX operations (Vaswani et al. 2017, section 3.2.1).

    Args:
        query: [B, T, N, H].
        key: [B, S, N, H].
        value: [B, S, N, H].
        attended: Segment ids that specify which tokens attend to which; if None, every token attends to all tokens. If
            no key has the same segment id as a query, that query attends to all keys equally.
        dropout_rate: The fraction of the probabilities to drop.
        dropout_key: PRNG key; None disables dropout.
        interventions: May contain a function for the "probabilities" site; see `bert_jax.interventions`.

    Returns:
        The context [B, T, N, H] in the dtype of `value`, and the probabilities before dropout, float32 [B, N, T, S].
    """
    # The head axis is moved before the token axis only once. If the einsums moved it instead, CPUs would repeat the
    # transposes in the backward pass.
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))  # [B, N, T, H]
    scores = product("bnth,bnsh->bnts", query, key) * query.shape[-1] ** -0.5
    if attended is not None:
        scores = jnp.where(attended.mask(), scores, np.finfo(np.float32).min)
    probabilities = intervene(interventions, "probabilities", jax.nn.softmax(scores, axis=-1))
    dropped = dropout(probabilities, dropout_rate, dropout_key).astype(value.dtype)
    context = product("bnts,bnsh->bnth", dropped, value).astype(value.dtype)
    return jnp.moveaxis(context, 1, 2), probabilities


# The kernels, keyed by name. A fused kernel returns None instead of the probabilities, because it never stores them.
ATTENTION: dict[str, Callable[..., tuple[jax.Array, jax.Array | None]]] = {
    "plain": plain_attention,
    "splash": splash,
    "triton": triton,
    "cudnn": cudnn,
}


class SelfAttention(nnx.Module):
    """Multi-head self-attention and its output projection (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs | None):
        self.config = config
        size, std = config.hidden_size, config.initializer_range
        self.query, self.key, self.value, self.output = (Linear(size, size, std, rngs) for _ in range(4))

    def __call__(
        self,
        x: jax.Array,
        states: jax.Array,
        attended: Attended | None,
        dropout_key: jax.Array | None,
        interventions: Interventions = NONE,
        kernel: str = "plain",
    ) -> tuple[jax.Array, jax.Array | None]:
        """Computes attention from the tokens in `x` to all tokens in `states`.

        If `x` contains only some of the tokens in `states`, plain attention is used, because a fused kernel would be
        of little benefit.

        Args:
            x: The hidden states from which the queries are computed, [B, T, D].
            states: The hidden states from which the keys and values are computed, [B, S, D].
            attended: Segment ids that specify which tokens attend to which; if None, every token attends to all tokens.
            dropout_key: PRNG key; None disables dropout.
            interventions: The interventions at the "query", "key", "value", "probabilities", "heads" and "output"
                sites.
            kernel: The name of a kernel in `ATTENTION`.

        Returns:
            The output [B, T, D], and the probabilities [B, N, T, S]. If a fused kernel was used, the probabilities are
            None.
        """
        rate = self.config.attention_probs_dropout_prob
        if dropout_key is not None:
            check_dropout(kernel, rate)
        query, key, value = (
            intervene(
                interventions,
                name,
                linear(source).reshape(*source.shape[:-1], self.config.num_attention_heads, -1),  # [B, T or S, N, H]
            )
            for name, linear, source in (
                ("query", self.query, x), ("key", self.key, states), ("value", self.value, states)
            )
        )  # fmt: skip
        probabilities: jax.Array | None
        if kernel == "plain" or x is not states:
            context, probabilities = plain_attention(query, key, value, attended, rate, dropout_key, interventions)
        else:
            context, probabilities = ATTENTION[kernel](query, key, value, attended, rate, dropout_key)
        context = intervene(interventions, "heads", context)
        return intervene(interventions, "output", self.output(context.reshape(x.shape))), probabilities
