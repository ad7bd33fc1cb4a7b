"""text-classification: labels or a number for a text or a pair of texts (Devlin et al. 2018, section 4.1)."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding

from bert_jax.config import BertConfig
from bert_jax.data.loader import Examples
from bert_jax.data.sources import PAIRS, TEXT, TEXTS, literal
from bert_jax.errors import InputError, listed, quoted
from bert_jax.heads import BertForSequenceClassification
from bert_jax.tasks.base import (
    Features,
    LabelScore,
    Outputs,
    ReadOptions,
    Request,
    TrainableTask,
    check_pairs,
    known_labels,
)
from bert_jax.tokenizer import Tokenizer
from bert_jax.training import losses

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
METRICS = {
    SINGLE: ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews"),
    MULTI: ("f1_micro", "f1_macro", "f1_weighted", "accuracy"),
    REGRESSION: ("pearson", "spearman", "mse"),
}
LABEL = ("label", "label_string", "labels", "label_name", "class", "score")
"""Usual names of the label column."""
UNKNOWN = -1
"""The label of an unlabelled example, as in GLUE's test sets; if labels are vectors, it is NaN."""


class SequenceClassification(TrainableTask):
    """Predicts one label per text, any number of labels, or a number (`problem_type`, as in transformers)."""

    name = "text-classification"
    model_class = BertForSequenceClassification
    columns_of_input = (*PAIRS, *TEXTS)
    json_input: Any = str | tuple[str, str]
    columns = {"text": TEXT, "text_pair": (), "label": LABEL}  # noqa: RUF012
    required, target = ("text",), "label"
    head, peft_type = r"classifier\..*", "SEQ_CLS"
    per_token, masked = False, False

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        self.tokenizer = tokenizer
        self.model_config = config
        self.max_length = max_length
        self.labels = config.labels
        self.problem_type = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
        # As in transformers' pipeline: a model with one label and no problem_type is trained as a regression, but its
        # output is read as the score of one independent label.
        independent = MULTI if config.num_labels == 1 else SINGLE
        scores: dict[str, Callable[[jax.Array], jax.Array]]
        scores = {SINGLE: jax.nn.softmax, MULTI: jax.nn.sigmoid, REGRESSION: lambda logits: logits}
        self.scores = scores[config.problem_type or independent]
        self.metrics = METRICS[self.problem_type]
        if self.problem_type == SINGLE and config.num_labels == 2:
            self.metrics += ("f1",)

    # ── Inference ────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(
        self, model: BertForSequenceClassification, inputs: dict[str, jax.Array], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """Scores, float32 [B, K, C]: probabilities over the labels, of each label by itself, or predicted numbers."""
        return {"scores": self.scores(model(**inputs, positions=starts).logits)}

    def request(self, text: str | tuple[str, str], *, top_k: int | None = 1) -> Request[LabelScore | list[LabelScore]]:
        """Classifies one text.

        Args:
            text: A text, or a pair of texts as a tuple. It is truncated to the model's length; a pair loses tokens of
                its longer text.
            top_k: How many labels to return; None for all.

        Returns:
            `{label, score}` if top_k is 1, else a list of such entries, best first. The scores of independent labels do
            not add up to 1; the score of a regression is its number.

        Raises:
            InputError: If the input is not a text or a pair of texts, or a text is empty.
        """
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, tuple | list) else []
        if len(texts) not in (1, 2) or not all(isinstance(part, str) for part in texts):
            raise InputError(f"expected a text or a pair of texts, got {quoted(text)} ({type(text).__name__}).")
        if not all(part.strip() for part in texts):
            raise InputError("the text is empty." if len(texts) == 1 else "a text of the pair is empty.")
        if len(texts) == 2:
            check_pairs(self.model_config)
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k is {quoted(top_k)}; expected a whole number of at least 1, or None.")
        encoded = self.tokenizer.encode(texts[:1], texts[1:] or None, max_length=self.max_length)
        return self._classify(encoded[0][0], top_k)

    def _classify(self, encoding: Encoding, top_k: int | None) -> Request[LabelScore | list[LabelScore]]:
        (output,) = yield [Features(encoding.ids, encoding.type_ids)]
        order = np.argsort(-output["scores"], kind="stable")[:top_k]
        entries: list[LabelScore] = [{"label": self.labels[i], "score": float(output["scores"][i])} for i in order]
        return entries[0] if top_k == 1 else entries

    # ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def clean(rows: Mapping[str, list[dict[str, Any]]], options: ReadOptions) -> str:
        """See `TrainableTask.clean`. A label becomes a name, a number, a list of names, or a 0/1 vector.

        The form of lists is inferred from all splits together, depending on `problem_type`.
        """
        cells = [
            Cell(f"data.{split}: row {i}", row)
            for split, found in rows.items() for i, row in enumerate(found, 1) if row.get("label") is not None
        ]  # fmt: skip
        names = options.labels or ()
        if options.problem_type in (None, MULTI):
            _read_lists(cells, options.problem_type)
        for cell in cells:
            cell.label = list(cell.label) if isinstance(cell.label, tuple) else cell.label
            _check(cell, cell.label, names)
        several = options.problem_type == MULTI or any(isinstance(cell.label, list) for cell in cells)
        if not several:
            return "" if options.problem_type == REGRESSION else _read_ids(cells, names)
        for cell in cells:
            if options.problem_type not in (None, MULTI) and isinstance(cell.label, list):
                raise InputError(
                    f"{cell.where}: the label is {quoted(cell.label)}; {options.problem_type} expects one."
                )
            if not isinstance(cell.label, list | str):
                raise InputError(f"{cell.where}: the label is {quoted(cell.label)}; expected a list, as in other rows.")
        return _read_sets(cells, names)

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """See `TrainableTask.config`. The fields are the problem type and the names and the number of the labels."""
        given = [row.get("label") for row in rows]
        problem_type, names = label_set(given, options.problem_type)
        for i, label in enumerate(given, 1):
            if label is None or (label == "" and problem_type != MULTI):
                raise InputError(f"data.train: row {i} has no label; data.label names the column.")
        if problem_type == SINGLE and len(names) < 2:
            raise InputError(
                f"All examples of data.train have the label {quoted(names[0])}; expected at least two labels."
            )
        if not names:
            raise InputError("No example of data.train has a label; expected at least one in all.")
        if problem_type == REGRESSION and len(options.labels or names) != 1:
            raise InputError(f"data.labels has {len(options.labels or ())} names; a regression has one number.")
        names = options.labels or (labels if labels and set(names) <= set(labels) else names)
        return {"problem_type": problem_type, "id2label": names, "num_labels": len(names)}

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows with `text` and optional `text_pair` and `label` to examples with the target `labels`.

        Targets are int32 [N], float32 [N, C] of 0 and 1, or float32 [N, 1]; `UNKNOWN` or NaN if a row has no label.

        Raises:
            InputError: If a text or a label cannot be used; the message names the row.
        """
        for i, row in enumerate(rows):
            for name in ("text", "text_pair"):
                if not isinstance(row.get(name, ""), str):
                    raise InputError(f"row {i + 1}: {name} is {quoted(row[name])}; expected a text.")
        pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        if pairs:
            check_pairs(self.model_config)
        encoded = self.tokenizer.encode([row["text"] for row in rows], pairs, max_length=self.max_length)
        ids = {label: i for i, label in enumerate(self.labels)}
        labels = []
        for i, row in enumerate(rows, 1):
            try:
                labels.append(self._target(row.get("label"), ids))
            except InputError as error:
                raise InputError(f"row {i}: {error}") from None
        return Examples(
            input_ids=[np.array(row.ids, np.int32) for row, *_ in encoded],
            token_type_ids=[np.array(row.type_ids, np.int32) for row, *_ in encoded],
            targets={"labels": np.array(labels)},
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )

    def _target(self, label: Any, ids: Mapping[str, int]) -> Any:
        if label is None or (label in ("", UNKNOWN) and self.problem_type == SINGLE and str(label) not in ids):
            width = {SINGLE: None, MULTI: len(ids), REGRESSION: 1}[self.problem_type]
            return np.int32(UNKNOWN) if width is None else np.full(width, np.nan, np.float32)
        if self.problem_type == REGRESSION:
            number = _number(label)
            if number is not None and abs(number) <= float(np.finfo(np.float32).max):  # false for NaN
                return np.array([number], np.float32)
            raise InputError(f"the label is {quoted(label)}; regression expects a number.")
        if self.problem_type == MULTI and _is_vector(label):
            if len(label) != len(ids):
                raise InputError(f"the label has {len(label)} numbers; {known_labels(self.labels)}")
            return np.array(label, np.float32)
        names = names_of(label) if self.problem_type == MULTI else [str(label)]
        if unknown := [name for name in names if name not in ids]:
            given = unknown[0] if isinstance(label, str | list | tuple) else label
            raise InputError(f"the label {quoted(given)} is unknown; {known_labels(self.labels)}")
        if self.problem_type == SINGLE:
            return np.int32(ids[names[0]])
        target = np.zeros(len(ids), np.float32)
        target[[ids[name] for name in names]] = 1
        return target

    def _known(self, labels: Any) -> Any:
        """Which examples have a label: bool [N], or [B, K] for a batch."""
        return labels != UNKNOWN if self.problem_type == SINGLE else ~(labels != labels).any(-1)  # NaN != NaN

    def loss(
        self, model: BertForSequenceClassification, batch: Mapping[str, Any], dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `TrainableTask.loss`. Cross entropy, binary cross entropy, or squared error, a mean over examples."""
        logits = model(**batch["inputs"], positions=batch["starts"], dropout_key=dropout_key).logits  # [B, K, C]
        labels = batch["targets"]["labels"]
        counts = (batch["weights"] > 0) & self._known(labels)
        count = jnp.sum(counts, dtype=jnp.float32)
        if self.problem_type == SINGLE:
            return losses.cross_entropy(logits, jnp.where(counts, labels, losses.IGNORE)), count
        loss = losses.squared_error if self.problem_type == REGRESSION else losses.binary_cross_entropy
        return loss(logits, jnp.where(counts[..., None], labels, 0.0), counts.astype(jnp.float32)), count

    def labelled(self, examples: Examples) -> bool:
        """See `TrainableTask.labelled`."""
        return bool(self._known(examples.targets["labels"]).any())

    def evaluate(self, outputs: Outputs, examples: Examples) -> dict[str, Any]:
        """The metrics (`bert_jax.evaluation.metrics`) of the examples that have labels; empty if none has."""
        from bert_jax.evaluation import metrics

        if not self.labelled(examples):
            return {}
        known = self._known(examples.targets["labels"])
        labels, scores = examples.targets["labels"][known], outputs["scores"][known]
        if self.problem_type == REGRESSION:
            return metrics.regression(labels[:, 0], scores[:, 0])
        if self.problem_type == MULTI:
            return metrics.multi_label(labels, scores > 0.5, self.labels)
        return metrics.classification(labels, scores.argmax(-1), self.labels)

    def predictions(self, outputs: Outputs, examples: Examples) -> list[dict[str, Any]]:
        """One `{label, score}` per example; if multi-label, `{labels, scores}` with the labels that score over 0.5."""
        if self.problem_type == MULTI:
            return [
                {
                    "labels": [name for name, p in zip(self.labels, row, strict=True) if p > 0.5],
                    "scores": {name: float(p) for name, p in zip(self.labels, row, strict=True)},
                }
                for row in outputs["scores"]
            ]
        best = outputs["scores"].argmax(-1)
        return [
            {"label": self.labels[i], "score": float(row[i])} for i, row in zip(best, outputs["scores"], strict=True)
        ]


