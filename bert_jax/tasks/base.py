"""The interfaces through which inference and training use a task.

For inference, a task has `Task.forward`, a pure function that runs on the device, and `Task.request`, which makes a
request from an input. The steps of a request are a generator: it yields the rows that it needs computed, receives their
outputs, may yield more rows that depend on those outputs, and returns its result. A request does not handle batches:
the pipeline (`bert_jax.inference.pipelines`) collects the rows of many requests in batches, and pads each batch to one
of a few shapes, the buckets. The result of a request does not depend on the other requests in the batch.

Shapes are written with B rows, T tokens per row, K texts or examples per row, P masked positions per row, C labels and
V tokens in the vocabulary.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import jax
import numpy as np
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from bert_jax.config import BertConfig
from bert_jax.data.formats import Row
from bert_jax.data.loader import Examples
from bert_jax.errors import CheckpointError, InputError, listed, quoted
from bert_jax.tokenizer import Tokenizer


def check_pairs(config: BertConfig) -> None:
    """Raises `InputError` if the model has only one token type, and so cannot tell the two texts of a pair apart."""
    if config.type_vocab_size < 2:
        raise InputError("The model has 1 token type; a pair of texts needs 2. Use single texts or another model.")


def check_vocabulary(tokenizer: Tokenizer, config: BertConfig) -> None:
    """Raises `CheckpointError` if the tokenizer has ids for which the model has no embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model has {config.vocab_size}. "
            "Use the model's tokenizer. If you added tokens to it, resize the model's embeddings, then make pipelines."
        )


def check_text(text: Any, name: str = "text") -> None:
    """Raises `InputError` if `text` is not a string or is blank.

    Args:
        text: The text to check.
        name: What the error message calls the text if it is blank.
    """
    if not isinstance(text, str):
        raise InputError(f"expected a text, got {quoted(text)} ({type(text).__name__}).")
    if not text.strip():
        raise InputError(f"the {name} is empty.")


@dataclass(frozen=True)
class ReadOptions:
    """How a task reads the rows of a data set.

    Attributes:
        labels: The names of the labels in the order of their ids; None to take them from the data set.
        problem_type: The problem type of text classification; None to infer it from the labels.
        wrong_answers: What to do with an invalid row in question answering: skip the row, or stop with an error. A row
            is invalid if, for example, its context does not have the answer at the given start.
    """

    labels: tuple[str, ...] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    wrong_answers: Literal["skip", "stop"] = "skip"


@dataclass
class Features:
    """The tokens of one text, pair or window: a row for the model, or a part of a packed row.

    Attributes:
        input_ids: Token ids, special tokens included.
        token_type_ids: 0 or 1 for each token.
        masked_positions: Indices of the tokens at which the model scores every token of the vocabulary; empty if
            `Task.masked` is false.
        labels: Ids of the true tokens at the masked positions; empty if `Task.with_labels` is false.
        outputs: The names of the outputs that are needed; empty for all.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    masked_positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    outputs: tuple[str, ...] = ()


Outputs = Mapping[str, np.ndarray]
"""The arrays of `Task.forward` for one `Features`, by name and without padding.

