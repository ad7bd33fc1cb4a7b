"""feature-extraction: the encoder's output vectors, one per token or one for the whole text."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding

from bert_jax.config import BertConfig
from bert_jax.data.sources import TEXTS
from bert_jax.errors import InputError, quoted
from bert_jax.model import BertModel
from bert_jax.tasks.base import Features, Request, check_text
from bert_jax.tokenizer import Tokenizer

POOLING = (None, "cls", "mean")


class FeatureExtraction:
    """Returns the vectors of the last layer."""

    name = "feature-extraction"
    model_class = BertModel
    per_token, masked = True, False
    columns_of_input = TEXTS
    json_input: Any = str

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def forward(self, model: BertModel, inputs: dict[str, jax.Array], starts: jax.Array) -> dict[str, jax.Array]:
        """The last hidden states, float32 [B, T, D]."""
        return {"states": model(**inputs).last_hidden_state.astype(jnp.float32)}

    def request(
        self, text: str, *, pooling: Literal["cls", "mean"] | None = None, normalize: bool = False
    ) -> Request[np.ndarray]:
        """Encodes one text.

        Args:
            text: A text; it is truncated to the model's maximum length.
            pooling: None returns the vector of each token, "cls" returns the vector of [CLS], and "mean" returns the
                mean over all tokens, [CLS] and [SEP] included (Reimers & Gurevych 2019, arXiv:1908.10084, section 3).
            normalize: Whether to scale each vector to length 1.

        Returns:
            float32 [T, D] if `pooling` is None, else [D].

        Raises:
            InputError: If `text` is not a string or is blank, or if `pooling` is unknown.
        """
        check_text(text)
        if pooling not in POOLING:
            raise InputError(f"pooling is {quoted(pooling)}; expected one of {', '.join(map(repr, POOLING))}.")
        return self._encode(self.tokenizer.encode([text], max_length=self.max_length)[0][0], pooling, normalize)

    def _encode(self, encoding: Encoding, pooling: str | None, normalize: bool) -> Request[np.ndarray]:
        (output,) = yield [Features(encoding.ids, encoding.type_ids)]
        states = output["states"]
        vectors: np.ndarray = {None: states, "cls": states[0], "mean": states.mean(axis=0)}[pooling]
        if normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return np.array(vectors)  # copied, because a view would keep the outputs of the whole batch in memory
