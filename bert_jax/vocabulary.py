"""Computes word embeddings for a new vocabulary from the embeddings of the old vocabulary.

The embedding of a new piece is the mean of the embeddings of the old pieces that spell it. If no old pieces spell it,
its embedding is the mean of all old embeddings.
"""

from collections.abc import Sequence

import numpy as np

from bert_jax.tokenizer import Tokenizer

SAME, LOWER, PIECES, NONE = "copied", "copied from lower case", "averaged over old pieces", "averaged over all"


def carry(before: Tokenizer, after: Tokenizer) -> tuple[list[list[int]], dict[str, int]]:
    """Finds the old pieces from which the embedding of each new piece is computed.

    If the old vocabulary contains the new piece, only that piece is used. If the old vocabulary contains only the
    lowercase form of the new piece, only that form is used. Otherwise, the pieces into which the old tokenizer splits
    the new piece are used.

    Args:
        before: The tokenizer with the old vocabulary.
        after: The tokenizer with the new vocabulary.

    Returns:
        A list of old ids for each new id, and a dict that maps each method of computing an embedding (`SAME`, `LOWER`,
        `PIECES` or `NONE`) to the number of new pieces for which it is used. If no old piece was found for a new id,
        its list of old ids is empty.
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
            # If the new piece continues a word ("##ing"), its first old piece should also continue a word.
            if piece.startswith("##") and pieces and f"##{pieces[0]}" in old:
                pieces[0] = f"##{pieces[0]}"
            sources[i] = [old[p] for p in pieces if old[p] != before.unk_token_id]
            how = PIECES if sources[i] else NONE
        counts[how] += 1
    return sources, counts


def rows(table: np.ndarray, sources: Sequence[Sequence[int]]) -> np.ndarray:
    """Computes the new table [new, …] from the old table [old, …].

    Entry i of `sources` (as returned by `carry`) lists the old rows whose mean becomes row i of the new table. If the
    entry is empty, the new row is the mean of all old rows.
    """
    everything = table.mean(axis=0)
    return np.stack([table[list(ids)].mean(axis=0) if ids else everything for ids in sources])
