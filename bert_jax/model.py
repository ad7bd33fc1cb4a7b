"""BERT's encoder (Devlin et al. 2018, arXiv:1810.04805) in Flax NNX.

All variables of the modules are `nnx.Param`s. They are float32 unless a model is loaded for inference with another
`dtype` (see `bert_jax.quantization`). A call applies dropout if and only if it is given a `dropout_key`. The
activations are converted to `compute_dtype` once, after the embeddings. The matrix products in the layers take operands
in `compute_dtype` and accumulate in float32. Softmax, LayerNorm and the pooler compute in float32, and logits are
float32. The docstring of `bert_jax.nn` explains the letters used in shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from bert_jax import porting, sharding
from bert_jax.attention import ATTENTION, Attended, SelfAttention, check, choose
from bert_jax.config import BertConfig
from bert_jax.errors import InputError, quoted
from bert_jax.interventions import NONE, Interventions, checked_interventions, intervene, within
from bert_jax.nn import ACTIVATIONS, Embedding, LayerNorm, Linear, dropout, split_key
from bert_jax.outputs import ModelOutput
from bert_jax.pretrained import Attention, BertPreTrainedModel
from bert_jax.quantization import Dtype

ComputeDtype = Literal["float32", "bfloat16"]
COMPUTE_DTYPES: dict[Dtype, tuple[ComputeDtype, ...]] = {
    "float32": ("float32", "bfloat16"), "bfloat16": ("bfloat16",), "int8": ("float32",)
}  # fmt: skip
"""Maps the dtype of a model's large weights to the dtypes that its activations may have."""
POSITIONS = ("positions", "masked_positions", "first_positions")
"""The names of the model arguments that contain token indices within a row."""


# The encoder always returns every field. Under jit, a field that the jitted function neither uses nor returns costs
# nothing, because the compiler removes its computation.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BertModelOutput(ModelOutput):
    """The output of `BertModel`. In the descriptions below, `positions` refers to the argument of the model call.

    Attributes:
        last_hidden_state: [B, T, D] in the compute dtype; [B, K, D] if `positions` are given.
        pooler_output: float32 [B, D], for the first token; [B, K, D] if `positions` are given; None if the model has no
            pooler.
        hidden_states: The output of the embeddings, followed by the output of each layer. Each entry is [B, T, D]. The
            last entry is `last_hidden_state`, which is [B, K, D] if `positions` are given.
        attentions: For each layer, the attention probabilities, float32 [B, N, T, S], or None if the kernel is fused.
            If `positions` are given, the last layer uses plain attention, and its probabilities are [B, N, K, S].
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


class BertLayer(nnx.Module):
    """One layer of the encoder: an attention block and a feed-forward block.

    Each block is followed by dropout, a residual connection and LayerNorm.
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs | None):
        self.config = config
        std, eps = config.initializer_range, config.layer_norm_eps
        self.attention = SelfAttention(config, rngs)
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
        interventions: Interventions = NONE,
        kernel: str = "plain",
    ) -> tuple[jax.Array, jax.Array | None]:
        """Applies the layer.

        Args:
            x: [B, S, D].
            attended: Specifies which tokens attend to which; None if every token attends to every token.
            dropout_key: PRNG key; None disables dropout.
            positions: int [B, T] or [1, T], the indices in x of the tokens whose outputs are computed; None for all S
                tokens. These tokens can also attend to the other tokens in x.
            interventions: The interventions in this layer; see `bert_jax.interventions`.
            kernel: The name of an attention kernel in `ATTENTION`.

        Returns:
            The output [B, T, D] in the dtype of x, and the attention probabilities [B, N, T, S] or, if a fused kernel
            was used, None.
        """
        rate = self.config.hidden_dropout_prob
        attention_key, context_key, output_key = split_key(dropout_key, 3)
        states = x
        if positions is not None:
            x = jnp.take_along_axis(states, positions[..., None], axis=1)
            # With document_ids, `queries` is [B, S]. Otherwise, it is [B, 1] and applies to all positions.
            if attended is not None and attended.queries.shape[1] > 1:
                attended = attended._replace(queries=jnp.take_along_axis(attended.queries, positions, axis=1))
        with jax.named_scope("attention"):
            context, probabilities = self.attention(
                x, states, attended, attention_key, within(interventions, "attention"), kernel
            )
            x = self.attention_norm(x + dropout(context, rate, context_key))
        with jax.named_scope("feed_forward"):
            inner = ACTIVATIONS[self.config.hidden_act](self.intermediate(x))  # [B, T, F]
            added = intervene(interventions, "output", self.output(intervene(interventions, "intermediate", inner)))
            x = self.output_norm(x + dropout(added, rate, output_key))
        return intervene(interventions, "", x), probabilities


