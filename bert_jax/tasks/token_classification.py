"""token-classification: a label for each token or, grouped, a text's entities (Devlin et al. 2018, section 5.3)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tokenizers import Encoding

from bert_jax.config import BertConfig
from bert_jax.errors import InputError
from bert_jax.model import BertForTokenClassification
from bert_jax.tasks.base import Outputs, Request, Row
from bert_jax.tokenizer import Tokenizer

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class Piece:
    """A token of the text: string, characters, place, its labels' probabilities, and whether it continues a word."""

    token: str
    start: int
    end: int
    index: int
    scores: np.ndarray
    continues: bool


class TokenClassification:
    """Labels tokens and groups them to entities, as transformers' pipeline does."""

    model_class = BertForTokenClassification

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.stride = max_length // 4
        self.labels = config.labels

    def forward(self, model: BertForTokenClassification, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Probabilities of the labels, float32 [B, T, C]."""
        return {"scores": jax.nn.softmax(model(**inputs).logits)}

    def request(
        self,
        text: str | Sequence[str],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
    ) -> Request:
        """Labels one text.

        Args:
            text: A text, or its words as a tuple or list; these are joined by a space, and characters count in that.
                What is over the model's length is read in windows, each token from where it stands farthest from a cut.
            aggregation_strategy: "none" gives tokens. "simple" groups neighbouring tokens with one label, B- opening a
                new group. The others give all tokens of a word one label before: the "first" token's, that of the
                "average" probabilities, or that of the token with the "max" probability.
            ignore_labels: Labels that are left out.

        Returns:
            A list of `{entity, score, index, word, start, end}`, or of `{entity_group, score, word, start, end}`;
            `start` and `end` are characters of the text, `index` the token's place, [CLS] being 0.

        Raises:
            InputError: If it is no text, or empty, or the strategy is unknown.
        """
        words: list[str] | None = None
        if not isinstance(text, str):
            if not isinstance(text, list | tuple) or not all(isinstance(word, str) for word in text):
                raise InputError(f"expected a text or its words, got {text!r} ({type(text).__name__}).")
            words, text = list(text), " ".join(text)
        if not text.strip():
            raise InputError("the text is empty.")
        if aggregation_strategy not in STRATEGIES:
            raise InputError(
                f"aggregation_strategy is {aggregation_strategy!r}; expected one of {', '.join(STRATEGIES)}."
            )
        if isinstance(ignore_labels, str):
            raise InputError(f"ignore_labels is {ignore_labels!r}; expected a list of labels.")
        return self._label(text, words, aggregation_strategy, frozenset(ignore_labels))

    def _label(self, text: str, words: list[str] | None, strategy: str, ignored: frozenset[str]) -> Request:
        windows = self.tokenizer.encode(
            [text if words is None else words],
            is_split_into_words=words is not None,
            max_length=self.max_length,
            stride=self.stride,
        )[0]
        outputs = yield [Row(window.ids, window.type_ids) for window in windows]
        pieces = self._pieces(text, words, windows, outputs)
        if strategy in ("none", "simple"):
            entities = [self._entity([piece], piece.scores, piece.token) | {"index": piece.index} for piece in pieces]
        else:
            entities = [self._word(word, strategy) for word in _words(pieces)]
        if strategy == "none":
            keys = ("entity", "score", "index", "word", "start", "end")
            return [{key: entity[key] for key in keys} for entity in entities if entity["entity"] not in ignored]
        groups = [self._group(group) for group in _groups(entities)]
        return [group for group in groups if group["entity_group"] not in ignored]

    def _pieces(
        self, text: str, words: list[str] | None, windows: list[Encoding], outputs: Sequence[Outputs]
    ) -> list[Piece]:
        """The text's tokens, each from the window in which the nearest cut is farthest."""
        # Characters before each word, where the text is its words joined by a space.
        before = np.cumsum([0, *(len(word) + 1 for word in words or [])]).tolist()
        chosen: dict[int, tuple[float, Piece]] = {}
        first = 0
        for n, (window, output) in enumerate(zip(windows, outputs, strict=True)):
            inside = [i for i, special in enumerate(window.special_tokens_mask) if not special]
            for k, i in enumerate(inside):
                start, end = window.offsets[i]
                if words is not None and window.word_ids[i] is not None:
                    start, end = start + before[window.word_ids[i]], end + before[window.word_ids[i]]
                token, shown = window.tokens[i], text[start:end]
                unknown = window.ids[i] == self.tokenizer.unk_token_id
                piece = Piece(
                    token=shown if unknown else token,
                    start=start,
                    end=end,
                    index=first + k + 1,
                    scores=output["scores"][i],
                    continues=not unknown and len(token) != len(shown),  # by the ## that it begins with
                )
                left = k if n else np.inf
                right = len(inside) - 1 - k if n < len(windows) - 1 else np.inf
                if piece.index not in chosen or min(left, right) > chosen[piece.index][0]:
                    chosen[piece.index] = (min(left, right), piece)
            first += len(inside) - self.stride
        return [piece for _, (_, piece) in sorted(chosen.items(), key=lambda entry: entry[0])]

    def _word(self, pieces: list[Piece], strategy: str) -> dict[str, Any]:
        if strategy == "first":
            scores = pieces[0].scores
        elif strategy == "max":
            scores = max((piece.scores for piece in pieces), key=lambda scores: scores.max())
        else:
            scores = np.mean([piece.scores for piece in pieces], axis=0)
        return self._entity(pieces, scores, self._joined([piece.token for piece in pieces]))

    def _entity(self, pieces: list[Piece], scores: np.ndarray, word: str) -> dict[str, Any]:
        best = int(scores.argmax())
        return {
            "entity": self.labels[best],
            "score": float(scores[best]),
            "word": word,
            "start": pieces[0].start,
            "end": pieces[-1].end,
        }

    def _group(self, entities: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": float(np.mean([entity["score"] for entity in entities])),
            "word": self._joined([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }

    def _joined(self, tokens: list[str]) -> str:
        return str(self.tokenizer.backend.decoder.decode(tokens))


def _words(pieces: Iterable[Piece]) -> list[list[Piece]]:
    words: list[list[Piece]] = []
    for piece in pieces:
        if words and piece.continues:
            words[-1].append(piece)
        else:
            words.append([piece])
    return words


def _groups(entities: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours of one type; B- opens a new group, and a label without a prefix goes on like I-."""

    def kind(label: str) -> str:
        return label[2:] if label.startswith(("B-", "I-")) else label

    groups: list[list[dict[str, Any]]] = []
    for entity in entities:
        label = entity["entity"]
        if groups and kind(groups[-1][-1]["entity"]) == kind(label) and not label.startswith("B-"):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups
