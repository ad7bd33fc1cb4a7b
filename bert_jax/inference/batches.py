"""Divides texts into batches and pads each batch to one of a few shapes, called buckets."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bert_jax.data.rows import Spot, best_fit, lay_out
from bert_jax.tasks.base import Features

BUCKET_LENGTHS = (16, 32, 64, 128, 256, 384, 512)
"""Lengths, in tokens, to which rows are padded.

A row of n tokens contains at most n // 8 texts, or one text if the attention kernel does not support packed rows.
"""
BUCKET_TOKENS = 2048
"""Maximum number of tokens in a batch on one device, including padding."""
BATCH_TOKENS = 32
"""The cost of starting a batch, in tokens.

Calling the program, which reads all weights, takes about as long as computing this many tokens.
"""
ATTENTION_LENGTH = 2048
"""The row length at which a token's attention takes about as long as the rest of the token's computation."""


class Shape(NamedTuple):
    """The shape of a batch. It has the same fields as `Bucket`, except that `masks` contains all possible values."""

    rows: int
    length: int
    texts: int
    masks: tuple[int, ...]


class Bucket(NamedTuple):
    """A shape for which a program is compiled.

    Attributes:
        rows: Number of rows.
        length: Number of tokens per row.
        masks: Maximum number of masked positions per row; 0 if there are none.
        texts: Maximum number of texts per row.
    """

    rows: int
    length: int
    masks: int
    texts: int = 1

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.length} tokens"


def is_usual(bucket: Bucket) -> bool:
    """Returns whether the bucket is meant for sentences with few masked positions."""
    return bucket.length <= 128 and bucket.masks <= max(2, most_texts(bucket.length))


class Queued(NamedTuple):
    """A text, pair or window in the queue, and the request that waits for its outputs.

    Attributes:
        features: The tokens of the text.
        request: The request that waits.
        place: The index of the text among the texts that the request queued at the same time.
    """

    features: Features
    request: Any
    place: int


@dataclass(frozen=True)
class Batch:
    """Texts whose outputs are computed together.

    Attributes:
        queued: The texts, pairs or windows.
        rows: For each text, the index of the row that contains it.
        bucket: The bucket whose program computes the outputs.
    """

    queued: list[Queued]
    rows: list[int]
    bucket: Bucket

    @functools.cached_property
    def spots(self) -> list[Spot]:
        """The location of each text's tokens in an array of shape [rows, tokens, …]."""
        return lay_out(range(len(self.rows)), self.rows, [len(q.features.input_ids) for q in self.queued])

    @functools.cached_property
    def masked_spots(self) -> list[Spot]:
        """The location of each text's masked positions in an array of shape [rows, masked positions, …]."""
        return lay_out(range(len(self.rows)), self.rows, [len(q.features.masked_positions) for q in self.queued])