Each array has one entry per masked position or per token, or is a single entry for the text.
"""

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
Steps = Generator[list[Features], list[Outputs], Result]
"""Yields the rows to compute, receives their outputs, and returns the result."""


@dataclass(frozen=True)
class Request(Generic[Result_co]):
    """The steps that compute one result, and what they cost. The cost is known before the first step.

    Attributes:
        steps: The steps.
        tokens: Number of tokens in all rows of all steps.
        size: Approximate size of the result as JSON, in bytes.
    """

    steps: Steps[Result_co]
    tokens: int = 0
    size: int = 0


class LabelScore(TypedDict):
    """A predicted label and its score. The score is a probability or, in regression, the predicted number."""

    label: str
    score: float


class Task(Protocol):
    """What inference needs from a task. The constructor expects a tokenizer, a config and the maximum row length."""

    name: str
    """Hugging Face's name of the task."""
    model_class: Any
    """The class of the task's models."""
    per_token: bool
    """Whether outputs have one entry per token. If neither `per_token` nor `masked` is true, they have one per text."""
    masked: bool
    """Whether rows have masked positions. If so, outputs have one entry per masked position."""
    one_mask: bool = False
    """Whether each text has exactly one masked position."""
    with_labels: bool = False
    """Whether rows have `labels`, the true tokens at their masked positions."""
    columns_of_input: tuple[tuple[str, ...], ...]
    """The usual columns of an input, as alternatives. Each row uses the first tuple whose columns it has."""
    json_input: Any
    """The type of one input in the JSON body that the server receives."""
    example: Any
    """A valid input. A request with it shows whether parameters are valid."""

    def forward(self, model: Any, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """Computes the outputs of a batch. This function is pure, and is compiled once for each shape of a batch.

        Args:
            model: An instance of `model_class`.
            inputs: The keyword arguments of the model.
            starts: int [B, K], the index of each text's first token in its row; [1, K] if all rows have equal indices.

        Returns:
            The arrays of outputs by name: [B, P, …] if `masked`, [B, T, …] if `per_token`, else [B, K, …].
        """

    @property
    def request(self) -> Callable[..., Request[Any]]:
        """The function that makes a request from an input and parameters.

        The function raises `InputError` if the input or a parameter is invalid.
        """


Loss = Callable[[Any, Mapping[str, Any], jax.Array | None], tuple[jax.Array, jax.Array]]
"""A function of a model, a batch and a dropout key, which returns what `Objective.loss` returns."""


class Objective(Protocol):
    """What training and evaluation need to know about a training objective: its loss, outputs and metrics."""

    metrics: tuple[str, ...]
    """Names of the metrics; the first one selects the best checkpoint unless the settings name another."""
    per_token: bool
    """Whether outputs have one entry per token. If not, they have one entry per example."""

    def loss(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The mean loss of a batch and the divisor of this mean, both float32 []. Padding does not count.

        The divisor is the number of entries in the mean or, if they have weights, the sum of their weights. If the
        dropout key is None, there is no dropout.
        """

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays that `evaluate` needs from a batch, by name: [B, T, …] if `per_token`, else [B, K, …]."""

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """Computes the metrics from the `outputs` of all examples."""


class TrainableTask(Task, Objective, Protocol):
    """A task that pretrained models are fine-tuned for."""

    columns: Mapping[str, tuple[str, ...]]
    """Maps each field of a row to the usual names of its column. The `data` settings may name another column."""
    required: tuple[str, ...]
    """The fields of `columns` that every split must have. The training split must also have `target`."""
    target: str
    """The field of `columns` that the model learns to predict."""
    head: str
    """Regular expression for the paths of the head's parameters. Pretrained checkpoints lack these parameters."""
    peft_type: str
    """The `task_type` that the library `peft` uses for models of this task."""
    options: Mapping[str, type] = {}
    """Maps the names of further arguments of the constructor to their classes.

    For each of these arguments, the settings have a section of the same name.
    """
    order_matters: bool = False
    """Whether a metric depends on the order of the labels if the model has two."""

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """Returns the rows of all splits in the form that `featurize` expects, and a note for the user."""

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """The fields of the model's config that depend on the training rows, such as the names of the labels.

        Args:
            rows: The training rows after `clean`.
            options: The options that were passed to `clean`.
            labels: The names of the labels in the order that the data set defines; None if it defines no order.
        """

    def labelled(self, examples: Examples) -> bool:
        """Whether any example has true values for `evaluate` to compare the outputs with."""

    def tuned(self, metrics: Mapping[str, Any]) -> Self:
        """Returns a task that uses the values, such as a threshold, that an evaluation found and stored in `metrics`.

        A task without such values returns itself.
        """
        return self

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows to examples. If a row cannot be used, raises `InputError` with the number of the row."""

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The outputs of `forward`."""
        return self.forward(model, batch["inputs"], batch["starts"])

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """Converts the outputs of `forward` to readable predictions, one per row of the data."""

    @staticmethod
    def files(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Further files to write besides the predictions: their JSON values by file name. By default, there are none.

        Args:
            lines: The rows of the data, each with its `prediction`.
        """
        return {}


def known_labels(labels: Sequence[str]) -> str:
    """The last part of an error message about an unknown label: it lists the labels of the model."""
    if all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        return f"the model has {listed(labels)}; set data.labels to name them, in this order."
    return f"the labels are {listed(labels)}."
