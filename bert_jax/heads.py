"""Models that consist of an encoder and a head. The head computes a task's logits from the encoder's output."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from bert_jax import porting, sharding
from bert_jax.config import BertConfig
from bert_jax.errors import InputError
from bert_jax.interventions import NONE, Interventions
from bert_jax.model import BertModel, BertModelOutput, ComputeDtype, check_inputs
from bert_jax.nn import ACTIVATIONS, Embedding, LayerNorm, Linear, dropout, last_axis, new_param, split_key
from bert_jax.outputs import ModelOutput
from bert_jax.pretrained import Attention, BertPreTrainedModel

Output = TypeVar("Output")

FIRST = np.zeros((1, 1), np.int32)
"""The `positions` to pass to a model whose head reads only the first token, [CLS]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadOutput(ModelOutput):
    """The output of a model with one head: float32 logits, and the encoder's hidden states and attentions.

    The docstring of each model states the shape of its logits.
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreTrainingOutput(ModelOutput):
    """The output of `BertForPreTraining`.

    Attributes:
        prediction_logits: float32 [B, T, V]; [B, P, V] if `masked_positions` [B, P] are given.
        seq_relationship_logits: float32 [B, 2]; [B, K, 2] if `first_positions` [B, K] are given. Index 0 means that
            the second text follows the first, and index 1 means that the second text is random.
        hidden_states: See `BertModelOutput`.
        attentions: See `BertModelOutput`.
    """

    prediction_logits: jax.Array
    seq_relationship_logits: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuestionAnsweringOutput(ModelOutput):
    """The output of `BertForQuestionAnswering`.

    The logits, float32 [B, T], score each token as the first token (`start_logits`) and as the last token
    (`end_logits`) of the answer.
    """

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array | None, ...]


class MaskedLMHead(nnx.Module):
    """Computes vocabulary logits.

    The head consists of a dense layer, an activation, LayerNorm, and dot products with the word embeddings.
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs | None):
        self.config = config
        self.transform = Linear(config.hidden_size, config.hidden_size, config.initializer_range, rngs)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)
        self.bias = new_param(rngs, (config.vocab_size,), jax.nn.initializers.zeros)

    def __call__(self, hidden: jax.Array, word_embeddings: Embedding) -> jax.Array:
        """Computes logits, float32 [B, T, V], from hidden states [B, T, D]."""
        with jax.named_scope("predictions"):
            x = self.layer_norm(ACTIVATIONS[self.config.hidden_act](self.transform(hidden)))
            logits = word_embeddings.attend(x)
            return logits + last_axis(self.bias[...], logits)


