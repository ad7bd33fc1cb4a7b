"""Small texts of two classes to learn from, and a small classifier."""

import numpy as np
from flax import nnx

import bert_jax
from bert_jax.tasks.sequence_classification import SequenceClassification

WORDS = ["good", "bad", "fine", "poor", "nice", "awful", "great", "dull", "happy", "sad"]


def rows(n, seed=0):
    """Texts whose first word decides the label."""
    random = np.random.default_rng(seed)
    texts = [random.choice(WORDS, random.integers(1, 13)).tolist() for _ in range(n)]
    return [{"text": " ".join(words), "label": "no" if WORDS.index(words[0]) % 2 else "yes"} for words in texts]


def classifier(tokenizer, layers=2, width=8, **config):
    """A model without dropout, and its task."""
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = bert_jax.BertConfig(**shape, intermediate_size=2 * width, id2label=("no", "yes"), **config)
    # A dozen layers compile in time as one.
    model = bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), scan_layers=layers > 2)
    return model, SequenceClassification(tokenizer, config, 32)