@dataclass(eq=False)
class Cell:
    """The label of a row, and the place of the row for error messages."""

    where: str
    row: dict[str, Any]

    @property
    def label(self) -> Any:
        """The label in the row."""
        return self.row["label"]

    @label.setter
    def label(self, label: Any) -> None:
        self.row["label"] = label


def _read_lists(cells: Sequence[Cell], problem_type: str | None) -> None:
    """Parses labels that are lists written as texts, as in tables.

    If `problem_type` is None and one text is a list, all texts have to be lists. In multi-label classification, all
    texts in brackets have to be lists.

    Raises:
        InputError: If one is not; the message names the row.
    """
    texts = dict.fromkeys(
        cell for cell in cells if isinstance(cell.label, str) and re.fullmatch(r"\s*\[.*\]\s*", cell.label, re.S)
    )
    lists: dict[Cell, list[Any]] = {}
    for cell in texts:
        try:
            lists[cell] = list(literal(cell.label))
        except InputError as error:
            if problem_type == MULTI:
                raise InputError(f"{cell.where}: the label {error}") from None
    if not lists:
        return  # the texts are names in brackets
    for cell in cells:
        if cell in lists:
            cell.label = lists[cell]
        elif isinstance(cell.label, str) and cell.label.strip() and (problem_type is None or cell in texts):
            raise InputError(
                f"{cell.where}: the label {quoted(cell.label)} is no list, and others are; expected lists in JSON, "
                "Python's or numpy's form, or data.problem_type."
            )


