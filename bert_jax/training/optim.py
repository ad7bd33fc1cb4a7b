"""Optimizers, such as BERT's AdamW, and the learning-rate schedules of `transformers`.

For example::

    optimizer = optim.adamw(optim.schedule("linear", 2e-5, steps=500, warmup_ratio=0.1), weight_decay=0.01)

`bert_jax.train` accepts any `optax.GradientTransformation`. The optimizers in this module determine the weight decay
and the learning-rate multiplier of each parameter from its path.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from bert_jax.errors import InputError

NO_DECAY = (r".*\bbias", r".*norm\.weight")
"""Default patterns for the parameters without weight decay, which are biases and LayerNorm weights."""
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Rule:
    """The update rule for a parameter.

    Attributes:
        weight_decay: Decoupled weight decay, which is multiplied by the learning rate.
        lr_multiplier: The factor by which the learning rate is multiplied.
        reasons: The patterns and settings that determined the weight decay and the multiplier.
    """

    weight_decay: float
    lr_multiplier: float
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        rate = "" if self.lr_multiplier == 1 else f", learning rate × {self.lr_multiplier:.4g}"
        what = f"weight decay {self.weight_decay:g}{rate}"
        return f"{what} ({'; '.join(self.reasons)})" if self.reasons else what


def rules(
    paths: Iterable[str],
    *,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
    lr_multipliers: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> dict[str, Rule]:
    """Returns the update rule of each parameter, keyed by path.

    Each pattern is a regular expression that must match a whole path. If several patterns match a path, the first one
    applies.

    Args:
        paths: The paths of the parameters, such as `bert.layers.0.attention.query.weight`.
        weight_decay: Weight decay of the parameters that `no_decay` does not match.
        no_decay: Patterns for the parameters without weight decay.
        lr_multipliers: Maps each pattern to the learning-rate multiplier of the parameters that the pattern matches.
        layer_decay: The learning rate of each layer is that of the layer above, multiplied by this factor. The head
            counts as the layer above the top layer, and the embeddings count as the layer below layer 0 (Howard & Ruder
            2018, section 3.2). The factor does not apply to parameters that `lr_multipliers` matches.

    Raises:
        InputError: If a pattern matches no parameter, unless it is one of the default `no_decay` patterns.
    """
    paths, lr_multipliers = list(paths), lr_multipliers or {}
    layers = 1 + max((int(match[1]) for path in paths if (match := re.search(r"\blayers\.(\d+)\.", path))), default=-1)
    for name, patterns in [("lr_multipliers", lr_multipliers), ("no_decay", set(no_decay) - set(NO_DECAY))]:
        check_patterns(name, patterns, paths)
    found = {}
    for path in paths:
        decay, multiplier, reasons = weight_decay, 1.0, []
        if pattern := _first(no_decay, path):
            decay, reasons = 0.0, [f"no_decay: {pattern}"]
        if pattern := _first(lr_multipliers, path):
            multiplier = lr_multipliers[pattern]
            reasons.append(f"lr_multipliers: {pattern}")
        elif layer_decay < 1:
            multiplier = layer_decay ** _layers_above(path, layers)
            reasons.append("layer_decay")
        found[path] = Rule(decay, multiplier, tuple(reasons))
    return found


def check_patterns(name: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raises `InputError` if one of the patterns matches none of the paths."""
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise InputError(
                f"{name} has {pattern!r}, which matches no parameter; expected a regular expression that matches whole "
                f"paths, such as {re.escape(paths[0].rpartition('.')[0])}.* for {paths[0]}."
            )


def _first(patterns: Iterable[str], path: str) -> str | None:
    return next((pattern for pattern in patterns if re.fullmatch(pattern, path)), None)


