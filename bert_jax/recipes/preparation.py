"""Prepares a run's task, model and examples from its settings and data."""

import functools
import inspect
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import yaml
from flax import nnx

from bert_jax import hub, losses, tree
from bert_jax.config import BertConfig
from bert_jax.data import sources
from bert_jax.data.formats import TEXT, Row, Table
from bert_jax.data.labels import REGRESSION
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError, listed, quoted
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.settings import Data, HeldOut, Pretraining, Settings
from bert_jax.tasks.base import Loss, ReadOptions, TrainableTask, check_vocabulary
from bert_jax.tasks.registry import TASKS
from bert_jax.tokenizer import Tokenizer

WORDS = "bert.embeddings.word_embeddings.weight"
DROPOUT = {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}
"""The settings in `model` that are dropout rates. A rate that is set replaces the one in the model's config."""


class Prepared(NamedTuple):
    """The task, the model and the data with which a run starts.

    Attributes:
        task: The task, created for this model.
        model: The model. Its head is either newly initialized or loaded from the checkpoint.
        tokenizer: The tokenizer of the model.
        rows: The rows of each split. Their columns have the names that the task uses.
        examples: The examples of each split, created from its rows.
        found: Notes for the user about the data and the head.
    """

    task: TrainableTask
    model: BertPreTrainedModel
    tokenizer: Tokenizer
    rows: dict[str, list[Row]]
    examples: dict[str, Examples]
    found: str


class Split(NamedTuple):
    """One split of the data.

    Attributes:
        rows: The rows. Their columns have the names that the task uses.
        labels: If the data set stores labels as class ids, the names of the classes in the order of their ids;
            otherwise None.
    """

    rows: list[Row]
    labels: tuple[str, ...] | None = None


def prepare(settings: Settings) -> Prepared:
    """Reads the data and the model.

    Raises:
        InputError: If a file, column, row or label cannot be used; the message states which one.
        ModelNotFoundError: If the model does not exist.
        CheckpointError: If the weights do not fit the model, or if the vocabulary does not fit the weights.
    """
    if settings.data.train is None:
        raise InputError("data.train is not set; expected a file or, if data.id is set, the name of a split.")
    if settings.decision.tune and settings.data.validation is None:
        raise InputError("decision.tune requires data.validation. Set data.validation, or set decision.tune=false.")
    task_class = TASKS[settings.task]
    splits = {split: read_split(settings, split) for split in ("train", "validation", "test")}
    rows = {split: found.rows for split, found in splits.items() if found.rows}
    options = read_options(settings)
    rows, found = task_class.clean(rows, options)
    config = task_class.config(rows["train"], options, splits["train"].labels)
    folder = hub.download(settings.model.id, revision=settings.model.revision)
    if settings.model.lora and hub.config_file(folder).name == hub.MERGED_CONFIG_FILE:
        raise InputError(
            f"model.lora is set, but {folder} contains adapters, whose own base these new adapters would lose. Set "
            f"model.id={folder.parent}, which has them merged."
        )
    new = [task_class.head, *settings.model.new]
    if task_class.model_class.__name__ in hub.architectures(folder):
        before, names = BertConfig.from_file(hub.config_file(folder)), tuple(config["id2label"])
        if not settings.data.labels:
            check_order(before.labels, names)
        if before.labels == names and before.problem_type in (None, config.get("problem_type")):
            new = list(settings.model.new)
    tokenizer = Tokenizer.from_pretrained(settings.model.id, revision=settings.model.revision)
    model = task_class.model_class.from_pretrained(
        settings.model.id,
        revision=settings.model.revision,
        new=new,
        ignore=settings.model.ignore,
        rngs=nnx.Rngs(settings.training.seed),
        **network_options(settings),
        **config | settings.model.model_dump(include=DROPOUT, exclude_none=True),
    )
    specs = tree.split(model)[1].specs
    if not {*tree.select([task_class.head], specs)} & {*tree.select(new, specs)}:
        found = "\n".join(filter(None, [found, "head: that of the checkpoint, which has the same labels"]))
    model.encoder.compute_dtype = settings.precision.compute_dtype
    if add_tokens(tokenizer, settings):
        model.resize_embeddings(max(tokenizer.vocab_size, model.config.vocab_size))
    task = make_task(settings, tokenizer, model.config)
    return Prepared(task, model, tokenizer, rows, featurize(task, rows), found)


def add_tokens(tokenizer: Tokenizer, settings: Settings | Pretraining) -> int:
    """Adds the tokens in `model.add_tokens` to a tokenizer and returns how many of them are new.

    Raises:
        InputError: If a token is blank, or if the embeddings of the new tokens would not be trained.
    """
    added = tokenizer.add_tokens(settings.model.add_tokens)
    if added and settings.model.lora:
        raise InputError(
            "model.add_tokens is set, but with model.lora, embeddings are neither trained nor saved. Remove one of the "
            "two settings."
        )
    if added and tree.select(settings.optimizer.frozen, [WORDS]):
        raise InputError(
            f"model.add_tokens is set, but optimizer.frozen matches {WORDS}, so the embeddings of the new tokens would "
            "not be trained. Change one of the two settings."
        )
    return added


