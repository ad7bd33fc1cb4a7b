"""Lays out texts one after another in rows of equal length and records the location of each text.

Training, evaluation, inference and the tokenizer all use this module.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Spot(NamedTuple):
    """The location of an item in a batch.

    Attributes:
        item: The index of the item.
        row: The index of the row in the batch.
        number: The index of the item among the items in its row, starting at 0.
        start: The index of the item's first token in the row.
        stop: The index of the item's last token in the row, plus 1.
    """

    item: int
    row: int
    number: int
    start: int
    stop: int

    @property
    def tokens(self) -> tuple[int, slice]:
        """The index that selects the item's tokens in an array of shape [rows, tokens, …]."""
        return self.row, slice(self.start, self.stop)


def lay_out(items: Iterable[int], rows: Iterable[int], lengths: Iterable[int]) -> list[Spot]:
    """Lays out each item in the row specified for it. Items in the same row keep their order in `items`."""
    used: dict[int, tuple[int, int]] = {}  # for each row, the number of items and the number of tokens so far
    spots = []
    for item, row, length in zip(items, rows, lengths, strict=True):
        number, start = used.get(row, (0, 0))
        spots.append(Spot(item, row, number, start, start + length))
        used[row] = number + 1, start + length
    return spots


def model_inputs(
    spots: Sequence[Spot],
    input_ids: Sequence[Sequence[int] | np.ndarray],
    token_type_ids: Sequence[Sequence[int] | np.ndarray],
    shape: tuple[int, int],
    *,
    packed: bool,
    pad_token_id: int,
) -> dict[str, np.ndarray]:
    """Builds the keyword arguments of a model call for a batch of items.

    Args:
        spots: The locations of the items.
        input_ids: The token ids of each item.
        token_type_ids: The token types of each item.
        shape: The number of rows and the number of tokens per row.
        packed: Whether a row may contain several items.
        pad_token_id: The id of the padding token.

    Returns:
        int32 arrays of the given shape: `input_ids`, `token_type_ids` and `attention_mask`. If rows are packed,
        `document_ids` (0 for padding) and `position_ids` replace `attention_mask`.
    """
    masks = ("document_ids", "position_ids") if packed else ("attention_mask",)
    inputs = {name: np.zeros(shape, np.int32) for name in ("input_ids", "token_type_ids", *masks)}
    inputs["input_ids"][:] = pad_token_id
    for spot in spots:
        inputs["input_ids"][spot.tokens] = input_ids[spot.item]
        inputs["token_type_ids"][spot.tokens] = token_type_ids[spot.item]
        inputs[masks[0]][spot.tokens] = spot.number + 1
        if packed:
            inputs["position_ids"][spot.tokens] = np.arange(spot.stop - spot.start)
    return inputs


def best_fit(tokens: Sequence[int], length: int, *, rows: int | None = None, items: int | None = None) -> list[int]:
    """Packs items one after another, each into the fullest row that has room for it.

    Args:
        tokens: Number of tokens in each item, in descending order (best-fit decreasing).
        length: Tokens per row.
        rows: Maximum number of rows; None for no limit.
        items: Maximum number of items per row; None for no limit.

    Returns:
        The index of each item's row, or -1 if no row has room for the item.
    """
    room: list[tuple[int, int, int]] = []  # (tokens left in the row, row, items in the row), fullest row first
    chosen: list[int] = []
    used = 0
    for size in tokens:
        place = bisect.bisect(room, (size, -1, 0))
        if place == len(room):
            if used == rows:
                chosen.append(-1)
                continue
            room.append((length, used, 0))
            used += 1
        left, row, count = room.pop(place)
        if count + 1 != items:
            bisect.insort(room, (left - size, row, count + 1))
        chosen.append(row)
    return chosen