def _check(cell: Cell, label: Any, names: Collection[str]) -> None:
    """Raises `InputError` if a label, or an item of a list of labels, is invalid."""
    if isinstance(label, list | tuple):
        for part in label:
            if part is None or isinstance(part, list | tuple):
                raise InputError(f"{cell.where}: the label holds {quoted(part)}; expected names, or numbers.")
            _check(cell, part, names)
    elif isinstance(label, Mapping | bytes):
        raise InputError(f"{cell.where}: the label is {quoted(label)}; expected a text, a number or a list.")
    elif not isinstance(label, int) and not math.isfinite(_number(label) or 0) and label not in names:
        raise InputError(
            f"{cell.where}: the label is {quoted(label)}; expected a name or a finite number, nothing where there is "
            "none, or data.labels with this name."
        )


def _read_ids(cells: Sequence[Cell], names: tuple[str, ...]) -> str:
    """Replaces class ids by names if all labels are integers and none is in `names`; returns a note for the user."""
    whole = [re.fullmatch("-1|[0-9]{1,9}", str(cell.label)) for cell in cells if cell.label != ""]
    if not names or not whole or not all(whole) or any(str(cell.label) in names for cell in cells):
        return ""
    for cell in cells:
        if cell.label == "" or int(cell.label) == UNKNOWN:
            cell.label = None
        elif int(cell.label) >= len(names):
            raise InputError(f"{cell.where}: the class id {cell.label} is outside data.labels, which has {len(names)}.")
        else:
            cell.label = names[int(cell.label)]
    return "labels: class ids"


