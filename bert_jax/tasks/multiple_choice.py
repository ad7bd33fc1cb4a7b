"""multiple-choice: selects an answer to a question (Lai et al. 2017) or an ending for a text (Zellers et al. 2018)."""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from bert_jax import losses
from bert_jax.config import BertConfig
from bert_jax.data.formats import Row, literal
from bert_jax.data.loader import Batch, Examples, Place
from bert_jax.errors import InputError, listed, quoted
from bert_jax.heads import BertForMultipleChoice
from bert_jax.tasks.base import Features, Outputs, ReadOptions, Request, Steps, TrainableTask, check_pairs, check_text
from bert_jax.tokenizer import Tokenizer

ENDINGS = tuple(f"ending{i}" for i in range(10))
"""Names of the columns that contain one choice each. SWAG uses the first four."""
MOST_CHOICES = 32
"""Maximum number of choices per example. Each choice is tokenized together with the context."""
UNKNOWN = -1
"""The label of an unlabeled row."""


class Choice(TypedDict):
    """The most likely choice: its index, its text, and the probabilities of all choices."""

    choice: int
    answer: str
    scores: list[float]


@dataclass(frozen=True)
class ChoiceExamples(Examples):
    """Examples that each consist of C texts, one per choice.

    Each token array concatenates the texts of one example. The choices of an example therefore always share a row, as
    separate documents.

    Attributes:
        sizes: Number of tokens in each choice, int64 [N, C].
    """

    packed = True

    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), int))

    def batch(self, place: Place, part: tuple[int, int] = (0, 1)) -> Batch:
        """See `Examples.batch`.

        `starts` is [B, K · C]. Each row contains the start indices of the first example's choices, followed by those
        of the second example's choices, and so on.
        """
        batch = super().batch(place, part)
        tokens = {name: batch["inputs"][name] for name in ("input_ids", "token_type_ids")}
        count = self.sizes.shape[1]
        starts = np.repeat(np.zeros_like(batch["starts"]), count, axis=1)
        documents, positions = np.zeros_like(tokens["input_ids"]), np.zeros_like(tokens["input_ids"])
        for spot in self.spots(place, part):
            sizes = self.sizes[spot.item]
            firsts = np.cumsum(sizes) - sizes
            numbers = spot.number * count + np.arange(count)
            documents[spot.tokens] = np.repeat(numbers + 1, sizes)
            positions[spot.tokens] = np.arange(spot.stop - spot.start) - np.repeat(firsts, sizes)
            starts[spot.row, numbers] = spot.start + firsts
        inputs = {**tokens, "document_ids": documents, "position_ids": positions}
        return Batch(inputs=inputs, targets=batch["targets"], starts=starts, weights=batch["weights"])


