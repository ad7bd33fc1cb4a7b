"""Small texts of two classes to learn from."""

import numpy as np

WORDS = ["good", "bad", "fine", "poor", "nice", "awful", "great", "dull", "happy", "sad"]


def rows(n, seed=0):
    """Texts whose first word decides the label."""
    random = np.random.default_rng(seed)
    texts = [random.choice(WORDS, random.integers(1, 13)).tolist() for _ in range(n)]
    return [{"text": " ".join(words), "label": "no" if WORDS.index(words[0]) % 2 else "yes"} for words in texts]