def _read_sets(cells: Sequence[Cell], names: tuple[str, ...]) -> str:
    """Converts the lists to lists of names or to 0/1 vectors; returns a note for the user.

    Raises:
        InputError: If the form of the lists is mixed or ambiguous; the message names a row.
    """
    blank = {cell for cell in cells if isinstance(cell.label, str) and not cell.label.strip()}
    for cell in cells:
        if isinstance(cell.label, str):
            cell.label = names_of(cell.label)
            _check(cell, cell.label, names)
    cells = [cell for cell in cells if cell not in blank]
    parts = [part for cell in cells for part in cell.label]
    texts = {part for part in parts if isinstance(part, str)}
    digits = bool(texts) and texts <= {"0", "1"} and not texts <= set(names)  # quoted numbers in a table
    if not parts or (not digits and all(isinstance(part, str) for part in parts)):
        return ""
    if texts and texts != set(parts):
        mixed = next(cell for cell in cells if not texts.issuperset(cell.label))
        raise InputError(
            f"{mixed.where}: the label is {quoted(mixed.label)}, and others have names; expected either in all rows."
        )
    binary = all(part in (0, 1, "0", "1") for part in parts)
    lengths = {len(cell.label) for cell in cells}
    if binary and len(lengths) == 1 and (lengths == {len(names)} if names else lengths != {1}):
        for cell in cells:
            vector = [int(part) for part in cell.label]
            # Names also suit a model that has the labels in another order.
            cell.label = [name for name, part in zip(names, vector, strict=True) if part] if names else vector
        for cell in blank:
            cell.label = None
        return f"labels: 0/1 vectors over {listed(names or _numbered(*lengths))}"
    ids = all(type(part) is int and part >= 0 for part in parts) and all(
        len(set(c.label)) == len(c.label) for c in cells
    )
    ids = ids and (max(parts) < len(names) if names else not binary)
    if ids and not any(len(cell.label) == len(names) and {0, 1}.issuperset(cell.label) for cell in cells):
        for cell in cells:
            cell.label = [names[part] if names else str(part) for part in cell.label]
        return "labels: class ids"
    first = cells[0]
    other = next((cell for cell in cells if len(cell.label) != len(first.label)), None)
    other = other or next((cell for cell in cells if not {0, 1}.issuperset(cell.label)), first)
    raise InputError(
        f"{other.where}: the label is {quoted(other.label)}, and that of {first.where} is {quoted(first.label)}; "
        f"expected names, 0/1 vectors {f'of {len(names)} numbers' if names else 'of one length'}, or class ids that "
        "data.labels names."
    )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


def _is_vector(label: Any) -> bool:
    return isinstance(label, list) and bool(label) and isinstance(label[0], int)


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except OverflowError:  # a whole number beyond float64
        return math.inf
    except (TypeError, ValueError):
        return None


def names_of(label: Any) -> list[str]:
    """The labels of a row that may have several labels, given as a list or as a text with commas."""
    parts = label.split(",") if isinstance(label, str) else label or []
    return [str(part).strip() for part in parts if str(part).strip()]


def label_set(labels: Sequence[Any], problem_type: str | None) -> tuple[str, tuple[str, ...]]:
    """Infers the problem type, unless it is given, and the sorted label names from the labels of training examples.

    Lists mean multi-label classification. Numbers, at least one of which has a fraction, mean regression. Anything else
    means one label per example. The labels of 0/1 vectors are named LABEL_0, LABEL_1, …
    """
    if problem_type is None:
        several = any(isinstance(label, list | tuple) for label in labels)
        numbers = [_number(label) for label in labels]  # also in tables, whose cells are texts
        fractions = all(number is not None for number in numbers)
        fractions = fractions and any(number % 1 for number in numbers if number and math.isfinite(number))
        problem_type = MULTI if several else REGRESSION if fractions else SINGLE
    if problem_type == REGRESSION:
        return REGRESSION, ("LABEL_0",)
    if problem_type == MULTI and (vectors := [label for label in labels if _is_vector(label)]):
        return MULTI, _numbered(len(vectors[0]))
    found = {name for label in labels for name in (names_of(label) if problem_type == MULTI else [str(label)])}
    if all(name.isascii() and name.isdigit() for name in found):  # numerically, with any number of digits
        return problem_type, tuple(sorted(found, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)))
    return problem_type, tuple(sorted(found))
