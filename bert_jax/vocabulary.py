"""One vocabulary's embeddings for another: each new piece begins as what is nearest to it by name."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from bert_jax.tokenizer import Tokenizer

SAME, LOWER, PIECES, NONE = "the same piece", "in lower case", "the mean of their old pieces", "the mean of all"


def carry(before: Tokenizer, after: Tokenizer) -> tuple[list[list[int]], dict[str, int]]:
    """Which rows of the old table each row of the new one is made of.

    Returns:
        Ids of `before`, a list for each id of `after`, empty where there is nothing like it; and how many pieces were
        found which way.
    """
    old = before.backend.get_vocab()
    sources: list[list[int]] = [[] for _ in range(after.vocab_size)]
    counts = Counter({SAME: 0, LOWER: 0, PIECES: 0, NONE: 0})
    for piece, i in after.backend.get_vocab().items():
        goes_on, text = piece.startswith("##"), piece.removeprefix("##")
        if piece in old:
            sources[i], how = [old[piece]], SAME
        elif piece.lower() in old:
            sources[i], how = [old[piece.lower()]], LOWER
        else:
            pieces = before.encode([text], add_special_tokens=False)[0][0].tokens
            # What goes on with a word is made of pieces that do.
            pieces = [f"##{p}" if goes_on and n == 0 and f"##{p}" in old else p for n, p in enumerate(pieces)]
            sources[i] = [old[p] for p in pieces if old[p] != before.unk_token_id]
            how = PIECES if sources[i] else NONE
        counts[how] += 1
    return sources, dict(counts)


def rows(table: np.ndarray, sources: Sequence[Sequence[int]]) -> np.ndarray:
    """The new table [new, …] of an old one [old, …]: the mean of each row's sources, of all rows where it has none."""
    everything = table.mean(axis=0)
    return np.stack([table[list(ids)].mean(axis=0) if ids else everything for ids in sources])
