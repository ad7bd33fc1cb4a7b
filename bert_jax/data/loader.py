"""Makes batches of examples. The batch for any step can be made without making those for earlier steps."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np

from bert_jax.data.rows import Spot, best_fit, lay_out, model_inputs
from bert_jax.losses import IGNORE

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""The row lengths to which unpacked batches are padded. Each length needs a separate compiled program.

To limit padding, each length is at most 1.5 times the previous length.
"""
SORTED_TOGETHER = 50
"""Shuffled examples are sorted by length within groups of this many batches.

The `group_by_length` option of `transformers` works similarly.
"""


class Batch(TypedDict):
    """A batch of B rows with T tokens each.

    Each row contains one example, or up to K examples if rows are packed, followed by padding.

    Attributes:
        inputs: The keyword arguments for the model, int32 [B, T]: `input_ids`, `token_type_ids` and `attention_mask`.
            For packed rows, `document_ids` (0 for padding) and `position_ids` replace `attention_mask`.
        targets: The targets that the task's loss expects, with the shape [B, K, …] (one target per example) or [B, T]
            (one target per token). `MaskedExamples` adds targets for up to P masked tokens per row, [B, P].
        starts: int32 [B, K], the position in the row at which each example starts.
        weights: float32 [B, K], 1 for examples and 0 for unused entries.
    """

    inputs: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]
    starts: np.ndarray
    weights: np.ndarray


class Shape(NamedTuple):
    """The shape of a batch: number of rows, number of tokens per row, and maximum number of examples per row.

    Each shape needs a separate compiled program.
    """

    rows: int
    length: int
    examples: int

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.length} tokens"


class Place(NamedTuple):
    """The examples in a batch, and the row to which each example is assigned.

    Attributes:
        indices: Indices of the examples, int64 [n].
        rows: The row of each example, int64 [n]. Examples in the same row are in the order of `indices`.
        shape: The shape of the batch.
        epoch: The epoch to which the batch belongs. `MaskedExamples` masks different tokens in each epoch.
    """

    indices: np.ndarray
    rows: np.ndarray
    shape: Shape
    epoch: int = 0


def one_a_row(indices: np.ndarray, rows: int, length: int) -> Place:
    """Assigns each example to a separate row in a batch of `rows` rows with `length` tokens each."""
    return Place(indices, np.arange(len(indices)), Shape(rows, length, 1))


