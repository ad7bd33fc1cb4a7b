"""Computes the requests of several owners together, slice by slice.

An owner is any hashable object that identifies a group of requests. In the server, each owner is a `Job`. A slice is
the set of rows that one call to `Run.compute` takes from the owners' queues.
"""

import contextlib
import functools
import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from bert_jax.errors import CheckpointError
from bert_jax.inference.batches import BUCKET_LENGTHS, Batch, Bucket, Queued
from bert_jax.tasks.base import Outputs, Request, Task
from bert_jax.training import memory

TOKENS_PER_MASK = 8
"""The cost of a masked position, in tokens, when a slice is filled.

The probabilities over the vocabulary at a masked position need as much memory as the activations of several tokens.
"""


explain_out_of_memory = functools.partial(
    memory.explain_out_of_memory,
    remedy="Use dtype bfloat16 or int8, or divide the model among devices by a mesh such as fsdp=2.",
)
"""`memory.explain_out_of_memory` with a remedy for inference."""


class Computes(Protocol):
    """The interface that a `Run` requires from a pipeline; see `bert_jax.inference.pipelines.Pipeline`."""

    task: Task

    def batches(self, queued: Sequence[Queued], has_program: Callable[[Bucket], bool]) -> Iterator[Batch]:
        """Divides texts into batches; see `bert_jax.inference.batches.batches`."""

    def forward(self, batch: Batch) -> dict[str, jax.Array]:
        """Starts the computation of a batch."""


@dataclass
class _Work:
    """The requests of one owner.

    Attributes:
        pending: The requests that have not been started, with their indices.
        results: The results, by index. A result is None until it is available.
        left: The number of results that are not available yet.
        finish: The virtual time, in tokens per owner, at which the most recently taken row would finish; see `Run`.
        queued: The rows to compute next.
    """

    pending: deque[tuple[int, Request[Any]]]
    results: list[Any]
    left: int
    finish: float
    queued: deque[Queued] = field(default_factory=deque)


@dataclass(eq=False)
class _Started:
    """A started request and the outputs that it needs to continue. An output is None until it is computed."""

    owner: Hashable
    index: int
    request: Request[Any]
    outputs: list[Outputs | None] = field(default_factory=list)


