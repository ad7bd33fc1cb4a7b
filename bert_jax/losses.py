"""Loss functions.

Each loss is a float32 mean over all entries whose label is not `IGNORE` and whose weight is not 0. Cross entropies are
in nats.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.errors import InputError

IGNORE = -100
"""The label of entries that the losses ignore. PyTorch and Hugging Face data sets use the same value."""


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> jax.Array:
    """Mean negative log-likelihood of the labels.

    This is the loss for masked language modeling, next-sentence prediction, token classification and single-label
    sequence classification.

    Args:
        logits: float [..., C].
        labels: int [...]; `IGNORE` marks the entries that have no target.
        class_weights: float [C], the weight of each class in the mean, as in `torch.nn.CrossEntropyLoss`. By default,
            all classes have the same weight.
        label_smoothing: The share of each target's probability that is divided equally among all classes (Szegedy et
            al. 2016, section 7).
        focal_gamma: The negative log-likelihood of each label is multiplied by (1 - p)^focal_gamma, where p is the
            label's predicted probability. Well-predicted labels therefore count less (Lin et al. 2017, section 3.2).

    Returns:
        float32 [], in nats per label. The mean is taken over the labels that are not `IGNORE` and is weighted if
        class weights are given. The loss is 0 if all labels are `IGNORE`.

    Raises:
        InputError: If `class_weights` does not contain exactly C numbers.
    """
    logits = logits.astype(jnp.float32)
    counts = labels != IGNORE
    labels = jnp.where(counts, labels, 0)
    total = jax.nn.logsumexp(logits, axis=-1)
    loss = total - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if focal_gamma:
        loss = _focus(loss, focal_gamma)
    if class_weights is not None:
        class_weights = _by_class(class_weights, logits)
    weights = jnp.ones_like(loss) if class_weights is None else jnp.take(class_weights, labels)
    loss = weights * loss
    if label_smoothing:
        others = total[..., None] - logits
        uniform = jnp.mean(others if class_weights is None else class_weights * others, axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    divisor = jnp.sum(jnp.where(counts, weights, 0.0))
    return jnp.sum(jnp.where(counts, loss, 0.0)) / jnp.where(divisor > 0, divisor, 1.0)


def total_weight(labels: jax.Array, class_weights: jax.Array | None = None) -> jax.Array:
    """Returns the denominator of the mean that `cross_entropy` computes, float32 [].

    Without class weights, the denominator is the number of labels that are not `IGNORE`. With class weights, the
    denominator is the sum of the class weights of those labels.
    """
    counts = labels != IGNORE
    if class_weights is None:
        return jnp.sum(counts, dtype=jnp.float32)
    weights = jnp.take(jnp.asarray(class_weights, jnp.float32), jnp.where(counts, labels, 0))
    return jnp.sum(jnp.where(counts, weights, 0.0))


def balanced(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns class weights that compensate for different class frequencies.

    For labels of shape [N], all classes have the same total weight in the loss. For labels of shape [N, C], the
    positive labels (1) of each class have the same total weight as its negative labels (0).

    Args:
        labels: For `cross_entropy`, int [N]; `IGNORE` and other negative numbers are left out. For
            `binary_cross_entropy`, zeros and ones [N, C]; rows that contain NaN are left out.
        classes: The number of classes, C.

    Returns:
        float32 [C]. For labels of shape [N], the weight of a class is M / (C · n), as in scikit-learn's
        `compute_class_weight`. M is the number of labels that are not left out, and n is the number of those that
        belong to the class. For labels of shape [N, C], the weight of a class is the number of zeros in its column
        divided by the number of ones. The weight of a class that does not occur is infinity or NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if labels.ndim == 2:
            known = labels[~np.isnan(labels).any(-1)]
            weights = np.sum(known == 0, axis=0) / np.sum(known == 1, axis=0)
        else:
            counts = np.bincount(labels[labels >= 0], minlength=classes)
            weights = counts.sum() / (classes * counts)
    return np.asarray(weights, np.float32)


def binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> jax.Array:
    """Mean negative log-likelihood of independent binary labels, the loss for multi-label classification.

    Args:
        logits: float [B, C].
        labels: [B, C], 0 or 1.
        weights: float [B], 1 for each row to include and 0 for each row to leave out. All rows are included by default.
        class_weights: float [C]. Where the label of a class is 1, the loss is multiplied by the weight of the class, as
            with `pos_weight` in `torch.nn.BCEWithLogitsLoss`.
        label_smoothing: A label of 0 is replaced with `label_smoothing / 2`, and a label of 1 with
            `1 - label_smoothing / 2`.
        focal_gamma: See `cross_entropy`. In this loss, p is the predicted probability of the label's value, 0 or 1.

    Returns:
        float32 [], in nats per label.

    Raises:
        InputError: If `class_weights` does not contain exactly C numbers.
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    yes, no = jax.nn.softplus(-logits), jax.nn.softplus(logits)  # -log p and -log (1 - p)
    if focal_gamma:
        yes, no = _focus(yes, focal_gamma), _focus(no, focal_gamma)
    if class_weights is not None:
        yes = _by_class(class_weights, yes) * yes
    labels = labels * (1 - label_smoothing) + label_smoothing / 2
    return _mean_of_rows(labels * yes + (1 - labels) * no, weights)


def _by_class(weights: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes weights [C] to the rank of `like`, [..., C]."""
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != like.shape[-1:]:
        raise InputError(f"class_weights has the shape {weights.shape}; there are {like.shape[-1]} classes.")
    return jnp.reshape(weights, (1,) * (like.ndim - 1) + (-1,))


def _focus(nll: jax.Array, gamma: float) -> jax.Array:
    """Multiplies a negative log-likelihood -log p by (1 - p)^gamma."""
    # The lower limit keeps the derivative finite where p is 1 and gamma is less than 1.
    return jnp.maximum(-jnp.expm1(-nll), float(np.finfo(np.float32).tiny)) ** gamma * nll


def squared_error(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean squared error, the loss for regression.

    Args:
        logits: float [B, C].
        labels: float [B, C].
        weights: float [B], 1 for each row to include and 0 for each row to leave out. All rows are included by default.

    Returns:
        float32 [], in the squared unit of the labels.
    """
    return _mean_of_rows(jnp.square(logits.astype(jnp.float32) - labels.astype(jnp.float32)), weights)


def _mean_of_rows(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        return jnp.mean(values)
    return jnp.sum(jnp.mean(values, axis=-1) * weights) / jnp.maximum(jnp.sum(weights), 1)


def span_cross_entropy(
    start_logits: jax.Array, end_logits: jax.Array, start_positions: jax.Array, end_positions: jax.Array
) -> jax.Array:
    """Mean of the cross entropies of an answer's first and last tokens (Devlin et al. 2018, section 4.2).

    Args:
        start_logits: float [B, T].
        end_logits: float [B, T].
        start_positions: int [B], the index of the answer's first token; `IGNORE` to leave out the row.
        end_positions: int [B], the index of the answer's last token; `IGNORE` to leave out the row.

    Returns:
        float32 [], in nats.
    """
    return (cross_entropy(start_logits, start_positions) + cross_entropy(end_logits, end_positions)) / 2
