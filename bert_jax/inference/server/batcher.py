"""Processes requests from many clients together, in slices. Small requests run between the slices of large ones."""

import asyncio
import enum
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from bert_jax import sharding
from bert_jax.inference.batches import BUCKET_LENGTHS, Bucket
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.run import Run
from bert_jax.inference.server.limits import Limits, Refused
from bert_jax.tasks.base import Request, Task

logger = logging.getLogger(__name__)

SLICE_TOKENS = 512
"""The number of tokens that a device computes before new requests get their turn.

Doubling this number would not change the throughput for clients that send sentences, but each sentence would wait twice
as long.
"""


class _Signal(enum.Enum):
    RESUME = enum.auto()
    CLOSE = enum.auto()


class Job:
    """The inputs of one HTTP request, and a future that receives the results.

    Args:
        pipe: The pipeline that processes the requests.
        requests: One request per input, created by `Pipeline.request`.
    """

    def __init__(self, pipe: Pipeline[Task], requests: Sequence[Request[Any]]):
        self.pipe, self.requests = pipe, requests
        self.tokens = sum(max(BUCKET_LENGTHS[0], request.tokens) for request in requests)
        self.answer: Future[Any] = Future()  # canceled if the client disconnects or has waited too long


class Batcher:
    """Processes jobs in slices, in a separate thread. All waiting jobs take turns.

    Args:
        limits: The server's limits.
        seen: A function that is called before each slice with the number of unfinished jobs for the slice's pipeline.
        want: A function that is called with a pipeline and a bucket if a job needs the corresponding program and this
            program has not been compiled yet. Call `resume` after compiling the program.
    """

    def __init__(self, limits: Limits, seen: Callable[[int], None], want: Callable[[Pipeline[Task], Bucket], None]):
        self.limits, self.seen, self.want = limits, seen, want
        self.waiting = 0  # number of tokens in unanswered jobs; accessed only by the event loop's thread
        self._arrivals: queue.SimpleQueue[Job | _Signal] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="batcher", daemon=True)
        self._thread.start()

    async def submit(self, job: Job) -> Any:
        """Queues a job and returns the results in the order of the job's requests.

        Raises:
            Refused: If too many tokens are already waiting, or if the computation takes too long.
        """
        tokens = min(job.tokens, self.limits.max_queue_tokens * 3 // 4)
        self.check_room(tokens)
        self.waiting += tokens
        self._arrivals.put(job)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.answer), self.limits.timeout)
        except TimeoutError:
            raise self.too_late() from None
        finally:
            self.waiting -= tokens

    def too_late(self) -> Refused:
        """Returns the error to raise if a request is not answered in time."""
        return Refused(504, "timeout", f"There was no answer within {self.limits.timeout:g} s.")

    def check_room(self, tokens: int = BUCKET_LENGTHS[0], *, arriving: int = 0) -> None:
        """Raises `Refused` if the queue has no room for a job of the given size (by default, the smallest size).

        An eighth of the queue is reserved for small jobs.

        Args:
            tokens: The number of tokens.
            arriving: The number of other requests in progress, including requests not yet passed to `submit`.
        """
        waiting, most = max(self.waiting, arriving * BUCKET_LENGTHS[0]), self.limits.max_queue_tokens
        if tokens > max(BUCKET_LENGTHS[0], most // 64):
            most -= most // 8
        if waiting + tokens > most:
            raise Refused(429, "busy", "Too many requests are waiting; try again in a second.", {"Retry-After": "1"})

    def resume(self) -> None:
        """Tells the thread to check for waiting rows whose programs have been compiled."""
        self._arrivals.put(_Signal.RESUME)

    def close(self) -> None:
        """Stops the thread after all waiting jobs are finished."""
        self._arrivals.put(_Signal.CLOSE)
        self._thread.join()

    def _compute(self) -> None:
        runs: dict[Pipeline[Task], Run] = {}
        open_ = True
        while open_ or runs:
            open_ = self._accept(runs, open_)
            for pipe, run in list(runs.items()):
                jobs: list[Any] = run.owners
                for job in jobs:
                    if job.answer.cancelled():
                        run.remove(job)
                run.resume()
                if run.owners and not run.waiting:
                    self.seen(len(run.owners))
                    for job, results in run.compute(SLICE_TOKENS * sharding.share(pipe.mesh)):
                        _answer(job, results)
                    for bucket in run.missing:
                        self.want(pipe, bucket)
                    run.resume()  # for programs compiled during the slice
                if not run.owners:
                    del runs[pipe]

    def _accept(self, runs: dict[Pipeline[Task], Run], open_: bool) -> bool:
        """Adds newly arrived jobs to the runs. If there is nothing to compute, waits for a job or a signal.

        Returns:
            Whether more jobs may arrive.
        """
        until = None if all(run.waiting for run in runs.values()) else 0.0
        while True:
            try:
                arrival = self._arrivals.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return open_
            if arrival is _Signal.CLOSE:
                return False
            if isinstance(arrival, _Signal):
                if until is None:
                    return open_
                continue  # a compiled program does not end the wait for more jobs
            until = time.monotonic() + self.limits.wait if until is None else until
            runs.setdefault(arrival.pipe, Run(arrival.pipe, arrival.pipe.has_program)).add(arrival, arrival.requests)


def _answer(job: Any, results: list[Any] | Exception) -> None:
    if not job.answer.set_running_or_notify_cancel():
        return
    if isinstance(results, Exception):
        logger.error("A request failed: %s", type(results).__name__)  # the message could quote a text
        job.answer.set_exception(results)
    else:
        job.answer.set_result(results)