class BertWithHead(BertPreTrainedModel):
    """An encoder (`bert`) with a head.

    Subclasses set `pooled`, create the head in `_add_head`, and apply it to the encoder's output.
    """

    pooled: ClassVar[bool] = False
    """Whether the head reads the pooler's output. If false, the encoder has no pooler."""

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs | None = None,
        compute_dtype: ComputeDtype = "float32",
        attention: Attention = "plain",
        remat: bool = False,
        scan_layers: bool = False,
    ):
        self.config = config
        self.bert = BertModel(
            config, rngs=rngs, compute_dtype=compute_dtype, attention=attention, remat=remat, scan_layers=scan_layers,
            add_pooling_layer=self.pooled,
        )  # fmt: skip
        self._add_head(rngs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute.

        Raises:
            InputError: If the attribute is an encoder option, because setting it on this model would have no effect.
        """
        if name in ("compute_dtype", "attention", "remat", "scan_layers") and not isinstance(value, nnx.Module):
            raise InputError(f"{name} is an option of the encoder; set model.encoder.{name} instead.")
        super().__setattr__(name, value)

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        """Adds the head's layers to the model."""
        raise NotImplementedError

    def _linear(self, features: int, rngs: nnx.Rngs | None) -> Linear:
        """Creates a linear layer with `hidden_size` inputs and `features` outputs."""
        return Linear(self.config.hidden_size, features, self.config.initializer_range, rngs)


class BertForPreTraining(BertWithHead):
    """The encoder with the heads for both pretraining tasks (Devlin et al. 2018, section 3.1)."""

    pooled = True

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        self.predictions = MaskedLMHead(self.config, rngs)
        self.seq_relationship = self._linear(2, rngs)

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
        masked_positions: ArrayLike | None = None,
        first_positions: ArrayLike | None = None,
        dropout_key: jax.Array | None = None,
        interventions: Interventions = NONE,
    ) -> PreTrainingOutput:
        """Computes the logits for masked language modeling and next-sentence prediction.

        Args:
            input_ids: int [B, T].
            attention_mask: See `BertModel`.
            token_type_ids: See `BertModel`.
            position_ids: See `BertModel`.
            document_ids: See `BertModel`.
            masked_positions: int [B, P], the indices of the tokens for which to compute vocabulary logits; None for all
                tokens.
            first_positions: int [B, K], the index of each example's first token, for rows with several examples.
                If given, the next-sentence logits are [B, K, 2]. If None, the first token of each row is used, and the
                next-sentence logits are [B, 2].
            inputs_embeds: See `BertModel`.
            dropout_key: See `BertModel`.
            interventions: See `BertModel`.
        """
        positions = None
        if masked_positions is not None or first_positions is not None:
            rows, tokens = check_inputs(
                self.config, input_ids, inputs_embeds, position_ids=position_ids, masked_positions=masked_positions,
                first_positions=first_positions,
            )  # fmt: skip
            masked = jnp.arange(tokens)[None] if masked_positions is None else jnp.asarray(masked_positions)
            first = jnp.zeros((1, 1), int) if first_positions is None else jnp.asarray(first_positions)
            n = first.shape[1]
            both = [jnp.broadcast_to(array, (rows, array.shape[1])) for array in (first, masked)]
            positions = jnp.concatenate(both, axis=1)
        out = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, document_ids, inputs_embeds=inputs_embeds,
            positions=positions, dropout_key=dropout_key, interventions=interventions,
        )  # fmt: skip
        hidden, pooled = out.last_hidden_state, out.pooler_output
        if positions is not None:
            hidden, pooled = hidden[:, n:], pooled[:, 0] if first_positions is None else pooled[:, :n]
        logits = self.predictions(hidden, self.bert.embeddings.word_embeddings)
        with jax.named_scope("seq_relationship"):
            return PreTrainingOutput(logits, self.seq_relationship(pooled), out.hidden_states, out.attentions)


class BertForMaskedLM(BertWithHead):
    """The encoder with the masked language modeling head."""

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        self.predictions = MaskedLMHead(self.config, rngs)

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
        masked_positions: ArrayLike | None = None,
        dropout_key: jax.Array | None = None,
        interventions: Interventions = NONE,
    ) -> HeadOutput:
        """Computes vocabulary logits for the tokens whose indices are `masked_positions`, int [B, K].

        If `masked_positions` is None, logits are computed for all tokens. The other arguments are those of
        `BertModel`.

        Returns:
            A `HeadOutput` with logits [B, K, V], or [B, T, V] if `masked_positions` is None.
        """
        check_inputs(
            self.config, input_ids, inputs_embeds, position_ids=position_ids, masked_positions=masked_positions
        )
        out = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, document_ids, inputs_embeds=inputs_embeds,
            positions=masked_positions, dropout_key=dropout_key, interventions=interventions,
        )  # fmt: skip
        logits = self.predictions(out.last_hidden_state, self.bert.embeddings.word_embeddings)
        return HeadOutput(logits, out.hidden_states, out.attentions)


class BertWithLinearHead(BertWithHead, Generic[Output]):
    """An encoder with a head that consists of one linear layer."""

    head_dropout: ClassVar[bool] = False
    """Whether dropout is applied to the input of the head."""

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
    ) -> Output:
        """Applies the encoder, then the head. The arguments are those of `BertModel`."""
        key, head_key = split_key(dropout_key, 2) if self.head_dropout else (dropout_key, None)
        out = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, document_ids, inputs_embeds=inputs_embeds,
            positions=positions, dropout_key=key, interventions=interventions,
        )  # fmt: skip
        hidden = out.pooler_output if self.pooled else out.last_hidden_state
        if self.head_dropout:
            config = self.config
            rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
            hidden = dropout(hidden, rate, head_key)
        return self._head(hidden.astype(jnp.float32), out)

    def _head(self, hidden: jax.Array, out: BertModelOutput) -> Output:
        """Applies the head.

        Args:
            hidden: float32, the pooler's output [B, D] if `pooled` is true, or the last hidden state [B, T, D]
                otherwise. If `positions` are given, the shape is [B, K, D] in both cases.
            out: The complete output of the encoder.
        """
        raise NotImplementedError


