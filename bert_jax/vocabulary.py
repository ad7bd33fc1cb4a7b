"""Carries embeddings over to another vocabulary: each new piece starts from the old ones nearest to it by name."""

from collections.abc import Sequence

import numpy as np

from bert_jax.tokenizer import Tokenizer

SAME, LOWER, PIECES, NONE = "copied", "copied from lower case", "averaged over old pieces", "averaged over all"


def carry(before: Tokenizer, after: Tokenizer) -> tuple[list[list[int]], dict[str, int]]:
    """Finds the rows of the old embedding table that each row of the new table is made of.

    Returns:
        A list of ids of `before` for each id of `after`, empty if nothing is similar; and the number of pieces found in
        each way.
    """
    old = before.backend.get_vocab()
    sources: list[list[int]] = [[] for _ in range(after.vocab_size)]
    counts = dict.fromkeys((SAME, LOWER, PIECES, NONE), 0)
    for piece, i in after.backend.get_vocab().items():
        if piece in old:
            sources[i], how = [old[piece]], SAME
        elif piece.lower() in old:
            sources[i], how = [old[piece.lower()]], LOWER
        else:
            pieces = before.encode([piece.removeprefix("##")], add_special_tokens=False)[0][0].tokens
            # A piece that continues a word is made of pieces that continue a word.
            if piece.startswith("##") and pieces and f"##{pieces[0]}" in old:
                pieces[0] = f"##{pieces[0]}"
            sources[i] = [old[p] for p in pieces if old[p] != before.unk_token_id]
            how = PIECES if sources[i] else NONE
        counts[how] += 1
    return sources, counts


def rows(table: np.ndarray, sources: Sequence[Sequence[int]]) -> np.ndarray:
    """The new table [new, …] from the old table [old, …].

    Each row is the mean of its sources, or of all old rows if it has no sources.
    """
    everything = table.mean(axis=0)
    return np.stack([table[list(ids)].mean(axis=0) if ids else everything for ids in sources])
