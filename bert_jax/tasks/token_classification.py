"""token-classification: labels the tokens of a text or finds entities in it (Devlin et al. 2018, section 5.3)."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import jax
import numpy as np
from tokenizers import Encoding
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from bert_jax import losses
from bert_jax.config import BertConfig
from bert_jax.data.formats import Row, literal
from bert_jax.data.loader import Examples
from bert_jax.data.sources import TEXTS
from bert_jax.errors import InputError, listed, quoted
from bert_jax.heads import BertForTokenClassification
from bert_jax.tasks.base import Features, Outputs, ReadOptions, Request, Steps, TrainableTask, known_labels
from bert_jax.tokenizer import Tokenizer

Strategy = Literal["none", "simple", "first", "average", "max"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "first": lambda scores: scores[0],
    "average": lambda scores: scores.mean(0),
    "max": lambda scores: scores[scores.max(1).argmax()],
}
"""Maps each strategy to a function that computes a word's probabilities [C] from those of its tokens [tokens, C]."""
Item = TypeVar("Item")


class TokenEntity(TypedDict):
    """A token or a whole word with its label. `TokenClassification.request` describes the fields."""

    entity: str
    score: float
    index: int
    word: str
    start: int
    end: int


class Entity(TypedDict):
    """A group of neighboring tokens whose labels have the same type."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Piece:
    """A token of the text.

    Attributes:
        token: The token or, if the token is [UNK], the characters that it represents in the text.
        start: The index of the token's first character in the text.
        end: The index in the text of the first character after the token.
        index: The position of the token; [CLS] is at position 0.
        scores: The probabilities of the labels, float32 [C].
        continues: Whether the token continues a word.
    """

    token: str
    start: int
    end: int
    index: int
    scores: np.ndarray
    continues: bool


class TokenClassification(TrainableTask):
    """Labels tokens and groups them into entities, like the token-classification pipeline of `transformers`."""

    name = "token-classification"
    model_class = BertForTokenClassification
    columns_of_input = (("tokens",), ("words",), *TEXTS)
    json_input: Any = str | list[str]
    example = "a"
    columns = {"tokens": ("tokens", "words"), "tags": ("ner_tags_str", "ner_tags", "tags")}  # noqa: RUF012
    required, target = ("tokens",), "tags"
    head, peft_type = r"classifier\..*", "TOKEN_CLS"
    metrics: tuple[str, ...] = ("f1", "precision", "recall", "accuracy")
    per_token, masked = True, False

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.stride = max_length // 4
        self.labels = config.labels
        if not _marked(self.labels):  # the labels do not mark entities, as in part-of-speech tagging
            self.metrics = ("accuracy",)

    def forward(
        self, model: BertForTokenClassification, inputs: dict[str, Any], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """The probabilities of the labels, float32 [B, T, C]."""
        return {"scores": jax.nn.softmax(model(**inputs).logits)}

    def request(
        self,
        text: str | tuple[str, ...],
        *,
        aggregation_strategy: Strategy = "none",
        ignore_labels: Sequence[str] = ("O",),
    ) -> Request[list[TokenEntity] | list[Entity]]:
        """Labels the tokens of one text.

        Args:
            text: A text, or its words as a tuple or list. Words are joined with spaces, and `start` and `end` refer to
                the joined text. A text longer than the model's maximum length is split into overlapping windows. Each
                token gets its label from the window in which it is farthest from a cut, that is, from a window boundary
                within the text.
            aggregation_strategy: "none" returns tokens. "simple" groups neighboring tokens whose labels have the same
                type; a label with the prefix B- begins a new group. The other strategies assign one label to each word
                and then group words in the same way as "simple" groups tokens. The label of a word is the label of its
                first token ("first"), the label with the highest mean probability over its tokens ("average"), or the
                label with the highest probability at any of its tokens ("max").
            ignore_labels: Labels to omit or, if tokens are grouped, entity types to omit, such as "PER".

        Returns:
            A list of `{entity, score, index, word, start, end}` dicts for the strategy "none"; otherwise, a list of
            `{entity_group, score, word, start, end}` dicts. Each entry covers the characters `text[start:end]`. `index`
            is the position of the token; [CLS] is at position 0.

        Raises:
            InputError: If the input is neither a text nor a sequence of words, if it is empty, or if a parameter is
                invalid.
        """
        words: list[str] | None = None
        if not isinstance(text, str):
            if not isinstance(text, list | tuple) or not all(isinstance(word, str) for word in text):
                raise InputError(f"expected a text or its words, got {quoted(text)} ({type(text).__name__}).")
            words, text = list(text), " ".join(text)
        if not text.strip():
            raise InputError("the text is empty.")
        if aggregation_strategy not in STRATEGIES:
            raise InputError(
                f"aggregation_strategy is {quoted(aggregation_strategy)}; expected one of {listed(STRATEGIES)}."
            )
        if not isinstance(ignore_labels, list | tuple) or not all(isinstance(name, str) for name in ignore_labels):
            raise InputError(f"ignore_labels is {quoted(ignore_labels)}; expected a list of labels.")
        windows = self.tokenizer.encode(
            [text if words is None else words],
            is_split_into_words=words is not None,
            max_length=self.max_length,
            stride=self.stride,
        )[0]
        steps = self._label(text, words, windows, aggregation_strategy, frozenset(ignore_labels))
        tokens = sum(map(len, windows))
        return Request(steps, tokens, 150 * tokens)

    def _label(
        self, text: str, words: list[str] | None, windows: list[Encoding], strategy: str, ignored: frozenset[str]
    ) -> Steps[list[TokenEntity] | list[Entity]]:
        outputs = yield [Features(window.ids, window.type_ids) for window in windows]
        pieces = self._pieces(text, words, windows, outputs)
        if strategy in ("none", "simple"):
            entities = [self._entity([piece], piece.scores, piece.token) for piece in pieces]
        else:
            entities = [self._word(word, strategy) for word in _runs(pieces, lambda _, piece: piece.continues)]
        if strategy == "none":
            return [entity for entity in entities if entity["entity"] not in ignored]
        groups = [self._group(group) for group in _runs(entities, _continues)]
        return [group for group in groups if group["entity_group"] not in ignored]

    def _pieces(
        self, text: str, words: list[str] | None, windows: list[Encoding], outputs: Sequence[Outputs]
    ) -> list[Piece]:
        """The tokens of the text, each taken from its best window (see `_places`)."""
        # The start of each word in the text, if the text was joined from words.
        starts = np.cumsum([0, *(len(word) + 1 for word in words or [])]).tolist()
        pieces = []
        for index, (n, i) in enumerate(self._places(windows), 1):
            window = windows[n]
            shift = starts[window.token_to_word(i)] if words else 0
            start, end = (shift + offset for offset in window.offsets[i])
            token, shown = window.tokens[i], text[start:end]
            unknown = window.ids[i] == self.tokenizer.unk_token_id
            # A token that continues a word begins with ##, so it is longer than the characters that it represents.
            continues = not unknown and len(token) != len(shown)
            pieces.append(Piece(shown if unknown else token, start, end, index, outputs[n]["scores"][i], continues))
        return pieces

    def _places(self, windows: list[Encoding]) -> Iterator[tuple[int, int]]:
        """For each token of a text, yields the index of the token's best window and the token's index in that window.

        The best window is the one in which the token is farthest from a cut, that is, from a window boundary within the
        text.
        """
        for n, window in enumerate(windows):
            inside = [i for i, special in enumerate(window.special_tokens_mask) if not special]
            # Neighboring windows share `stride` tokens. The first half of the shared tokens is taken from the earlier
            # window, and the rest from the later one.
            start = (self.stride + 1) // 2 if n else 0
            stop = len(inside) - (self.stride // 2 if n < len(windows) - 1 else 0)
            yield from ((n, i) for i in inside[start:stop])

    def _word(self, pieces: list[Piece], strategy: str) -> TokenEntity:
        scores = AGGREGATES[strategy](np.stack([piece.scores for piece in pieces]))
        return self._entity(pieces, scores, self._joined([piece.token for piece in pieces]))

    def _entity(self, pieces: list[Piece], scores: np.ndarray, word: str) -> TokenEntity:
        best = int(scores.argmax())
        return {
            "entity": self.labels[best],
            "score": float(scores[best]),
            "index": pieces[0].index,
            "word": word,
            "start": pieces[0].start,
            "end": pieces[-1].end,
        }

    def _group(self, entities: list[TokenEntity]) -> Entity:
        return {
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": float(np.mean([entity["score"] for entity in entities])),
            "word": self._joined([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }

    def _joined(self, tokens: list[str]) -> str:
        return str(self.tokenizer.backend.decoder.decode(tokens))

    # ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """See `TrainableTask.clean`. Converts numeric tags to names, and IOB1 and BIOES tags to IOB2."""
        cleaned = {split: [dict(row) for row in found] for split, found in rows.items()}
        for split, found in cleaned.items():
            for i, row in enumerate(found, 1):
                try:
                    row["tokens"], row["tags"] = _words_and_tags(row["tokens"], row.get("tags"), options.labels or ())
                except InputError as error:
                    raise InputError(f"data.{split}: row {i}: {error}") from None
        schemes = {}
        for split, found in cleaned.items():
            tagged = [row for row in found if row["tags"] is not None]
            try:
                scheme, converted = _read_scheme([row["tags"] for row in tagged])
            except InputError as error:
                raise InputError(f"data.{split}: {error}") from None
            for row, tags in zip(tagged, converted, strict=True):
                row["tags"] = tags
            if tagged:
                schemes[split] = scheme
        if len(every := set(schemes.values())) == 1:
            return cleaned, f"tags: {every.pop()}"
        return cleaned, "; ".join(f"tags of {split}: {scheme}" for split, scheme in schemes.items())

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """See `TrainableTask.config`. The returned fields are the label names and the number of labels.

        The names are taken from the first applicable source:

        1. `options.labels`, if given.
        2. `labels`, if given. This source does not apply if it lacks a tag that occurs in the rows, or if it contains
           a tag that begins with E- or S-.
        3. O, then B- and I- labels for each type in sorted order, then all other tags in sorted order. If no tag marks
           an entity, the names are all tags in sorted order.
        """
        tags = {tag for row in rows for tag in row["tags"] or ()}
        if not tags:
            raise InputError("data.train: no row has tags; data.tags names the column.")
        kinds = sorted({tag[1:] for tag in _marked(tags)})
        usual = ["O", *(f"{prefix}{kind}" for kind in kinds for prefix in "BI")] if kinds else []
        names = options.labels or (*usual, *sorted(tags - set(usual)))
        if not options.labels and labels and tags <= set(labels) and not any(tag[0] in "ES" for tag in _marked(labels)):
            names = labels
        if unknown := sorted(tags - set(names)):
            raise InputError(f"data.labels lacks the tag {quoted(unknown[0])} of data.train; it has {listed(names)}.")
        return {"id2label": names, "num_labels": len(names)}

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows with `tokens` and optional `tags` to windows.

        The label of a word is assigned to its first piece, in only one of the windows that contain this piece. All
        other tokens get `losses.IGNORE`.

        Raises:
            InputError: If a tag is unknown. The message gives the row number.
        """
        ids = {label: i for i, label in enumerate(self.labels)}
        encoded = self.tokenizer.encode(
            [row["tokens"] for row in rows], is_split_into_words=True, max_length=self.max_length, stride=self.stride
        )
        labels, origins = [], []
        for n, (row, parts) in enumerate(zip(rows, encoded, strict=True)):
            tags = row.get("tags")
            if unknown := [tag for tag in tags or () if tag not in ids]:
                raise InputError(f"row {n + 1}: the tag {quoted(unknown[0])} is unknown; {known_labels(self.labels)}")
            columns = [np.full(len(part), losses.IGNORE, np.int32) for part in parts]
            # For each window, the words whose tags are read from it, each as (index of the first piece, index of the
            # word).
            firsts: list[list[tuple[int, int]]] = [[] for _ in parts]
            last = None
            for window, i in self._places(parts):
                word = parts[window].token_to_word(i)
                if word is not None and word != last:
                    firsts[window].append((i, word))
                    if tags:
                        columns[window][i] = ids[tags[word]]
                last = word
            labels += columns
            origins += [(n, row, places) for places in firsts]
        return Examples(
            input_ids=[np.array(window.ids, np.int32) for parts in encoded for window in parts],
            token_type_ids=[np.array(window.type_ids, np.int32) for parts in encoded for window in parts],
            token_targets={"labels": labels},
            origins=origins,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )

    def loss(
        self,
        model: BertForTokenClassification,
        batch: Mapping[str, Any],
        dropout_key: jax.Array | None,
        *,
        class_weights: jax.Array | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective.loss`. Computes `losses.cross_entropy` over words, with the given options."""
        labels = batch["targets"]["labels"]
        logits = model(**batch["inputs"], dropout_key=dropout_key).logits
        loss = losses.cross_entropy(
            logits, labels, class_weights=class_weights, label_smoothing=label_smoothing, focal_gamma=focal_gamma
        )
        return loss, losses.total_weight(labels, class_weights)

    def labeled(self, examples: Examples) -> bool:
        """See `TrainableTask.labeled`."""
        return any(row["tags"] for _, row, _ in examples.origins)

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """The metrics of the rows with tags (see `bert_jax.evaluation.metrics.tagging`); empty if no row has tags."""
        from bert_jax.evaluation import metrics

        if not self.labeled(examples):
            return {}
        truth = {n: row["tags"] for n, row, _ in examples.origins}
        found = self.predictions(outputs, examples)
        known = [n for n, tags in truth.items() if tags]
        # If the model predicts BIOES tags, they are converted to IOB2, because `clean` converts the true tags to IOB2.
        bioes = any(label[0] in "ES" for label in _marked(self.labels))
        tags = [iob2(found[n]["tags"]) if bioes else found[n]["tags"] for n in known]
        result = metrics.tagging([truth[n] for n in known], tags)
        return result if "f1" in self.metrics else {"accuracy": result["accuracy"]}

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """Returns a `{tags}` dict for each row, with one tag per word.

        A word without tokens gets the tag O or, if the model has no O label, the model's first label.
        """
        found: dict[int, list[str]] = {}
        nothing = "O" if "O" in self.labels else self.labels[0]
        for scores, (n, row, places) in zip(outputs["scores"], examples.origins, strict=True):
            tags = found.setdefault(n, [nothing] * len(row["tokens"]))
            for i, word in places:
                tags[word] = self.labels[int(scores[i].argmax())]
        return [{"tags": tags} for tags in found.values()]


def iob2(tags: Sequence[str]) -> list[str]:
    """Converts tags in any scheme to IOB2: B- for the first word of an entity and I- for its other words.

    Tags without an entity type become B or I.
    """
    from bert_jax.evaluation import metrics

    converted = ["O"] * len(tags)
    for _, first, last in metrics.entities(tags):
        kind = tags[first][1:]  # includes the hyphen
        converted[first : last + 1] = [f"B{kind}", *[f"I{kind}"] * (last - first)]
    return converted


def _marked(tags: Iterable[str]) -> set[str]:
    """The tags that mark a word as part of an entity: tags such as B-PER, or the single letters B, I, E and S.

    Single letters are recognized only if they include B or I, and only if all other tags are O.
    """
    tags = set(tags)
    bare = tags - {"O"}
    if bare <= set("BIES") and bare & set("BI"):
        return bare
    return {tag for tag in tags if re.fullmatch(r"[BIES]-.+", tag)}


def _words_and_tags(tokens: Any, tags: Any, names: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Returns the words and the tags of a row. The tags are None if the row has no tags.

    Numeric tags are indices into `names`.
    """
    # In CSV files, lists are written as strings.
    tokens, tags = (literal(cell) if isinstance(cell, str) else cell for cell in (tokens, tags))
    if not isinstance(tokens, list | tuple) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"tokens is {quoted(tokens)}; expected a list of one or more words.")
    if tags is None:
        return list(tokens), None
    if not isinstance(tags, list | tuple) or len(tags) != len(tokens):
        count = len(tags) if isinstance(tags, list | tuple) else "no list of"
        raise InputError(f"{len(tokens)} tokens and {count} tags; expected one tag for each token.")
    for tag in tags:
        if not isinstance(tag, str | int) or isinstance(tag, bool):
            raise InputError(f"a tag is {quoted(tag)}; expected a text, or a number if data.labels names the tags.")
        if isinstance(tag, int) and not 0 <= tag < len(names):
            raise InputError(
                f"the tag {tag} is outside data.labels ({len(names)} names); list the names of all tags there."
            )
    return list(tokens), [str(names[tag] if isinstance(tag, int) else tag) for tag in tags]


def _read_scheme(sentences: list[list[str]]) -> tuple[str, list[list[str]]]:
    """Determines the tagging scheme (IOB1, IOB2, BIOES or none) of all sentences and converts the tags to IOB2.

    Tags of the form PER-B are read as B-PER.

    Returns:
        The scheme, described in a note for the user, and the tags. Tags that follow a scheme are converted to IOB2.

    Raises:
        InputError: If only some of the tags follow a scheme, or if the tags appear to follow an unknown scheme.
    """
    tags = {tag for sentence in sentences for tag in sentence}
    marked = _marked(tags)
    others = sorted(tags - marked - {"O"})
    suffixed = not marked and all(re.fullmatch(r".+-[BIES]", tag) for tag in others)
    if suffixed and any(tag[-1] in "BI" for tag in others):
        swapped = {tag: f"{tag[-1]}-{tag[:-2]}" for tag in others}
        return _read_scheme([[swapped.get(tag, tag) for tag in sentence] for sentence in sentences])
    prefixed = r"\w-.+|.+-[BI]|[BIES][._:/|].+"
    if stray := [tag for tag in others if marked or ("O" in tags and re.fullmatch(prefixed, tag))]:
        raise InputError(f"the tag {quoted(stray[0])} follows no scheme; expected O, B-PER, I-PER, … or only O, B, I.")
    if not marked:
        return "none", sentences
    converted = [iob2(sentence) for sentence in sentences]
    if any(tag[0] in "ES" for tag in marked):
        return "BIOES, read as IOB2", converted
    pairs = zip(itertools.chain(*sentences), itertools.chain(*converted), strict=True)
    begins = [tag[0] for tag, new in pairs if new[0] == "B"]
    # In IOB1, B- is rare, because an entity begins with B- only if it directly follows an entity of the same type.
    if begins.count("B") > len(begins) / 2:
        return "IOB2", sentences
    return "IOB1, read as IOB2", converted


def _runs(items: Iterable[Item], joins: Callable[[Item, Item], bool]) -> list[list[Item]]:
    """Groups neighboring items. An item joins the preceding item's group if `joins(before, item)` is true."""
    runs: list[list[Item]] = []
    for item in items:
        if runs and joins(runs[-1][-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _continues(before: TokenEntity, entity: TokenEntity) -> bool:
    """Whether `entity` has the same type as `before` and a label that does not begin with B-.

    If so, both belong to the same group. A label without a prefix is treated like a label with the prefix I-.
    """
    kinds = {re.sub("^[BI]-", "", neighbour["entity"]) for neighbour in (before, entity)}
    return len(kinds) == 1 and not entity["entity"].startswith("B-")
