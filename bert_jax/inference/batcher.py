"""Batches the requests of many clients. One thread computes the batches, and each client receives its own results."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.errors import InputError
from bert_jax.inference.pipelines import BUCKET_LENGTHS, Pipeline
from bert_jax.tasks.base import Task

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ATTENTION_TOKENS = 128
"""Maximum number of tokens, special tokens included, of a text for which `Attention` computes weights."""


class Refused(Exception):
    """Raised to refuse a request. It holds the HTTP status, the error code and the message of the response."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Job:
    """The inputs of one HTTP request, the function that computes its answer, and a future that receives the answer.

    Args:
        work: Returns the answers to a list of jobs, in order.
        kind: Only jobs of equal kind are computed together.
        requests: One request per input, in the form that `work` expects. For `run_together`, `Pipeline.request` makes
            the requests.
    """

    def __init__(self, work: Callable[[list["Job"]], list[Any]], kind: Any, requests: Sequence[Any]):
        self.work, self.kind, self.requests = work, kind, requests
        self.answer: Future[Any] = Future()  # cancelled if the client disconnects or has waited too long


@dataclass(frozen=True)
class Limits:
    """What the server accepts, and how long it works on a request.

    Attributes:
        batch: The maximum number of inputs in a batch, unless a single request has more.
        wait: Seconds to wait for more inputs after the first input of a batch.
        queue: The maximum number of unanswered inputs. A request that would exceed this maximum is refused with status
            429, unless no other request is waiting.
        timeout: The body of a request must arrive within this many seconds; otherwise, the status is 408. The answer
            must be ready within as many seconds after that; otherwise, the status is 504.
        max_body: The maximum size of the body of a request, in bytes.
        max_inputs: The maximum number of inputs of a request.
        max_characters: The maximum number of characters of an input.
    """

    batch: int = 64
    wait: float = 0.0005
    queue: int = 512
    timeout: float = 30.0
    max_body: int = 2**20
    max_inputs: int = 128
    max_characters: int = 20_000


class Batcher:
    """A thread that computes waiting jobs in batches of up to `limits.batch` inputs.

    After the first job of a batch, the thread waits up to `limits.wait` seconds for more jobs. A job with more than
    `limits.batch` inputs is a batch of its own.

    Args:
        limits: The limits of the server.
        seen: Called with the number of inputs of each batch.
    """

    def __init__(self, limits: Limits, seen: Callable[[int], None]):
        self.limits, self.seen = limits, seen
        self.waiting = 0  # the number of unanswered inputs; accessed only by the event loop's thread
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    async def submit(self, job: Job) -> Any:
        """Queues a job and returns its answer.

        Raises:
            Refused: If too many inputs are waiting already, or if the answer takes too long.
        """
        size = max(1, len(job.requests))
        if self.waiting + size > max(self.limits.queue, size):
            raise Refused(429, "busy", "Too many inputs are waiting; try again in a second.", {"Retry-After": "1"})
        self.waiting += size
        self._jobs.put(job)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.answer), self.limits.timeout)
        except TimeoutError:
            raise Refused(504, "timeout", f"There was no answer within {self.limits.timeout:g} s.") from None
        finally:
            self.waiting -= size

    def close(self) -> None:
        """Ends the thread after all waiting jobs are done."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        held: Job | None = None
        while first := held or self._jobs.get():
            held, batch, size, until = None, [first], len(first.requests), time.monotonic() + self.limits.wait
            while size < self.limits.batch:
                try:
                    job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if job is None:
                    self._jobs.put(None)  # put back, so that the loop gets it again after this batch and ends
                    break
                if job.kind != first.kind or size + len(job.requests) > self.limits.batch:
                    held = job
                    break
                batch.append(job)
                size += len(job.requests)
            self._compute([job for job in batch if job.answer.set_running_or_notify_cancel()])

    def _compute(self, batch: list[Job]) -> None:
        if not batch:
            return
        self.seen(sum(len(job.requests) for job in batch))
        try:
            answers = batch[0].work(batch)
        except Exception as error:
            logger.error("A batch failed: %s", type(error).__name__)  # without the message, which could quote a text
            for job in batch:
                job.answer.set_exception(error)
        else:
            for job, answer in zip(batch, answers, strict=True):
                job.answer.set_result(answer)


def run_together(pipe: Pipeline[Task]) -> Callable[[list[Job]], list[list[Any]]]:
    """Returns a function that runs the requests of several jobs together and gives each job its results."""

    def work(batch: list[Job]) -> list[list[Any]]:
        results = iter(pipe.run([request for job in batch for request in job.requests]))
        return [[next(results) for _ in job.requests] for job in batch]

    return work


class Attention:
    """Computes the attention weights of one layer for one text, with one compiled program per padded length."""

    def __init__(self, pipe: Pipeline[Task]):
        self.pipe = pipe
        longest = min(ATTENTION_TOKENS, pipe.max_length)
        self._programs = {length: self._compiled(length) for length in BUCKET_LENGTHS if length <= longest}

    def _compiled(self, length: int) -> Any:
        def attentions(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
            return jnp.stack([layer[0] for layer in self.pipe.model(params).bert(**inputs).attentions])

        inputs = dict.fromkeys(MODEL_INPUTS, jax.ShapeDtypeStruct((1, length), np.int32))
        return jax.jit(attentions).lower(self.pipe.params, inputs).compile()

    def encode(self, text: str) -> Any:
        """Tokenizes a text; raises `InputError` if it has too many tokens."""
        encoding = self.pipe.tokenizer.encode([text])[0][0]
        longest = max(self._programs)
        if len(encoding) > longest:
            raise InputError(f"the text has {len(encoding)} tokens; attention is shown for at most {longest}.")
        return encoding

    def work(self, batch: list[Job]) -> list[Any]:
        """Answers jobs one after another. Each job has a single request, the tuple (encoding, layer)."""
        return [self._weights(*request) for job in batch for request in job.requests]

    def _weights(self, encoding: Any, layer: int) -> dict[str, Any]:
        tokens = len(encoding)
        length = min(length for length in self._programs if length >= tokens)
        inputs = self.pipe.tokenizer.pad([encoding.ids], [encoding.type_ids], length=length)
        weights = np.asarray(self._programs[length](self.pipe.params, inputs)[layer, :, :tokens, :tokens])
        return {"tokens": encoding.tokens, "attention": weights.astype(np.float64).round(4).tolist()}
