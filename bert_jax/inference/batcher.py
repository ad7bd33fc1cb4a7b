"""Computes the requests of many clients together, slice by slice, so that small requests pass between large ones."""

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
from bert_jax.inference.batches import BUCKET_LENGTHS, BUCKET_TOKENS
from bert_jax.inference.pipelines import Pipeline, Run
from bert_jax.tasks.base import Request, Task

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
    """The inputs of one HTTP request, and a future that receives the answer.

    Args:
        pipe: The pipeline that computes the requests.
        requests: One request per input, made by `Pipeline.request`.
    """

    def __init__(self, pipe: Pipeline[Task], requests: Sequence[Request[Any]]):
        self.pipe, self.requests = pipe, requests
        self.tokens = sum(max(BUCKET_LENGTHS[0], request.tokens) for request in requests)
        self.answer: Future[Any] = Future()  # cancelled if the client disconnects or has waited too long


@dataclass(frozen=True)
class Limits:
    """What the server accepts, and how long it works on a request.

    Attributes:
        wait: Seconds to wait for more requests after the first one.
        timeout: The body of a request must arrive within this many seconds; otherwise, the status is 408. The answer
            must be ready within as many seconds after that; otherwise, the status is 504.
        max_body: The maximum size of the body of a request, in bytes.
        max_inputs: The maximum number of inputs of a request.
        max_characters: The maximum number of characters of an input.
        max_tokens: The maximum number of tokens that a request may need computed, in all its rows.
        max_answer: The maximum size of the answer to a request, in bytes. The size is estimated before the computation.
        max_queue_tokens: The maximum number of tokens that all unanswered requests may need computed. A request that
            would exceed this maximum is refused with status 429, unless no other request is waiting.
    """

    wait: float = 0.0005
    timeout: float = 30.0
    max_body: int = 2**20
    max_inputs: int = 128
    max_characters: int = 20_000
    max_tokens: int = 2**15
    max_answer: int = 2**24
    max_queue_tokens: int = 2**15


class Batcher:
    """A thread that computes jobs in slices of `BUCKET_TOKENS` tokens, in which all waiting jobs take turns.

    Args:
        limits: The limits of the server.
        seen: Called with the number of jobs that wait when a slice is computed.
    """

    def __init__(self, limits: Limits, seen: Callable[[int], None]):
        self.limits, self.seen = limits, seen
        self.waiting = 0  # the tokens of unanswered jobs; accessed only by the event loop's thread
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="batcher", daemon=True)
        self._thread.start()

    async def submit(self, job: Job) -> Any:
        """Queues a job and returns the results of its requests, in order.

        Raises:
            Refused: If too many tokens are waiting already, or if the answer takes too long.
        """
        if self.waiting + job.tokens > max(self.limits.max_queue_tokens, job.tokens):
            raise Refused(429, "busy", "Too many requests are waiting; try again in a second.", {"Retry-After": "1"})
        self.waiting += job.tokens
        self._jobs.put(job)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.answer), self.limits.timeout)
        except TimeoutError:
            raise Refused(504, "timeout", f"There was no answer within {self.limits.timeout:g} s.") from None
        finally:
            self.waiting -= job.tokens

    def close(self) -> None:
        """Ends the thread after all waiting jobs are done."""
        self._jobs.put(None)
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
                if run.owners:
                    self.seen(len(run.owners))
                    for job, results in run.compute(BUCKET_TOKENS).items():
                        _answer(job, results)
                if not run.owners:
                    del runs[pipe]

    def _accept(self, runs: dict[Pipeline[Task], Run], open_: bool) -> bool:
        """Adds the jobs that have arrived to the runs. If there are no runs, waits for a job, and for others after it.

        Returns:
            Whether more jobs may come.
        """
        until: float | None = None if not runs else 0.0
        while open_:
            try:
                job = self._jobs.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return False
            until = time.monotonic() + self.limits.wait if until is None else until
            runs.setdefault(job.pipe, Run(job.pipe)).add(job, job.requests)
        return open_


def _answer(job: Any, results: list[Any] | Exception) -> None:
    if not job.answer.set_running_or_notify_cancel():
        return
    if isinstance(results, Exception):
        logger.error("A request failed: %s", type(results).__name__)  # the message could quote a text
        job.answer.set_exception(results)
    else:
        job.answer.set_result(results)


class Attention:
    """Computes the attention weights of one layer for one text, with one compiled program per padded length."""

    def __init__(self, pipe: Pipeline[Task]):
        self.pipe = pipe
        longest = min(ATTENTION_TOKENS, pipe.max_length)
        self._programs = {length: self._compiled(length) for length in BUCKET_LENGTHS if length <= longest}

    def _compiled(self, length: int) -> Any:
        def attentions(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
            return jnp.stack([layer[0] for layer in self.pipe.model(params).encoder(**inputs).attentions])

        inputs = dict.fromkeys(MODEL_INPUTS, jax.ShapeDtypeStruct((1, length), np.int32))
        return jax.jit(attentions).lower(self.pipe.params, inputs).compile()

    def weights(self, text: str, layer: int) -> dict[str, Any]:
        """The tokens of a text, and the attention weights of each head in one layer.

        Raises:
            InputError: If the text has too many tokens.
        """
        encoding = self.pipe.tokenizer.encode([text])[0][0]
        tokens, longest = len(encoding), max(self._programs)
        if tokens > longest:
            raise InputError(f"the text has {tokens} tokens; attention is shown for at most {longest}.")
        length = min(length for length in self._programs if length >= tokens)
        inputs = self.pipe.tokenizer.pad([encoding.ids], [encoding.type_ids], length=length)
        weights = np.asarray(self._programs[length](self.pipe.params, inputs)[layer, :, :tokens, :tokens])
        return {"tokens": encoding.tokens, "attention": weights.astype(np.float64).round(4).tolist()}
