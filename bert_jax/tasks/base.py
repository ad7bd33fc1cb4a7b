"""The interfaces through which inference and training use a task.

For inference, a task provides `Task.forward`, a pure function that runs on the device, and `Task.request`, which
creates a request from an input. The steps of a request are implemented as a generator. The generator yields rows for
the model, receives the outputs for these rows, may yield more rows that depend on the outputs, and finally returns the
result. Requests do not deal with batching. The pipeline (`bert_jax.inference.pipelines`) collects the rows of many
requests into batches and pads each batch to one of a few shapes, called buckets. The result of a request does not
depend on the other requests in the batch.

In shapes, B is the number of rows, T the number of tokens per row, K the number of texts or examples per row, P the
number of masked positions per row, C the number of labels, and V the vocabulary size.
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
    """Raises `InputError` if the model has only one token type and therefore cannot distinguish the texts of a pair."""
    if config.type_vocab_size < 2:
        raise InputError("The model has 1 token type; a pair of texts needs 2. Use single texts or another model.")


def check_vocabulary(tokenizer: Tokenizer, config: BertConfig) -> None:
    """Raises `CheckpointError` if the tokenizer has token ids for which the model has no embeddings."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model has {config.vocab_size}. "
            "Use the model's tokenizer. If you added tokens to it, resize the model's embeddings, then make pipelines."
        )


def check_text(text: Any, name: str = "text") -> None:
    """Raises `InputError` if `text` is not a string or is blank.

    Args:
        text: The text to check.
        name: The name used for the text in the error message if the text is blank.
    """
    if not isinstance(text, str):
        raise InputError(f"expected a text, got {quoted(text)} ({type(text).__name__}).")
    if not text.strip():
        raise InputError(f"the {name} is empty.")


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading the rows of a data set.

    Attributes:
        labels: The names of the labels in the order of their ids; None to take them from the data set.
        problem_type: The problem type of text classification; None to infer it from the labels.
        wrong_answers: For question answering, whether to skip invalid rows ("skip") or to stop with an error ("stop").
            A row is invalid if, for example, its context does not contain the answer at the given start.
    """

    labels: tuple[str, ...] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    wrong_answers: Literal["skip", "stop"] = "skip"


@dataclass
class Features:
    """The tokens of a text, a pair of texts or a window. They form a row for the model or part of a packed row.

    Attributes:
        input_ids: Token ids, including special tokens.
        token_type_ids: The token type of each token, 0 or 1.
        masked_positions: Positions at which the model scores every token of the vocabulary; empty if `Task.masked` is
            false.
        labels: Ids of the true tokens at the masked positions; empty if `Task.with_labels` is false.
        outputs: The names of the required outputs; empty if all outputs are required.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    masked_positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    outputs: tuple[str, ...] = ()


Outputs = Mapping[str, np.ndarray]
"""The arrays that `Task.forward` returns for one `Features` object, keyed by name and without padding.

Each array has one entry per masked position, one entry per token, or a single entry for the whole text.
"""

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
Steps = Generator[list[Features], list[Outputs], Result]
"""A generator that yields rows for the model, receives their outputs, and finally returns the result."""


