"""Chooses the tokens that a model must predict and replaces them in the input (Devlin et al. 2018, appendix A.1)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bert_jax.data.corpus import HEADER, Shards
from bert_jax.data.loader import Batch, Examples, Place
from bert_jax.errors import InputError
from bert_jax.losses import IGNORE
from bert_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Masking:
    """Options for choosing the tokens to predict in an example.

    Attributes:
        share: Share of the example's tokens to choose; at least one token is chosen.
        most: Maximum number of tokens to choose. BERT's maximum (`max_predictions_per_seq`) is 20 for examples of 128
            tokens and 76 for examples of 512 tokens.
        whole_words: Whether to choose all pieces of a word together.
    """

    share: float = 0.15
    most: int = 20
    whole_words: bool = False


def count(tokens: int, share: float, most: int) -> int:
    """The number of tokens to choose in an example, where `tokens` is the example's length including special tokens."""
    return min(most, max(1, round(share * tokens)))


def choose(
    candidates: np.ndarray, n: int, random: np.random.Generator, continuing: np.ndarray | None = None
) -> np.ndarray:
    """Chooses the tokens to predict.

    Args:
        candidates: The positions that may be chosen, int [m], ascending.
        n: Number of tokens to choose.
        random: The random generator.
        continuing: bool [m], true for each candidate that belongs to the same word as the previous candidate. If given,
            whole words are chosen in random order, and a word is skipped if it would raise the number of chosen tokens
            above n. If every word has more than n tokens, the first n candidates are chosen.

    Returns:
        The chosen positions, int64 [at most n], ascending.
    """
    if continuing is None:
        return np.sort(random.choice(candidates, min(n, len(candidates)), replace=False))
    words = np.split(candidates, np.flatnonzero(~continuing[1:]) + 1)
    chosen: list[int] = []
    for i in random.permutation(len(words)):
        if len(chosen) + len(words[i]) <= n:
            chosen += words[i].tolist()
        if len(chosen) == n:
            break
    return np.sort(chosen or words[0][:n]).astype(np.int64)


def hide(ids: np.ndarray, random: np.random.Generator, mask_id: int, vocab_size: int) -> np.ndarray:
    """Replaces the chosen tokens: 80% become [MASK], 10% become random tokens, and 10% remain unchanged."""
    fate = random.random(len(ids))
    return np.where(fate < 0.8, mask_id, np.where(fate < 0.9, random.integers(vocab_size, size=len(ids)), ids))


@dataclass(frozen=True)
class _Lazy(Sequence[np.ndarray]):
    """A sequence that calls `read(i)` whenever item i is accessed."""

    read: Callable[[int], np.ndarray]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        return self.read(range(self.size)[i])  # `range` raises IndexError past the end, which ends iteration


@dataclass(frozen=True)
class MaskedExamples(Examples):
    """Examples in which some tokens are chosen for prediction.

    The choice depends only on the seed, the epoch and the example. Up to P tokens are chosen per row. Three int32
    arrays of shape [B, P] are added to a batch's `targets`, each with one entry per chosen token. For each chosen
    token, `masked_positions` contains its index in the row, `labels` contains its original id, and `guessed_in`
    contains the index of its example within the row. Unused entries are `IGNORE` in `labels` and 0 in the other two
    arrays.

    Attributes:
        masking: The number of tokens to choose, and whether to choose whole words.
        seed: The seed for the random choices.
        mask_id: The id of [MASK].
        vocab_size: The size of the vocabulary from which random replacements are drawn.
        special: Ids of the tokens that are never chosen.
        continuing: bool [vocab_size], true for each piece that continues a word.
    """

    masking: Masking = Masking()
    seed: int = 0
    mask_id: int = 0
    vocab_size: int = 0
    special: tuple[int, ...] = ()
    continuing: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def of(cls, shards: Shards, tokenizer: Tokenizer, masking: Masking, seed: int) -> "MaskedExamples":
        """Makes an example from each row of the shards.

        Raises:
            InputError: If the vocabulary has no [MASK] token.
        """
        if tokenizer.mask_token_id is None:
            raise InputError("The vocabulary has no [MASK]; masked language modeling needs it.")
        lengths, first = (shards.column(name) for name in HEADER[:2])
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        continuing = np.zeros(tokenizer.vocab_size, bool)
        continuing[[i for piece, i in tokenizer.backend.get_vocab().items() if piece.startswith("##")]] = True
        examples = cls(
            input_ids=_Lazy(lambda i: shards.ids(i)[: lengths[i]].astype(np.int32), len(lengths)),
            token_type_ids=_Lazy(lambda i: (np.arange(lengths[i]) >= first[i]).astype(np.int32), len(lengths)),
            targets={"next_sentence_label": shards.column(HEADER[2])},
            pad_token_id=tokenizer.pad_token_id or 0,
            masking=masking,
            seed=seed,
            mask_id=tokenizer.mask_token_id,
            vocab_size=tokenizer.vocab_size,
            special=tuple(id for id in special if id is not None),
            continuing=continuing,
        )
        vars(examples)["lengths"] = lengths.astype(np.int64)  # without this, `lengths` would read every example
        return examples

    def digest(self) -> str:
        """SHA-256 of the lengths. The tokens are not included, because the hashes of the shards already cover them."""
        return hashlib.sha256(self.lengths.tobytes()).hexdigest()

    def batch(self, place: Place, part: tuple[int, int] = (0, 1)) -> Batch:
        """See `Examples.batch`."""
        batch = super().batch(place, part)
        rows, (_, length, examples) = len(batch["starts"]), place.shape
        # An upper bound on the number of chosen tokens per row. Rounding adds at most 1 for each example in the row.
        most = min(examples * self.masking.most, int(self.masking.share * length) + examples)
        positions, guessed_in = (np.zeros((rows, most), np.int32) for _ in range(2))
        labels = np.full((rows, most), IGNORE, np.int32)
        used = np.zeros(rows, int)
        for i, row, n, start, stop in self.spots(place, part):
            random = np.random.default_rng((self.seed, place.epoch, i))
            ids = batch["inputs"]["input_ids"][row, start:stop]
            candidates = np.flatnonzero(~np.isin(ids, self.special))
            continuing = self.continuing[ids[candidates]] if self.masking.whole_words else None
            chosen = choose(candidates, count(len(ids), self.masking.share, self.masking.most), random, continuing)
            here = row, slice(used[row], used[row] + len(chosen))
            positions[here], labels[here], guessed_in[here] = start + chosen, ids[chosen], n
            ids[chosen] = hide(ids[chosen], random, self.mask_id, self.vocab_size)
            used[row] += len(chosen)
        batch["targets"] |= {"masked_positions": positions, "labels": labels, "guessed_in": guessed_in}
        return batch
