"""The interfaces of a task to inference and to training.

A task gives inference a pure function on the device (`Task.forward`) and requests (`Task.request`). A request is a
generator. It yields the rows that it needs computed, receives their outputs, may yield more rows that depend on those
outputs, and returns its result. It never sees a batch: a batch holds the rows of many requests, padded to a bucket
(`bert_jax.inference.pipelines`), and a result does not depend on the other requests in its batch.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypedDict, TypeVar

import jax
import numpy as np

from bert_jax.config import BertConfig
from bert_jax.data.loader import Examples
from bert_jax.data.sources import Row
from bert_jax.errors import CheckpointError, InputError, listed, quoted
from bert_jax.tokenizer import Tokenizer


def check_pairs(config: BertConfig) -> None:
    """Raises `InputError` if the model cannot tell the two texts of a pair apart."""
    if config.type_vocab_size < 2:
        raise InputError("The model has 1 token type; a pair of texts needs 2. Use single texts or another model.")


def check_vocabulary(tokenizer: Tokenizer, config: BertConfig) -> None:
    """Raises `CheckpointError` if the tokenizer has ids for which the model has no embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model has {config.vocab_size}. "
            "Use the model's tokenizer."
        )


def check_text(text: Any, name: str = "text") -> None:
    """Raises `InputError` if an input is not a text, or if it is empty; that message calls it `name`."""
    if not isinstance(text, str):
        raise InputError(f"expected a text, got {quoted(text)} ({type(text).__name__}).")
    if not text.strip():
        raise InputError(f"the {name} is empty.")


@dataclass(frozen=True)
class ReadOptions:
    """How a task reads the rows of a data set.

    Attributes:
        labels: The names of the labels in the order of their ids; None to read them from the training rows.
        problem_type: The problem type of a text classification; None to infer it from the labels.
        wrong_answers: What to do if an answer is not where its row says: skip the row, or stop.
    """

    labels: tuple[str, ...] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    wrong_answers: Literal["skip", "stop"] = "skip"


@dataclass
class Features:
    """One row of tokens for the model.

    Attributes:
        input_ids: Token ids, special tokens included.
        token_type_ids: 0 or 1 for each token.
        masked_positions: Indices of the tokens at which the vocabulary is scored; empty for other tasks.
        labels: Ids of the true tokens at the masked positions if a model is evaluated, else empty.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    masked_positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


Outputs = Mapping[str, np.ndarray]
"""The outputs of `Task.forward` for one row, without padding: per masked position, per token, or for its text."""

Result = TypeVar("Result")
Request = Generator[list[Features], list[Outputs], Result]


class LabelScore(TypedDict):
    """A label and its score."""

    label: str
    score: float


class Task(Protocol):
    """What inference needs of a task. The constructor expects a tokenizer, a config and the maximum row length."""

    name: str
    """Hugging Face's name of the task."""
    model_class: Any
    """The class of the task's models."""
    per_token: bool
    """Whether outputs have one entry per token (otherwise one per text)."""
    masked: bool
    """Whether rows have masked positions."""
    columns_of_input: tuple[tuple[str, ...], ...]
    """Usual names of the columns that make up an input; the first entry whose columns a file has is used."""
    json_input: Any
    """The type of one input in the JSON of a request."""

    def forward(self, model: Any, inputs: dict[str, jax.Array], starts: jax.Array) -> dict[str, jax.Array]:
        """Computes the outputs of a batch. It is pure, and compiled once per bucket.

        Args:
            model: A model of `model_class`.
            inputs: The keyword arguments of the model.
            starts: int [B, K], or [1, K] for all rows: the first token of each text in its row.

        Returns:
            Arrays [B, P, …] if the task has masked positions, [B, T, …] if it is per token, else [B, K, …].
        """

    @property
    def request(self) -> Callable[..., Request[Any]]:
        """Makes a request from one input and keyword parameters; raises `InputError` if one of them is invalid."""


class Objective(Protocol):
    """What training and evaluation need of a learning objective."""

    metrics: tuple[str, ...]
    """Names of the metrics; the first one selects the best checkpoint unless the settings name another."""
    per_token: bool
    """Whether outputs have one entry per token (otherwise one per example)."""

    def loss(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The mean loss of the batch, and how many items it averages, without rows of padding; both float32 []."""

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays of a batch that `evaluate` reads, each [B, T, …] if the objective is per token, else [B, K, …]."""

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """Computes the metrics from the `outputs` of all examples."""


class TrainableTask(Task, Objective, Protocol):
    """A task that pretrained models are fine-tuned for."""

    columns: Mapping[str, tuple[str, ...]]
    """Field of a row -> usual names of its column; the `data` settings may name another column."""
    required: tuple[str, ...]
    """The fields of `columns` that the data must have."""
    target: str
    """The field of `columns` that is learnt."""
    head: str
    """Regular expression of the parameters that a pretrained checkpoint lacks."""
    peft_type: str
    """The task type of such a model in `peft`."""
    options: Mapping[str, type] = {}
    """Keyword of the constructor, which is also a section of the settings -> the class of its value."""
    order_matters: bool = False
    """Whether a metric depends on the order of two labels."""

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """Returns the rows of all splits in the form that `featurize` expects, and a note for the user."""

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """The fields of the config that follow from the training rows: their labels.

        Args:
            rows: The training rows after `clean`.
            options: See `clean`.
            labels: The names of the labels in the order of the data set; None if it defines no order.
        """

    def labelled(self, examples: Examples) -> bool:
        """Whether any example has true values for `evaluate` to compare the outputs with."""

    def tuned(self, metrics: Mapping[str, Any]) -> Self:
        """The task with the values that an evaluation found, for predictions; by default there are none."""
        return self

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows to examples; raises `InputError`, which names the row by its number, if one cannot be used."""

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The outputs of `forward`."""
        return self.forward(model, batch["inputs"], batch["starts"])

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """Converts the outputs of `forward` to readable predictions, one per row of the data."""

    @staticmethod
    def files(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Further files of predictions: name -> JSON value; by default there are none.

        Args:
            lines: The rows of the data, each with its `prediction`.
        """
        return {}


def known_labels(labels: Sequence[str]) -> str:
    """The end of an error message about a label that the model does not have."""
    if all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        return f"the model has {listed(labels)}; set data.labels to name them, in this order."
    return f"the labels are {listed(labels)}."
