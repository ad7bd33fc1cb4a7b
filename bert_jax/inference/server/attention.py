"""Computes the attention weights that the web page shows for a text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.errors import InputError
from bert_jax.inference.batches import BUCKET_LENGTHS
from bert_jax.inference.pipelines import Pipeline
from bert_jax.tasks.base import Task

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ATTENTION_TOKENS = 128
"""Maximum number of tokens, including special tokens, in a text for which `Attention` computes weights."""


class Attention:
    """Computes the attention weights of one layer for one text, with one compiled program per padded length."""

    def __init__(self, pipe: Pipeline[Task]):
        self.pipe = pipe
        longest = min(ATTENTION_TOKENS, pipe.max_length)
        self.lengths = [*(length for length in BUCKET_LENGTHS if length < longest), longest]
        self._programs: dict[int, jax.stages.Compiled] = {}

    def compile(self, length: int) -> jax.stages.Compiled:
        """Returns the compiled program for a padded length. The first call for each length compiles the program."""

        def attentions(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
            return jnp.stack([layer[0] for layer in self.pipe.model(params).encoder(**inputs).attentions])

        if length not in self._programs:
            inputs = dict.fromkeys(MODEL_INPUTS, jax.ShapeDtypeStruct((1, length), np.int32))
            self._programs[length] = jax.jit(attentions).lower(self.pipe.params, inputs).compile()
        return self._programs[length]

    def weights(self, text: str, layer: int) -> dict[str, Any]:
        """Returns the tokens of a text and the attention weights of each head in one layer.

        Raises:
            InputError: If the text has too many tokens.
        """
        encoding = self.pipe.tokenizer.encode([text])[0][0]
        tokens, longest = len(encoding), self.lengths[-1]
        if tokens > longest:
            raise InputError(f"the text has {tokens} tokens; attention is shown for at most {longest}.")
        length = min(length for length in self.lengths if length >= tokens)
        inputs = self.pipe.tokenizer.pad([encoding.ids], [encoding.type_ids], length=length)
        weights = np.asarray(self.compile(length)(self.pipe.params, inputs)[layer, :, :tokens, :tokens])
        return {"tokens": encoding.tokens, "attention": weights.astype(np.float64).round(4).tolist()}