def read_options(settings: Settings) -> ReadOptions:
    """Returns the options in `data` that determine how a task reads rows."""
    return ReadOptions(settings.data.labels, settings.data.problem_type, settings.data.wrong_answers)


def network_options(settings: Settings | Pretraining) -> dict[str, Any]:
    """Returns the model class's keyword arguments that determine how the network is computed."""
    return {
        "attention": settings.model.attention,
        "remat": settings.training.remat,
        "scan_layers": settings.training.scan_layers,
    }


def training_loss(settings: Settings, task: TrainableTask, examples: Examples) -> Loss | None:
    """Returns the training loss with the options in `settings.loss`; None means the task's default loss.

    Raises:
        InputError: If an option does not apply to the task, or if the class weights do not fit the labels.
    """
    options = settings.loss.model_dump(exclude_defaults=True)
    regression = getattr(task, "problem_type", None) == REGRESSION
    for name in options:
        if regression or name not in inspect.signature(task.loss).parameters:
            raise InputError(f"loss.{name} is set, but {REGRESSION if regression else task.name} has none. Remove it.")
    if "class_weights" in options:
        options["class_weights"] = _class_weights(options["class_weights"], task, examples)
    return functools.partial(task.loss, **options) if options else None


def _class_weights(given: Literal["balanced"] | Mapping[str, float], task: Any, examples: Examples) -> np.ndarray:
    """Returns the weight of each label of a task, float32 [C]."""
    names: tuple[str, ...] = task.labels
    if given == "balanced":
        labels = examples.targets.get("labels")
        labels = np.concatenate(examples.token_targets["labels"]) if labels is None else labels
        weights = losses.balanced(labels, len(names))
        if wrong := [name for name, weight in zip(names, weights, strict=True) if not 0 < weight < np.inf]:
            raise InputError(
                f"loss.class_weights is balanced, but data.train has the label {quoted(wrong[0])} in no example or in "
                "all. Set the weights, or leave out the label."
            )
        return weights
    if given.keys() != set(names):
        wrong = [name for name in (*given, *names) if (name in given) != (name in names)]
        raise InputError(
            f"loss.class_weights has the labels {listed(given)}, but those of the model are {listed(names)}; "
            f"{quoted(wrong[0])} is in only one of these lists. Give each label of the model a weight."
        )
    return np.array([given[name] for name in names], np.float32)


def make_task(settings: Settings, tokenizer: Tokenizer, config: BertConfig) -> TrainableTask:
    """Creates the task that the settings specify, for a model with this config.

    Raises:
        InputError: If the vocabulary does not fit the model, or if a section of the settings applies only to another
            task.
    """
    task_class = TASKS[settings.task]
    for other in TASKS.values():
        for name in getattr(other, "options", {}).keys() - task_class.options.keys():
            if getattr(settings, name) != type(getattr(settings, name))():
                raise InputError(f"The settings of {name} are for {other.name}; {settings.task} has none. Remove them.")
    options = {name: kind(**getattr(settings, name).model_dump()) for name, kind in task_class.options.items()}
    check_vocabulary(tokenizer, config)
    task: TrainableTask = task_class(tokenizer, config, max_length(settings, config), **options)
    return task


def max_length(settings: Settings | Pretraining, config: BertConfig) -> int:
    """Returns `data.max_length` after checking that the model has enough positions.

    Raises:
        InputError: If the model has fewer positions than `data.max_length`.
    """
    length, positions = settings.data.max_length, config.max_position_embeddings
    if length > positions:
        raise InputError(f"data.max_length is {length}; the model has {positions} positions. Use at most as many.")
    return length


def featurize(task: TrainableTask, rows: dict[str, list[Row]]) -> dict[str, Examples]:
    """Creates the examples of each split from its rows. Error messages name the split."""
    examples = {}
    for split, found in rows.items():
        try:
            examples[split] = task.featurize(found)
        except InputError as error:
            raise InputError(f"data.{split}: {error}") from None
    return examples


