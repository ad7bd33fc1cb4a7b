"""Makes predictions for texts. The rows of many requests share batches, and each batch shape has one compiled program.

Example:
    fill_mask = bert_jax.pipeline("fill-mask", "google-bert/bert-base-cased")
    fill_mask("Paris is the [MASK] of France.", top_k=2)
"""

import contextlib
import functools
import heapq
import inspect
import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax import attention, hub, sharding, tree
from bert_jax.data.rows import model_inputs
from bert_jax.errors import CheckpointError, InputError, quoted
from bert_jax.heads import FIRST, BertWithClassifier
from bert_jax.hub import DEFAULT_MODEL
from bert_jax.inference.batches import (
    BUCKET_LENGTHS,
    BUCKET_ROWS,
    PACKED_LENGTHS,
    Batch,
    Bucket,
    Queued,
    batches,
    mask_counts,
    most_rows,
)
from bert_jax.model import BertModel, BertPreTrainedModel, ComputeDtype
from bert_jax.tasks.base import Outputs, Request, Task, check_vocabulary
from bert_jax.tasks.feature_extraction import FeatureExtraction
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tasks.next_sentence_prediction import NextSentencePrediction
from bert_jax.tasks.question_answering import QuestionAnswering
from bert_jax.tasks.registry import TASKS, TaskName, task_name
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.tasks.token_classification import TokenClassification
from bert_jax.tokenizer import Tokenizer

READ_AHEAD = 1024
"""Number of inputs of a stream that are read ahead, sorted by length and batched together."""
TOKENS_PER_MASK = 8
"""The number of tokens that a masked position counts as when a slice is filled. Its probabilities of the vocabulary
need as much memory as the activations of some tokens."""