class MultipleChoice(TrainableTask):
    """Assigns a probability to each choice. The model reads each choice separately, together with the context."""

    name = "multiple-choice"
    model_class = BertForMultipleChoice
    columns_of_input = (
        ("context", "question", "choices"),
        ("article", "question", "options"),
        *(("sent1", "sent2", *ENDINGS[:count]) for count in range(len(ENDINGS), 1, -1)),
        ("context", "choices"),
    )
    json_input: Any = dict[str, str | list[str] | None]
    example = ("a", ["a", "a"])
    columns = {  # noqa: RUF012
        "context": ("context", "article", "passage", "sent1", "premise"),
        "question": ("question", "sent2"),
        "answers": ("choices", "options", "endings", "answers"),
        "label": ("label", "answer"),
        **{name: (name,) for name in ENDINGS},
    }
    required, target = ("context",), "label"
    head, peft_type = r"classifier\..*", "SEQ_CLS"
    metrics = ("accuracy",)
    per_token, masked = False, False

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        check_pairs(config)
        self.tokenizer = tokenizer
        self.max_length = max_length

    # ── Inference ────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(self, model: BertForMultipleChoice, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """The score of each choice: float32 [B, K]."""
        return {"logits": model(**inputs, positions=starts).logits}

    def request(self, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Request[Choice]:
        """Selects one of the choices.

        Args:
            inputs: `{"context": …, "choices": […]}`, optionally with a `question`. Alternatively, a tuple of the form
                (context, list of choices), (context, question, list of choices) or (context, question, choice, choice,
                …), where the question may be empty. Each choice replaces the first blank (`_` or `____`) in the
                question. If the question has no blank, the choice follows the question. If the context and a choice
                together are longer than the model's maximum length, the longer of the two is truncated.

        Returns:
            `{choice, answer, scores}`: the index of the most likely choice, its text, and the probabilities of all
            choices in their original order.

        Raises:
            InputError: If there are fewer than 2 or more than `MOST_CHOICES` choices, or if the context or a choice is
                empty or not a string.
        """
        context, question, choices = _parts(inputs)
        encodings = self._encode(context, question, choices)
        tokens, size = sum(map(len, encodings)), 80 + 25 * len(choices) + len(max(choices, key=len))
        return Request(self._choose(encodings, choices), tokens, size)

    def _choose(self, encodings: Sequence[Encoding], choices: Sequence[str]) -> Steps[Choice]:
        outputs = yield [Features(encoding.ids, encoding.type_ids) for encoding in encodings]
        logits = np.array([output["logits"] for output in outputs])
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = int(scores.argmax())
        return {"choice": best, "answer": choices[best], "scores": scores.tolist()}

    def _encode(self, context: str, question: str, choices: Sequence[str]) -> list[Encoding]:
        """Encodes each choice as a pair of texts: first the context, then the question combined with the choice."""
        blank = re.search(r"(?<!\w)_+(?!\w)", question)
        before, after = (question[: blank.start()], question[blank.end() :]) if blank else (f"{question} ".lstrip(), "")
        seconds = [f"{before}{choice}{after}" for choice in choices]
        pairs = self.tokenizer.encode([context] * len(seconds), seconds, max_length=self.max_length)
        return [encoding for encoding, *_ in pairs]

    # ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """See `TrainableTask.clean`.

        A row's choices become the list `answers`, and its label becomes an index into this list. The original label is
        an index, starting at 0, or a letter, starting at A. An unlabeled row gets the label `UNKNOWN`.

        Raises:
            InputError: If `options.labels` is set, if a row has no choices or a different number of choices than the
                first row, or if a label is invalid.
        """
        if options.labels:
            raise InputError(
                f"data.labels is {listed(options.labels)}; {MultipleChoice.name} has no labels. Remove it."
            )
        cleaned: dict[str, list[Row]] = {}
        first: tuple[str, int] | None = None
        for split, found in rows.items():
            cleaned[split] = []
            for i, row in enumerate(found, 1):
                where = f"data.{split}: row {i}"
                try:
                    choices = row.get("answers")
                    if choices is None:
                        choices = _endings(row)
                    context, question, choices = _parts((row["context"], row.get("question"), choices))
                    first = first or (where, len(choices))
                    if len(choices) != first[1]:
                        raise InputError(f"there are {len(choices)} choices, and {first[1]} in {first[0]}.")
                    label = _index(row.get("label"), len(choices))
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
                cleaned[split].append({"context": context, "question": question, "answers": choices, "label": label})
        return cleaned, f"choices: {first[1]}" if first else ""

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """See `TrainableTask.config`. As in `transformers`, the config does not depend on the number of choices."""
        for i, row in enumerate(rows, 1):
            if row["label"] == UNKNOWN:
                raise InputError(f"data.train: row {i} has no label. Add it, or set data.label to the label column.")
        return {"id2label": ("LABEL_0", "LABEL_1"), "num_labels": 2}

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> ChoiceExamples:
        """Converts rows from `clean` to examples with the target `labels`, int32 [N]."""
        encoded = [self._encode(row["context"], row["question"], row["answers"]) for row in rows]
        return ChoiceExamples(
            input_ids=[np.concatenate([np.array(e.ids, np.int32) for e in choices]) for choices in encoded],
            token_type_ids=[np.concatenate([np.array(e.type_ids, np.int32) for e in choices]) for choices in encoded],
            targets={"labels": np.array([row["label"] for row in rows], np.int32)},
            pad_token_id=self.tokenizer.pad_token_id or 0,
            sizes=np.array([[len(encoding) for encoding in choices] for choices in encoded]),
        )

    def loss(
        self,
        model: BertForMultipleChoice,
        batch: Mapping[str, Any],
        dropout_key: jax.Array | None,
        *,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective.loss`. Computes `losses.cross_entropy` over the choices of each labeled example."""
        labels = batch["targets"]["labels"]  # [B, K]
        logits = model(**batch["inputs"], positions=batch["starts"], dropout_key=dropout_key).logits  # [B, K · C]
        counts = (batch["weights"] > 0) & (labels != UNKNOWN)
        labels = jnp.where(counts, labels, losses.IGNORE)
        logits = logits.reshape(*labels.shape, -1)
        loss = losses.cross_entropy(logits, labels, label_smoothing=label_smoothing, focal_gamma=focal_gamma)
        return loss, losses.total_weight(labels)

    def outputs(self, model: BertForMultipleChoice, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """See `Objective.outputs`. Computes `scores`, the probabilities of the choices: float32 [B, K, C]."""
        logits = model(**batch["inputs"], positions=batch["starts"]).logits
        return {"scores": jax.nn.softmax(logits.reshape(*batch["weights"].shape, -1))}

    def labeled(self, examples: Examples) -> bool:
        """See `TrainableTask.labeled`."""
        return bool((examples.targets["labels"] != UNKNOWN).any())

    def evaluate(self, outputs: Outputs, examples: Examples) -> dict[str, Any]:
        """The `accuracy` on the labeled examples; an empty dict if no example is labeled."""
        labels = examples.targets["labels"]
        known = labels != UNKNOWN
        if not known.any():
            return {}
        return {"accuracy": float((outputs["scores"].argmax(-1) == labels)[known].mean())}

    def predictions(self, outputs: Outputs, examples: Examples) -> list[dict[str, Any]]:
        """Returns a `{choice, scores}` dict for each example."""
        return [{"choice": int(row.argmax()), "scores": row.tolist()} for row in outputs["scores"]]


def _endings(row: Row) -> list[Any]:
    """The choices of a row that contains each choice in a separate column."""
    cells = [row.get(name) for name in ENDINGS]
    while cells and cells[-1] is None:
        cells.pop()
    if not cells:
        raise InputError("there are no choices. Set data.answers to the column with the list of the choices.")
    if None in cells:
        raise InputError(f"there is no {ENDINGS[cells.index(None)]}, but there is {ENDINGS[len(cells) - 1]}.")
    return cells


def _parts(inputs: Any) -> tuple[str, str, list[str]]:
    """The context, the question ("" if there is none) and the choices of an input; see `MultipleChoice.request`."""
    if isinstance(inputs, Mapping):
        if unknown := set(inputs) - {"context", "question", "choices"}:
            raise InputError(f"{quoted(min(unknown))} is unknown; expected context, choices and perhaps question.")
        inputs = [inputs.get("context"), inputs.get("question"), inputs.get("choices")]
    if not isinstance(inputs, list | tuple) or len(inputs) < 2:
        raise InputError(f"expected a context and choices, got {quoted(inputs)} ({type(inputs).__name__}).")
    context, *question, choices = inputs
    if len(question) > 1:
        question, choices = question[:1], [*question[1:], choices]
    asked = (question or [None])[0] or ""
    if isinstance(choices, str):  # in CSV and TSV files, lists are written as strings
        choices = literal(choices)
    if isinstance(choices, np.ndarray):
        choices = choices.tolist()
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= MOST_CHOICES:
        raise InputError(f"the choices are {quoted(choices)}; expected a list of 2 to {MOST_CHOICES} texts.")
    check_text(context, "context")
    for choice in choices:
        check_text(choice, "choice")
    if not isinstance(asked, str):
        raise InputError(f"the question is {quoted(asked)}; expected a text.")
    return context, asked.strip(), list(choices)


def _index(label: Any, choices: int) -> int:
    """The index of the correct choice; `UNKNOWN` if there is no label."""
    if isinstance(label, float):  # `pandas` writes integer columns with missing values as floats
        label = None if math.isnan(label) else int(label) if label.is_integer() else label
    text = str("" if label is None else label).strip()
    if text in ("", "-1"):
        return UNKNOWN
    letters = string.ascii_uppercase[:choices]
    for names in ([str(i) for i in range(choices)], list(letters)):
        if text in names:
            return names.index(text)
    raise InputError(f"the label is {quoted(label)}; expected 0 to {choices - 1}, or A to {letters[-1]}.")