def read_split(settings: Settings | HeldOut, split: str) -> Split:
    """Reads a split. If the settings do not specify the split, the result is empty.

    Raises:
        InputError: If the split cannot be read, if it has no rows, or if it lacks a column. Also raised if a class id
            means different labels in two files of the split, unless `data.labels` is set.
    """
    data = settings.data
    places = getattr(data, split)
    if places is None:
        return Split([])
    rows: list[Row] = []
    class_labels: dict[str, sources.ClassLabels] = {}
    for place in [places] if isinstance(places, str) else places:
        path = Path(place)
        if data.id:
            if path.suffix in sources.FORMATS and path.is_file():
                raise InputError(
                    f"data.{split} is the file {place}, but data.id is {data.id}; for files, set data.id=null."
                )
            if table(data) != Table():
                raise InputError(
                    f"data.delimiter, data.quoting and data.columns are for files, but data.id is {data.id}. Remove "
                    "them, or set data.id=null."
                )
            class_labels[place], found = sources.read_hub(data.id, data.name, place, data.revision)
        else:
            if path.suffix not in sources.FORMATS and data.format is None and not path.exists():
                raise InputError(
                    f"data.{split}: there is no file {quoted(place)}. For a split of a data set on the Hub, set "
                    f"data.id; for none, data.{split}=null."
                )
            class_labels[place] = sources.class_labels(place, data.format)
            found = sources.read(place, data.format, labeled=isinstance(settings, Settings), table=table(data))
        rows += islice(found, None if data.limit is None else data.limit - len(rows))
    where = f"data.{split} ({places})"
    if not rows:
        raise InputError(f"{where} has no examples.")
    # The columns of all rows are collected, because JSON rows may differ in their columns.
    there = dict.fromkeys(name for row in rows for name in row)
    usual: Mapping[str, tuple[str, ...]] = {"text": TEXT}
    required: tuple[str, ...] = ("text",)
    target = "text"
    if isinstance(settings, Settings):
        task = TASKS[settings.task]
        usual, required, target = task.columns, task.required, task.target
    elif settings.task == "minimal-pairs":
        usual = {"text": ("sentence_good",), "text_pair": ("sentence_bad",), "label": ("linguistics_term",)}
        required = ("text", "text_pair")
    try:
        # Some columns have no setting. The setting `data.id` is the id of the data set, not the name of a column.
        wanted = {
            name: sources.column(there, None if name == "id" else getattr(data, name, None), names)
            for name, names in usual.items()
        }
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for name in [*required, target] if split == "train" else required:
        if wanted[name] is None:
            raise InputError(f"{where} has no column for the {name}; the columns are {listed(there)}. Set data.{name}.")
    column = wanted[target]
    orders = {found[column]: place for place, found in class_labels.items() if column in found}
    if len(orders) > 1 and not data.labels:
        (first, one), (second, other) = islice(orders.items(), 2)
        raise InputError(
            f"{where}: the class ids mean {listed(first)} in {one}, but {listed(second)} in {other}. Set data.labels "
            "to choose an order."
        )
    rows = [{name: row.get(column) for name, column in wanted.items() if column} for row in rows]
    return Split(rows, next(iter(orders), None))


def table(data: Data) -> Table:
    """Returns the table format that the settings describe."""
    return Table(data.delimiter, data.quoting, data.columns)


def named(config: BertConfig, settings: Settings, labels: tuple[str, ...] | None) -> BertConfig:
    """Returns a model's config, in which `data.labels` (if set) replaces the names LABEL_0, LABEL_1, …

    Args:
        config: The config of the model.
        settings: Settings that specify the task and `data.labels`.
        labels: The names of the data's classes in the order of their ids; None if the data has no class ids.

    Raises:
        InputError: If the number of names in `data.labels` differs from the number of labels that they replace. Also
            raised if a metric depends on the order of the model's two labels, but `data.labels` (or, if that is not
            set, `labels`) lists the two labels in the opposite order.
    """
    given, names = settings.data.labels, config.labels
    if given and all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        if len(given) != len(names):
            raise InputError(f"data.labels has {len(given)} names; the model has {len(names)} labels, {listed(names)}.")
        return config.replace(id2label=given)
    if TASKS[settings.task].order_matters and len(names) == 2:
        check_order(names, given or labels or names)
    return config


def check_order(model: tuple[str, ...], data: tuple[str, ...]) -> None:
    """Raises `InputError` if the data has the same labels as the model but in a different order."""
    if model != data and sorted(model) == sorted(data):
        order = yaml.safe_dump(list(model), default_flow_style=True, width=10**6, allow_unicode=True).strip()
        raise InputError(
            f"The labels of the model are, in the order of their ids, {listed(model)}, but those of the data are "
            f"{listed(data)}. Set data.labels='{order}' to keep the order of the model; another order requires a model "
            "trained with it. If there are two labels, f1 is that of the second."
        )


def overview(settings: Settings, prepared: Prepared) -> str:
    """Describes the task, the model and the examples of a run in a few lines."""
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
    """Returns a description of a model: its number of parameters and the devices on which it will run."""
    count = sum(spec.size for spec in tree.split(model)[1].specs.values())
    return f"{count / 1e6:.1f} M parameters, {jax.device_count()} × {jax.devices()[0].device_kind}"