class BertEmbeddings(nnx.Module):
    """Sums word, position and token-type embeddings, then applies LayerNorm and dropout.

    Source: Devlin et al. 2018, figure 2.
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs | None):
        self.config = config
        size, std = config.hidden_size, config.initializer_range
        self.word_embeddings = Embedding(config.vocab_size, size, std, rngs)
        self.position_embeddings = Embedding(config.max_position_embeddings, size, std, rngs)
        self.token_type_embeddings = Embedding(config.type_vocab_size, size, std, rngs)
        self.layer_norm = LayerNorm(size, config.layer_norm_eps, rngs)

    def __call__(
        self,
        input_ids: jax.Array | None,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        dropout_key: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the embeddings, float32 [B, T, D].

        Each array of ids is int [B, T], or [1, T] if all rows have the same ids.

        `inputs_embeds`, float32 [B, T, D], replaces the word embeddings of `input_ids`.
        """
        words: Any = inputs_embeds
        if input_ids is not None:
            words = sharding.by_rows_from_features(self.word_embeddings(input_ids))
            if self.config.pad_token_id is not None:
                # Like torch.nn.Embedding(padding_idx=…), this lookup passes no gradient to the [PAD] vector.
                pads = (input_ids == self.config.pad_token_id)[..., None]
                words = jnp.where(pads, jax.lax.stop_gradient(words), words)
        x = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)  # [B, T, D]
        return dropout(self.layer_norm(x), self.config.hidden_dropout_prob, dropout_key)