@dataclass(frozen=True)
class Request(Generic[Result_co]):
    """The steps that compute one result, and their cost. The cost is known before the first step.

    Attributes:
        steps: The steps.
        tokens: Total number of tokens in the rows of all steps.
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
    """The inference interface of a task. The constructor takes a tokenizer, a config and the maximum row length."""

    name: str
    """The Hugging Face name of the task."""
    model_class: Any
    """The class of the task's models."""
    per_token: bool
    """Whether outputs have one entry per token. If neither this nor `masked` is true, they have one entry per text."""
    masked: bool
    """Whether rows have masked positions. If so, outputs have one entry per masked position."""
    one_mask: bool = False
    """Whether each text has exactly one masked position."""
    with_labels: bool = False
    """Whether rows have `labels`, the ids of the true tokens at their masked positions."""
    columns_of_input: tuple[tuple[str, ...], ...]
    """Alternative tuples of input columns. For each row, the first tuple whose columns all exist is used."""
    json_input: Any
    """The type of one input in the JSON body that the server receives."""
    example: Any
    """A valid input. To check parameters, a request is created from this input."""

    def forward(self, model: Any, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """Computes the outputs of a batch. This function is pure and is compiled once per batch shape.

        Args:
            model: An instance of `model_class`.
            inputs: The keyword arguments of the model.
            starts: int [B, K], the index of each text's first token in its row; [1, K] if the indices are the same in
                all rows.

        Returns:
            The output arrays, keyed by name: [B, P, …] if `masked`, [B, T, …] if `per_token`, else [B, K, …].
        """

    @property
    def request(self) -> Callable[..., Request[Any]]:
        """The function that creates a request from an input and parameters.

        The function raises `InputError` if the input or a parameter is invalid.
        """


Loss = Callable[[Any, Mapping[str, Any], jax.Array | None], tuple[jax.Array, jax.Array]]
"""A function of a model, a batch and a dropout key, with the same return values as `Objective.loss`."""


class Objective(Protocol):
    """A training objective: the loss, outputs and metrics that training and evaluation require."""

    metrics: tuple[str, ...]
    """Names of the metrics; the first one selects the best checkpoint unless the settings specify another metric."""
    per_token: bool
    """Whether outputs have one entry per token. If false, they have one entry per example."""

    def loss(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Computes the mean loss of a batch. Padding is ignored. If the dropout key is None, no dropout is applied.

        Returns:
            The mean loss and the number by which the sum of the losses was divided, both float32 []. The sum is divided
            by the number of losses (for example, the number of examples) or, if the losses are weighted, by the sum of
            their weights.
        """

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays that `evaluate` needs from a batch, keyed by name: [B, T, …] if `per_token`, else [B, K, …]."""

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """Computes the metrics from the `outputs` of all examples."""


class TrainableTask(Task, Objective, Protocol):
    """A task for which pretrained models can be fine-tuned."""

    columns: Mapping[str, tuple[str, ...]]
    """Maps each field of a row to the usual names of its column. The `data` settings can specify a different column."""
    required: tuple[str, ...]
    """The fields of `columns` that every split must have. The training split must also have `target`."""
    target: str
    """The field of `columns` that the model learns to predict."""
    head: str
    """A regular expression for the paths of the head's parameters, which pretrained checkpoints lack."""
    peft_type: str
    """The `task_type` that the `peft` library uses for models of this task."""
    options: Mapping[str, type] = {}
    """Maps the names of additional constructor arguments to their classes.

    For each of these arguments, the settings contain a section with the same name.
    """
    order_matters: bool = False
    """Whether any metric depends on the order of the labels if a model has two labels."""

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """Returns the rows of all splits in the form that `featurize` expects, and a note for the user."""

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """The fields of the model's config that depend on the training rows, such as the names of the labels.

        Args:
            rows: The training rows, as returned by `clean`.
            options: The options that were passed to `clean`.
            labels: The names of the labels in the order that the data set defines; None if it does not define an order.
        """

    def labeled(self, examples: Examples) -> bool:
        """Whether any example has ground-truth values with which `evaluate` can compare the outputs."""

    def tuned(self, metrics: Mapping[str, Any]) -> Self:
        """Returns a task that uses the tuned values (for example, a threshold) in the metrics of an evaluation.

        If nothing is tuned, returns the task itself.
        """
        return self

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows to examples. If a row cannot be used, raises an `InputError` that gives the row number."""

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The outputs of `forward`."""
        return self.forward(model, batch["inputs"], batch["starts"])

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """Converts the outputs of `forward` to human-readable predictions, one per data row."""

    @staticmethod
    def files(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Additional files to write next to the predictions, as JSON values keyed by file name; none by default.

        Args:
            lines: The data rows, each with its `prediction`.
        """
        return {}


def known_labels(labels: Sequence[str]) -> str:
    """Returns the end of the error message for an unknown label, including the model's labels."""
    if all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        return f"the model has {listed(labels)}; set data.labels to name them, in this order."
    return f"the labels are {listed(labels)}."
