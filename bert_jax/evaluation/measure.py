"""Runs a model over examples: its outputs for each example, and their metrics."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from bert_jax import sharding, tree
from bert_jax.data.loader import Batch, Examples, Loader, Place, Shape
from bert_jax.errors import TrainingError
from bert_jax.model import BertPreTrainedModel
from bert_jax.tasks.base import Objective

Program = Callable[[tree.Params, Batch], tuple[dict[str, jax.Array], jax.Array, jax.Array]]


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        metrics: `loss` (the mean over the entries that count, in nats or in the target's unit squared) and the metrics
            of the task.
        outputs: What `Objective.outputs` returned, in the order of the examples: arrays with one entry per example or,
            if the task has one entry per token, lists of arrays, each as long as its example.
    """

    metrics: dict[str, Any]
    outputs: Mapping[str, Any]


def program(task: Objective, skeleton: tree.Skeleton) -> jax.stages.Wrapped:
    """Returns the compiled function: parameters and batch -> outputs, mean loss, and the count that the mean is over.

    Every device gets the full results.
    """

    @functools.partial(jax.jit, out_shardings=PartitionSpec())
    def evaluate_batch(params: tree.Params, batch: Any) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        model = tree.merge(skeleton, params)
        loss, count = task.loss(model, batch, None)
        return task.outputs(model, batch), loss, count

    return evaluate_batch


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
    """Runs a model once over each example; padding has no weight.

    Args:
        task: Computes the metrics from the outputs.
        evaluate_batch: The function that `program` returns.
        params: The parameters of the model.
        examples: All examples to evaluate.
        batch_size: Examples per batch, over all devices.
        packing: Maximum number of tokens of a packed row, which holds several examples; None for one example per row.
        multiple: The number of tokens per row is a multiple of this.
        mesh: The devices.

    Raises:
        TrainingError: If a batch does not fit into memory, or the outputs or the loss are not finite.
    """
    loader = Loader(
        examples, batch_size, seed=0, share=sharding.share(mesh), packing=packing, multiple=multiple,
        part=sharding.part(mesh),
    )  # fmt: skip
    remedy = "Lower evaluation_batch_size or the length of the examples."
    collected: dict[str, Any] = {}
    total = counted = 0.0
    in_flight: list[tuple[Place, Any]] = []

    def deliver(place: Place, results: Any) -> None:
        nonlocal total, counted
        with out_of_memory(place.shape, remedy):
            outputs, loss, count = jax.device_get(results)
        if not all(np.isfinite(array).all() for array in (loss, *outputs.values())):
            raise TrainingError(
                "The model's results are not finite (NaN or infinity) on examples in rows "
                f"{', '.join(map(str, examples.rows(place.indices)[:20]))} of the data: its numbers overflow."
            )
        total, counted = total + float(loss) * float(count), counted + float(count)
        for name, array in outputs.items():
            column = collected.setdefault(name, [None] * len(examples))
            for spot in examples.spots(place):
                # A copy, because a slice would keep the whole batch in memory.
                column[spot.item] = array[spot.tokens].copy() if task.per_token else array[spot.row, spot.number]

    for step in range(loader.steps_per_epoch):
        with jax.set_mesh(mesh), out_of_memory(loader.place(step).shape, remedy):
            batch = sharding.put_batch(loader.batch_at(step), mesh)
            in_flight.append((loader.place(step), evaluate_batch(params, batch)))
        if len(in_flight) > 1:  # the device computes this batch while the host reads the previous one
            deliver(*in_flight.pop(0))
    for entry in in_flight:
        deliver(*entry)
    if not task.per_token:
        collected = {name: np.stack(column) for name, column in collected.items()}
    metrics = {"loss": total / counted} if counted else {}
    return Evaluation(metrics | (task.evaluate(collected, examples) if counted else {}), collected)


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
    """Returns the shape of the largest batch of an evaluation and its program, compiled but not run; see `evaluate`."""
    loader = Loader(examples, batch_size, seed=0, share=sharding.share(mesh), packing=packing, multiple=multiple)
    shapes = {loader.place(step).shape for step in range(loader.steps_per_epoch)}
    shape = max(shapes, key=lambda shape: shape.rows * shape.length)
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    abstract = tree.unflatten(sharding.abstract(flat, sharding.placements(mesh, flat)))
    empty = Place(np.zeros(0, int), np.zeros(0, int), shape)
    batch = sharding.abstract(examples.batch(empty), sharding.by_row(mesh))
    with jax.set_mesh(mesh):
        compiled: jax.stages.Compiled = program(task, skeleton).lower(abstract, batch).compile()
    return shape, compiled


@contextlib.contextmanager
def out_of_memory(shape: Shape, remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error into a `TrainingError` that names the batch and the remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"A batch of {shape.rows} rows of {shape.length} tokens does not fit into memory. {remedy}"
        ) from None
