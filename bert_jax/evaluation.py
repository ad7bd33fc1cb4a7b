"""A model over examples: what it returns for each of them, and the metrics of that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bert_jax import sharding, tree
from bert_jax.data.loader import Batch, Examples, by_length
from bert_jax.tasks.base import TrainableTask

Program = Callable[[tree.Params, Batch], tuple[dict[str, jax.Array], jax.Array, jax.Array]]


@dataclass(frozen=True)
class Evaluation:
    """What became of some examples.

    Attributes:
        metrics: `loss` (a mean over what counts, in nats or the target's unit squared) and the task's own.
        outputs: What `Task.forward` returned, by example in their order: arrays or, where it has an entry a token,
            lists of arrays, each as long as its example.
    """

    metrics: dict[str, Any]
    outputs: Mapping[str, Any]


def program(task: TrainableTask, skeleton: tree.Skeleton) -> Program:
    """The compiled function of a batch: outputs, mean loss, and what that is the mean of."""

    @jax.jit
    def evaluate_batch(params: tree.Params, batch: Any) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        model = tree.merge(skeleton, params)
        loss, count = task.loss(model, batch, None)
        return task.forward(model, batch["inputs"]), loss, count

    return evaluate_batch


def evaluate(
    task: TrainableTask,
    evaluate_batch: Program,
    params: tree.Params,
    examples: Examples,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Evaluation:
    """Runs a model over examples, each once; rows of padding weigh nothing.

    Args:
        task: Says what outputs mean.
        evaluate_batch: From `program`.
        params: The model's parameters.
        examples: All of them.
        batch_size: Examples at a time, over all devices.
        mesh: The devices.
    """
    rows = sharding.rows(batch_size, 1, mesh)
    collected: dict[str, Any] = {}
    total = counted = 0.0
    flying: list[tuple[np.ndarray, Any]] = []

    def deliver(indices: np.ndarray, results: Any) -> None:
        nonlocal total, counted
        outputs, loss, count = jax.device_get(results)
        total, counted = total + float(loss) * float(count), counted + float(count)
        for name, array in outputs.items():
            column = collected.setdefault(name, [None] * len(examples))
            for i, row in zip(indices, array, strict=False):
                # A copy: a slice would keep the batch.
                column[i] = row[: examples.lengths[i]].copy() if task.per_token else row

    for place in by_length(examples.lengths, batch_size):
        batch = examples.batch(place.indices, rows=rows, length=place.length)
        flying.append((place.indices, evaluate_batch(params, sharding.put_batch(batch, mesh))))
        if len(flying) > 1:  # the device computes one while the host takes in the one before
            deliver(*flying.pop(0))
    for entry in flying:
        deliver(*entry)
    if not task.per_token:
        collected = {name: np.stack(column) for name, column in collected.items()}
    metrics = {"loss": total / counted} if counted else {}
    return Evaluation(metrics | (task.evaluate(collected, examples) if counted else {}), collected)