def _layers_above(path: str, layers: int) -> int:
    """Returns a parameter's distance from the head: 0 for the head, 1 for the top layer, layers + 1 for embeddings."""
    if match := re.search(r"\blayers\.(\d+)\.", path):
        return layers - int(match[1])
    return layers + 1 if ".embeddings." in path else 0


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bias_correction: bool = True,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
    lr_multipliers: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), with a `Rule` for each parameter.

    The gradients are clipped by their global norm. The running means of the gradients and of their squares are called m
    and v (Kingma & Ba 2015). Each step updates every parameter w::

        w <- w - learning_rate(step) · lr_multiplier · (m̂ / (√v̂ + eps) + weight_decay · w)

    If `bias_correction` is true, m̂ and v̂ are m and v corrected for their initialization to zero. Otherwise, m̂ and v̂
    are m and v.

    Args:
        learning_rate: A number or a function of the step.
        b1: Decay rate of m.
        b2: Decay rate of v.
        eps: A constant added to √v̂ (google-research/bert uses 1e-6).
        bias_correction: Whether to correct m and v. The original BERT code (optimization.py in google-research/bert)
            omits the correction, but small data sets need it (Zhang et al. 2020, Mosbach et al. 2020).
        weight_decay: See `rules`.
        no_decay: See `rules`.
        lr_multipliers: See `rules`.
        layer_decay: See `rules`.
        max_grad_norm: Gradients with a larger global norm are scaled down to this norm; None for no limit.
    """
    return by_path(
        scale_by_adam(b1, b2, eps, bias_correction),
        learning_rate, weight_decay=weight_decay, no_decay=no_decay, lr_multipliers=lr_multipliers,
        layer_decay=layer_decay, max_grad_norm=max_grad_norm,
    )  # fmt: skip


def by_path(
    transform: optax.GradientTransformation,
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
    lr_multipliers: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    max_grad_norm: float | None = 1.0,
    trust_ratio: bool = False,
) -> optax.GradientTransformation:
    """Returns an optimizer that clips and transforms the gradients, then applies weight decay and the learning rate.

    Args:
        transform: A transformation without a learning rate, such as `optax.scale_by_lion()`.
        learning_rate: A number or a function of the step.
        weight_decay: See `rules`.
        no_decay: See `rules`.
        lr_multipliers: See `rules`.
        layer_decay: See `rules`.
        max_grad_norm: Gradients with a larger global norm are scaled down to this norm; None for no limit.
        trust_ratio: Whether to multiply each parameter's update by the ratio of the parameter's norm to the update's
            norm, as LAMB does (You et al. 2020, arXiv:1904.00962).
    """

    def by_parameter(params: optax.Params) -> dict[str, Rule]:
        return rules(
            [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)],
            weight_decay=weight_decay, no_decay=no_decay, lr_multipliers=lr_multipliers, layer_decay=layer_decay,
        )  # fmt: skip

    def init(params: optax.Params) -> optax.EmptyState:
        by_parameter(params)  # raises an error before the first step if a pattern matches no parameter
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        found = by_parameter(params)
        updates = jax.tree_util.tree_map_with_path(
            lambda keys, u, w: u + found[_path(keys)].weight_decay * w, updates, params
        )
        if trust_ratio:
            updates, _ = optax.scale_by_trust_ratio().update(updates, optax.ScaleByTrustRatioState(), params)
        return jax.tree_util.tree_map_with_path(lambda keys, u: found[_path(keys)].lr_multiplier * u, updates), state

    def clip(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        # XLA repeats this multiplication wherever the gradients are read. The division in
        # optax.clip_by_global_norm is not repeated: XLA stores the quotients, which costs another pass over memory.
        factor = jnp.minimum(1.0, max_grad_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.chain(
        *([] if max_grad_norm is None else [optax.stateless(clip)]),
        transform,
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, bias_correction: bool = True
) -> optax.GradientTransformation:
    """Like `optax.scale_by_adam`, but with optional bias correction. Without it, the update is m / (√v + eps)."""
    corrected = optax.scale_by_adam(b1, b2, eps)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return corrected if bias_correction else optax.GradientTransformation(corrected.init, update)


def schedule(
    name: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    learning_rate: float,
    steps: int,
    *,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    cycles: float | None = None,
    power: float = 1.0,
    final_learning_rate: float = 1e-7,
) -> optax.Schedule:
    """Returns a `transformers` schedule: a function from the step, starting at 0, to the learning rate (float32).

    Args:
        name: The `transformers` name of the schedule that follows warm-up.
        learning_rate: The peak learning rate.
        steps: Total number of steps in the run.
        warmup_steps: Number of linear warm-up steps.
        warmup_ratio: The fraction of steps to use for warm-up if `warmup_steps` is None. The resulting number of steps
            is rounded up.
        cycles: For "cosine", the number of cosine waves (0.5 by default). For "cosine_with_restarts", the number of
            times that the rate falls from its peak to 0 (1 by default).
        power: The exponent of "polynomial".
        final_learning_rate: The learning rate at the end of "polynomial".

    Raises:
        InputError: If the schedule is unknown, if an argument is set that the schedule does not use, or if the run's
            only step is a warm-up step (the learning rate is 0 in the first warm-up step).
    """
    if name not in SCHEDULES:
        raise InputError(f"The schedule {name!r} is unknown; expected one of {', '.join(SCHEDULES)}.")
    warmup = math.ceil(steps * warmup_ratio) if warmup_steps is None else warmup_steps
    for given, what, names in (
        (warmup > 0, "warm-up", [other for other in SCHEDULES if other != "constant"]),
        (cycles is not None, "cycles", ["cosine", "cosine_with_restarts"]),
        (power != 1.0, "power", ["polynomial"]),
        (final_learning_rate != 1e-7, "final_learning_rate", ["polynomial"]),
    ):
        if given and name not in names:
            raise InputError(f"The schedule {name} has no {what}. Leave it out, or use {', '.join(names)}.")
    if steps == 1 and warmup:
        raise InputError(
            "The run has 1 step, and the learning rate of the first step of a warm-up is 0, so nothing would be "
            "trained. Take more steps, or set warmup_steps and warmup_ratio to 0."
        )

    def cosine(angle: jax.Array) -> jax.Array:
        return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(angle)))

    def restarts(progress: jax.Array) -> jax.Array:
        wave = (cycles or 1.0) * progress % 1.0
        return jnp.where(progress >= 1.0, 0.0, cosine(jnp.pi * wave))

    last = final_learning_rate / (learning_rate or 1.0)
    # Each function maps the progress after warm-up to a fraction of the peak. Constant schedules need no entry.
    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "linear": lambda p: jnp.maximum(0.0, 1.0 - p),
        "cosine": lambda p: cosine(jnp.pi * (cycles or 0.5) * 2.0 * p),
        "cosine_with_restarts": restarts,
        "polynomial": lambda p: (1.0 - last) * jnp.clip(1.0 - p, 0.0, 1.0) ** power + last,
    }
    rest = max(1, steps - warmup)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = shapes.get(name, jnp.ones_like)((step - warmup) / rest)
        return learning_rate * jnp.where(step < warmup, step / max(1, warmup), after)

    return rate