class BertForNextSentencePrediction(BertWithLinearHead[HeadOutput]):
    """The encoder with the next-sentence head. The logits are [B, 2], or [B, K, 2] if `positions` are given.

    Index 0 means that the second text follows the first, and index 1 means that the second text is random.
    """

    pooled = True

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        self.seq_relationship = self._linear(2, rngs)

    def _head(self, hidden: jax.Array, out: BertModelOutput) -> HeadOutput:
        with jax.named_scope("seq_relationship"):
            return HeadOutput(self.seq_relationship(hidden), out.hidden_states, out.attentions)


class BertWithClassifier(BertWithLinearHead[HeadOutput]):
    """An encoder with a linear classifier for `num_labels` labels. Dropout is applied to the classifier's input."""

    head_dropout = True

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        self.classifier = self._linear(self.config.num_labels, rngs)

    def _head(self, hidden: jax.Array, out: BertModelOutput) -> HeadOutput:
        with jax.named_scope("classifier"):
            return HeadOutput(self.classifier(hidden), out.hidden_states, out.attentions)


class BertForSequenceClassification(BertWithClassifier):
    """The encoder with a classifier on the pooler's output.

    The logits are [B, C], or [B, K, C] if `positions` are given.
    """

    pooled = True


class BertForMultipleChoice(BertWithClassifier):
    """The encoder with a linear layer that computes each text's score from the pooler's output.

    Source: `modeling_bert.py` in `transformers`.
    """

    pooled = True

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        self.classifier = self._linear(1, rngs)

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
    ) -> HeadOutput:
        """Scores the choices of each example. The softmax over an example's scores gives the choices' probabilities.

        The arguments are those of `BertModel` with an additional axis for the C choices. For example, `input_ids` is
        [B, C, T]. For packed rows, omit this axis, and pass the index of each choice's first token as `positions`.

        Returns:
            A `HeadOutput` with logits [B, C] and the hidden states of B · C rows. If `positions` [B, K] are given, the
            logits are [B, K].
        """
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "document_ids": document_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        groups: Any = None
        if positions is None and (input_ids is None) != (inputs_embeds is None):
            given: Any = inputs_embeds if input_ids is None else input_ids
            groups = np.shape(given)[:2]
            for name, array in inputs.items():
                if array is None:
                    continue
                shape, vector = np.shape(array), ["hidden size"] * (name == "inputs_embeds")
                if len(shape) != 3 + len(vector) or shape[:2] != groups:
                    expected = ", ".join(["batch", "choices", "tokens", *vector])
                    raise InputError(
                        f"{name} has the shape {shape}; expected [{expected}], with as many rows and choices as the "
                        "other arguments."
                    )
                inputs[name] = jnp.reshape(jnp.asarray(array), (-1, *shape[2:]))
        out = super().__call__(**inputs, positions=positions, dropout_key=dropout_key, interventions=interventions)
        logits = out.logits[..., 0]
        return replace(out, logits=logits if groups is None else logits.reshape(groups))


class BertForTokenClassification(BertWithClassifier):
    """The encoder with a classifier for each token. The logits are [B, T, C], or [B, K, C] if `positions` are given."""


class BertForQuestionAnswering(BertWithLinearHead[QuestionAnsweringOutput]):
    """The encoder with a head that scores tokens as an answer's start and end (Devlin et al. 2018, section 4.2)."""

    def _add_head(self, rngs: nnx.Rngs | None) -> None:
        self.qa_outputs = self._linear(2, rngs)

    def _head(self, hidden: jax.Array, out: BertModelOutput) -> QuestionAnsweringOutput:
        with jax.named_scope("qa_outputs"):
            logits = self.qa_outputs(hidden)  # [B, T, 2]
        return QuestionAnsweringOutput(logits[..., 0], logits[..., 1], out.hidden_states, out.attentions)
