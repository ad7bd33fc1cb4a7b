"""Makes predictions for texts.

The rows of many requests are batched together, and one program is compiled per batch shape.

Example:
    fill_mask = bert_jax.pipeline("fill-mask", "google-bert/bert-base-cased")
    fill_mask("Paris is the [MASK] of France.", top_k=2)
"""

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bert_jax import attention, hub, porting, sharding, tree
from bert_jax.data.rows import model_inputs
from bert_jax.errors import CheckpointError, InputError, quoted
from bert_jax.heads import FIRST, BertWithClassifier
from bert_jax.hub import DEFAULT_MODEL
from bert_jax.inference.batches import (
    Batch,
    Bucket,
    Queued,
    batches,
    is_usual,
    mask_counts,
    shapes,
)
from bert_jax.inference.run import Run, explain_out_of_memory
from bert_jax.model import BertModel
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.quantization import Dtype
from bert_jax.tasks.base import Request, Task, check_vocabulary
from bert_jax.tasks.feature_extraction import FeatureExtraction
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tasks.multiple_choice import MultipleChoice
from bert_jax.tasks.next_sentence_prediction import NextSentencePrediction
from bert_jax.tasks.pseudo_log_likelihood import PseudoLogLikelihood
from bert_jax.tasks.question_answering import QuestionAnswering
from bert_jax.tasks.registry import TASKS, TaskName, task_name
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.tasks.token_classification import TokenClassification
from bert_jax.tokenizer import Tokenizer
from bert_jax.training import memory

READ_AHEAD = 1024
"""Number of inputs per batch shard that are read ahead from a stream, to be sorted by length and batched together."""

