"""Losses. Each is a float32 mean that leaves out the entries whose label is `IGNORE` or whose weight is 0.

Cross entropies are in nats.
"""

import jax
import jax.numpy as jnp

IGNORE = -100
"""The label of entries that a loss leaves out. PyTorch and Hugging Face's data sets use the same number."""


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the labels.

    This is the loss of masked-language modeling, next-sentence prediction, token classification and single-label
    sequence classification.

    Args:
        logits: float [..., C].
        labels: int [...]; `IGNORE` where nothing is to be predicted.

    Returns:
        float32 [], nats per label that is not `IGNORE`; 0 if all labels are `IGNORE`.
    """
    logits = logits.astype(jnp.float32)
    counts = labels != IGNORE
    chosen = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counts, nll, 0.0)) / jnp.maximum(jnp.sum(counts), 1)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean negative log-likelihood of independent yes-no labels: the loss of multi-label classification.

    Args:
        logits: float [B, C].
        labels: [B, C], 0 or 1.
        weights: float [B], 1 for each row to include and 0 for each row to leave out. All rows are included by default.

    Returns:
        float32 [], nats per label.
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    return _mean_of_rows(jax.nn.softplus(logits) - logits * labels, weights)


def squared_error(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean squared error: the loss of regression.

    Args:
        logits: float [B, C].
        labels: float [B, C].
        weights: float [B], 1 for each row to include and 0 for each row to leave out. All rows are included by default.

    Returns:
        float32 [], in the labels' unit squared.
    """
    return _mean_of_rows(jnp.square(logits.astype(jnp.float32) - labels.astype(jnp.float32)), weights)


def _mean_of_rows(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        return jnp.mean(values)
    return jnp.sum(jnp.mean(values, axis=-1) * weights) / jnp.maximum(jnp.sum(weights), 1)


def span_cross_entropy(
    start_logits: jax.Array, end_logits: jax.Array, start_positions: jax.Array, end_positions: jax.Array
) -> jax.Array:
    """Mean of the cross entropies of the first and last token of an answer (Devlin et al. 2018, section 4.2).

    Args:
        start_logits: float [B, T].
        end_logits: float [B, T].
        start_positions: int [B], the index of the answer's first token; `IGNORE` leaves out the row.
        end_positions: int [B], the index of the answer's last token; `IGNORE` leaves out the row.

    Returns:
        float32 [], nats.
    """
    return (cross_entropy(start_logits, start_positions) + cross_entropy(end_logits, end_positions)) / 2