class Run:
    """Computes the requests of several owners together, slice by slice.

    Owners take turns by fair queueing (Demers, Keshav and Shenker 1989). The next row is the one that would finish
    first if the rows of all owners were computed simultaneously, at the same speed for each owner. A short text
    therefore waits neither for the many rows of another owner nor for longer texts that arrived shortly before it. New
    owners cannot starve an existing owner.

    Args:
        pipe: The pipeline that computes the batches.
        has_program: A function that returns whether the program for a bucket has already been compiled. A row that fits
            no bucket with a compiled program is deferred until `resume` queues it again. By default, no rows are
            deferred, and `pipe` compiles missing programs.
    """

    def __init__(self, pipe: Computes, has_program: Callable[[Bucket], bool] = lambda bucket: True):
        self._pipe, self._has_program = pipe, has_program
        self._work: dict[Hashable, _Work] = {}
        self._time = 0.0  # number of tokens that would have been computed for each owner by now
        self._deferred: dict[Bucket, list[Queued]] = {}

    @property
    def owners(self) -> list[Hashable]:
        """The owners with unfinished requests."""
        return list(self._work)

    @property
    def missing(self) -> list[Bucket]:
        """The buckets of the deferred rows. When the rows were deferred, these buckets had no compiled programs."""
        return list(self._deferred)

    @property
    def waiting(self) -> bool:
        """Whether rows are deferred and there is nothing else to compute."""
        return bool(self._deferred) and not any(work.pending or work.queued for work in self._work.values())

    def resume(self) -> None:
        """Queues the deferred rows whose buckets now have compiled programs."""
        for bucket in [bucket for bucket in self._deferred if self._has_program(bucket)]:
            for queued in self._deferred.pop(bucket):
                if work := self._work.get(queued.request.owner):
                    work.queued.append(queued)

    def add(self, owner: Hashable, requests: Sequence[Request[Any]]) -> None:
        """Adds the requests of an owner. There must be at least one request."""
        self._work[owner] = _Work(deque(enumerate(requests)), [None] * len(requests), len(requests), self._time)

    def remove(self, owner: Hashable) -> None:
        """Discards an owner's requests, if there are any."""
        self._work.pop(owner, None)

    def compute(self, tokens: int | None = None) -> Iterator[tuple[Hashable, list[Any] | Exception]]:
        """Computes a slice.

        Args:
            tokens: The size of the slice, in tokens. If None, the slice contains the next rows of all requests.

        Yields:
            Each owner whose requests have finished, together with the results in the order of the requests. If a
            request failed, its exception is yielded instead of the results.
        """
        finished: dict[Hashable, list[Any] | Exception] = {}
        in_flight: deque[tuple[Batch, dict[str, jax.Array]]] = deque()
        taken = self._next(tokens, finished)
        turn = {id(queued): i for i, queued in enumerate(taken)}
        for batch in sorted(
            self._pipe.batches(taken, self._has_program), key=lambda batch: min(turn[id(q)] for q in batch.queued)
        ):
            if not self._has_program(batch.bucket):
                self._deferred.setdefault(batch.bucket, []).extend(batch.queued)
                continue
            with self._failing(batch, finished):
                in_flight.append((batch, self._pipe.forward(batch)))
            if len(in_flight) > 1:  # while the device computes a batch, the host decodes the previous one
                self._deliver(*in_flight.popleft(), finished)
                yield from _emptied(finished)
        while in_flight:
            self._deliver(*in_flight.popleft(), finished)
            yield from _emptied(finished)
        yield from _emptied(finished)

    def _next(self, tokens: int | None, finished: dict[Hashable, Any]) -> list[Queued]:
        """Takes the rows of the next slice from the queues.

        If an owner's queue is empty, starts the owner's pending requests.
        """
        turns: list[tuple[float, int, Hashable]] = []

        def queue(i: int, owner: Hashable) -> None:
            """Adds an owner's next row, if any, to `turns`.

            If the owner's queue is empty, starts the owner's pending requests.
            """
            while owner in self._work and self._work[owner].pending and not self._work[owner].queued:
                index, request = self._work[owner].pending.popleft()
                self._advance(_Started(owner, index, request), None, finished)
            if owner in self._work and (queued := self._work[owner].queued):
                heapq.heappush(turns, (self._work[owner].finish + _cost(queued[0]), i, owner))

        for i, owner in enumerate(list(self._work)):
            queue(i, owner)
        taken: list[Queued] = []
        while turns and (tokens is None or tokens > 0):
            finish, i, owner = heapq.heappop(turns)
            taken.append(row := self._work[owner].queued.popleft())
            cost = _cost(row)
            tokens = None if tokens is None else tokens - cost
            self._time += cost / len(self._work)
            self._work[owner].finish = finish
            queue(i, owner)
        return taken

    def _advance(self, started: _Started, outputs: Any, finished: dict[Hashable, Any]) -> None:
        """Sends outputs to a request.

        If the request has finished, stores its result. Otherwise, queues the request's next rows.
        """
        work = self._work[started.owner]
        try:
            rows = started.request.steps.send(outputs)
            while not rows:
                rows = started.request.steps.send([])
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
        """Delivers the outputs of a batch to the requests that wait for them."""
        task = self._pipe.task
        with self._failing(batch, finished):
            wanted = {name for queued in batch.queued for name in queued.features.outputs or arrays}
            on_host = {name: np.asarray(array) for name, array in arrays.items() if name in wanted}
            if not all(np.isfinite(array).all() for array in on_host.values()):
                raise CheckpointError("The results are not finite. Check the weights and config, or use float32.")
        for (features, started, place), spot in zip(
            batch.queued, batch.masked_spots if task.masked else batch.spots, strict=True
        ):
            if started.owner in self._work:
                where: Any = spot.tokens if task.masked or task.per_token else (spot.row, spot.number)
                # The outputs are copied, because a view would keep the outputs of the whole batch in memory.
                started.outputs[place] = {name: np.array(on_host[name][where]) for name in features.outputs or arrays}
                if None not in started.outputs:
                    self._advance(started, started.outputs, finished)

    @contextlib.contextmanager
    def _failing(self, batch: Batch, finished: dict[Hashable, Any]) -> Iterator[None]:
        """Turns an exception raised in the `with` block into the result of every owner with texts in the batch."""
        try:
            with explain_out_of_memory(f"A batch of {batch.bucket}"):
                yield
        except Exception as error:
            for owner in {queued.request.owner for queued in batch.queued}:
                if self._work.pop(owner, None):
                    finished[owner] = error


def _cost(queued: Queued) -> int:
    """Returns the cost of a row, in tokens."""
    features = queued.features
    return max(BUCKET_LENGTHS[0], len(features.input_ids), TOKENS_PER_MASK * len(features.masked_positions))


def _emptied(finished: dict[Hashable, list[Any] | Exception]) -> Iterator[tuple[Hashable, list[Any] | Exception]]:
    """Yields the items of a dict, removing each from the dict."""
    while finished:
        owner = next(iter(finished))
        yield owner, finished.pop(owner)