class BertModel(BertPreTrainedModel):
    """The encoder, optionally with a pooler.

    Some heads use the pooler, for example those for next-sentence prediction and sequence classification.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs | None = None,
        compute_dtype: ComputeDtype = "float32",
        attention: Attention = "plain",
        remat: bool = False,
        scan_layers: bool = False,
        add_pooling_layer: bool = True,
    ):
        if attention not in ("auto", *ATTENTION):
            raise InputError(f"attention is {quoted(attention)}; expected one of auto, {', '.join(ATTENTION)}.")
        self.config, self.compute_dtype, self.attention = config, compute_dtype, attention
        self.remat, self.scan_layers = remat, scan_layers
        self.embeddings = BertEmbeddings(config, rngs)
        self.layers = nnx.List([BertLayer(config, rngs) for _ in range(config.num_hidden_layers)])
        size, std = config.hidden_size, config.initializer_range
        self.pooler = Linear(size, size, std, rngs) if add_pooling_layer else None
        self._check_compute_dtype()

    @property
    def encoder(self) -> "BertModel":
        """The model itself."""
        return self

    def _check_compute_dtype(self) -> None:
        allowed = COMPUTE_DTYPES[self.dtype]
        if self.compute_dtype not in allowed:
            raise InputError(
                f"compute_dtype is {quoted(self.compute_dtype)}; expected {' or '.join(allowed)}, because the weights "
                f"are {self.dtype}."
            )

    @porting.suggests(porting.CALL)
    @sharding.automatic
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        document_ids: ArrayLike | None = None,
        *,
        inputs_embeds: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        dropout_key: jax.Array | None = None,
        interventions: Interventions = NONE,
    ) -> BertModelOutput:
        """Encodes tokens.

        Models with heads accept the same arguments, with two exceptions. Instead of `positions`, `BertForMaskedLM`
        accepts `masked_positions`, and `BertForPreTraining` accepts `masked_positions` and `first_positions`.

        Args:
            input_ids: int [B, T], with T at most `max_position_embeddings` unless `position_ids` are given.
            attention_mask: [B, T], 1 for tokens and 0 for padding; None if there is no padding.
            token_type_ids: int [B, T], 0 for the first text and 1 for the second; None for all zeros.
            position_ids: int [B, T], or [1, T] for all rows; None for 0, 1, 2, …
            document_ids: For packed rows, which contain several texts: int [B, T], the id of the text that each token
                belongs to. Tokens then attend only to tokens of the same text.
            inputs_embeds: float [B, T, D], vectors that replace the word embeddings of `input_ids`. Pass exactly one of
                `input_ids` and `inputs_embeds`.
            positions: int [B, K], or [1, K] for all rows: the indices of the tokens whose outputs the caller needs;
                None for all tokens. The last layer is computed only for these tokens, so `last_hidden_state` and
                `pooler_output` are [B, K, D], and the last entry of `attentions` is [B, N, K, S].
            dropout_key: PRNG key; None disables dropout.
            interventions: Functions that change activations, keyed by site name; see `bert_jax.interventions`.

        Raises:
            InputError: If T is too large, if shapes do not match, if an id or position is out of range, if both or
                neither of `input_ids` and `inputs_embeds` are given, if the attention kernel does not support the
                devices, the dtype or the rows, or if an intervention is invalid. Under jit, ids and positions are not
                checked.
        """
        self._check_compute_dtype()
        rows, tokens = check_inputs(
            self.config, input_ids, inputs_embeds, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, document_ids=document_ids, positions=positions,
        )  # fmt: skip
        input_ids = None if input_ids is None else jnp.asarray(input_ids)
        vectors = None if inputs_embeds is None else jnp.asarray(inputs_embeds)
        places = jnp.arange(tokens)[None] if position_ids is None else jnp.asarray(position_ids)
        types = jnp.zeros((rows, tokens), jnp.int32) if token_type_ids is None else jnp.asarray(token_type_ids)
        attended = None
        if attention_mask is not None:
            keys = jnp.asarray(attention_mask).astype(bool).astype(jnp.int32)
            attended = Attended(jnp.ones_like(keys[:, :1]), keys)
        if document_ids is not None:
            documents = jnp.asarray(document_ids)
            keys = documents if attended is None else jnp.where(attended.keys > 0, documents, documents.min() - 1)
            attended = Attended(documents, keys)
        facts: dict[str, Any] = {
            "platform": sharding.platform(), "compute_dtype": self.compute_dtype, "length": tokens
        }  # fmt: skip
        rate = 0.0 if dropout_key is None else self.config.attention_probs_dropout_prob
        # Fused kernels hide activations from interventions.
        wanted = "plain" if self.attention == "auto" and interventions else self.attention
        kernel, _ = choose(wanted, dropout_rate=rate, **facts)
        check(kernel, packed=document_ids is not None, **facts)
        interventions = checked_interventions(
            interventions, layers=len(self.layers), pooler=self.pooler is not None,
            fused=None if kernel == "plain" else kernel, scan=self.scan_layers,
        )  # fmt: skip
        embeddings_key, layers_key = split_key(dropout_key, 2)
        with jax.named_scope("embeddings"):
            x = self.embeddings(input_ids, types, places, embeddings_key, vectors)
        x = intervene(interventions, "embeddings", sharding.by_rows(x.astype(self.compute_dtype)))
        hidden_states, attentions = self._encode(x, attended, layers_key, positions, interventions, kernel)
        x = hidden_states[-1]
        pooled: Any = None
        if self.pooler is not None:
            with jax.named_scope("pooler"):
                first = x[:, 0] if positions is None else x
                pooled = jnp.tanh(self.pooler(first.astype(jnp.float32)))  # [B, D] or [B, K, D]
                pooled = intervene(interventions, "pooler", pooled)
        return BertModelOutput(x, pooled, hidden_states, attentions)

    def _encode(
        self,
        x: jax.Array,
        attended: Attended | None,
        key: jax.Array | None,
        positions: Any,
        interventions: Interventions,
        kernel: str,
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
        """Applies the layers in order. Returns the hidden states (x, then each layer's output) and the attentions."""

        def runner(own: Interventions) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
            """Returns a function that applies a layer with the given interventions."""

            def run(layer: BertLayer, x: jax.Array, i: ArrayLike, positions: Any = None) -> Any:
                return layer(x, attended, None if key is None else jax.random.fold_in(key, i), positions, own, kernel)

            return jax.checkpoint(run) if self.remat else run

        n = len(self.layers)
        # The number of layers that are computed for all tokens. If positions are given, the last layer is computed only
        # for the tokens at these positions.
        full = n if positions is None else n - 1
        hidden_states, probabilities = [x], []
        if self.scan_layers and full:

            def body(x: jax.Array, inputs: Any) -> Any:
                with jax.named_scope("layer"):
                    y, probabilities = runner(NONE)(inputs[0], x, inputs[1])
                y = sharding.by_rows(y)
                return y, (y, probabilities)

            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.layers[:full])
            _, (states, attentions) = jax.lax.scan(body, x, (stacked, jnp.arange(full)))
            hidden_states += [states[i] for i in range(full)]
            probabilities += [None if attentions is None else attentions[i] for i in range(full)]
        for i in range(len(probabilities), n):
            with jax.named_scope(f"layer_{i}"):
                run = runner(within(interventions, f"layers.{i}"))
                y, p = run(self.layers[i], hidden_states[-1], i, None if i < full else jnp.asarray(positions))
            hidden_states.append(sharding.by_rows(y))
            probabilities.append(p)
        return tuple(hidden_states), tuple(probabilities)


