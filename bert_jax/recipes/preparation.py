"""Settings and data -> a task, a model and examples."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx

from bert_jax import hub, tree
from bert_jax.config import BertConfig
from bert_jax.data import sources
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError, listed, quoted
from bert_jax.model import BertPreTrainedModel
from bert_jax.settings import HeldOut, Pretraining, Settings
from bert_jax.tasks.base import ReadOptions, TrainableTask, check_vocabulary
from bert_jax.tasks.question_answering import AnswerOptions
from bert_jax.tasks.registry import TASKS, TRAINABLE
from bert_jax.tokenizer import Tokenizer

UNNAMED = ("id", "is_impossible")
"""Columns that have no setting for their names."""


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        task: The task, made for this model.
        model: The model, with its new head.
        tokenizer: The tokenizer of the model.
        rows: Split -> its rows, with columns named as the task names them.
        examples: Split -> the same rows, featurized.
        found: Notes on the data for the user.
    """

    task: TrainableTask
    model: BertPreTrainedModel
    tokenizer: Tokenizer
    rows: dict[str, list[sources.Row]]
    examples: dict[str, Examples]
    found: str


@dataclass(frozen=True)
class Split:
    """The content of a split of the settings' data.

    Attributes:
        rows: The rows, with columns named as tasks name them.
        labels: Names of the classes in the order of their ids, if the data set stores labels as class ids.
    """

    rows: list[sources.Row]
    labels: tuple[str, ...] | None = None


