"""Which tokens a model is to guess, and what stands in their place (Devlin et al. 2018, appendix A.1)."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bert_jax.data.corpus import HEADER, Shards
from bert_jax.data.loader import Batch, Examples, Place
from bert_jax.errors import InputError
from bert_jax.tokenizer import Tokenizer
from bert_jax.training.losses import IGNORE


@dataclass(frozen=True)
class Masking:
    """Which tokens of an example are to be guessed.

    Attributes:
        share: Share of its tokens; at least one is chosen.
        most: The maximum number; the original has 20 of 128 tokens and 76 of 512 (max_predictions_per_seq).
        whole_words: Chooses all pieces of a word together.
    """

    share: float = 0.15
    most: int = 20
    whole_words: bool = False


def count(tokens: int, share: float, most: int) -> int:
    """How many of a text's tokens, special ones included, are chosen."""
    return min(most, max(1, round(share * tokens)))


def choose(
    candidates: np.ndarray, n: int, random: np.random.Generator, continuing: np.ndarray | None = None
) -> np.ndarray:
    """Chooses tokens to guess.

    Args:
        candidates: Positions to choose from, int [m], ascending.
        n: How many.
        random: Draws them.
        continuing: bool [m], true for a piece that goes on with the word of the candidate before it; then words are
            chosen as wholes, and as many as fit into n. A first word that is longer than n is chosen in part.

    Returns:
        Positions, int64 [at most n], ascending.
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
    """What stands in the place of chosen tokens: [MASK] in 80 %, any token in 10 %, the token itself in 10 %."""
    fate = random.random(len(ids))
    return np.where(fate < 0.8, mask_id, np.where(fate < 0.9, random.integers(vocab_size, size=len(ids)), ids))


@dataclass(frozen=True)
class _Lazy(Sequence[np.ndarray]):
    """What `read` gives for 0, 1, …, size - 1."""

    read: Callable[[int], np.ndarray]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        return self.read(int(i))

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.read, range(self.size))


@dataclass(frozen=True)
class MaskedExamples(Examples):
    """Examples some of whose tokens are to be guessed.

    Which ones is a pure function of seed, epoch and example. A batch's `targets` get, for P tokens to guess in a row:
    `masked_positions` int32 [B, P], where they stand (0 where there are fewer); `labels` int32 [B, P], what stood
    there (`IGNORE`); `guessed_in` int32 [B, P], the number of their example in the row.

    Attributes:
        masking: How many tokens are chosen, and whether as whole words.
        seed: Of the choice.
        mask_id: Of [MASK].
        vocab_size: Any token may stand in the place of one.
        special: Ids that are never chosen.
        continuing: bool [vocab_size], true for pieces that go on with a word.
    """

    masking: Masking = Masking()
    seed: int = 0
    mask_id: int = 0
    vocab_size: int = 0
    special: tuple[int, ...] = ()
    continuing: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def of(cls, shards: Shards, tokenizer: Tokenizer, masking: Masking, seed: int) -> "MaskedExamples":
        """The examples of shards.

        Raises:
            InputError: If the vocabulary has no [MASK].
        """
        if tokenizer.mask_token_id is None:
            raise InputError("The vocabulary has no [MASK]; masked-language modeling cannot do without.")
        lengths, first = (shards.column(name) for name in HEADER[:2])
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        pieces = tokenizer.backend.get_vocab()
        continuing = np.zeros(tokenizer.vocab_size, bool)
        continuing[[i for piece, i in pieces.items() if piece.startswith("##")]] = True

        def types(i: int) -> np.ndarray:
            second: np.ndarray = np.arange(lengths[i]) >= first[i]
            return second.astype(np.int32)

        examples = cls(
            input_ids=_Lazy(lambda i: shards.ids(i)[: lengths[i]].astype(np.int32), len(lengths)),
            token_type_ids=_Lazy(types, len(lengths)),
            targets={"next_sentence_label": shards.column(HEADER[2])},
            pad_token_id=tokenizer.pad_token_id or 0,
            masking=masking,
            seed=seed,
            mask_id=tokenizer.mask_token_id,
            vocab_size=tokenizer.vocab_size,
            special=tuple(id for id in special if id is not None),
            continuing=continuing,
        )
        vars(examples)["lengths"] = lengths.astype(np.int64)  # known, where each example would have to be read
        return examples

    def digest(self) -> str:
        """SHA-256 of the lengths; the shards have hashes of their own."""
        return hashlib.sha256(self.lengths.tobytes()).hexdigest()

    def batch(self, place: Place, part: tuple[int, int] = (0, 1)) -> Batch:
        """See `Examples.batch`."""
        batch = super().batch(place, part)
        rows, (_, length, examples) = len(batch["starts"]), place.shape
        # The sum over a row's examples of at most so many is at most this.
        most = min(examples * self.masking.most, int(self.masking.share * length) + examples)
        positions, guessed_in = (np.zeros((rows, most), np.int32) for _ in range(2))
        labels = np.full((rows, most), IGNORE, np.int32)
        used = np.zeros(rows, int)
        for i, row, n, at in self.share(place, part):
            random = np.random.default_rng((self.seed, place.epoch, i))
            ids = batch["inputs"]["input_ids"][row, at : at + self.lengths[i]]
            candidates = np.flatnonzero(~np.isin(ids, self.special))
            if not len(candidates):
                continue
            chosen = choose(
                candidates,
                count(len(ids), self.masking.share, self.masking.most),
                random,
                self.continuing[ids[candidates]] if self.masking.whole_words else None,
            )
            here = row, slice(used[row], used[row] + len(chosen))
            positions[here], labels[here], guessed_in[here] = at + chosen, ids[chosen], n
            ids[chosen] = hide(ids[chosen], random, self.mask_id, self.vocab_size)
            used[row] += len(chosen)
        batch["targets"] |= {"masked_positions": positions, "labels": labels, "guessed_in": guessed_in}
        return batch
