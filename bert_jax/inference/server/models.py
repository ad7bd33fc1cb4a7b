"""The models that a server loads, and the tasks that it offers for each model."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from bert_jax import hub, tree
from bert_jax.errors import BertJaxError
from bert_jax.inference.pipelines import Pipeline, pipeline, tasks_of
from bert_jax.quantization import Dtype
from bert_jax.tasks.base import Task
from bert_jax.tasks.registry import task_name


@dataclass(frozen=True)
class Served:
    """A served model.

    Attributes:
        name: The name by which clients refer to the model.
        pipes: The model's pipelines, keyed by task. The first pipeline of the first model answers requests to `/score`.
        created: The time at which the model was loaded, as a Unix timestamp in seconds.
    """

    name: str
    pipes: Mapping[str, Pipeline[Task]]
    created: int = field(default_factory=lambda: int(time.time()))


def load(
    name: str,
    folder: Path,
    *,
    tasks: Sequence[str] = (),
    ignore: Sequence[str] = (),
    dtype: Dtype = "float32",
    mesh: jax.sharding.Mesh | None = None,
) -> Served:
    """Loads a model for serving. The tasks share the parameters of the encoder and of heads that they have in common.

    Args:
        name: The name by which clients refer to the model.
        folder: The model's folder.
        tasks: The tasks to serve; by default, those for which the model has heads.
        ignore: Regular expressions for the names of tensors to skip; see `BertModel.from_pretrained`.
        dtype: "float32", "bfloat16" or "int8"; see `BertModel.from_pretrained`.
        mesh: The device mesh; see `bert_jax.pipeline`.

    Raises:
        BertJaxError: If the model cannot be loaded for one of `tasks` or, if `tasks` is empty, for the first task that
            it supports.
    """
    # Published configs do not list the next-sentence head among the architectures, even if the model has this head.
    # Therefore, if no tasks are given, next-sentence prediction is also tried.
    fitting = [
        *(["feature-extraction"] if hub.find_modules(folder) else []),
        *(tasks_of(hub.architectures(folder)) or ["fill-mask"]),
        "next-sentence-prediction",
    ]
    pipes: dict[str, Pipeline[Any]] = {}
    loaded: dict[str, jax.Array] = {}  # the parameters of all pipelines
    for task in dict.fromkeys(tasks or fitting):
        try:
            pipe = pipeline(task_name(task), folder, ignore=ignore, dtype=dtype, mesh=mesh)
        except BertJaxError:
            if tasks or not pipes:
                raise
            continue
        # A BertModel, which has no head, has the parameter paths of an encoder.
        shared = {
            path: loaded.setdefault(path.removeprefix("bert."), array)
            for path, array in tree.flatten(pipe.params).items()
        }
        pipe.params, pipes[task] = tree.unflatten(shared), pipe
    return Served(name, pipes)