def prepare(settings: Settings) -> Prepared:
    """Reads the data and the model.

    Raises:
        InputError: Names the file, column, row or label that cannot be used.
        ModelNotFoundError: If there is no such model.
        CheckpointError: If the weights do not fit the model, or the vocabulary does not fit the weights.
    """
    if settings.data.train is None:
        raise InputError("data.train is not set; expected a file, or the name of a split where data.id is set.")
    task_class = TASKS[settings.task]
    splits = {split: read_split(settings, split) for split in ("train", "validation", "test")}
    rows = {split: found.rows for split, found in splits.items() if found.rows}
    options = read_options(settings)
    found = task_class.clean(rows, options)
    config = task_class.config(rows.get("train", []), options, splits["train"].labels)
    _check_order(settings, config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        if (value := getattr(settings.model, name)) is not None:
            config[name] = value
    tokenizer = Tokenizer.from_pretrained(settings.model.id, revision=settings.model.revision)
    model = task_class.model_class.from_pretrained(
        settings.model.id,
        revision=settings.model.revision,
        new=[task_class.head, *settings.model.new],
        ignore=settings.model.ignore,
        rngs=nnx.Rngs(settings.training.seed),
        compute_dtype=settings.precision.compute_dtype,
        attention=settings.model.attention,
        remat=settings.training.remat,
        scan_layers=settings.training.scan_layers,
        **config,
    )
    task = make_task(settings, tokenizer, model.config)
    return Prepared(task, model, tokenizer, rows, featurize(task, rows), found)


def read_options(settings: Settings) -> ReadOptions:
    """The options of `data` that decide how a task reads rows."""
    data = settings.data
    return ReadOptions(data.labels, data.problem_type, data.wrong_answers)


def make_task(settings: Settings, tokenizer: Tokenizer, config: BertConfig) -> TrainableTask:
    """Makes the settings' task for a model."""
    options: dict[str, Any] = {}
    if settings.task == "question-answering":
        options["answers"] = AnswerOptions(**settings.answers.model_dump())
    check_vocabulary(tokenizer, config)
    task: TrainableTask = TASKS[settings.task](tokenizer, config, max_length(settings, config), **options)
    return task


def max_length(settings: Settings | Pretraining, config: BertConfig) -> int:
    """The settings' `data.max_length`.

    Raises:
        InputError: If the model has fewer positions.
    """
    if settings.data.max_length > config.max_position_embeddings:
        raise InputError(
            f"data.max_length is {settings.data.max_length}; the model has {config.max_position_embeddings} positions."
        )
    return settings.data.max_length


def featurize(task: TrainableTask, rows: dict[str, list[sources.Row]]) -> dict[str, Examples]:
    """The rows of each split -> its examples; an error names the split."""
    examples = {}
    for split, found in rows.items():
        try:
            examples[split] = task.featurize(found)
        except InputError as error:
            raise InputError(f"data.{split}: {error}") from None
    return examples


def read_split(settings: Settings | HeldOut, split: str) -> Split:
    """Reads a split; the result is empty if the split is not set.

    Raises:
        InputError: If it cannot be read, has no rows or lacks a column, or its files name the labels differently.
    """
    data = settings.data
    places = getattr(data, split)
    if places is None:
        return Split([])
    rows: list[sources.Row] = []
    class_labels: dict[str, sources.ClassLabels] = {}
    for place in [places] if isinstance(places, str) else places:
        named = Path(place).suffix in sources.FORMATS
        if data.id and named and Path(place).is_file():
            raise InputError(f"data.{split} is the file {place}, and data.id {data.id}; for files set data.id=null.")
        if not data.id and not named and data.format is None and not Path(place).exists():
            raise InputError(
                f"data.{split}: there is no file {quoted(place)}. If it is a split of the Hub's, set data.id; "
                f"data.{split}=null goes without."
            )
        if data.id:
            class_labels[place], found = sources.read_hub(data.id, data.name, place, data.revision)
        else:
            class_labels[place] = sources.class_labels(place, data.format)
            found = sources.read(place, data.format, labelled=isinstance(settings, Settings))
        rows += islice(found, None if data.limit is None else data.limit - len(rows))
    where = f"data.{split} ({places})"
    if not rows:
        raise InputError(f"{where} has no examples.")
    there = dict.fromkeys(name for row in rows for name in row)  # JSON rows may differ in columns
    task = TASKS[settings.task] if settings.task in TRAINABLE else None
    usual, required = (task.columns, task.required) if task else ({"text": sources.TEXT}, ("text",))
    try:
        wanted = {
            name: sources.column(there, None if name in UNNAMED else getattr(data, name), names)
            for name, names in usual.items()
        }
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    needed = [*required, task.target] if task and split == "train" else required
    for name in needed:
        if wanted[name] is None:
            raise InputError(f"{where}: which column is the {name}? There are {listed(there)}; set data.{name}.")
    target = wanted[task.target] if task else None
    orders = {found[target]: place for place, found in class_labels.items() if target in found}
    if len(orders) > 1 and not data.labels:
        (first, one), (second, other) = islice(orders.items(), 2)
        raise InputError(
            f"{where}: the class ids of {one} stand for {listed(first)}, and those of {other} for {listed(second)}; "
            "data.labels says which order counts."
        )
    found_rows = [{name: row.get(column) for name, column in wanted.items() if column} for row in rows]
    return Split(found_rows, next(iter(orders), None))


def _check_order(settings: Settings, config: Mapping[str, Any]) -> None:
    """Refuses to reorder the labels of a checkpoint that is fine-tuned for the task, unless data.labels is set.

    Raises:
        InputError: If the order differs; the message says how to keep that of the checkpoint.
    """
    folder = hub.download(settings.model.id, revision=settings.model.revision)
    names = tuple(config["id2label"] or ())
    if settings.data.labels or TASKS[settings.task].model_class.__name__ not in hub.architectures(folder):
        return
    before = BertConfig.from_file(folder / hub.CONFIG_FILE).labels
    if before != names and sorted(before) == sorted(names):
        raise InputError(
            f"The labels of {settings.model.id} are, in the order of their ids, {listed(before)}, and those of "
            f"data.train are {listed(names)}. Set data.labels='{_as_yaml(before)}' to keep the order of the model."
        )


def named(config: BertConfig, settings: Settings, labels: tuple[str, ...] | None) -> BertConfig:
    """A model's config, with LABEL_0, LABEL_1, … replaced by `data.labels` if it is set.

    Raises:
        InputError: If `data.labels` has another number of names than the model, or if the order of the labels differs
            from the model's and a metric depends on it.
    """
    given, names = settings.data.labels, config.labels
    if given and settings.task != "question-answering" and all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        if len(given) != len(names):
            raise InputError(f"data.labels has {len(given)} names; the model has {len(names)} labels, {listed(names)}.")
        return config.replace(id2label=given)
    expected = given or labels or names
    binary = settings.task == "text-classification" and len(names) == 2  # f1 is computed for the second label
    if binary and expected != names and sorted(expected) == sorted(names):
        raise InputError(
            f"The labels of the model are, in the order of their ids, {listed(names)}, and those of the data are "
            f"{listed(expected)}; f1 is that of the second label. Set data.labels='{_as_yaml(names)}' for that of "
            f"{names[1]}, or train the model again for that of {expected[1]}."
        )
    return config


def _as_yaml(names: Sequence[str]) -> str:
    return yaml.safe_dump(list(names), default_flow_style=True, width=10**6, allow_unicode=True).strip()


def overview(settings: Settings, prepared: Prepared) -> str:
    """Describes in a few lines what a run starts from."""
    sizes = ", ".join(
        f"{len(rows):,} {split}"
        + (f" ({windows:,} windows)" if (windows := len(prepared.examples[split])) != len(rows) else "")
        for split, rows in prepared.rows.items()
    )
    labels = getattr(prepared.task, "labels", ())
    return (
        f"{settings.task}: {settings.model.id}, {describe(prepared.model)}\n"
        f"examples: {sizes}"
        + (f"; labels: {', '.join(labels[:20])}{', …' if len(labels) > 20 else ''}" if labels else "")
        + (f"\n{prepared.found}" if prepared.found else "")
    )


def describe(model: BertPreTrainedModel) -> str:
    """Describes how many parameters a model has, and which devices it is to run on."""
    _, skeleton = tree.split(model)
    count = sum(spec.size for spec in skeleton.specs.values())
    return f"{count / 1e6:.1f} M parameters, {jax.device_count()} × {jax.devices()[0].device_kind}"
