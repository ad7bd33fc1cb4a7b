"""Evaluates a model on examples: computes the outputs for each example, then the metrics."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from bert_jax import sharding, tree
from bert_jax.data.loader import Batch, Examples, Loader, Place, Shape
from bert_jax.errors import TrainingError, listed
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.tasks.base import Objective
from bert_jax.training import memory

Program = Callable[[tree.Params, Batch], tuple[dict[str, jax.Array], jax.Array, jax.Array]]


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        metrics: The task's metrics and `loss`, which is the mean loss over the examples or tokens that have a target.
            The loss is in nats or, for regression, in the squared unit of the target. The dict is empty if there are no
            targets.
        outputs: The outputs of `Objective.outputs`, keyed by name. Each output is an array with one entry per example,
            in the order of the examples. If the task's `per_token` is true, each output is instead a list with one
            array per example, and each of these arrays has one entry per token.
    """

    metrics: dict[str, Any]
    outputs: Mapping[str, Any]


def program(task: Objective, skeleton: tree.Skeleton) -> jax.stages.Wrapped:
    """Returns a jitted function of the parameters and a batch.

    The jitted function returns the outputs, the mean loss, and the number of entries over which the mean was taken.
    Every device receives the full results.
    """

    def evaluate_batch(params: tree.Params, batch: Any) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        model = tree.merge(skeleton, params)
        loss, count = task.loss(model, batch, None)
        return task.outputs(model, batch), loss, count

    return jax.jit(evaluate_batch, out_shardings=PartitionSpec())


def evaluate(
    task: Objective,
    evaluate_batch: Program,
    params: tree.Params,
    examples: Examples,
    *,
    batch_size: int,
    packing: int | None,
    multiple: int = 1,
    mesh: jax.sharding.Mesh,
) -> Evaluation:
    """Evaluates a model on each example once. Padding does not affect the results.

    Args:
        task: The task that defines the loss, the outputs and the metrics.
        evaluate_batch: The function that `program` returns.
        params: The parameters of the model.
        examples: All examples to evaluate.
        batch_size: Number of examples per batch, across all devices.
        packing: Maximum number of tokens in a packed row, which contains several examples; None for one example per
            row.
        multiple: The number of tokens per row is a multiple of this number.
        mesh: The device mesh.

    Raises:
        OutOfMemoryError: If a batch does not fit in memory.
        TrainingError: If the outputs or the loss are not finite.
    """
    loader = Loader(
        examples, batch_size, seed=0, share=sharding.share(mesh), packing=packing, multiple=multiple,
        part=sharding.part(mesh),
    )  # fmt: skip
    remedy = "Lower evaluation_batch_size or the length of the examples."
    collected: dict[str, Any] = {}
    total = counted = 0.0

    def dispatch(step: int) -> tuple[Place, Any]:
        place = loader.place(step)
        with jax.set_mesh(mesh), memory.explain_out_of_memory(f"A batch of {place.shape}", remedy):
            return place, evaluate_batch(params, sharding.put_batch(loader.batch_at(step), mesh))

    # The results of a batch are read after the next batch is dispatched, so that the device can compute the next batch
    # while the host reads the results.
    batches: Iterator[Any] = itertools.chain(map(dispatch, range(loader.steps_per_epoch)), [None])
    for (place, results), _ in itertools.pairwise(batches):
        with memory.explain_out_of_memory(f"A batch of {place.shape}", remedy):
            outputs, loss, count = jax.device_get(results)
        if not all(np.isfinite(array).all() for array in (loss, *outputs.values())):
            raise TrainingError(
                f"The model's results for rows {listed(examples.rows(place.indices))} of the data are not finite (NaN "
                "or infinity): its numbers overflow. Check its weights and dtype."
            )
        total, counted = total + float(loss) * float(count), counted + float(count)
        for name, array in outputs.items():
            column = collected.setdefault(name, [None] * len(examples))
            for spot in examples.spots(place):
                # This is a copy, because a slice would keep the whole batch in memory.
                column[spot.item] = array[spot.tokens].copy() if task.per_token else array[spot.row, spot.number]
    found = collected if task.per_token else {name: np.stack(column) for name, column in collected.items()}
    return Evaluation({"loss": total / counted} | task.evaluate(found, examples) if counted else {}, found)


def largest(
    task: Objective,
    model: BertPreTrainedModel,
    examples: Examples,
    *,
    batch_size: int,
    packing: int | None,
    multiple: int = 1,
    mesh: jax.sharding.Mesh,
) -> tuple[Shape, jax.stages.Compiled]:
    """Finds the largest batch that `evaluate` creates when called with the same arguments.

    Returns:
        The shape of the batch and the compiled program that evaluates batches of this shape. The program is not run.
    """
    loader = Loader(examples, batch_size, seed=0, share=sharding.share(mesh), packing=packing, multiple=multiple)
    shape = max({loader.place(step).shape for step in range(loader.steps_per_epoch)}, key=lambda s: s.rows * s.length)
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    abstract = tree.unflatten(sharding.abstract(flat, sharding.placements(mesh, flat)))
    # Only the shapes of the batch's arrays are needed, so the batch contains only padding and no examples.
    nowhere = np.zeros(0, int)
    batch = sharding.abstract(examples.batch(Place(nowhere, nowhere, shape)), sharding.by_row(mesh))
    with jax.set_mesh(mesh):
        return shape, program(task, skeleton).lower(abstract, batch).compile()
