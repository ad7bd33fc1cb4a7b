"""Examples -> batches. An epoch's batches are a pure function of seed, epoch and lengths; the place is the step."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np

from bert_jax.losses import IGNORE

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens that a batch is padded to: a program each, a third of padding at worst."""
WINDOW = 50
"""Batches whose examples are sorted by length together, as in transformers' `group_by_length`."""


class Batch(TypedDict):
    """Rows of one length, of which some may be padding.

    Attributes:
        inputs: What the model takes, each [B, T]: input_ids, attention_mask, token_type_ids.
        targets: What the task's loss takes, first axis B.
        weights: float32 [B], 1 for an example, 0 for a row of padding.
    """

    inputs: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]
    weights: np.ndarray


class Place(NamedTuple):
    """What a batch is made of: indices of examples, and the tokens they are padded to."""

    indices: np.ndarray
    length: int


@dataclass(frozen=True)
class Examples:
    """Featurised examples, in the order of their rows.

    Attributes:
        input_ids: Token ids, special tokens included, example by example.
        token_type_ids: Token types, likewise.
        targets: Name -> an entry an example: a number or a vector of equal shape for all.
        token_targets: Name -> an array an example, with an entry a token; padding gets `losses.IGNORE`.
        origins: An entry an example, by which the task knows again what it was made of, its row's number first; no
            program sees it.
        pad_token_id: What rows are padded with.
    """

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
        """Tokens of each example: int64 [N]."""
        return np.array([len(ids) for ids in self.input_ids])

    def rows(self, indices: np.ndarray) -> list[int]:
        """Rows of the data, from 1, that examples were made of."""
        return sorted({1 + (self.origins[i][0] if self.origins else int(i)) for i in indices})

    def batch(self, indices: np.ndarray, *, rows: int, length: int) -> Batch:
        """Examples padded to a rectangle of `rows` by `length` tokens."""
        ids, types = ([column[i] for i in indices] for column in (self.input_ids, self.token_type_ids))
        inputs = pad(ids, types, pad_token_id=self.pad_token_id, rows=rows, length=length)
        targets = {}
        for name, values in self.targets.items():
            targets[name] = np.zeros((rows, *values.shape[1:]), values.dtype)
            targets[name][: len(indices)] = values[indices]
        for name, columns in self.token_targets.items():
            targets[name] = np.full((rows, length), IGNORE, np.int32)
            for n, i in enumerate(indices):
                targets[name][n, : len(columns[i])] = columns[i]
        weights = (np.arange(rows) < len(indices)).astype(np.float32)
        return Batch(inputs=inputs, targets=targets, weights=weights)


def pad(
    ids: Sequence[Sequence[int] | np.ndarray],
    type_ids: Sequence[Sequence[int] | np.ndarray],
    *,
    pad_token_id: int,
    rows: int,
    length: int,
) -> dict[str, np.ndarray]:
    """Rows of ids and token types -> what a model takes, each int32 [rows, length]; added rows attend to nothing."""
    inputs = {
        "input_ids": np.full((rows, length), pad_token_id, np.int32),
        "attention_mask": np.zeros((rows, length), np.int32),
        "token_type_ids": np.zeros((rows, length), np.int32),
    }
    for i, (row, types) in enumerate(zip(ids, type_ids, strict=True)):
        inputs["input_ids"][i, : len(row)] = row
        inputs["attention_mask"][i, : len(row)] = 1
        inputs["token_type_ids"][i, : len(row)] = types
    return inputs


def shuffled(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[Place]:
    """An epoch's batches in random order, examples of like length together, each example once.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples a batch; one batch has the rest.
        seed: Of the run.
        epoch: Counted from 0.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    window = WINDOW * batch_size
    order = np.concatenate([
        part[np.argsort(-lengths[part], kind="stable")]
        for part in (order[start : start + window] for start in range(0, len(order), window))
    ])  # fmt: skip
    batches = _cut(order, lengths, batch_size)
    return [batches[i] for i in random.permutation(len(batches))]


def by_length(lengths: np.ndarray, batch_size: int) -> list[Place]:
    """All examples once, longest first: for evaluation, where the order does not matter."""
    return _cut(np.argsort(-lengths, kind="stable"), lengths, batch_size)


def padded_length(tokens: int) -> int:
    """The length of the program that takes so many tokens."""
    return next((length for length in LENGTHS if length >= tokens), tokens)


def _cut(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[Place]:
    parts = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return [Place(part, padded_length(int(lengths[part].max()))) for part in parts]


class Loader:
    """The batches of a run by their step, of which each process makes its own rows.

    Args:
        examples: What to learn from.
        batch_size: Examples a batch, over all processes.
        seed: Of their order.
        rows: Rows a batch is padded to: `batch_size`, or what divides among the devices.
        process: This process's index, and how many there are.
    """

    def __init__(self, examples: Examples, batch_size: int, *, seed: int, rows: int, process: tuple[int, int] = (0, 1)):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.rows, self.process = rows, process
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: shuffled(examples.lengths, batch_size, seed=seed, epoch=epoch)
        )

    def place(self, step: int) -> Place:
        """What a step's batch is made of, in all processes."""
        epoch, n = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[n]

    def batch_at(self, step: int) -> Batch:
        """This process's rows of a step's batch."""
        indices, length = self.place(step)
        index, count = self.process
        share = self.rows // count
        return self.examples.batch(indices[index * share : (index + 1) * share], rows=share, length=length)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of some steps, made ahead by a thread."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(self.batch_at)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