Model = str | os.PathLike[str] | BertPreTrainedModel
Input = TypeVar("Input")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")
Input_contra = TypeVar("Input_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
Task_co = TypeVar("Task_co", covariant=True)


class Asks(Protocol[Input_contra, Parameters, Result_co]):
    """A protocol for tasks. It lets type checkers infer the types of a task's inputs, parameters and results."""

    @property
    def request(self) -> Callable[Concatenate[Input_contra, Parameters], Request[Result_co]]:
        """See `Task.request`."""
        ...


class Predicts(Protocol[Input, Parameters, Result]):
    """The type of `Pipeline.__call__`, which accepts one input, a list of inputs, or another iterable of inputs."""

    @overload
    def __call__(self, inputs: Input, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # a list is an iterable
        self, inputs: list[Input], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> list[Result]: ...
    @overload
    def __call__(
        self, inputs: Iterable[Input], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Iterator[Result]: ...


# fmt: off

@overload
def pipeline(
    task: Literal["fill-mask"], model: Model = ..., *, tokenizer: Tokenizer | None = ..., revision: str | None = ...,
    ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[FillMask]": ...
@overload
def pipeline(
    task: Literal["next-sentence-prediction"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[NextSentencePrediction]": ...
@overload
def pipeline(
    task: Literal["feature-extraction"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[FeatureExtraction]": ...
@overload
def pipeline(
    task: Literal["text-classification"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[SequenceClassification]": ...
@overload
def pipeline(
    task: Literal["token-classification"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[TokenClassification]": ...
@overload
def pipeline(
    task: Literal["question-answering"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[QuestionAnswering]": ...
@overload
def pipeline(
    task: Literal["multiple-choice"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[MultipleChoice]": ...
@overload
def pipeline(
    task: Literal["pseudo-log-likelihood"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[PseudoLogLikelihood]": ...
@overload
def pipeline(
    task: TaskName, model: Model = ..., *, tokenizer: Tokenizer | None = ..., revision: str | None = ...,
    ignore: Sequence[str] = ..., dtype: Dtype | None = ..., mesh: Mesh | None = ...,
) -> "Pipeline[Task]": ...
# fmt: on
@porting.suggests(porting.PIPELINE)
def pipeline(
    task: str,
    model: Model = DEFAULT_MODEL,
    *,
    tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    dtype: Dtype | None = None,
    mesh: Mesh | None = None,
) -> "Pipeline[Task]":
    """Prepares a model for a task.

    Args:
        task: "fill-mask", "next-sentence-prediction", "feature-extraction", "text-classification",
            "token-classification", "question-answering", "multiple-choice" or "pseudo-log-likelihood".
        model: A folder, an id on the Hugging Face Hub, the embedded model (`bert-mini-cased`), or a loaded model.
        tokenizer: The tokenizer. It is required for a loaded model. For other models, the default is the checkpoint's
            tokenizer.
        revision: The branch, tag or commit on the Hub.
        ignore: Regular expressions for the names of tensors to skip; see `BertModel.from_pretrained`.
        dtype: "float32" (the default), "bfloat16" or "int8". The last two need less memory and, on some processors,
            less time; see `BertModel.from_pretrained`. A loaded model keeps its dtype.
        mesh: A device mesh created by `bert_jax.sharding.mesh`. The rows of each batch are divided among the devices.
            By default, a loaded model stays on its current devices, and other models use the mesh from
            `bert_jax.sharding.local`.

    Raises:
        InputError: If the task or dtype is unknown, or if the mesh does not fit the model or contains devices of other
            processes. Also raised if a loaded model does not fit the task, if it is passed without a tokenizer, or if
            it is passed with arguments that specify how to load a model.
        ModelNotFoundError: If the model does not exist, or if the Hub does not respond.
        CheckpointError: If the checkpoint lacks the task's head, is damaged, or does not fit the tokenizer.
        OutOfMemoryError: If the model does not fit in the memory of the devices.
    """
    if mesh is not None and mesh.is_multi_process:
        raise InputError(
            "The mesh has devices of other processes. Expected those of this process: "
            "bert_jax.sharding.mesh(devices=jax.local_devices())."
        )
    model_class = TASKS[task_name(task)].model_class
    options: dict[str, Any] = {}
    if isinstance(model, BertPreTrainedModel):
        given = {"revision": revision, "ignore": ignore, "dtype": None if dtype == model.dtype else dtype}
        for name, value in given.items():
            if value:
                raise InputError(f"{name} is {quoted(value)}, but the model is loaded already. Leave {name} out.")
        if not isinstance(model, model_class):
            raise InputError(f"{task} expects a {model_class.__name__}, got a {type(model).__name__}.")
        if tokenizer is None:
            raise InputError("A loaded model has no tokenizer. Pass tokenizer=Tokenizer.from_pretrained(…).")
        params, skeleton = tree.split(model)
        flat, mesh = tree.flatten(params), mesh or sharding.mesh_of(params) or sharding.local()
        sharding.check(mesh, model.config)
        with explain_out_of_memory("The model"):
            network = tree.merge(skeleton, tree.unflatten(sharding.put(flat, sharding.placements(mesh, flat))))
    else:
        mesh = mesh or sharding.local()
        folder = hub.download(model, revision=revision)
        tokenizer = tokenizer or Tokenizer.from_pretrained(folder)
        without_pooler = {}
        if model_class is BertModel:  # for feature extraction, which does not use the pooler
            without_pooler["add_pooling_layer"] = False
            options["folder"] = folder
        fitting = tasks_of(hub.architectures(folder))
        other = bool(fitting) and task not in fitting
        misfit = CheckpointError(f"{model} is for {' and '.join(fitting)}; {task} expects a {model_class.__name__}.")
        # All classifiers have the same tensor names, so a checkpoint for another task would load without an error.
        if other and issubclass(model_class, BertWithClassifier):
            raise misfit
        try:
            with explain_out_of_memory("The model"):
                network = model_class.from_pretrained(
                    folder, ignore=ignore, dtype=dtype or "float32", mesh=mesh, **without_pooler
                )
        except CheckpointError as error:
            raise misfit if other else error from None
    config = network.current_config
    check_vocabulary(tokenizer, config)
    max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return Pipeline(TASKS[task](tokenizer, config, max_length, **options), network, tokenizer, max_length, mesh)


def tasks_of(architectures: Sequence[str]) -> list[str]:
    """Returns the tasks for which a checkpoint was trained, based on the architectures that its config lists."""
    if "BertForPreTraining" in architectures:  # this class has both pretraining heads
        architectures = [*architectures, "BertForMaskedLM", "BertForNextSentencePrediction"]
    tasks = {task.model_class.__name__: name for name, task in reversed(TASKS.items())}  # the first task of each class
    return [name for name in TASKS if name in {tasks.get(architecture) for architecture in architectures}]


class Pipeline(Generic[Task_co]):
    """A model prepared for a task, together with its compiled programs.

    Call a pipeline with one input, a list of inputs, or another iterable of inputs.
    """

    def __init__(self, task: Task_co, model: BertPreTrainedModel, tokenizer: Tokenizer, max_length: int, mesh: Mesh):
        self.task: Any = task
        self.tokenizer = tokenizer
        self.config = model.current_config
        # A float32 model may compute in bfloat16, which changes the results in the same way as dtype bfloat16 does.
        self.dtype: Dtype = "bfloat16" if model.encoder.compute_dtype == "bfloat16" else model.dtype
        self.max_length = max_length
        self.params, self._skeleton = tree.split(model)
        self.mesh, self._share = mesh, sharding.share(mesh)
        kernel, _ = attention.choose(
            model.encoder.attention, platform=mesh.devices.flat[0].platform, compute_dtype=model.encoder.compute_dtype
        )
        self._shapes = shapes(
            max_length,
            packed=kernel not in attention.UNPACKED,
            masks=lambda length, texts: mask_counts(length, texts, self.task.one_mask) if self.task.masked else (),
            share=self._share,
            multiple=attention.multiple(kernel),
        )
        self._programs: dict[Bucket, jax.stages.Compiled] = {}

    @functools.cached_property
    def _parameters(self) -> list[str]:
        return list(inspect.signature(self.task.request).parameters)[1:]

    @property
    def read_ahead(self) -> int:
        """The number of inputs that are read ahead from a stream."""
        return READ_AHEAD * self._share

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        """All buckets that inputs may require, with the usual ones first; see `is_usual`."""
        buckets = [
            Bucket(rows, length, masks, texts)
            for rows, length, texts, counts in self._shapes
            for masks in sorted(set(counts)) or [0]
        ]
        return sorted(buckets, key=is_usual, reverse=True)

    def warm_up(self) -> None:
        """Compiles the programs for all `buckets`, several at a time, and runs the program with the highest memory use.

        Afterward, no input waits for compilation, and memory use has reached its peak.
        """
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            list(compilers.map(self.compile, self.buckets))
        self.run_largest()

    def run_largest(self) -> None:
        """Runs the program with the highest memory use."""
        largest = max(self.buckets, key=lambda bucket: (bucket.masks * bucket.rows, bucket.length * bucket.rows))
        inputs = {name: np.zeros(shape, np.int32) for name, shape in self._arrays(largest).items()}
        with explain_out_of_memory(f"A batch of {largest}"):
            jax.block_until_ready(self.compile(largest)(self.params, inputs))

    @property
    def programs(self) -> list[Bucket]:
        """The buckets that have a compiled program."""
        return sorted(self._programs)

    @property
    def __call__(self: "Pipeline[Asks[Input, Parameters, Result]]") -> Predicts[Input, Parameters, Result]:
        """Makes predictions.

        Call a pipeline as `pipe(inputs, …)`, with the keyword arguments of the task's `request` method.

        Args:
            inputs: One input, a list of inputs, or any other iterable of inputs. Depending on the task, an input is a
                text, a tuple of two texts, or a dict with either the keys `question` and `context` or the keys
                `context` and `choices`.

        Returns:
            For one input, the task's result. For a list, a list of results in the same order. For any other iterable,
            an iterator that yields the results and reads at most `read_ahead` inputs ahead.

        Raises:
            InputError: If an input or a parameter is invalid. The message describes the problem and, if there are
                several inputs, gives the index of the invalid input.
            CheckpointError: If the model's results are not finite.
            OutOfMemoryError: If a batch does not fit in the memory of the devices.
        """
        predict: Predicts[Input, Parameters, Result] = self._predict
        return predict

    def _predict(self, inputs: Any, /, *_: object, **parameters: object) -> Any:
        if isinstance(inputs, str | tuple | dict):
            return self.run([self.request(inputs, parameters)])[0]
        if not isinstance(inputs, Iterable):
            raise InputError(f"expected one or several inputs, got {quoted(inputs)} ({type(inputs).__name__}).")
        results = self._stream(enumerate(inputs), parameters)
        return list(results) if isinstance(inputs, list) else results

    def request(self, entry: Any, parameters: Mapping[str, Any]) -> Request[Any]:
        """Makes a request from one input. To compute its result, call `run`.

        Raises:
            InputError: If the input is invalid, or if a parameter is not one of the task's parameters.
            CheckpointError: If tokens were added to the tokenizer after the pipeline was created.
        """
        check_vocabulary(self.tokenizer, self.config)
        self.check_parameters(parameters)
        request: Request[Any] = self.task.request(entry, **parameters)
        return request

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Raises `InputError` if any parameter is not one of the task's parameters."""
        if unknown := [name for name in parameters if name not in self._parameters]:
            known = ", ".join(self._parameters) or "no parameters"
            hint = porting.PIPELINE_CALL.get(unknown[0], f"this task accepts {known}")
            raise InputError(f"the parameter {quoted(unknown[0])} is unknown; {hint}.")

    def _stream(self, numbered: Iterator[tuple[int, Any]], parameters: Mapping[str, Any]) -> Iterator[Any]:
        while window := list(itertools.islice(numbered, self.read_ahead)):
            requests = []
            for i, entry in window:
                try:
                    requests.append(self.request(entry, parameters))
                except InputError as error:
                    raise InputError(f"inputs[{i}]: {error}") from None
            yield from self.run(requests)

    def run(self, requests: Sequence[Request[Any]]) -> list[Any]:
        """Computes the results of requests and returns them in order. The rows of all requests are batched together."""
        if not requests:
            return []
        run = Run(self)
        run.add(self, requests)
        finished: dict[Any, Any] = {}
        while not finished:
            finished = dict(run.compute())
        (results,) = finished.values()
        if isinstance(results, Exception):
            raise results
        found: list[Any] = results
        return found

    def batches(
        self, queued: Sequence[Queued], has_program: Callable[[Bucket], bool] = lambda bucket: True
    ) -> Iterator[Batch]:
        """Divides texts into batches; see `bert_jax.inference.batches.batches`."""
        return batches(queued, self._shapes, has_program, self._share)

    def forward(self, batch: Batch) -> dict[str, jax.Array]:
        """Starts the computation of a batch and returns the outputs of `Task.forward`."""
        bucket = batch.bucket
        inputs = {name: np.zeros(shape, np.int32) for name, shape in self._arrays(bucket).items()}
        inputs |= model_inputs(
            batch.spots,
            [q.features.input_ids for q in batch.queued],
            [q.features.token_type_ids for q in batch.queued],
            (bucket.rows, bucket.length),
            packed=bucket.texts > 1,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        for (features, _, _), spot, mask in zip(batch.queued, batch.spots, batch.masked_spots, strict=True):
            if bucket.texts > 1:
                inputs["starts"][spot.row, spot.number] = spot.start
            if features.masked_positions:
                inputs["masked_positions"][mask.tokens] = spot.start + np.array(features.masked_positions)
            if features.labels:
                inputs["labels"][mask.tokens] = features.labels
        outputs: dict[str, jax.Array] = self.compile(bucket)(self.params, inputs)
        return outputs

    def has_program(self, bucket: Bucket) -> bool:
        """Returns whether the program for a bucket has already been compiled."""
        return bucket in self._programs

    def compile(self, bucket: Bucket) -> jax.stages.Compiled:
        """Returns the program for a bucket. The first call for each bucket compiles the program."""
        if bucket not in self._programs:
            first = not self._programs
            with explain_out_of_memory(f"A batch of {bucket}"):
                self._programs[bucket] = self.trace(bucket).lower().compile()
            if first:  # the compiler retains 50 MB that it needs only when it compiles another program
                memory.release()
        return self._programs[bucket]

    def trace(self, bucket: Bucket) -> jax.stages.Traced:
        """Traces the program for a bucket. The parameters may be abstract, and the devices may be in other machines."""
        flat, rows = tree.flatten(self.params), sharding.by_row(self.mesh)
        params = tree.unflatten(sharding.abstract(flat, sharding.placements(self.mesh, flat)))
        inputs = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in self._arrays(bucket).items()}
        with jax.set_mesh(self.mesh):
            traced: jax.stages.Traced = jax.jit(self._step, out_shardings=rows).trace(
                params, sharding.abstract(inputs, rows)
            )
        return traced

    def _arrays(self, bucket: Bucket) -> dict[str, tuple[int, int]]:
        packed = bucket.texts > 1
        lengths = {
            "input_ids": bucket.length,
            "token_type_ids": bucket.length,
            "attention_mask": 0 if packed else bucket.length,
            "document_ids": bucket.length if packed else 0,
            "position_ids": bucket.length if packed else 0,
            "starts": bucket.texts if packed else 0,
            "masked_positions": bucket.masks,
            "labels": bucket.masks if self.task.with_labels else 0,
        }  # a length of 0 means that the program has no such input
        return {name: (bucket.rows, length) for name, length in lengths.items() if length}

    def _step(self, params: tree.Params, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        starts = inputs.pop("starts", jnp.asarray(FIRST))
        outputs: dict[str, jax.Array] = self.task.forward(self.model(params), inputs, starts)
        return outputs

    def model(self, params: tree.Params) -> Any:
        """Rebuilds the model from `params`: either `self.params` or, inside `jax.jit`, the corresponding tracers."""
        return tree.merge(self._skeleton, params)