def shapes(
    max_length: int,
    *,
    packed: bool,
    masks: Callable[[int, int], tuple[int, ...]],
    share: int = 1,
    multiple: int = 1,
) -> list[Shape]:
    """Returns the possible batch shapes.

    Args:
        max_length: The length of the longest text, in tokens.
        packed: Whether a row may contain several texts.
        masks: A function that takes the length of a row and the maximum number of texts in the row. It returns the
            possible numbers of masked positions after padding, in ascending order.
        share: The number of parts into which the rows are divided; see `bert_jax.sharding.share`.
        multiple: The attention kernel requires lengths that are multiples of this number.
    """
    max_length = -(-max_length // multiple) * multiple
    lengths = [*(n for n in BUCKET_LENGTHS if n < max_length and n % multiple == 0), max_length]
    if not packed:  # fewer choices for the number of rows, because each choice is combined with many lengths
        return [
            Shape(share * rows, length, 1, masks(length, 1))
            for length in lengths
            for rows in (1, 4, 16, 64)
            if rows <= most_rows(length)
        ]
    shapes = []
    for length in lengths:
        rows = most_rows(length) if length >= min(128, lengths[-1]) else 1  # several short texts share a longer row
        while rows:
            texts = most_texts(length)
            shapes.append(Shape(share * rows, length, texts, masks(length, texts)))
            rows //= 2
    return shapes


def batches(
    queued: Iterable[Queued],
    shapes: Sequence[Shape],
    has_program: Callable[[Bucket], bool] = lambda bucket: True,
    share: int = 1,
) -> Iterator[Batch]:
    """Divides texts into batches. Each batch uses the shape that leaves the least padding.

    If rows are packed and there are enough texts for a full batch, only full batches are considered. Large numbers of
    texts therefore need only a few programs.

    Args:
        queued: The texts.
        shapes: The shapes to choose from; see `shapes`.
        has_program: A function that returns whether the program for a bucket has already been compiled. A bucket
            without a compiled program is chosen only for a text that fits no other bucket, and the batch then contains
            only this text.
        share: The number of parts into which the rows are divided; see `shapes`.
    """
    full = share * BUCKET_TOKENS
    rest = sorted(queued, key=lambda q: (-len(q.features.input_ids), -len(q.features.masked_positions)))
    most = max(shape.rows * shape.texts for shape in shapes)
    while rest:
        fitting = [shape for shape in shapes if shape.length >= len(rest[0].features.input_ids)]
        if sum(len(q.features.input_ids) for q in rest[: full + 1]) > full and fitting[0].texts > 1:
            filled = [_fill(rest, shape, share) for shape in fitting if shape.rows == share * most_rows(shape.length)]
        else:
            filled = [_fill(rest, shape, share) for shape in fitting]
        compiled = [entry for entry in filled if has_program(entry[1].bucket)]
        if not compiled:
            filled = [_fill(rest[:1], shape, share) for shape in fitting]
            compiled = [entry for entry in filled if has_program(entry[1].bucket)]
        _, batch = max(compiled or filled, key=lambda entry: entry[0])
        yield batch
        taken = {id(q) for q in batch.queued}
        rest = [q for q in rest[:most] if id(q) not in taken] + rest[most:]


def _fill(queued: Sequence[Queued], shape: Shape, share: int) -> tuple[float, Batch]:
    """Fills a batch of the given shape with the first texts in `queued`, which is sorted by length, longest first.

    Returns:
        The fill ratio of the batch, and the batch itself. The fill ratio is the total number of tokens and masked
        positions in the texts, divided by the cost of the batch in tokens.
    """
    first = queued[: shape.rows * shape.texts]
    rows = best_fit([len(q.features.input_ids) for q in first], shape.length, rows=shape.rows, items=shape.texts)
    here = [q for q, row in zip(first, rows, strict=True) if row >= 0]
    rows = [row for row in rows if row >= 0]
    used = [0] * shape.rows  # masked positions
    for q, row in zip(here, rows, strict=True):
        used[row] += len(q.features.masked_positions)
    masks = next(n for n in (0, *shape.masks) if n >= max(used))
    cost = shape.rows * (shape.length * (1 + shape.length / ATTENTION_LENGTH) + masks) + share * BATCH_TOKENS
    filled = (sum(len(q.features.input_ids) for q in here) + sum(used)) / cost
    return filled, Batch(here, rows, Bucket(shape.rows, shape.length, masks, shape.texts))


def most_rows(length: int) -> int:
    """Returns the number of rows per device in a full batch, for rows of the given length."""
    return max(1, BUCKET_TOKENS // length)


def most_texts(length: int) -> int:
    """Returns the maximum number of texts in a packed row of the given length."""
    return max(1, length // 8)


def mask_counts(length: int, texts: int, one_mask: bool) -> tuple[int, int, int]:
    """Returns the possible numbers of masked positions per row after padding, in ascending order.

    The rows have `length` tokens and contain at most `texts` texts. If each text has exactly one masked position
    (`one_mask`), the numbers are 1/2, 3/4 and 1 times `texts`. Otherwise, the numbers are `texts`, `length` / 4 and
    `length`. A quarter of the tokens is enough for pretraining, which masks 15%. All numbers are at least 2 because,
    with a single position, the head would compute matrix-vector products, which are slow on CPUs.
    """
    if one_mask:
        return max(2, texts // 2), max(2, 3 * texts // 4), max(2, texts)
    return max(2, texts), max(2, length // 4), length
