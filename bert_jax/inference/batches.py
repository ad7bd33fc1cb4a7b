"""Divides rows into batches, and chooses for each batch one of a few shapes, the buckets, to pad it to."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bert_jax.data.rows import Spot, best_fit, lay_out
from bert_jax.tasks.base import Features

BUCKET_LENGTHS = (16, 32, 64, 128, 256, 512)
"""Lengths that rows with one text are padded to, in tokens."""
BUCKET_ROWS = (1, 4, 16, 64)
"""Numbers of rows that a batch with one text per row is padded to."""
BUCKET_TOKENS = 2048
"""Maximum number of tokens in a batch, padding included.

If all queued texts together have more tokens than this, several texts are packed into each row, unless the attention
kernel does not support packed rows.
"""
PACKED_LENGTHS = (128, 256, 384, 512)
"""Lengths that packed rows are padded to, in tokens. A packed row of n tokens holds at most n // 8 texts."""


class Bucket(NamedTuple):
    """The shape that a program is compiled for.

    Attributes:
        rows: Number of rows.
        length: Tokens per row.
        masks: Maximum number of masked positions per row; 0 if there are none.
        texts: Maximum number of texts per row.
        labelled: Whether the true tokens of the masked positions are given.
    """

    rows: int
    length: int
    masks: int
    texts: int = 1
    labelled: bool = False


def is_usual(bucket: Bucket) -> bool:
    """Whether texts of up to 128 tokens with up to 2 masked positions use a bucket, unless they are very many."""
    return bucket.length <= 128 and bucket.masks <= 2 and bucket.texts == 1


class Queued(NamedTuple):
    """A text, pair or window whose outputs a request waits for.

    Attributes:
        features: The tokens of the text.
        request: The request.
        place: The index of the text among those that the request waits for.
    """

    features: Features
    request: Any
    place: int


@dataclass(frozen=True)
class Batch:
    """The texts whose outputs are computed together.

    Attributes:
        queued: The texts, pairs or windows.
        rows: For each text, the index of the row that holds it.
        bucket: The bucket whose program computes the outputs.
    """

    queued: list[Queued]
    rows: list[int]
    bucket: Bucket

    @functools.cached_property
    def spots(self) -> list[Spot]:
        """Where the tokens of each text lie in an array [rows, tokens, …]."""
        return lay_out(range(len(self.rows)), self.rows, [len(q.features.input_ids) for q in self.queued])

    @functools.cached_property
    def masked_spots(self) -> list[Spot]:
        """Where the masked positions of each text lie in an array [rows, masked positions, …]."""
        return lay_out(range(len(self.rows)), self.rows, [len(q.features.masked_positions) for q in self.queued])


def batches(queued: Iterable[Queued], lengths: Sequence[int], packed: Sequence[int]) -> Iterator[Batch]:
    """Divides texts into batches, and chooses a bucket for each batch.

    Args:
        queued: The texts.
        lengths: The lengths that rows with one text are padded to, in ascending order.
        packed: The lengths that packed rows are padded to; empty if rows cannot be packed.
    """

    def padded(q: Queued) -> tuple[int, int]:
        """The length and the number of masks that a row with this text alone is padded to."""
        length = next(length for length in lengths if length >= len(q.features.input_ids))
        return length, next(n for n in (0, *mask_counts(length, 1)) if n >= len(q.features.masked_positions))

    rest = list(queued)
    while rest:
        if packed and sum(len(q.features.input_ids) for q in rest) > BUCKET_TOKENS:
            rest.sort(key=lambda q: (-len(q.features.input_ids), -len(q.features.masked_positions)))
            tokens = [len(q.features.input_ids) for q in rest]
            length = next(length for length in packed if length >= tokens[0])
            rows, texts = most_rows(length), length // 8
            placed = best_fit(tokens, length, rows=rows, items=texts)
        else:
            # The batch gets as many rows as possible, but more than half of them must need its length, and more than
            # half its number of masks. The other texts go into later batches, for which less may be enough.
            rest.sort(key=padded, reverse=True)
            length, masks = padded(rest[0])
            alike = [padded(q) for q in rest if padded(q)[0] == length]
            filling = alike.count((length, masks))
            if 2 * filling > len(alike):
                filling = len(alike)
            rows, texts = max(n for n in BUCKET_ROWS if n <= most_rows(length) and filling > n // 2), 1
            placed = [i if i < rows else -1 for i in range(len(rest))]
        here = [q for q, row in zip(rest, placed, strict=True) if row >= 0]
        rest = [q for q, row in zip(rest, placed, strict=True) if row < 0]
        placed = [row for row in placed if row >= 0]
        most = np.bincount(placed, [len(q.features.masked_positions) for q in here]).max()
        masks = next(n for n in (0, *mask_counts(length, texts)) if n >= most)
        yield Batch(here, placed, Bucket(rows, length, masks, texts, any(q.features.labels for q in here)))


def most_rows(length: int) -> int:
    """Number of rows of this length in a full batch."""
    return max(1, BUCKET_TOKENS // length)


def mask_counts(length: int, texts: int) -> tuple[int, int, int]:
    """Numbers of masked positions that rows are padded to.

    The smallest is at least 2: with 1 position, the head would compute matrix-vector products, which are slow on CPU.
    The second is a quarter of the row's tokens, enough for the 15 % that pretraining masks. The largest is the
    number of all tokens of the row.
    """
    return 2 if texts == 1 else max(2, length // 16), length // 4, length
