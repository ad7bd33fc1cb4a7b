"""BERT's optimizer: AdamW by rules over parameter paths, and the learning rate's schedules."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from bert_jax.errors import InputError
from bert_jax.settings import Optimizer, Schedule


@dataclass(frozen=True)
class Rule:
    """How a parameter is treated.

    Attributes:
        trained: False leaves it as it is.
        weight_decay: Decoupled, times the learning rate.
        factor: Of the learning rate.
        reasons: The patterns that say so.
    """

    trained: bool
    weight_decay: float
    factor: float
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if not self.trained:
            what = "frozen"
        else:
            rate = "" if self.factor == 1 else f", learning rate × {self.factor:.4g}"
            what = f"weight decay {self.weight_decay:g}{rate}"
        return f"{what} ({'; '.join(self.reasons)})" if self.reasons else what


def rules(settings: Optimizer, paths: Iterable[str]) -> dict[str, Rule]:
    """Which rule takes which parameter; of each list of patterns the first match counts.

    Raises:
        InputError: If a pattern matches nothing, or nothing is left to train.
    """
    paths = list(paths)
    layers = 1 + max((int(match[1]) for path in paths if (match := re.search(r"\blayers\.(\d+)\.", path))), default=-1)
    rates = [rate.parameters for rate in settings.rates]
    no_decay = set(settings.no_decay) - set(Optimizer().no_decay)  # the defaults may: LoRA's are no biases
    for name, patterns in [("frozen", settings.frozen), ("rates", rates), ("no_decay", no_decay)]:
        for pattern in patterns:
            if not _first([pattern], *paths):
                raise InputError(
                    f"optimizer.{name} has {pattern!r}, which matches no parameter; expected a regular expression of "
                    f"whole paths, {re.escape(paths[0].rpartition('.')[0])}.* for {paths[0]} and the like."
                )
    found = {}
    for path in paths:
        reasons = []
        if frozen := _first(settings.frozen, path):
            found[path] = Rule(False, 0.0, 0.0, (f"frozen: {frozen}",))
            continue
        decay = settings.weight_decay
        if without := _first(settings.no_decay, path):
            decay, reasons = 0.0, [f"no_decay: {without}"]
        factor = 1.0
        if rate := _first(rates, path):
            factor = settings.rates[rates.index(rate)].factor
            reasons.append(f"rates: {rate}")
        elif settings.layer_decay < 1:
            factor = settings.layer_decay ** _layers_above(path, layers)
            reasons.append("layer_decay")
        found[path] = Rule(True, decay, factor, tuple(reasons))
    if not any(rule.trained for rule in found.values()):
        raise InputError("optimizer.frozen matches all parameters; nothing is left to train.")
    return found


def _first(patterns: Iterable[str], *paths: str) -> str | None:
    return next((pattern for pattern in patterns for path in paths if re.fullmatch(pattern, path)), None)


def _layers_above(path: str, layers: int) -> int:
    """How far below the head: the top layer is 1, the embeddings are one below the lowest layer."""
    if match := re.search(r"\blayers\.(\d+)\.", path):
        return layers - int(match[1])
    return layers + 1 if ".embeddings." in path else 0


def adamw(
    settings: Optimizer, schedule: Callable[[jax.Array], jax.Array], by_path: Mapping[str, Rule]
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over a flat dict of parameters by path.

    The gradients are clipped by their global norm, m and v follow Kingma & Ba (2015), and

        w <- w - schedule(step) · factor · (m̂ / (√v̂ + epsilon) + weight_decay · w)

    where m̂ and v̂ are corrected for their start at zero or, with `bias_correction: false`, are m and v themselves, as
    in google-research/bert optimization.py.

    Args:
        settings: Rates.
        schedule: Step -> learning rate.
        by_path: From `rules`; those of trained parameters are read.
    """

    def decay_and_scale(updates: dict[str, jax.Array], params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            path: by_path[path].factor * (update + by_path[path].weight_decay * params[path])
            for path, update in updates.items()
        }

    adam = optax.scale_by_adam if settings.bias_correction else scale_by_uncorrected_adam

    def clip(updates: dict[str, jax.Array], params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        # One factor for all, which XLA multiplies in where the gradients are read; optax.clip_by_global_norm divides,
        # and a quotient that is read twice costs a pass over memory to keep.
        factor = jnp.minimum(1.0, settings.max_grad_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    steps = [] if settings.max_grad_norm is None else [optax.stateless(clip)]
    return optax.chain(
        *steps,
        adam(settings.beta1, settings.beta2, settings.epsilon),
        optax.stateless(decay_and_scale),
        optax.scale_by_learning_rate(schedule),
    )


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without bias correction, which optax has no switch for: m / (√v + eps)."""

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.scale_by_adam(b1, b2, eps).init(params)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def schedule(settings: Schedule, learning_rate: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Step (from 0) -> learning rate, float32, as transformers' optimization.py.

    Args:
        settings: Which of the six, and its warm-up.
        learning_rate: The peak.
        steps: Of the whole run.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = -int(-steps * settings.warmup_ratio // 1)  # rounded up
    if settings.name == "constant":
        warmup = 0
    rest = max(1, steps - warmup)

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = (step - warmup) / rest
        if settings.name == "linear":
            after = jnp.maximum(0.0, 1.0 - progress)
        elif settings.name == "cosine":
            after = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (settings.cycles or 0.5) * 2.0 * progress)))
        elif settings.name == "cosine_with_restarts":
            wave = ((settings.cycles or 1.0) * progress) % 1.0
            after = jnp.where(progress >= 1.0, 0.0, jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * wave))))
        elif settings.name == "polynomial":
            last = settings.final_learning_rate / learning_rate
            after = (1.0 - last) * jnp.clip(1.0 - progress, 0.0, 1.0) ** settings.power + last
        else:
            after = jnp.ones_like(step)
        return learning_rate * jnp.where(step < warmup, step / max(1, warmup), after)

    return rate
