"""fill-mask: which tokens a [MASK] stands for, alone, among given words, or several masks together."""

from collections.abc import Iterator, Sequence
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np

from bert_jax.config import BertConfig
from bert_jax.data.sources import TEXTS
from bert_jax.errors import InputError, quoted
from bert_jax.heads import BertForMaskedLM
from bert_jax.tasks.base import Request, Row
from bert_jax.tokenizer import Tokenizer

BEAMS = 16
"""Partial fillings that are kept from mask to mask when several are filled jointly (more if top_k is)."""


class TargetPiece(TypedDict):
    """One token of a target that has several."""

    score: float
    token: int
    token_str: str
    rank: int


class Filling(TypedDict):
    """What a mask may stand for; `FillMask.request` says which fields are there."""

    score: float
    token: int | list[int]
    token_str: str | list[str]
    sequence: str
    rank: NotRequired[int]
    pieces: NotRequired[list[TargetPiece]]


Fillings = list[Filling] | list[list[Filling]]


class FillMask:
    """Fills masks as Hugging Face's pipeline does, and beyond it ranks targets of any length and fills jointly."""

    name = "fill-mask"
    model_class = BertForMaskedLM
    per_token, masked = False, True
    columns_of_input = TEXTS
    json_input: Any = str

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        if tokenizer.mask_token_id is None:
            raise InputError(f"The vocabulary has no {tokenizer.mask_token}: this model cannot fill masks.")
        self.tokenizer = tokenizer
        self.mask_id: int = tokenizer.mask_token_id
        self.max_length = max_length

    def forward(self, model: BertForMaskedLM, inputs: dict[str, jax.Array], starts: jax.Array) -> dict[str, jax.Array]:
        """Probabilities of the whole vocabulary at each masked position: float32 [B, P, V]."""
        return {"probabilities": jax.nn.softmax(model(**inputs).logits, axis=-1)}

    def request(
        self, text: str, *, top_k: int | None = None, targets: str | Sequence[str] | None = None, joint: bool = False
    ) -> Request[Fillings]:
        """Fills the masks of one text.

        Args:
            text: Holds at least one mask token. A text over the model's length is seen through a window around
                its masks, several windows if they are far apart.
            top_k: How many fillings to return: 5 by default, with targets all of them.
            targets: Words to score instead of the whole vocabulary, without renormalising. One of several pieces
                takes a mask for each piece; its score is the product of theirs, each given those before it.
            joint: Fills all masks together, left to right, each given those before it (beam search); a score is
                the product over the masks.

        Returns:
            One mask: a list of `{score, token, token_str, sequence}`, best first. Several: such a list for each mask
            (the `sequence` then keeps the special tokens and the other masks). With targets each entry has a `rank`,
            1 for the likeliest of the vocabulary, and one of several pieces has a list for `token` and its `pieces`.
            Jointly: one list, with a list for `token` and `token_str`, an entry a mask.

        Raises:
            InputError: Says what cannot be used, and what was expected.
        """
        tokenizer = self.tokenizer
        if not isinstance(text, str):
            raise InputError(f"expected a text, got {quoted(text)} ({type(text).__name__}).")
        if not text.strip():
            raise InputError(f"the text is empty; expected one with {tokenizer.mask_token}.")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k is {quoted(top_k)}; expected a whole number of at least 1.")
        if top_k is not None and top_k > (size := tokenizer.vocab_size):
            raise InputError(f"top_k is {top_k}; the vocabulary has {size} tokens.")
        if joint and targets is not None:
            raise InputError("joint and targets do not go together: score the targets of each mask, or fill jointly.")
        pieces = None if targets is None else self._pieces(targets)
        ids = tokenizer.encode([text])[0][0].ids
        masks = [i for i, token in enumerate(ids) if token == self.mask_id]
        if not masks:
            raise InputError(f"the text has no {tokenizer.mask_token}, which marks the word to fill in: {quoted(text)}")
        if joint:
            if masks[-1] - masks[0] >= self.max_length - 2:
                raise InputError(
                    f"the masks span {masks[-1] - masks[0] + 1} tokens; the model sees {self.max_length} at once, "
                    "[CLS] and [SEP] included. Without joint, each mask gets a window of its own."
                )
            return self._fill_jointly(ids, masks, top_k or 5)
        if pieces is not None:
            return self._score_targets(ids, masks, pieces, top_k or len(pieces))
        return self._fill(ids, masks, top_k or 5)

    def _fill(self, ids: list[int], masks: list[int], top_k: int) -> Request[Fillings]:
        outputs = yield [self._row(ids, group) for group in self._groups(masks)]
        probabilities = np.concatenate([output["probabilities"] for output in outputs])  # [masks, V]
        results = [
            [self._entry(ids, mask, [token], p[token], alone=len(masks) == 1) for token in _best(p, top_k)]
            for mask, p in zip(masks, probabilities, strict=True)
        ]
        return results[0] if len(masks) == 1 else results

    def _score_targets(
        self, ids: list[int], masks: list[int], targets: list[list[int]], top_k: int
    ) -> Request[Fillings]:
        # One request for all: the masks as they are and, for each target of n pieces, n rows that are filled up to
        # their first, second, … piece.
        groups = list(self._groups(masks))
        rows = [self._row(ids, group) for group in groups]
        for mask in masks:
            for target in targets:
                if len(target) > 1:
                    for n in range(len(target)):
                        filled = target[:n] + [self.mask_id] * (len(target) - n)
                        rows.append(self._row(ids[:mask] + filled + ids[mask + 1 :], [mask + n]))
        outputs = iter((yield rows))
        probabilities = np.concatenate([next(outputs)["probabilities"] for _ in groups])  # [masks, V]
        results = []
        for mask, p in zip(masks, probabilities, strict=True):
            entries = []
            for target in targets:
                steps = [p] if len(target) == 1 else [next(outputs)["probabilities"][0] for _ in target]
                score = np.prod([step[token] for step, token in zip(steps, target, strict=True)])
                entry = self._entry(ids, mask, target, score, alone=len(masks) == 1)
                entry["rank"] = _rank(p, score)
                if len(target) > 1:
                    entry["pieces"] = [
                        {"score": float(step[token]), "token": token, "token_str": self.tokenizer.decode([token]),
                         "rank": _rank(step, step[token])}
                        for step, token in zip(steps, target, strict=True)
                    ]  # fmt: skip
                entries.append(entry)
            results.append(sorted(entries, key=lambda entry: -entry["score"])[:top_k])
        return results[0] if len(masks) == 1 else results

    def _fill_jointly(self, ids: list[int], masks: list[int], top_k: int) -> Request[Fillings]:
        beams: list[tuple[float, list[int]]] = [(1.0, [])]
        for n in range(len(masks)):
            rows = []
            for _, tokens in beams:
                filled = list(ids)
                for mask, token in zip(masks, tokens, strict=False):
                    filled[mask] = token
                rows.append(self._row(filled, [masks[n]], around=masks))
            outputs = yield rows
            width = max(BEAMS, top_k)
            beams = [
                (score * float(p[token]), [*tokens, int(token)])
                for (score, tokens), output in zip(beams, outputs, strict=True)
                for p in output["probabilities"]
                for token in _best(p, width)
            ]
            beams = sorted(beams, key=lambda beam: -beam[0])[:width]
        entries: list[Filling] = []
        for score, tokens in beams[:top_k]:
            filled = list(ids)
            for mask, token in zip(masks, tokens, strict=True):
                filled[mask] = token
            entries.append(
                {
                    "score": score,
                    "token": tokens,
                    "token_str": [self.tokenizer.decode([token]) for token in tokens],
                    "sequence": self.tokenizer.decode(filled, skip_special_tokens=True),
                }
            )
        return entries

    def _pieces(self, targets: str | Sequence[str]) -> list[list[int]]:
        """Token ids of each target, without repetitions."""
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(targets, list | tuple):
            raise InputError(f"targets is {quoted(targets)}; expected a list of words.")
        if not targets:
            raise InputError("targets is empty; expected at least one word.")
        found = []
        for target in targets:
            if not isinstance(target, str) or not target.strip():
                raise InputError(f"targets has {quoted(target)}; expected words that are not empty.")
            token = self.tokenizer.token_to_id(target)
            ids = [token] if token is not None else self.tokenizer.encode([target], add_special_tokens=False)[0][0].ids
            if token is None and self.tokenizer.unk_token_id in ids:
                raise InputError(f"the target {quoted(target)} has characters that the vocabulary cannot write.")
            if ids not in found:
                found.append(ids)
        return found

    def _groups(self, masks: list[int]) -> Iterator[list[int]]:
        """The masks in as few groups as fit, in order, into a window each."""
        group = masks[:1]
        for mask in masks[1:]:
            if mask - group[0] >= self.max_length - 2:
                yield group
                group = []
            group.append(mask)
        yield group

    def _row(self, ids: list[int], positions: list[int], around: Sequence[int] = ()) -> Row:
        """A row that wants the vocabulary at these positions; of a long text, the window that has them in its middle.

        Args:
            ids: Tokens of the whole text, [CLS] first and [SEP] last.
            positions: Indices in `ids`.
            around: What the window is to hold, where that is more than the positions.
        """
        if len(ids) <= self.max_length:
            return Row(ids, [0] * len(ids), positions)
        room = self.max_length - 2
        held = around or positions
        start = min(max(1, (held[0] + held[-1] - room + 1) // 2), len(ids) - 1 - room)
        window = [ids[0], *ids[start : start + room], ids[-1]]
        return Row(window, [0] * len(window), [position - start + 1 for position in positions])

    def _entry(self, ids: list[int], mask: int, pieces: list[int], score: Any, *, alone: bool) -> Filling:
        filled = [*ids[:mask], *pieces, *ids[mask + 1 :]]
        return {
            "score": float(score),
            "token": pieces[0] if len(pieces) == 1 else pieces,
            "token_str": self.tokenizer.decode(pieces),
            # Beside other masks the special tokens stay, or those masks would vanish too (as in Hugging Face's).
            "sequence": self.tokenizer.decode(filled, skip_special_tokens=alone),
        }


def _best(p: np.ndarray, k: int) -> list[int]:
    """Ids of the k highest entries, best first; of equals the lower id."""
    candidates = np.flatnonzero(p >= np.partition(p, -k)[-k])  # half of argpartition's time
    best: list[int] = candidates[np.lexsort((candidates, -p[candidates]))][:k].tolist()
    return best


def _rank(p: np.ndarray, score: Any) -> int:
    return 1 + int(np.sum(p > score))
