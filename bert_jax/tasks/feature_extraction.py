"""feature-extraction: returns the encoder's output vectors, one per token or one for the whole text."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from bert_jax.config import BertConfig
from bert_jax.data.sources import TEXTS
from bert_jax.errors import CheckpointError, InputError, quoted
from bert_jax.model import BertModel
from bert_jax.sentence_embedding import SentenceEmbedding
from bert_jax.tasks.base import Features, Request, Steps, check_text
from bert_jax.tokenizer import Tokenizer

POOLING = (None, "cls", "mean", "max", "auto")


class FeatureExtraction:
    """Returns the vectors of the last layer or of selected layers."""

    name = "feature-extraction"
    model_class = BertModel
    per_token, masked, one_mask, with_labels = True, False, False, False
    columns_of_input = TEXTS
    json_input: Any = str
    example = "a"

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int, *, folder: Path | None = None):
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = max_length
        self.folder = folder

    @functools.cached_property
    def embedding(self) -> SentenceEmbedding:
        """The settings for `pooling="auto"`, which `declared` reads from the model's folder.

        Raises:
            InputError: If the model was not loaded from a folder, or if `declared` raises `CheckpointError`.
        """
        if self.folder is None:
            raise InputError("pooling is 'auto', but the model was not loaded from a folder; expected 'cls' or 'mean'.")
        try:
            return self.declared(self.folder)
        except CheckpointError as error:
            raise InputError(f"pooling is 'auto', but {error} To choose the pooling, pass 'cls' or 'mean'.") from None

    def declared(self, folder: Path) -> SentenceEmbedding:
        """Reads a folder's sentence-transformers settings for combining token vectors into a single vector.

        Raises:
            CheckpointError: If the folder contains no sentence-transformers model, or if the settings are unsupported
                or do not match the network or the tokenizer.
        """
        embedding = SentenceEmbedding.from_pretrained(folder)
        if embedding.size != self.config.hidden_size:
            raise CheckpointError(
                f"{folder} declares vectors of {embedding.size} dimensions; the model has {self.config.hidden_size}."
            )
        if embedding.lowercase and not getattr(self.tokenizer.backend.normalizer, "lowercase", False):
            raise CheckpointError(f"{folder} declares do_lower_case, but its tokenizer keeps the case.")
        if min(embedding.max_length or 0, self.config.max_position_embeddings) > self.max_length:
            raise CheckpointError(
                f"{folder} declares max_seq_length {embedding.max_length}, but its tokenizer has the model_max_length "
                f"{self.max_length}."
            )
        return embedding

    @property
    def embedding_length(self) -> int:
        """The maximum number of tokens per text, including special tokens. Raises the same errors as `embedding`."""
        return min(self.max_length, self.embedding.max_length or self.max_length)

    def forward(self, model: BertModel, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """The hidden states, keyed by layer number ("0" for the embeddings): [B, T, D] in the compute dtype."""
        return {str(i): states for i, states in enumerate(model(**inputs).hidden_states)}

    def request(
        self,
        text: str,
        *,
        layers: Sequence[int] | None = None,
        pooling: Literal["cls", "mean", "max", "auto"] | None = None,
        normalize: bool = False,
    ) -> Request[np.ndarray]:
        """Encodes one text.

        Args:
            text: The text, which is truncated to the model's maximum length.
            layers: The layers to return, such as `[6, -1]`. They are numbered like the items of `hidden_states`: 0 for
                the embeddings, 1 for the first layer, and -1 for the last. None returns the vectors of the last layer,
                without a layer axis.
            pooling: None returns the vector of each token. "cls" returns the vector of [CLS]. "mean" and "max" return
                the mean and the maximum over all tokens, including [CLS] and [SEP] (Reimers & Gurevych 2019,
                arXiv:1908.10084, section 3). "auto" applies the pooling, normalization and maximum length declared by
                the sentence-transformers files in the model's folder.
            normalize: Whether to scale each vector to length 1. With `pooling="auto"`, vectors are also scaled if the
                sentence-transformers files declare normalization.

        Returns:
            float32 [T, D] if `pooling` is None, else [D]. If `layers` is given, a layer axis comes first:
            [layers, T, D] or [layers, D].

        Raises:
            InputError: If `text` is not a string or is blank, if the model lacks one of the `layers`, if `pooling` is
                unknown, or if `pooling` is "auto" and the model's folder contains no supported sentence-transformers
                model.
        """
        check_text(text)
        if pooling not in POOLING:
            raise InputError(f"pooling is {quoted(pooling)}; expected one of {', '.join(map(repr, POOLING))}.")
        if pooling == "auto":
            return self.embed(text, layers=layers, normalize=normalize or self.embedding.normalize)
        encoding = self.tokenizer.encode([text], max_length=self.max_length)[0][0]
        return self._request(encoding.ids, layers, pooling, normalize)

    def embed(
        self,
        text: str | Sequence[int],
        *,
        layers: Sequence[int] | None = None,
        normalize: bool | None = None,
        truncate: bool = True,
    ) -> Request[np.ndarray]:
        """Embeds one text with the pooling declared by the sentence-transformers files in the model's folder.

        Args:
            text: A text, or its token ids. [CLS] and [SEP] are added to ids that lack them.
            layers: See `request`.
            normalize: Whether to scale the vector to length 1; None to use the setting in the sentence-transformers
                files.
            truncate: Whether to truncate a text that is too long. If false, such a text raises `InputError`.

        Returns:
            float32 [D]; [layers, D] if `layers` is given.

        Raises:
            InputError: If `text` is blank, has no ids, has an invalid id, or is too long while `truncate` is false; if
                the model lacks one of the `layers`; or if `embedding` raises `InputError`.
        """
        embedding, longest = self.embedding, self.embedding_length
        if isinstance(text, str):
            check_text(text)
            ids = self.tokenizer.encode([text])[0][0].ids
            if len(ids) > longest and truncate:
                ids = self.tokenizer.encode([text], max_length=longest)[0][0].ids
        else:
            ids = self._with_special_tokens(text)
            if len(ids) > longest and truncate:
                ids = [*ids[: longest - 1], ids[-1]]
        if len(ids) > longest:
            raise InputError(f"the text has {len(ids)} tokens; at most {longest} are allowed.")
        normalize = embedding.normalize if normalize is None else normalize
        return self._request(ids, layers, embedding.pooling, normalize)

    def _with_special_tokens(self, ids: Sequence[int]) -> list[int]:
        size = self.tokenizer.vocab_size
        if wrong := [id_ for id_ in ids if not 0 <= id_ < size]:
            raise InputError(f"the token id {wrong[0]} is out of range; the model has ids from 0 to {size - 1}.")
        if not ids:
            raise InputError("there are no token ids.")
        first, last = self.tokenizer.encode([""])[0][0].ids
        return list(ids) if [ids[0], ids[-1]] == [first, last] else [first, *ids, last]

    def _request(
        self, ids: list[int], layers: Sequence[int] | None, pooling: str | None, normalize: bool
    ) -> Request[np.ndarray]:
        count = self.config.num_hidden_layers
        if layers is not None and (
            not isinstance(layers, list | tuple)
            or not layers
            or not all(type(layer) is int and -count - 1 <= layer <= count for layer in layers)
        ):
            raise InputError(
                f"layers is {quoted(layers)}; expected a list of numbers from 0 (the embeddings) to {count} (the last "
                "layer), or negative ones that count from the last, -1."
            )
        vectors = (1 if layers is None else len(layers)) * (len(ids) if pooling is None else 1)
        return Request(self._encode(ids, layers, pooling, normalize), len(ids), 25 * self.config.hidden_size * vectors)

    def _encode(
        self, ids: list[int], layers: Sequence[int] | None, pooling: str | None, normalize: bool
    ) -> Steps[np.ndarray]:
        names = [str(layer % (self.config.num_hidden_layers + 1)) for layer in layers or [-1]]
        (output,) = yield [Features(ids, [0] * len(ids), outputs=tuple(names))]
        states = np.stack([output[name] for name in names]).astype(np.float32)  # [layers, T, D]
        vectors: np.ndarray = {
            None: states, "cls": states[:, 0], "mean": states.mean(axis=1), "max": states.max(axis=1),
        }[pooling]  # fmt: skip
        if normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors[0] if layers is None else vectors
