"""Compiles the programs of a server: the usual ones first, then those that requests wait for, then the rest."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bert_jax.inference.batches import Bucket, is_usual
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.server.attention import Attention
from bert_jax.tasks.base import Task


class Programs:
    """The programs of several pipelines, and of the page's attention weights.

    Args:
        pipes: The pipelines.
        attention: Computes attention weights.
    """

    def __init__(self, pipes: Sequence[Pipeline[Task]], attention: Attention):
        pairs = [(pipe, bucket) for pipe in pipes for bucket in pipe.buckets]
        self._usual = [(pipe.compile, bucket) for pipe, bucket in pairs if is_usual(bucket)]
        self._rest: deque[tuple[Callable[[Any], Any], Any]] = deque(
            [(pipe.compile, bucket) for pipe, bucket in pairs if not is_usual(bucket)]
            + [(attention.compile, length) for length in attention.lengths]
        )
        self._wanted: deque[tuple[Pipeline[Task], Bucket]] = deque()
        self._closed = False

    @property
    def left(self) -> int:
        """The number of programs that are still to be compiled."""
        return len(self._rest)

    def want(self, pipe: Pipeline[Task], bucket: Bucket) -> None:
        """Compiles a program before all others. Can be called from any thread."""
        if (pipe, bucket) not in self._wanted:
            self._wanted.append((pipe, bucket))

    def compile_usual(self) -> None:
        """Compiles the programs of usual texts, several at a time."""
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            list(compilers.map(lambda pair: self._closed or pair[0](pair[1]), self._usual))

    def compile_rest(self, compiled: Callable[[], None]) -> None:
        """Compiles all other programs, one after another; those that were asked for with `want` first.

        Args:
            compiled: Called when a program is ready.
        """
        while (self._wanted or self._rest) and not self._closed:
            if self._wanted:
                pipe, bucket = self._wanted.popleft()
                pipe.compile(bucket)
                compiled()
            else:
                compile_, argument = self._rest[0]
                compile_(argument)
                self._rest.popleft()

    def close(self) -> None:
        """Ends the compilation after the programs that are compiled now."""
        self._closed = True
