"""text-classification: predicts labels or a number for a text or a pair of texts (Devlin et al. 2018, section 4.1)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding

from bert_jax import losses
from bert_jax.config import BertConfig
from bert_jax.data.formats import TEXT, Row
from bert_jax.data.labels import (
    MULTI,
    REGRESSION,
    SINGLE,
    UNKNOWN,
    as_number,
    check_label,
    is_vector,
    label_set,
    names_of,
    read_ids,
    read_lists,
    read_sets,
)
from bert_jax.data.loader import Examples
from bert_jax.data.sources import PAIRS, TEXTS
from bert_jax.errors import InputError, listed, quoted
from bert_jax.heads import BertForSequenceClassification
from bert_jax.tasks.base import (
    Features,
    LabelScore,
    Outputs,
    ReadOptions,
    Request,
    Steps,
    TrainableTask,
    check_pairs,
    check_text,
    known_labels,
)
from bert_jax.tokenizer import Tokenizer

METRICS = {
    SINGLE: ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews"),
    MULTI: ("f1_micro", "f1_macro", "f1_weighted", "accuracy"),
    REGRESSION: ("pearson", "spearman", "mse"),
}
SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    SINGLE: jax.nn.softmax,
    MULTI: jax.nn.sigmoid,
    REGRESSION: lambda logits: logits,
}
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": lambda logits: np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(),
    "sigmoid": lambda logits: np.exp(-np.logaddexp(0, -logits)),
    "none": lambda logits: logits,
}
LABEL = ("label", "label_string", "labels", "label_name", "class", "score")
"""Usual names of the label column."""


@dataclass(frozen=True)
class DecisionOptions:
    """Options that determine which labels are predicted in multi-label classification.

    Attributes:
        threshold: A label is predicted if its score is above this threshold.
        tune: Whether evaluation searches for the threshold with the best `f1_micro`. `SequenceClassification.tuned`
            then uses this threshold.
    """

    threshold: float = 0.5
    tune: bool = False


class SequenceClassification(TrainableTask):
    """Predicts one label, any number of labels, or a numeric value, depending on the config's `problem_type`."""

    name = "text-classification"
    model_class = BertForSequenceClassification
    columns_of_input = (*PAIRS, *TEXTS)
    json_input: Any = str | tuple[str, str]
    example = "a"
    columns = {"text": TEXT, "text_pair": (), "label": LABEL}  # noqa: RUF012
    required, target = ("text",), "label"
    head, peft_type = r"classifier\..*", "SEQ_CLS"
    per_token, masked = False, False
    order_matters = True  # if there are two labels, `f1` is the F1 score of the second label
    options = {"decision": DecisionOptions}  # noqa: RUF012

    def __init__(
        self, tokenizer: Tokenizer, config: BertConfig, max_length: int, decision: DecisionOptions = DecisionOptions()
    ):
        self.tokenizer = tokenizer
        self.model_config = config
        self.max_length = max_length
        self.labels = config.labels
        self.problem_type = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
        # As in `transformers`, a model with one label and no `problem_type` is trained for regression, but the pipeline
        # applies a sigmoid to its output.
        self.scores = SCORES[config.problem_type or (MULTI if config.num_labels == 1 else SINGLE)]
        self.metrics = METRICS[self.problem_type]
        if self.problem_type == SINGLE and config.num_labels == 2:
            self.metrics += ("f1",)
        self.decision = decision
        if decision != DecisionOptions() and self.problem_type != MULTI:
            raise InputError(f"decision is for {MULTI}, but the problem type is {self.problem_type}. Remove decision.")
        if decision.tune:
            self.metrics = ("best_f1_micro", *self.metrics)

    # ── Inference ────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(
        self, model: BertForSequenceClassification, inputs: dict[str, Any], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """Computes `logits` and `scores`, each float32 [B, K, C].

        The constructor selects the function in `SCORES` that converts logits to scores. The scores are probabilities
        that add up to 1 for `SINGLE`, independent probabilities of the labels for `MULTI`, and the predicted numbers
        for `REGRESSION`.
        """
        logits = model(**inputs, positions=starts).logits
        return {"logits": logits, "scores": self.scores(logits)}

    def request(
        self,
        text: str | tuple[str, str],
        *,
        top_k: int | None = 1,
        function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None,
    ) -> Request[LabelScore | list[LabelScore]]:
        """Classifies one text.

        Args:
            text: A text, or a pair of texts as a tuple. Inputs are truncated to the model's maximum length. In a pair,
                the longer text is truncated.
            top_k: How many labels to return; None for all.
            function_to_apply: The function that converts logits to scores; None for the default function of the model's
                problem type.

        Returns:
            `{label, score}` if `top_k` is 1, else a list of such entries, best first. In multi-label classification,
            the scores need not add up to 1. In regression, the score is the predicted number.

        Raises:
            InputError: If the input is not a text or a pair of texts, if a text is empty, or if a parameter is invalid.
        """
        texts = list(text) if isinstance(text, list | tuple) else [text]
        if len(texts) not in (1, 2):
            raise InputError(f"expected a text or a pair of texts, got {quoted(text)}.")
        for part in texts:
            check_text(part)
        if len(texts) == 2:
            check_pairs(self.model_config)
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k is {quoted(top_k)}; expected a whole number of at least 1, or None.")
        if function_to_apply not in (None, *FUNCTIONS):
            expected = ", ".join(map(repr, FUNCTIONS))
            raise InputError(f"function_to_apply is {quoted(function_to_apply)}; expected {expected} or None.")
        encoding = self.tokenizer.encode(texts[:1], texts[1:] or None, max_length=self.max_length)[0][0]
        return Request(
            self._classify(encoding, top_k, function_to_apply),
            len(encoding),
            sum(50 + len(label) for label in self.labels),
        )

    def _classify(
        self, encoding: Encoding, top_k: int | None, function_to_apply: str | None
    ) -> Steps[LabelScore | list[LabelScore]]:
        (output,) = yield [Features(encoding.ids, encoding.type_ids)]
        scores = output["scores"] if function_to_apply is None else FUNCTIONS[function_to_apply](output["logits"])
        order = np.argsort(-scores, kind="stable")[:top_k]
        entries: list[LabelScore] = [{"label": self.labels[i], "score": float(scores[i])} for i in order]
        return entries[0] if top_k == 1 else entries

    # ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """See `TrainableTask.clean`. Each label becomes a name, a number, a list of names, or a 0/1 vector.

        If labels are lists, the labels of all splits together determine whether the lists contain names, class ids, or
        the values 0 and 1.
        """
        cleaned = {split: [dict(row) for row in found] for split, found in rows.items()}
        labeled = {
            f"data.{split}: row {i}": row
            for split, found in cleaned.items() for i, row in enumerate(found, 1) if row.get("label") is not None
        }  # fmt: skip
        labels = {where: row["label"] for where, row in labeled.items()}
        names, problem_type, note = options.labels or (), options.problem_type, ""
        if problem_type in (None, MULTI):
            read_lists(labels, problem_type)
        for where, label in labels.items():
            labels[where] = list(label) if isinstance(label, tuple) else label
            check_label(where, labels[where], names)
            if isinstance(label, list | tuple) and problem_type in (SINGLE, REGRESSION):
                raise InputError(f"{where}: the label is {quoted(label)}; {problem_type} expects one label.")
        if problem_type == MULTI or any(isinstance(label, list) for label in labels.values()):
            note = read_sets(labels, names)
        elif problem_type != REGRESSION:
            note = read_ids(labels, names)
        for where, row in labeled.items():
            row["label"] = labels[where]
        return cleaned, note

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """See `TrainableTask.config`. The fields are the problem type, the label names, and the number of labels."""
        given = [row.get("label") for row in rows]
        problem_type, names = label_set(given, options.problem_type)
        for i, label in enumerate(given, 1):
            if label is None or (label == "" and problem_type != MULTI):
                raise InputError(f"data.train: row {i} has no label. Add it, or set data.label to the label column.")
        least = 2 if problem_type == SINGLE else 1
        if len(names) < least:
            raise InputError(f"The labels of data.train are [{listed(names)}]; expected at least {least}.")
        names = options.labels or (labels if labels and set(names) <= set(labels) else names)
        if problem_type == REGRESSION and len(names) != 1:
            raise InputError(f"data.labels has {len(names)} names; regression expects one.")
        return {"problem_type": problem_type, "id2label": names, "num_labels": len(names)}

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows to examples with the target `labels`. Rows have `text` and optionally `text_pair` and `label`.

        `labels` is int32 [N] for one label per text, float32 [N, C] with values 0 and 1 for multi-label classification,
        and float32 [N, 1] for regression. Unlabeled rows get the value `UNKNOWN` (int32) or NaN (float32).

        Raises:
            InputError: If a text or a label cannot be used. The message gives the row number.
        """
        ids = {label: i for i, label in enumerate(self.labels)}
        labels = []
        for i, row in enumerate(rows, 1):
            try:
                for name in ("text", "text_pair"):
                    if not isinstance(row.get(name, ""), str):
                        raise InputError(f"{name} is {quoted(row[name])}; expected a text.")
                labels.append(self._target(row.get("label"), ids))
            except InputError as error:
                raise InputError(f"row {i}: {error}") from None
        pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        if pairs:
            check_pairs(self.model_config)
        encoded = self.tokenizer.encode([row["text"] for row in rows], pairs, max_length=self.max_length)
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
            number = as_number(label)
            if number is not None and abs(number) <= float(np.finfo(np.float32).max):  # NaN fails the comparison
                return np.array([number], np.float32)
            raise InputError(f"the label is {quoted(label)}; regression expects a number.")
        if self.problem_type == MULTI and is_vector(label):
            if len(label) != len(ids):
                raise InputError(f"the label has {len(label)} numbers; {known_labels(self.labels)}")
            return np.array(label, np.float32)
        names = names_of(label) if self.problem_type == MULTI else [str(label)]
        if unknown := [name for name in names if name not in ids]:
            raise InputError(f"the label {quoted(unknown[0])} is unknown; {known_labels(self.labels)}")
        if self.problem_type == SINGLE:
            return np.int32(ids[names[0]])
        target = np.zeros(len(ids), np.float32)
        target[[ids[name] for name in names]] = 1
        return target

    def _known(self, labels: Any) -> Any:
        """A mask of the labeled examples: bool [N], or [B, K] for a batch."""
        # NaN, which marks unlabeled examples, is the only number that differs from itself.
        return labels != UNKNOWN if self.problem_type == SINGLE else ~(labels != labels).any(-1)

    def loss(
        self,
        model: BertForSequenceClassification,
        batch: Mapping[str, Any],
        dropout_key: jax.Array | None,
        *,
        class_weights: jax.Array | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective.loss`. The loss is the mean over the labeled examples.

        `SINGLE` uses `losses.cross_entropy`, `MULTI` uses `losses.binary_cross_entropy`, and `REGRESSION` uses
        `losses.squared_error`. The two cross-entropy losses support `class_weights`, `label_smoothing` and
        `focal_gamma`.
        """
        logits = model(**batch["inputs"], positions=batch["starts"], dropout_key=dropout_key).logits  # [B, K, C]
        labels = batch["targets"]["labels"]
        counts = (batch["weights"] > 0) & self._known(labels)
        options: Any = {
            "class_weights": class_weights, "label_smoothing": label_smoothing, "focal_gamma": focal_gamma
        }  # fmt: skip
        if self.problem_type == REGRESSION and (class_weights is not None or label_smoothing or focal_gamma):
            raise InputError(f"{listed(options)} are options of classification; {REGRESSION} has none of them.")
        if self.problem_type == SINGLE:
            labels = jnp.where(counts, labels, losses.IGNORE)
            return losses.cross_entropy(logits, labels, **options), losses.total_weight(labels, class_weights)
        labels, weights = jnp.where(counts[..., None], labels, 0.0), counts.astype(jnp.float32)
        if self.problem_type == MULTI:
            return losses.binary_cross_entropy(logits, labels, weights, **options), jnp.sum(weights)
        return losses.squared_error(logits, labels, weights), jnp.sum(weights)

    def outputs(self, model: BertForSequenceClassification, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """See `Objective.outputs`. Computes `scores` with the function in `SCORES` for `self.problem_type`."""
        logits = model(**batch["inputs"], positions=batch["starts"]).logits
        return {"scores": SCORES[self.problem_type](logits)}

    def labeled(self, examples: Examples) -> bool:
        """See `TrainableTask.labeled`."""
        return bool(self._known(examples.targets["labels"]).any())

    def tuned(self, metrics: Mapping[str, Any]) -> Self:
        """See `TrainableTask.tuned`. Only `DecisionOptions.threshold` is tuned."""
        tuned = copy.copy(self)
        if self.decision.tune and "threshold" in metrics:
            tuned.decision = DecisionOptions(metrics["threshold"])
        return tuned

    def evaluate(self, outputs: Outputs, examples: Examples) -> dict[str, Any]:
        """The metrics on the labeled examples (see `bert_jax.evaluation.metrics`); empty if no example is labeled.

        If `DecisionOptions.tune` is set, `threshold` is the threshold with the best `f1_micro`, and `best_f1_micro` is
        the `f1_micro` at this threshold.
        """
        from bert_jax.evaluation import metrics

        if not self.labeled(examples):
            return {}
        known = self._known(examples.targets["labels"])
        labels, scores = examples.targets["labels"][known], outputs["scores"][known]
        if self.problem_type == REGRESSION:
            return metrics.regression(labels[:, 0], scores[:, 0])
        if self.problem_type == MULTI:
            found = metrics.multi_label(labels, scores.astype(np.float64) > self.decision.threshold, self.labels)
            if self.decision.tune:
                found["threshold"], found["best_f1_micro"] = metrics.best_threshold(labels, scores)
            return found
        return metrics.classification(labels, scores.argmax(-1), self.labels)

    def predictions(self, outputs: Outputs, examples: Examples) -> list[dict[str, Any]]:
        """Returns a `{label, score}` dict for each example.

        In multi-label classification, each dict is `{labels, scores}` instead. `labels` lists the labels with a score
        above `DecisionOptions.threshold`, and `scores` maps the name of each label to its score.
        """
        if self.problem_type == MULTI:
            scores = [dict(zip(self.labels, row.tolist(), strict=True)) for row in outputs["scores"]]
            threshold = self.decision.threshold
            return [{"labels": [name for name, p in row.items() if p > threshold], "scores": row} for row in scores]
        return [{"label": self.labels[row.argmax()], "score": float(row.max())} for row in outputs["scores"]]
