"""Pretraining: masked language modeling and next-sentence prediction (Devlin et al. 2018, section 3.1)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.data.loader import Examples
from bert_jax.heads import BertForMaskedLM, BertForPreTraining
from bert_jax.losses import IGNORE, cross_entropy
from bert_jax.tasks.base import Objective


class MaskedLanguageModeling(Objective):
    """Masked language modeling without next-sentence prediction, for a `BertForMaskedLM` model."""

    model_class: Any = BertForMaskedLM
    metrics: tuple[str, ...] = ("loss", "mlm_accuracy", "pseudo_perplexity")
    per_token = False

    def loss(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """A pair: the mean loss over the masked tokens, in nats, and the number of masked tokens."""
        return self._mlm_loss(self._logits(model, batch, dropout_key)[0], batch)

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Three sums over the masked tokens of each example, float32 [B, K].

        `masked` is the number of masked tokens, `mlm_nll` is their total negative log-likelihood in nats, and
        `mlm_correct` is the number of masked tokens that are predicted correctly.
        """
        return self._mlm_outputs(self._logits(model, batch, None)[0], batch)

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """Computes `mlm_loss` (in nats), `mlm_accuracy` and `pseudo_perplexity` (the exponential of `mlm_loss`).

        If no token is masked, the result is empty.
        """
        masked = float(outputs["masked"].sum())
        if not masked:
            return {}
        loss = float(outputs["mlm_nll"].sum()) / masked
        return {
            "mlm_loss": loss,
            "mlm_accuracy": float(outputs["mlm_correct"].sum()) / masked,
            "pseudo_perplexity": math.exp(min(loss, 700.0)),
        }

    def _logits(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, ...]:
        """Returns a tuple that contains the logits at the masked positions, float32 [B, P, V].

        `PreTraining` adds the next-sentence logits, float32 [B, K, 2], to the tuple.
        """
        positions = batch["targets"]["masked_positions"]
        return (model(**batch["inputs"], masked_positions=positions, dropout_key=dropout_key).logits,)

    def _mlm_loss(self, logits: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        labels = batch["targets"]["labels"]
        return cross_entropy(logits, labels), jnp.sum(labels != IGNORE).astype(jnp.float32)

    def _mlm_outputs(self, logits: jax.Array, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        labels, guessed_in = batch["targets"]["labels"], batch["targets"]["guessed_in"]
        counts = labels != IGNORE
        examples = jnp.arange(batch["starts"].shape[1])[None, :, None]
        belongs = counts[:, None, :] & (guessed_in[:, None, :] == examples)  # [B, K, P]
        chosen = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[..., None], axis=-1)[..., 0]
        values = {
            "masked": counts.astype(jnp.float32),
            "mlm_nll": jax.nn.logsumexp(logits, axis=-1) - chosen,
            "mlm_correct": (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32),
        }
        return {name: jnp.sum(jnp.where(belongs, v[:, None, :], 0.0), axis=-1) for name, v in values.items()}


class PreTraining(MaskedLanguageModeling):
    """Masked language modeling and next-sentence prediction, for a `BertForPreTraining` model.

    The loss is the sum of the two objectives' losses (Devlin et al. 2018). If gradients are accumulated
    (`training.accumulation`), each of the two losses of a step is a weighted mean over the parts of the batch. The
    weight of a part is its number of masked tokens, even for next-sentence prediction.
    """

    model_class: Any = BertForPreTraining
    metrics = (*MaskedLanguageModeling.metrics, "nsp_accuracy")

    def loss(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """A pair: the sum of the two objectives' mean losses, in nats, and the number of masked tokens."""
        logits, following = self._logits(model, batch, dropout_key)
        loss, count = self._mlm_loss(logits, batch)
        labels = jnp.where(batch["weights"] > 0, batch["targets"]["next_sentence_label"], IGNORE)
        return loss + cross_entropy(following, labels), count

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Adds `nsp_nll` and `nsp_correct`, float32 [B, K], to the outputs of `MaskedLanguageModeling`.

        `nsp_nll` is in nats, and `nsp_correct` is 0 or 1.
        """
        logits, following = self._logits(model, batch, None)
        label = batch["targets"]["next_sentence_label"]
        return self._mlm_outputs(logits, batch) | {
            "nsp_nll": -jnp.take_along_axis(jax.nn.log_softmax(following), label[..., None], axis=-1)[..., 0],
            "nsp_correct": (jnp.argmax(following, axis=-1) == label).astype(jnp.float32),
        }

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """Adds `nsp_loss`, in nats, and `nsp_accuracy` to the metrics of `MaskedLanguageModeling`."""
        return super().evaluate(outputs, examples) | {
            "nsp_loss": float(np.mean(outputs["nsp_nll"])),
            "nsp_accuracy": float(np.mean(outputs["nsp_correct"])),
        }

    def _logits(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, ...]:
        out = model(
            **batch["inputs"],
            masked_positions=batch["targets"]["masked_positions"],
            first_positions=batch["starts"],
            dropout_key=dropout_key,
        )
        return out.prediction_logits, out.seq_relationship_logits