def check_inputs(
    config: BertConfig, input_ids: ArrayLike | None, inputs_embeds: ArrayLike | None = None, **others: ArrayLike | None
) -> tuple[int, int]:
    """Checks the arguments of a model call.

    Under jit, ids and positions are not checked, because their values are unknown.

    Returns:
        The number of rows and the number of tokens per row.

    Raises:
        InputError: If rows are too long, if shapes do not match, if an id or position is out of range, or if both or
            neither of `input_ids` and `inputs_embeds` are given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError(f"Expected input_ids or inputs_embeds, got {'neither' if input_ids is None else 'both'}.")
    given: Any = inputs_embeds if input_ids is None else input_ids
    source, vector = ("inputs_embeds", (config.hidden_size,)) if input_ids is None else ("input_ids", ())
    shape: Any = np.shape(given)
    if len(shape) < 2 or shape[2:] != vector:
        expected = ", ".join(map(str, ("batch", "tokens", *vector)))
        raise InputError(f"{source} has the shape {shape}; expected [{expected}].")
    rows, tokens = shape[:2]
    if tokens > config.max_position_embeddings and others.get("position_ids") is None:
        raise InputError(
            f"{source} has {tokens} tokens per row; the model has {config.max_position_embeddings} positions "
            "(max_position_embeddings). Truncate the texts, or cut them into windows."
        )
    limits = {
        "input_ids": config.vocab_size,
        "token_type_ids": config.type_vocab_size,
        "position_ids": config.max_position_embeddings,
        **dict.fromkeys(POSITIONS, tokens),
    }
    for name, array in {"input_ids": input_ids, **others}.items():
        if array is None:
            continue
        shape = np.shape(array)
        if name in POSITIONS:
            fits = len(shape) == 2 and shape[0] in (1, rows)
        else:
            fits = shape == (rows, tokens) or (name == "position_ids" and shape == (1, tokens))
        if not fits:
            raise InputError(f"{name} has the shape {shape}; {source} has {(rows, tokens)}.")
        if name in limits and not isinstance(array, jax.core.Tracer):
            values = np.asarray(array)
            for row, token in np.argwhere((values < 0) | (values >= limits[name])):
                hint = " Was the text tokenized for another model?" if name == "input_ids" else ""
                raise InputError(
                    f"{name}[{row}, {token}] is {values[row, token]}; expected 0 to {limits[name] - 1}.{hint}"
                )
    return rows, tokens
