"""Compiles a server's programs: first the usual ones, then those for which requests are waiting, then the rest."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bert_jax.inference.batches import Bucket, is_usual
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.server.attention import Attention
from bert_jax.inference.server.models import Served
from bert_jax.tasks.base import Task


class Programs:
    """The programs of several models, and the programs that compute the attention weights for the web page.

    Args:
        models: The models. A program is usual if it serves its model's first task and a usual bucket; see `is_usual`.
        attention: The object that computes attention weights.
    """

    def __init__(self, models: Sequence[Served], attention: Attention):
        self._usual: list[tuple[Pipeline[Task], Bucket]] = []
        self._rest: deque[tuple[Callable[[Any], Any], Any]] = deque()
        for model in models:
            for n, pipe in enumerate(model.pipes.values()):
                usual = [bucket for bucket in pipe.buckets if n == 0 and is_usual(bucket)]
                self._usual += [(pipe, bucket) for bucket in usual]
                self._rest += [(pipe.compile, bucket) for bucket in pipe.buckets if bucket not in usual]
        self._rest += [(attention.compile, length) for length in attention.lengths]
        self._wanted: deque[tuple[Pipeline[Task], Bucket]] = deque()
        self._closed = False

    @property
    def left(self) -> int:
        """The number of programs that `compile_rest` has not compiled yet."""
        return len(self._rest)

    def want(self, pipe: Pipeline[Task], bucket: Bucket) -> None:
        """Schedules a program to be compiled before all others. Can be called from any thread."""
        if (pipe, bucket) not in self._wanted:
            self._wanted.append((pipe, bucket))

    def compile_usual(self) -> None:
        """Compiles the usual programs, several at a time."""
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            list(compilers.map(lambda pair: self._closed or pair[0].compile(pair[1]), self._usual))

    def compile_rest(self, compiled: Callable[[], None]) -> None:
        """Compiles all other programs one after another, beginning with those that were requested with `want`.

        Args:
            compiled: A function that is called each time a program is ready.
        """
        while (self._wanted or self._rest) and not self._closed:
            if self._wanted:
                pipe, bucket = self._wanted.popleft()
                pipe.compile(bucket)
            else:
                compile_, argument = self._rest[0]
                compile_(argument)
                self._rest.popleft()
            compiled()

    def close(self) -> None:
        """Prevents further compilations. Compilations that are already in progress run to completion."""
        self._closed = True