@dataclass(frozen=True)
class Examples:
    """Featurized examples, in the order of the data rows from which they are made.

    Attributes:
        input_ids: One array of token ids per example, including special tokens.
        token_type_ids: One array of token type ids per example.
        targets: Arrays keyed by name, with one number ([N]) or one vector ([N, …]) per example.
        token_targets: For each name, one array per example, with one entry per token. In a batch, the entries for
            padding tokens are `losses.IGNORE`.
        origins: For each example, a tuple that describes its source. The first item is the index of the data row; the
            task defines the other items. Batches do not contain origins. If `origins` is empty, example i is made from
            data row i.
        pad_token_id: The token id used for padding.
    """

    packed: ClassVar[bool] = False
    """Whether each example consists of several texts. If so, rows are always packed."""

    input_ids: Sequence[np.ndarray]
    token_type_ids: Sequence[np.ndarray]
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_targets: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    origins: Sequence[Any] = ()
    pad_token_id: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each example: int64 [N]."""
        return np.array([len(ids) for ids in self.input_ids])

    def digest(self) -> str:
        """Returns the SHA-256 hash of the token ids and the targets."""
        found = hashlib.sha256()
        for arrays in (self.input_ids, self.targets.values(), *self.token_targets.values()):
            for array in arrays:
                found.update(np.int64(len(array)).tobytes() + array.tobytes())
        return found.hexdigest()

    def rows(self, indices: np.ndarray) -> list[int]:
        """Returns the numbers, starting at 1, of the data rows from which the given examples are made."""
        return sorted({1 + (self.origins[i][0] if self.origins else int(i)) for i in indices})

    def spots(self, place: Place, part: tuple[int, int] = (0, 1)) -> list[Spot]:
        """Returns the locations of the examples in one part of a batch.

        A part consists of consecutive rows. `Spot.row` is counted from the first row of the part.

        Args:
            place: The examples of the batch.
            part: A pair: the index of the part and the number of parts.
        """
        size = place.shape.rows // part[1]
        here = place.rows // size == part[0]
        indices, rows = place.indices[here], place.rows[here] % size
        return lay_out(indices.tolist(), rows.tolist(), self.lengths[indices].tolist())

    def batch(self, place: Place, part: tuple[int, int] = (0, 1)) -> Batch:
        """Makes a batch or one part of its rows. `part` is a pair: the index of the part and the number of parts."""
        shape = place.shape.rows // part[1], place.shape.length
        by_example = shape[0], place.shape.examples
        spots = self.spots(place, part)
        inputs = model_inputs(
            spots, self.input_ids, self.token_type_ids, shape, packed=by_example[1] > 1, pad_token_id=self.pad_token_id
        )
        targets = {
            **{name: np.zeros((*by_example, *column.shape[1:]), column.dtype) for name, column in self.targets.items()},
            **{name: np.full(shape, IGNORE, np.int32) for name in self.token_targets},
        }
        starts, weights = np.zeros(by_example, np.int32), np.zeros(by_example, np.float32)
        for spot in spots:
            for name, values in self.targets.items():
                targets[name][spot.row, spot.number] = values[spot.item]
            for name, columns in self.token_targets.items():
                targets[name][spot.tokens] = columns[spot.item]
            starts[spot.row, spot.number], weights[spot.row, spot.number] = spot.start, 1
        return Batch(inputs=inputs, targets=targets, starts=starts, weights=weights)


# ── Grouping of examples ─────────────────────────────────────────────────────────────────────────────────────────────


def bucketed(
    lengths: np.ndarray, batch_size: int, rows: int, random: np.random.Generator, multiple: int = 1
) -> list[Place]:
    """Groups examples of similar length into batches, one example per row, and returns the batches in random order.

    If the number of examples is not a multiple of `batch_size`, one batch contains fewer examples than the others.
    """
    order = random.permutation(len(lengths))
    window = np.arange(len(order)) // (SORTED_TOGETHER * batch_size)
    order = order[np.lexsort((-lengths[order], window))]
    parts = np.split(order, range(batch_size, len(order), batch_size))
    places = [one_a_row(part, rows, padded_length(int(lengths[part].max()), multiple)) for part in parts]
    return [places[i] for i in random.permutation(len(places))]


def padded_length(tokens: int, multiple: int = 1) -> int:
    """The length to which a row of `tokens` tokens is padded.

    The smallest value in `LENGTHS` that is at least `tokens` is chosen, or `tokens` itself if all values are smaller.
    In both cases, the result is rounded up to a multiple of `multiple`.
    """
    return -(-next((length for length in LENGTHS if length >= tokens), tokens) // multiple) * multiple


def balanced(lengths: np.ndarray, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Randomly groups examples into batches with nearly equal numbers of tokens.

    The examples are sorted by length and divided into strata. Each batch gets a random example from every stratum.

    Args:
        lengths: Number of tokens in each example.
        batch_size: Maximum number of examples per batch. Batch sizes differ by at most 1.
        random: The random generator.

    Returns:
        The indices of the examples in each batch, longest example first.
    """
    count = -(-len(lengths) // batch_size)
    order = random.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    strata = np.pad(order, (0, -len(order) % count), constant_values=-1).reshape(-1, count)
    return [batch[batch >= 0] for batch in random.permuted(strata, axis=1).T]


def packed(lengths: np.ndarray, indices: np.ndarray, length: int) -> tuple[np.ndarray, Shape]:
    """Packs examples into rows with `best_fit`.

    Args:
        lengths: Number of tokens in each example.
        indices: Indices of the examples to pack, longest first.
        length: Tokens per row.

    Returns:
        A pair: the row number of each example, in the order of `indices`, and the shape of the resulting batch.
    """
    rows = best_fit(lengths[indices].tolist(), length)
    return np.array(rows), Shape(max(rows) + 1, length, int(np.bincount(rows).max()))


def packed_shape(
    lengths: np.ndarray, batches: Sequence[np.ndarray], share: int, limit: int, multiple: int = 1
) -> Shape:
    """Finds the shape that fits every packed batch and has the lowest estimated computational cost.

    Args:
        lengths: Number of tokens in each example.
        batches: The indices of the examples in each batch, longest example first.
        share: The number of rows must be a multiple of this number.
        limit: Maximum number of tokens per row, raised to the length of the longest example if that is greater.
        multiple: The number of tokens per row must be a multiple of this number.
    """
    most, longest = max(int(lengths[batch].sum()) for batch in batches), int(lengths.max())

    def least(length: int) -> int:
        """A lower bound on the cost of a batch with rows of this length: the cost if no padding were needed."""
        return _work(Shape(-(-most // length // share) * share, length, 1))

    step = max(8, multiple)
    steps = range(-(-longest // step) * step, max(longest, min(limit, 2 * longest)) + step, step)
    found: list[Shape] = []
    for length in sorted((min(length, max(longest, limit)) for length in steps), key=least):
        if found and least(length) >= min(map(_work, found)):
            break
        rows, _, examples = np.max([packed(lengths, batch, length)[1] for batch in batches], axis=0).tolist()
        found.append(Shape(-(-rows // share) * share, length, examples))
    best = min(found, key=_work)
    # Allow two more examples per row. If a row of a later epoch had more examples than the shape allows, its batch
    # would need a separate compiled program.
    return best if best.examples == 1 else best._replace(examples=best.examples + 2)


def _work(shape: Shape) -> int:
    """Estimates the computational cost of a batch, in arbitrary units.

    Each token costs 1000 plus its row's length. This formula is based on measurements with hidden size 384.
    """
    return shape.rows * shape.length * (1000 + shape.length)


class Loader:
    """Makes the batch for each step. If there are several processes, each one makes only its part of the rows.

    The examples in a batch, and the rows to which they are assigned, depend only on the step and on the arguments other
    than `part`.

    Args:
        examples: The examples for training or evaluation.
        batch_size: Maximum number of examples per batch, across all processes.
        seed: The seed for the order of the examples.
        share: The number of rows in a batch must be a multiple of this number, so that all devices get the same number.
        packing: Maximum number of tokens in a packed row, which contains several examples; None for one example per
            row.
        multiple: The number of tokens per row must be a multiple of this number.
        part: A pair: the index of the part that this process makes, and the number of parts.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int,
        share: int = 1,
        packing: int | None = None,
        multiple: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.share, self.packing, self.multiple, self.part = share, packing, multiple, part
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(self._places)

    @functools.cached_property
    def _shape(self) -> Shape:
        """A shape into which every batch of the first epoch fits."""
        batches = balanced(self.examples.lengths, self.batch_size, np.random.default_rng((self.seed, 0)))
        return packed_shape(self.examples.lengths, batches, self.share, self.packing or 0, self.multiple)

    def _places(self, epoch: int) -> list[Place]:
        lengths, random = self.examples.lengths, np.random.default_rng((self.seed, epoch))
        if self.packing is None:
            rows = -(-self.batch_size // self.share) * self.share
            return bucketed(lengths, self.batch_size, rows, random, self.multiple)
        return [self._place(indices) for indices in balanced(lengths, self.batch_size, random)]

    def _place(self, indices: np.ndarray) -> Place:
        rows, needed = packed(self.examples.lengths, indices, self._shape.length)
        more = max(0, -(-(needed.rows - self._shape.rows) // self.share)) * self.share
        examples = max(needed.examples, self._shape.examples)
        return Place(indices, rows, self._shape._replace(rows=self._shape.rows + more, examples=examples))

    def place(self, step: int) -> Place:
        """Returns the examples in a step's batch and their rows. Steps are numbered from 0.

        The result is the same in all processes.
        """
        epoch, n = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[n]._replace(epoch=epoch)

    def batch_at(self, step: int) -> Batch:
        """Makes this process's part of the batch for a step."""
        return self.examples.batch(self.place(step), self.part)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps `start` to `stop` - 1. A background thread prepares the batches in advance."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(self.batch_at)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
