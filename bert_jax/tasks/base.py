"""What a task is to inference: a pure function on the device, and requests that ask for rows and get their outputs.

A request is a generator. It yields the rows it wants computed, receives their outputs, may yield more rows that
depend on these, and returns its result. It never sees a batch: rows of many requests share one, padded to a bucket
(`bert_jax.inference.pipelines`), and so a result does not depend on its company.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict, TypeVar

import jax
import numpy as np

from bert_jax.config import BertConfig
from bert_jax.data.loader import Examples
from bert_jax.errors import CheckpointError, InputError, listed
from bert_jax.tokenizer import Tokenizer


def check_pairs(config: BertConfig) -> None:
    """Raises `InputError` where a model cannot tell the two texts of a pair apart."""
    if config.type_vocab_size < 2:
        raise InputError(
            f"The model has {config.type_vocab_size} token type (type_vocab_size); a pair of texts takes two. "
            "Give single texts, or take another model."
        )


def check_vocabulary(tokenizer: Tokenizer, config: BertConfig) -> None:
    """Raises `CheckpointError` where a tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
            "they do not belong together."
        )


@dataclass(frozen=True)
class ReadOptions:
    """How a task reads the rows of a data set.

    Attributes:
        labels: The names of the labels in the order of their ids; None to find them in the training rows.
        problem_type: What the labels of a text classification are; None to decide by the labels.
        wrong_answers: What to do about an answer that is not where its row says: skip the row, or stop.
    """

    labels: tuple[str, ...] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    wrong_answers: Literal["skip", "stop"] = "skip"


@dataclass
class Row:
    """One row of tokens for the model.

    Attributes:
        input_ids: Token ids, special tokens included.
        token_type_ids: 0 or 1 for each.
        masked_positions: Indices of the tokens at which the vocabulary is wanted; none for other tasks.
        labels: What stands there in truth, where a model is evaluated.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    masked_positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


Outputs = Mapping[str, np.ndarray]
"""A row's share of what `Task.forward` returned: of its masked positions or its tokens, without padding, or its own."""

Result = TypeVar("Result")
Request = Generator[list[Row], list[Outputs], Result]


class LabelScore(TypedDict):
    """A label and its score."""

    label: str
    score: float


class Task(Protocol):
    """What inference needs to know about a task. Its constructor takes a tokenizer, a config and the longest row."""

    name: str
    """Hugging Face's name of the task."""
    model_class: Any
    """The class of its models."""
    per_token: bool
    """Whether outputs have one entry per token, not per text."""
    masked: bool
    """Whether rows have masked positions."""
    columns_of_input: tuple[tuple[str, ...], ...]
    """Usual names of the columns of a file that make up an input; the first that a file has are used."""
    json_input: Any
    """The type of one input in a request's JSON."""

    def forward(self, model: Any, inputs: dict[str, jax.Array], starts: jax.Array) -> dict[str, jax.Array]:
        """From a batch to arrays; pure, and compiled once a bucket.

        Args:
            model: Of `model_class`.
            inputs: What it takes.
            starts: int [B, K], or [1, K] for all rows: the first token of each text in its row.

        Returns:
            Arrays [B, P, …] where inputs have masked positions, else [B, T, …] where they are per token, or [B, K, …].
        """
        ...

    @property
    def request(self) -> Callable[..., Request[Any]]:
        """Takes one input, and the task's parameters as keywords. Raises `InputError` if they cannot be used."""
        ...


class Objective(Protocol):
    """What training and evaluation need to know of what is to be learnt."""

    metrics: tuple[str, ...]
    """Names of what `evaluate` gives; the first chooses the best checkpoint unless the settings say otherwise."""
    per_token: bool
    """Whether outputs have an entry a token, and not an example."""

    def loss(self, model: Any, batch: Mapping[str, Any], dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The batch's mean loss and how many it is the mean of, rows of padding apart; both float32 []."""
        ...

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """What `evaluate` reads of a batch, each [B, T, …] where it is per token, else [B, K, …]."""
        ...

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """Metrics of the `outputs` of all examples."""
        ...


class TrainableTask(Task, Objective, Protocol):
    """A task that pretrained models are fine-tuned for."""

    columns: Mapping[str, tuple[str, ...]]
    """What a row has -> usual names of its column; the settings' `data` may name another."""
    required: tuple[str, ...]
    """Which of these have to be there."""
    target: str
    """Which of these is learnt."""
    head: str
    """Pattern of the parameters that a pretrained checkpoint lacks."""
    peft_type: str
    """By which `peft` knows such a model."""

    @staticmethod
    def clean(rows: Mapping[str, list[dict[str, Any]]], options: ReadOptions) -> str:
        """Puts splits' rows into the form that `featurize` takes, in place; returns what people should know of it."""
        ...

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """The config's fields that follow from the training rows: their labels.

        Args:
            rows: Cleaned ones.
            options: See `clean`.
            labels: That order as the data set has it; None where it has none.
        """
        ...

    def labelled(self, examples: Examples) -> bool:
        """Whether any has what `evaluate` holds outputs against."""
        ...

    def adopt(self, metrics: Mapping[str, Any]) -> None:
        """Takes over what an evaluation has found, for predictions; nothing by default."""

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Rows of data -> examples; raises `InputError` where a row cannot be used, with its index."""
        ...

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """What `forward` returns."""
        return self.forward(model, batch["inputs"], batch["starts"])

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """What `forward` returned, in words, row by row of the data."""
        ...


def known_labels(labels: Sequence[str]) -> str:
    """A sentence's end about a label that is none of the model's."""
    if all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        return f"the model has {listed(labels)}; data.labels gives them names, in this order."
    return f"the labels are {listed(labels)}."