Model = str | os.PathLike[str] | BertPreTrainedModel
Input = TypeVar("Input")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")
Input_contra = TypeVar("Input_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
Task_co = TypeVar("Task_co", covariant=True)


class Asks(Protocol[Input_contra, Parameters, Result_co]):
    """A task, from which type checkers infer the types of its inputs, parameters and results."""

    @property
    def request(self) -> Callable[Concatenate[Input_contra, Parameters], Request[Result_co]]:
        """See `Task.request`."""
        ...


class Predicts(Protocol[Input, Parameters, Result]):
    """The type of `Pipeline.__call__`, which accepts one input, a list of inputs, or another iterable."""

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
    ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[FillMask]": ...
@overload
def pipeline(
    task: Literal["next-sentence-prediction"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[NextSentencePrediction]": ...
@overload
def pipeline(
    task: Literal["feature-extraction"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[FeatureExtraction]": ...
@overload
def pipeline(
    task: Literal["text-classification"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[SequenceClassification]": ...
@overload
def pipeline(
    task: Literal["token-classification"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[TokenClassification]": ...
@overload
def pipeline(
    task: Literal["question-answering"], model: Model = ..., *, tokenizer: Tokenizer | None = ...,
    revision: str | None = ..., ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[QuestionAnswering]": ...
@overload
def pipeline(
    task: TaskName, model: Model = ..., *, tokenizer: Tokenizer | None = ..., revision: str | None = ...,
    ignore: Sequence[str] = ..., compute_dtype: ComputeDtype = ...,
) -> "Pipeline[Task]": ...
# fmt: on
def pipeline(
    task: str,
    model: Model = DEFAULT_MODEL,
    *,
    tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    compute_dtype: ComputeDtype = "float32",
) -> "Pipeline[Task]":
    """Makes a model ready for a task.

    Args:
        task: "fill-mask", "next-sentence-prediction", "feature-extraction", "text-classification",
            "token-classification" or "question-answering".
        model: A folder, an id on the Hugging Face Hub, `bert-mini-cased`, or a loaded model.
        tokenizer: The tokenizer. It is required with a loaded model; otherwise, None means that of the checkpoint.
        revision: Branch, tag or commit on the Hub.
        ignore: Regular expressions for the names of tensors that are not loaded; see `BertModel.from_pretrained`.
        compute_dtype: Dtype of the activations, "float32" or "bfloat16". A loaded model keeps its own.

    Raises:
        InputError: If the task is unknown, or if a loaded model does not fit the task or is given without a tokenizer.
        ModelNotFoundError: If there is no such model, or if the Hub does not answer.
        CheckpointError: If the checkpoint lacks the task's head, is damaged, or does not fit the tokenizer.
    """
    model_class = TASKS[task_name(task)].model_class
    options: dict[str, Any] = {}
    if isinstance(model, BertPreTrainedModel):
        if not isinstance(model, model_class):
            raise InputError(f"{task} expects a {model_class.__name__}, got a {type(model).__name__}.")
        if tokenizer is None:
            raise InputError("A loaded model has no tokenizer. Pass tokenizer=Tokenizer.from_pretrained(…).")
        network = model
    else:
        folder = hub.download(model, revision=revision)
        tokenizer = tokenizer or Tokenizer.from_pretrained(folder)
        without_pooler = {}
        if model_class is BertModel:  # feature extraction, which does not use the pooler
            without_pooler["add_pooling_layer"] = False
            options["folder"] = folder
        fitting = tasks_of(hub.architectures(folder))
        other = bool(fitting) and task not in fitting
        misfit = CheckpointError(f"{model} is for {' and '.join(fitting)}; {task} expects a {model_class.__name__}.")
        # All classifiers have the same tensor names, so a checkpoint for another task would load without an error.
        if other and issubclass(model_class, BertWithClassifier):
            raise misfit
        try:
            network = model_class.from_pretrained(folder, ignore=ignore, compute_dtype=compute_dtype, **without_pooler)
        except CheckpointError as error:
            raise misfit if other else error from None
    check_vocabulary(tokenizer, network.config)
    max_length = min(tokenizer.model_max_length, network.config.max_position_embeddings)
    return Pipeline(TASKS[task](tokenizer, network.config, max_length, **options), network, tokenizer, max_length)


def tasks_of(architectures: Sequence[str]) -> list[str]:
    """The tasks that a model with these architectures was trained for."""
    if "BertForPreTraining" in architectures:  # has both pretraining heads
        architectures = [*architectures, "BertForMaskedLM", "BertForNextSentencePrediction"]
    return [name for name, task in TASKS.items() if task.model_class.__name__ in architectures]


class Pipeline(Generic[Task_co]):
    """A task, a model and its programs. Call it with one input, a list of inputs, or any other iterable of inputs."""

    def __init__(self, task: Task_co, model: BertPreTrainedModel, tokenizer: Tokenizer, max_length: int):
        self.task: Any = task
        self.tokenizer = tokenizer
        self.config = model.config
        self.max_length = max_length
        self.params, self._skeleton = tree.split(model)
        self._lengths = [*(length for length in BUCKET_LENGTHS if length < max_length), max_length]
        packs = model.encoder.attention not in attention.UNPACKED
        self._packed = [*(length for length in PACKED_LENGTHS if length < max_length), max_length] if packs else []
        self._programs: dict[Bucket, jax.stages.Compiled] = {}

    @functools.cached_property
    def _parameters(self) -> list[str]:
        return list(inspect.signature(self.task.request).parameters)[1:]

    def warm_up(self) -> None:
        """Compiles the programs that predictions need, several at a time, and runs the one that uses the most memory.

        After that, no input waits for a compiler, and memory use has reached its peak.
        """
        shapes = [(rows, length, 1) for length in self._lengths for rows in BUCKET_ROWS if rows <= most_rows(length)]
        shapes += [(most_rows(length), length, length // 8) for length in self._packed]
        buckets = [
            Bucket(rows, length, masks, texts)
            for rows, length, texts in shapes
            for masks in (sorted(set(mask_counts(length, texts))) if self.task.masked else [0])
        ]
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            list(compilers.map(self._program, buckets))
        largest = max(buckets, key=lambda bucket: (bucket.masks * bucket.rows, bucket.length * bucket.rows))
        inputs = {name: np.zeros(shape, np.int32) for name, shape in self._shapes(largest).items()}
        jax.block_until_ready(self._program(largest)(self.params, inputs))

    @property
    def programs(self) -> list[Bucket]:
        """The buckets that have a compiled program."""
        return sorted(self._programs)

    @property
    def __call__(self: "Pipeline[Asks[Input, Parameters, Result]]") -> Predicts[Input, Parameters, Result]:
        """Makes predictions. A call is `pipe(inputs, …)`; its keyword arguments are those of the task's `request`.

        Args:
            inputs: One input of the task (a text, a pair as a tuple, a dict with question and context), a list of
                inputs, or any other iterable of inputs.

        Returns:
            For one input, the task's result. For a list, a list of results in the same order. For any other iterable,
            an iterator of results, which reads at most `READ_AHEAD` inputs ahead.

        Raises:
            InputError: If an input or a parameter cannot be used. The message names the problem and, if there
                are several inputs, the index of the input.
            CheckpointError: If the model's results are not finite.
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
        """Makes a request from one input; `run` computes its result.

        Raises:
            InputError: If the input cannot be used, or if the task does not have one of the parameters.
            CheckpointError: If tokens were added to the tokenizer after the pipeline was made.
        """
        check_vocabulary(self.tokenizer, self.config)
        if unknown := [name for name in parameters if name not in self._parameters]:
            known = ", ".join(self._parameters) or "no parameters"
            raise InputError(f"the parameter {quoted(unknown[0])} is unknown; this task accepts {known}.")
        request: Request[Any] = self.task.request(entry, **parameters)
        return request

    def _stream(self, numbered: Iterator[tuple[int, Any]], parameters: Mapping[str, Any]) -> Iterator[Any]:
        while window := list(itertools.islice(numbered, READ_AHEAD)):
            requests = []
            for i, entry in window:
                try:
                    requests.append(self.request(entry, parameters))
                except InputError as error:
                    raise InputError(f"inputs[{i}]: {error}") from None
            yield from self.run(requests)

    def run(self, requests: Sequence[Request[Any]]) -> list[Any]:
        """Returns the results of requests, in order. The rows of all requests are batched together."""
        if not requests:
            return []
        run = Run(self)
        run.add(self, requests)
        finished: dict[Any, Any] = {}
        while not finished:
            finished = run.compute()
        (results,) = finished.values()
        if isinstance(results, Exception):
            raise results
        found: list[Any] = results
        return found

    def batches(self, queued: Sequence[Queued]) -> Iterator[Batch]:
        """Divides texts into batches, and chooses a bucket for each batch."""
        return batches(queued, self._lengths, self._packed)

    def forward(self, batch: Batch) -> dict[str, jax.Array]:
        """Starts the computation of a batch. Returns the outputs of `Task.forward`."""
        bucket = batch.bucket
        inputs = {name: np.zeros(shape, np.int32) for name, shape in self._shapes(bucket).items()}
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
        outputs: dict[str, jax.Array] = self._program(bucket)(self.params, inputs)
        return outputs

    def _program(self, bucket: Bucket) -> jax.stages.Compiled:
        if bucket not in self._programs:
            self._programs[bucket] = self.trace(bucket).lower().compile()
        return self._programs[bucket]

    def trace(self, bucket: Bucket, device: Any = None) -> jax.stages.Traced:
        """Traces the program of a bucket for `device`, or for the default device if it is None.

        This machine need not have `device`.
        """
        inputs = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in self._shapes(bucket).items()}
        arguments = self.params, inputs
        if device is not None:
            arguments = sharding.abstract(arguments, jax.sharding.SingleDeviceSharding(device))
        traced: jax.stages.Traced = jax.jit(self._step).trace(*arguments)
        return traced

    def _shapes(self, bucket: Bucket) -> dict[str, tuple[int, int]]:
        packed = bucket.texts > 1
        lengths = {
            "input_ids": bucket.length,
            "token_type_ids": bucket.length,
            "attention_mask": 0 if packed else bucket.length,
            "document_ids": bucket.length if packed else 0,
            "position_ids": bucket.length if packed else 0,
            "starts": bucket.texts if packed else 0,
            "masked_positions": bucket.masks,
            "labels": bucket.masks if bucket.labelled else 0,
        }  # a length of 0 means that the program has no such input
        return {name: (bucket.rows, length) for name, length in lengths.items() if length}

    def _step(self, params: tree.Params, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        starts = inputs.pop("starts", jnp.asarray(FIRST))
        outputs: dict[str, jax.Array] = self.task.forward(self.model(params), inputs, starts)
        return outputs

    def model(self, params: tree.Params) -> Any:
        """The model with `params`, which are `self.params` or, inside `jax.jit`, tracers of them."""
        return tree.merge(self._skeleton, params)


@dataclass
class _Work:
    """The requests of one owner.

    Attributes:
        pending: The requests that are not started, with their indices.
        results: The results by index, as far as they are known.
        left: The number of results that are not known yet.
        queued: The rows to compute next.
        tokens: The number of tokens that were computed for the owner.
    """

    pending: deque[tuple[int, Request[Any]]]
    results: list[Any]
    left: int
    queued: deque[Queued] = field(default_factory=deque)
    tokens: int = 0


@dataclass(eq=False)
class _Started:
    """A request that was started, and the outputs that it waits for. An output is None until it is computed."""

    owner: Hashable
    index: int
    request: Request[Any]
    outputs: list[Outputs | None] = field(default_factory=list)


class Run:
    """Requests of several owners, computed together, slice by slice.

    In each slice, the owners for whom the fewest tokens were computed come first. So an owner with a few rows does not
    wait for the many rows of another one.
    """

    def __init__(self, pipe: Pipeline[Any]):
        self._pipe = pipe
        self._work: dict[Hashable, _Work] = {}

    @property
    def owners(self) -> list[Hashable]:
        """The owners whose requests are not finished."""
        return list(self._work)

    def add(self, owner: Hashable, requests: Sequence[Request[Any]]) -> None:
        """Adds the requests of an owner; there must be at least one."""
        self._work[owner] = _Work(deque(enumerate(requests)), [None] * len(requests), len(requests))

    def remove(self, owner: Hashable) -> None:
        """Drops the requests of an owner, if it has any."""
        self._work.pop(owner, None)

    def compute(self, tokens: int | None = None) -> dict[Hashable, list[Any] | Exception]:
        """Computes a slice.

        Args:
            tokens: The size of the slice. None computes all rows that are known to be needed.

        Returns:
            For each owner whose requests are now finished, their results in order or, if one of them failed, its error.
        """
        finished: dict[Hashable, list[Any] | Exception] = {}
        in_flight: deque[tuple[Batch, dict[str, jax.Array]]] = deque()
        for batch in self._pipe.batches(self._next(tokens, finished)):
            with self._failing(batch, finished):
                in_flight.append((batch, self._pipe.forward(batch)))
            if len(in_flight) > 1:  # while the device computes a batch, the host decodes the previous one
                self._deliver(*in_flight.popleft(), finished)
        while in_flight:
            self._deliver(*in_flight.popleft(), finished)
        return finished

    def _next(self, tokens: int | None, finished: dict[Hashable, Any]) -> list[Queued]:
        """Takes the rows of the next slice from the queues, and starts requests as they are needed for it."""
        turns = [(work.tokens, i, owner) for i, (owner, work) in enumerate(self._work.items())]
        heapq.heapify(turns)
        taken: list[Queued] = []
        while turns and (tokens is None or tokens > 0):
            _, i, owner = heapq.heappop(turns)
            while owner in self._work and self._work[owner].pending and not self._work[owner].queued:
                index, request = self._work[owner].pending.popleft()
                self._advance(_Started(owner, index, request), None, finished)
            if owner not in self._work or not self._work[owner].queued:
                continue
            work = self._work[owner]
            row = work.queued.popleft()
            cost = max(
                BUCKET_LENGTHS[0], len(row.features.input_ids), TOKENS_PER_MASK * len(row.features.masked_positions)
            )
            work.tokens += cost
            tokens = None if tokens is None else tokens - cost
            taken.append(row)
            heapq.heappush(turns, (work.tokens, i, owner))
        return taken

    def _advance(self, started: _Started, outputs: Any, finished: dict[Hashable, Any]) -> None:
        """Sends outputs to a request. Queues the rows that it yields, or keeps its result."""
        work = self._work[started.owner]
        try:
            rows = started.request.steps.send(outputs)
        except StopIteration as end:
            work.results[started.index] = end.value
            work.left -= 1
            if not work.left:
                finished[started.owner] = work.results
                del self._work[started.owner]
        except Exception as error:
            finished[started.owner] = error
            del self._work[started.owner]
        else:
            started.outputs = [None] * len(rows)
            work.queued.extend(Queued(row, started, place) for place, row in enumerate(rows))

    def _deliver(self, batch: Batch, arrays: dict[str, jax.Array], finished: dict[Hashable, Any]) -> None:
        """Gives each text of a batch its outputs."""
        task = self._pipe.task
        with self._failing(batch, finished):
            on_host = {name: np.asarray(array) for name, array in arrays.items()}
            if not all(np.isfinite(array).all() for array in on_host.values()):
                raise CheckpointError("The results are not finite. Check the weights and config, or use float32.")
        for (_, started, place), spot in zip(
            batch.queued, batch.masked_spots if task.masked else batch.spots, strict=True
        ):
            if started.owner in self._work:
                where: Any = spot.tokens if task.masked or task.per_token else (spot.row, spot.number)
                started.outputs[place] = {name: array[where] for name, array in on_host.items()}
                if None not in started.outputs:
                    self._advance(started, started.outputs, finished)

    @contextlib.contextmanager
    def _failing(self, batch: Batch, finished: dict[Hashable, Any]) -> Iterator[None]:
        """If the computation of a batch raises an exception, it is the result of all owners with texts in the batch."""
        try:
            yield
        except Exception as error:
            for owner in {queued.request.owner for queued in batch.queued}:
                if self._work.pop(owner, None):
                    finished[owner] = error
