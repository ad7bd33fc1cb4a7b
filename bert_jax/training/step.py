"""One training step: a pure function of the state, the frozen parameters and a batch.

For example, 500 steps without checkpoints or evaluations::

    planned = step.plan(model, optax.lion(1e-5))
    state, train_step = step.init_state(planned, seed=0), step.make_step(task, planned)
    for batch in loader.batches(0, 500):
        state, metrics = train_step(state, planned.frozen, batch)
    model = tree.merge(planned.skeleton, planned.params(state.params, planned.frozen))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bert_jax import tree
from bert_jax.data.loader import Batch
from bert_jax.errors import InputError
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.tasks.base import Loss, Objective
from bert_jax.training import lora as adapters
from bert_jax.training.lora import LoRA
from bert_jax.training.optim import check_patterns

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The training state, which each step updates.

    Attributes:
        step: int32 [], the number of completed steps.
        params: The trained parameters, including LoRA adapters, as float32 arrays keyed by path.
        opt_state: The state of the optimizer.
        key: The uint32 data of a PRNG key. The dropout key of a step is derived from this key and the step number.
    """

    step: jax.Array
    params: Arrays
    opt_state: optax.OptState
    key: jax.Array


@dataclass(frozen=True)
class Plan:
    """The trained and frozen parameters of a model, and the optimizer.

    Attributes:
        skeleton: The model without its arrays (see `tree.split`).
        trained: The trained parameters, including LoRA adapters, keyed by path.
        frozen: The model's other parameters, keyed by path.
        optimizer: Updates the trained parameters.
        lora: The settings of the adapters; None if there are no adapters.
    """

    skeleton: tree.Skeleton
    trained: Arrays
    frozen: Arrays
    optimizer: optax.GradientTransformation
    lora: LoRA | None = None

    def params(self, trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> tree.Params:
        """Returns the parameters of the model, both trained and frozen, with the adapters merged."""
        return tree.unflatten(adapters.merge({**frozen, **trained}, self.lora.scale if self.lora else 0.0))


def plan(
    model: BertPreTrainedModel,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str | Sequence[str] | None = None,
    lora: LoRA | None = None,
    seed: int = 0,
) -> Plan:
    """Divides the parameters of a model into trained and frozen parameters.

    Args:
        model: The model.
        optimizer: An `optax` transformation that operates on a flat dict of parameters, keyed by path.
        trainable: One or more regular expressions that match the paths of the parameters to train. All other parameters
            are frozen: they have neither gradients nor optimizer state. None trains all parameters or, if `lora` is
            given, only the adapters.
        lora: Adapters to train in addition to the parameters that `trainable` matches.
        seed: Seed for initializing the adapters.

    Raises:
        InputError: If the model is not loaded in float32, if a pattern matches no parameter, if there is nothing to
            train, or if the optimizer's updates do not have the same paths and shapes as the parameters.
    """
    model.check_float32("training")
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    if trainable is None:
        trainable = () if lora else (r".*",)
    patterns = (trainable,) if isinstance(trainable, str) else trainable
    check_patterns("trainable", patterns, list(flat))
    added = adapters.init(lora, skeleton.specs, jax.random.key(seed)) if lora else {}
    chosen = set(tree.select(patterns, flat))
    if not chosen and not added:
        raise InputError("trainable is empty; expected patterns of the parameters to train.")
    trained = {**added, **{path: leaf for path, leaf in flat.items() if path in chosen}}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}

    def update(trained: Arrays) -> Any:
        return optimizer.update(trained, optimizer.init(trained), trained)[0]

    updates = jax.eval_shape(update, trained)
    shapes = {path: getattr(leaf, "shape", None) for path, leaf in updates.items()} if isinstance(updates, dict) else {}
    expected = {path: leaf.shape for path, leaf in trained.items()}
    if shapes != expected:
        wrong = min(path for path in expected.keys() | shapes.keys() if shapes.get(path) != expected.get(path))
        raise InputError(
            f"The optimizer returns an update of shape {shapes.get(wrong)} for {wrong}, which has the shape "
            f"{expected.get(wrong)}; expected the structure of the parameters."
        )
    return Plan(skeleton, trained, frozen, optimizer, lora)


def init_state(plan: Plan, seed: int) -> TrainState:
    """Returns the state before the first step. Its arrays are copies, because the first step overwrites them."""
    trained = {path: jnp.array(leaf, copy=True) for path, leaf in plan.trained.items()}
    return TrainState(jnp.int32(0), trained, plan.optimizer.init(trained), jax.random.key_data(jax.random.key(seed)))


def make_step(
    task: Objective, plan: Plan, *, loss: Loss | None = None, accumulation: int = 1, out_shardings: Any = None
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Arrays]]:
    """Returns the jitted step: (state, frozen parameters, batch) -> (next state, metrics `loss` and `grad_norm`).

    The loss is the mean over the whole batch, even if gradients are accumulated. Entries that the task ignores, such as
    padding, are not counted. The step overwrites the arrays in the state that is passed to it (donation).

    Args:
        task: Defines the loss.
        plan: The parameters and the optimizer.
        loss: A loss to use instead of `task.loss`; None to use `task.loss`.
        accumulation: Number of parts into which a batch is divided. The parts are processed one after another (gradient
            accumulation).
        out_shardings: The shardings of the next state and of the metrics.
    """

    compute = loss or task.loss

    def mean_loss(trained: Arrays, frozen: Arrays, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return compute(tree.merge(plan.skeleton, plan.params(trained, frozen)), batch, key)

    def total_loss(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        mean, count = mean_loss(*arguments)
        return mean * count, count

    def train_step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Arrays]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        # With one part, the gradients of the mean loss are computed directly. Those of the total loss would have to be
        # divided by `count`, which costs another pass over memory.
        if accumulation == 1:
            (loss, _), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params, frozen, batch, key)
        else:
            gradient = jax.value_and_grad(total_loss, has_aux=True)
            # Row i goes to part i % accumulation. The padding rows, which come last, are thus spread over all parts.
            parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

            def add(sums: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, gradient(state.params, frozen, *part)), None

            zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.params))
            ((total, count), gradients), _ = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulation)))
            count = jnp.where(count > 0, count, 1.0)  # a sum of class weights may be less than 1
            loss, gradients = total / count, jax.tree.map(lambda g: g / count, gradients)
        updates, opt_state = plan.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def state_shapes(plan: Plan) -> TrainState:
    """Returns the shapes and dtypes of the arrays in the state that `init_state` returns for a plan."""

    shapes: TrainState = jax.eval_shape(lambda trained: init_state(replace(plan, trained=trained), 0), plan.trained)
    return shapes
