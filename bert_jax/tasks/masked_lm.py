"""fill-mask: predicts tokens for each [MASK], scores given words, or predicts the tokens of all masks jointly."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NotRequired, TypeVar

import jax
import numpy as np
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from bert_jax.config import BertConfig
from bert_jax.data.sources import TEXTS
from bert_jax.errors import InputError, quoted
from bert_jax.heads import BertForMaskedLM
from bert_jax.tasks.base import Features, Outputs, Request, Steps, check_text
from bert_jax.tokenizer import Tokenizer

BEAMS = 16
"""The beam width for joint prediction, that is, the number of candidates to keep after each mask.

If `top_k` is larger, it is the beam width instead.
"""


MASKS = 64
"""Maximum number of masked positions for which a request holds probabilities over the vocabulary at the same time."""
Item = TypeVar("Item")


class TargetPiece(TypedDict):
    """One piece of a multi-piece target, with its probability and its rank in the vocabulary."""

    score: float
    token: int
    token_str: str
    rank: int


class Filling(TypedDict):
    """A prediction for one mask or, with `joint`, for all masks. `FillMask.request` describes the fields."""

    score: float
    token: int | list[int]
    token_str: str | list[str]
    sequence: str
    rank: NotRequired[int]
    pieces: NotRequired[list[TargetPiece]]


Fillings = list[Filling] | list[list[Filling]]


class FillMask:
    """Predicts the tokens at masked positions, like Hugging Face's fill-mask pipeline.

    Unlike that pipeline, this class can score targets with several pieces and predict several masks jointly.
    """

    name = "fill-mask"
    model_class = BertForMaskedLM
    per_token, masked, one_mask, with_labels = False, True, False, False
    columns_of_input = TEXTS
    json_input: Any = str

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        if tokenizer.mask_token_id is None:
            raise InputError(f"The vocabulary has no {tokenizer.mask_token}, which fill-mask needs. Use another model.")
        self.tokenizer = tokenizer
        self.mask_id: int = tokenizer.mask_token_id
        self.max_length = max_length
        self.example = f"a {tokenizer.mask_token}"

    def forward(self, model: BertForMaskedLM, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """The probabilities over the whole vocabulary at each masked position: float32 [B, P, V]."""
        return {"probabilities": jax.nn.softmax(model(**inputs).logits, axis=-1)}

    def request(
        self, text: str, *, top_k: int | None = None, targets: str | Sequence[str] | None = None, joint: bool = False
    ) -> Request[Fillings]:
        """Predicts the tokens at the masked positions of one text.

        Args:
            text: A text with at least one mask token. If it is longer than the model's maximum length, the model sees a
                window around the masks, or several windows if the masks are far apart.
            top_k: The number of predictions to return for each mask or, if `joint` is set, for all masks together. The
                default is 5 or, if `targets` is given, the number of targets.
            targets: Words to score. Each score is a probability over the whole vocabulary, so the scores of the targets
                do not add up to 1. For a target with several pieces, the mask is replaced with one mask per piece. The
                score is then the product of the pieces' probabilities, each conditioned on the preceding pieces.
            joint: Whether to fill in all masks together by beam search. Masks are filled in from left to right, each
                conditioned on the tokens chosen for the previous masks. The score is the product of the probabilities
                of the chosen tokens.

        Returns:
            A list of `{score, token, token_str, sequence}`, best first. If the text has several masks, the result
            contains one such list per mask, and each `sequence` retains the special tokens and the other masks.

            If `targets` is given, each entry has a fifth field, `rank`: 1 plus the number of tokens in the vocabulary
            that are more likely than the target. For a target with several pieces, `token` is a list of ids, and
            `pieces` describes each piece.

            If `joint` is set, the result is a single list for all masks. In each entry, `token` and `token_str` are
            lists with one item per mask.

        Raises:
            InputError: If an argument is invalid. The message states what was expected.
        """
        check_text(text)
        size = self.tokenizer.vocab_size
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= size):
            raise InputError(f"top_k is {quoted(top_k)}; expected a whole number from 1 to {size} (vocabulary size).")
        if joint and targets is not None:
            raise InputError("joint does not support targets. Omit targets, or set joint=False to score them.")
        pieces = None if targets is None else self._pieces(targets)
        ids = self.tokenizer.encode([text])[0][0].ids
        masks = [i for i, token in enumerate(ids) if token == self.mask_id]
        if not masks:
            raise InputError(f"the text has no {self.tokenizer.mask_token} for the word to fill in: {quoted(text)}")
        length = min(len(ids), self.max_length)
        if joint:
            if masks[-1] - masks[0] >= self.max_length - 2:
                raise InputError(
                    f"the masks span {masks[-1] - masks[0] + 1} tokens; joint supports at most {self.max_length - 2}. "
                    "Set joint=False to read each mask in its own window."
                )
            top_k = top_k or 5
            tokens, entries = len(masks) * max(BEAMS, top_k) * length, top_k
            steps = self._fill_jointly(ids, masks, top_k)
        else:
            windows = [self._row(ids, part, around=group) for group in self._groups(masks) for part in _parts(group)]
            tokens, entries = len(windows) * length, len(masks) * (top_k or 5)
            if pieces is None:
                steps = self._fill(ids, masks, windows, top_k or 5)
            else:
                tokens += len(masks) * sum(
                    len(target) * min(len(ids) + len(target) - 1, self.max_length)
                    for target in pieces
                    if len(target) > 1
                )
                entries = len(masks) * sum(map(len, pieces))
                steps = self._score_targets(ids, masks, windows, pieces, top_k or len(pieces))
        return Request(steps, tokens, entries * (100 + len(text)))

    def _fill(self, ids: list[int], masks: list[int], windows: list[Features], top_k: int) -> Steps[Fillings]:
        results: list[list[Filling]] = []
        for rows in _chunks(windows):
            outputs = yield rows
            for mask, p in zip(masks[len(results) :], _each(outputs), strict=False):
                sequence = self._sequence(ids, mask, alone=len(masks) == 1)
                results.append([self._entry(sequence, [token], p[token]) for token in _best(p, top_k)])
        return results[0] if len(masks) == 1 else results

    def _score_targets(
        self, ids: list[int], masks: list[int], windows: list[Features], targets: list[list[int]], top_k: int
    ) -> Steps[Fillings]:
        results: list[list[Filling]] = []
        for rows in _chunks(windows):
            outputs = yield rows
            for mask, p in zip(masks[len(results) :], _each(outputs), strict=False):
                pieces = yield from self._score_pieces(ids, mask, targets)
                sequence, entries = self._sequence(ids, mask, alone=len(masks) == 1), []
                for target in targets:
                    steps = pieces.get(tuple(target), [])
                    scores = np.array([piece["score"] for piece in steps] or [p[target[0]]], np.float32)
                    score = scores.prod()
                    entry = self._entry(sequence, target, score)
                    entry["rank"] = _rank(p, score)
                    if steps:
                        entry["pieces"] = steps
                    entries.append(entry)
                results.append(sorted(entries, key=lambda entry: -entry["score"])[:top_k])
        return results[0] if len(masks) == 1 else results

    def _score_pieces(
        self, ids: list[int], mask: int, targets: list[list[int]]
    ) -> Steps[dict[tuple[int, ...], list[TargetPiece]]]:
        """Scores the pieces of each multi-piece target at one mask.

        To score piece n (counted from 0) of a target with k pieces, the mask is replaced with the first n pieces,
        followed by k - n masks. The piece is scored at the first of these masks.
        """
        found: dict[tuple[int, ...], list[TargetPiece]] = {}
        wanted = [(target, n) for target in targets if len(target) > 1 for n in range(len(target))]
        for some in _parts(wanted):
            outputs = yield [
                self._row([*ids[:mask], *target[:n], *[self.mask_id] * (len(target) - n), *ids[mask + 1 :]], [mask + n])
                for target, n in some
            ]
            for (target, n), p in zip(some, _each(outputs), strict=True):
                token = target[n]
                shown, rank = self.tokenizer.decode([token]), _rank(p, p[token])
                found.setdefault(tuple(target), []).append(
                    {"score": float(p[token]), "token": token, "token_str": shown, "rank": rank}
                )
        return found

    def _fill_jointly(self, ids: list[int], masks: list[int], top_k: int) -> Steps[Fillings]:
        width = max(BEAMS, top_k)
        beams = [(1.0, ids)]
        for mask in masks:
            best: list[tuple[float, list[int], int]] = []
            for some in _parts(beams):
                outputs = yield [self._row(row, [mask], around=masks) for _, row in some]
                for (score, row), p in zip(some, _each(outputs), strict=True):
                    tokens = _best(p, width)
                    # The scores are in descending order, so if one is too low, all later ones are too low as well.
                    scores = score * p[tokens].astype(np.float64)
                    kept = len(tokens) if len(best) < width else int(np.sum(scores > best[-1][0]))
                    best += [(float(s), row, token) for s, token in zip(scores[:kept], tokens[:kept], strict=True)]
                    best = sorted(best, key=lambda candidate: -candidate[0])[:width]
            beams = [(score, [*row[:mask], token, *row[mask + 1 :]]) for score, row, token in best]
        entries: list[Filling] = [
            {
                "score": score,
                "token": [row[mask] for mask in masks],
                "token_str": [self.tokenizer.decode([row[mask]]) for mask in masks],
                "sequence": self.tokenizer.decode(row, skip_special_tokens=True),
            }
            for score, row in beams[:top_k]
        ]
        return entries

    def _pieces(self, targets: str | Sequence[str]) -> list[list[int]]:
        """The token ids of each target, with duplicate targets removed."""
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(targets, list | tuple) or not targets:
            raise InputError(f"targets is {quoted(targets)}; expected a list of words.")
        for target in targets:
            if not isinstance(target, str) or not target.strip():
                raise InputError(f"targets has {quoted(target)}; expected words that are not empty.")
        found: dict[tuple[int, ...], None] = {}
        for target, (row,) in zip(targets, self.tokenizer.encode(targets, add_special_tokens=False), strict=True):
            token = self.tokenizer.token_to_id(target)
            if token is None and self.tokenizer.unk_token_id in row.ids:
                raise InputError(f"the target {quoted(target)} has characters outside the vocabulary; replace it.")
            found[tuple(row.ids) if token is None else (token,)] = None
        return [list(ids) for ids in found]

    def _groups(self, masks: list[int]) -> Iterator[list[int]]:
        """Splits the masks, in order, into as few groups as possible, each of which fits into one window."""
        group = masks[:1]
        for mask in masks[1:]:
            if mask - group[0] >= self.max_length - 2:
                yield group
                group = []
            group.append(mask)
        yield group

    def _row(self, ids: list[int], positions: list[int], around: Sequence[int] = ()) -> Features:
        """Makes a row with masked positions from the text or, if the text is too long, from a window of the text.

        Args:
            ids: Token ids of the whole text, with [CLS] first and [SEP] last.
            positions: The masked positions, as indices into `ids`.
            around: Indices into `ids` on which the window is centered. If empty, `positions` is used.
        """
        if len(ids) <= self.max_length:
            return Features(ids, [0] * len(ids), positions)
        room = self.max_length - 2
        held = around or positions
        start = min(max(1, (held[0] + held[-1] - room + 1) // 2), len(ids) - 1 - room)
        window = [ids[0], *ids[start : start + room], ids[-1]]
        return Features(window, [0] * len(window), [position - start + 1 for position in positions])

    def _entry(self, sequence: Callable[[list[int]], str], pieces: list[int], score: Any) -> Filling:
        return {
            "score": float(score),
            "token": pieces[0] if len(pieces) == 1 else pieces,
            "token_str": self.tokenizer.decode(pieces),
            "sequence": sequence(pieces),
        }

    def _sequence(self, ids: list[int], mask: int, *, alone: bool) -> Callable[[list[int]], str]:
        """Returns a function that decodes the text after replacing a mask with the given pieces.

        The rest of the text is decoded only once.

        The decoder decodes each token independently of the others, except that it puts no space before the first token.
        Each part of the text is therefore decoded with another token in front of it, and that token's text is removed
        from the result.
        """
        # As in Hugging Face's pipeline, special tokens are kept if there are several masks, because removing them would
        # also remove the other masks.
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=alone)
        before, after = ids[:mask], ids[mask + 1 :]
        if not (left := decode(before)):
            return lambda pieces: decode([*before, *pieces, *after])
        token = next(token for token in reversed(before) if decode([token]))
        start = len(decode([token]))
        right = decode([token, *after])[start:]
        return lambda pieces: left + decode([token, *pieces])[start:] + right


def _parts(items: list[Item]) -> Iterator[list[Item]]:
    """Splits a list into parts of at most `MASKS` items."""
    return (items[i : i + MASKS] for i in range(0, len(items), MASKS))


def _chunks(rows: list[Features]) -> Iterator[list[Features]]:
    """Splits rows, in order, into lists that each contain at most `MASKS` masked positions in total."""
    chunk: list[Features] = []
    for row in rows:
        if chunk and sum(len(other.masked_positions) for other in chunk) + len(row.masked_positions) > MASKS:
            yield chunk
            chunk = []
        chunk.append(row)
    yield chunk


def _each(outputs: list[Outputs]) -> Iterator[np.ndarray]:
    """Yields, for each masked position, the probabilities over the vocabulary."""
    return (p for output in outputs for p in output["probabilities"])


def _best(p: np.ndarray, k: int) -> list[int]:
    """The ids of the k most probable tokens, best first. Among equally probable tokens, lower ids come first."""
    candidates = np.flatnonzero(p >= np.partition(p, -k)[-k])  # np.partition takes half the time of np.argpartition
    best: list[int] = candidates[np.lexsort((candidates, -p[candidates]))][:k].tolist()
    return best


def _rank(p: np.ndarray, score: Any) -> int:
    return 1 + int(np.sum(p > score))
