"""Settings -> a fine-tuned model, or a model's metrics: what the command line runs, a step at a time."""

import importlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from flax import nnx
from rich.console import Console

from bert_jax import attention, hub, sharding, tree, vocabulary
from bert_jax.config import BertConfig
from bert_jax.data import corpus, sources
from bert_jax.data.loader import Examples, Shape
from bert_jax.data.masking import MaskedExamples, Masking
from bert_jax.errors import InputError, check_extra, listed, quoted
from bert_jax.evaluation import held_out, measure
from bert_jax.model import BertPreTrainedModel
from bert_jax.settings import HeldOut, Pretraining, Settings
from bert_jax.tasks.base import Objective, ReadOptions, TrainableTask, check_pairs, check_vocabulary
from bert_jax.tasks.pretraining import MaskedLanguageModeling, PreTraining
from bert_jax.tasks.question_answering import AnswerOptions
from bert_jax.tasks.registry import TASKS, TRAINABLE
from bert_jax.tokenizer import Tokenizer
from bert_jax.tools import aot, report
from bert_jax.training import distributed, log, loop, lora, memory, optim

SETTINGS, RESULTS, PREDICTIONS, CURVE, CARD = (
    "settings.yaml", "results.json", "predictions.jsonl", "curve.png", "README.md",
)  # fmt: skip
WORDS, BIAS, TRANSFORM = (
    "bert.embeddings.word_embeddings.weight", "predictions.bias", "predictions.transform.weight",
)  # fmt: skip
ADAPTERS, ANSWERS = "adapters", "answers.json"
UNNAMED = ("id", "is_impossible")
"""Columns that no setting names."""
LOADED_LATER = ("grain", "sklearn.metrics")
"""Modules that a run imports on its way, 60 MB."""


@dataclass(frozen=True)
class Prepared:
    """All that a run starts from.

    Attributes:
        task: Made for this model.
        model: With its new head.
        tokenizer: The model's.
        rows: The splits' rows, their columns by the names of the task.
        examples: The same, featurised.
        found: What people should know of the data.
    """

    task: TrainableTask
    model: BertPreTrainedModel
    tokenizer: Tokenizer
    rows: dict[str, list[sources.Row]]
    examples: dict[str, Examples]
    found: str


@dataclass(frozen=True)
class Split:
    """What a split of the settings' data holds.

    Attributes:
        rows: Their columns by the names that tasks know.
        labels: Names of the classes in the order of their ids, where the data set stores labels as class ids.
    """

    rows: list[sources.Row]
    labels: tuple[str, ...] | None = None


def prepare(settings: Settings) -> Prepared:
    """Reads the data and the model.

    Raises:
        InputError: Names the file, column, row or label that cannot be used.
        ModelNotFoundError: If there is no such model.
        CheckpointError: If its weights do not fit, or its vocabulary does not fit them.
    """
    if settings.data.train is None:
        raise InputError("data.train is not set; expected a file, or the name of a split where data.id is set.")
    task_class = TASKS[settings.task]
    splits = {split: read_split(settings, split) for split in ("train", "validation", "test")}
    rows = {split: found.rows for split, found in splits.items() if found.rows}
    options = _read_options(settings)
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


def _read_options(settings: Settings) -> ReadOptions:
    data = settings.data
    return ReadOptions(data.labels, data.problem_type, data.wrong_answers)


def make_task(settings: Settings, tokenizer: Tokenizer, config: BertConfig) -> TrainableTask:
    """The settings' task, for a model."""
    options: dict[str, Any] = {}
    if settings.task == "question-answering":
        options["answers"] = AnswerOptions(**settings.answers.model_dump())
    check_vocabulary(tokenizer, config)
    task: TrainableTask = TASKS[settings.task](tokenizer, config, max_length(settings, config), **options)
    return task


def max_length(settings: Settings | Pretraining, config: BertConfig) -> int:
    """The settings' length, if the model has so many positions.

    Raises:
        InputError: If it has not.
    """
    if settings.data.max_length > config.max_position_embeddings:
        raise InputError(
            f"data.max_length is {settings.data.max_length}; the model has {config.max_position_embeddings} positions."
        )
    return settings.data.max_length


def featurize(task: TrainableTask, rows: dict[str, list[sources.Row]]) -> dict[str, Examples]:
    """Splits' rows -> their examples; an error names the split."""
    examples = {}
    for split, found in rows.items():
        try:
            examples[split] = task.featurize(found)
        except InputError as error:
            raise InputError(f"data.{split}: {error}") from None
    return examples


def read_split(settings: Settings | HeldOut, split: str) -> Split:
    """Reads a split; it is empty where the settings have none.

    Raises:
        InputError: If it cannot be read, has no rows, or lacks a column, or its files name the labels differently.
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
    there = dict.fromkeys(name for row in rows for name in row)  # rows of JSON need not all have the same ones
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


def finetune(settings: Settings, *, console: Console | None = None) -> Path:
    """Fine-tunes a model and leaves all about it in `settings.output.folder`.

    The same call after a kill goes on where the last checkpoint stands; after the end it does nothing.

    Returns:
        The folder.

    Raises:
        InputError: If the settings, the data or the folder cannot be used; the folder is untouched.
        TrainingError: See `training.train`, as for the following.
        Interrupted: After Ctrl-C or SIGTERM.
        CheckpointError: If a file cannot be written.
    """
    console, began = console or Console(quiet=True), time.perf_counter()
    folder = Path(settings.output.folder)
    distributed.agree("The settings", settings.to_yaml)
    if is_finished(settings, console):
        return folder
    prepared = prepare(settings)
    console.print(_overview(settings, prepared), highlight=False, markup=False)
    distributed.agree("The training examples", prepared.examples["train"].digest)
    train = prepared.examples["train"]
    steps = steps_of(settings, train)
    run = set_up(settings, prepared.task, prepared.model, train, steps)
    if "validation" in prepared.examples and not prepared.task.labelled(prepared.examples["validation"]):
        raise InputError(
            f"data.validation ({settings.data.validation}) has no labels, by which the best checkpoint would be "
            "chosen. Give it as data.test, or leave it out."
        )
    begin(settings)
    trained = fit(settings, run, steps, prepared.examples.get("validation"), console)
    results: dict[str, Any] = {"step": trained.step, "steps": trained.steps, "validation": trained.metrics}
    prepared.task.adopt(trained.metrics)
    split = "test" if "test" in prepared.examples else "validation"
    examples = prepared.examples.get(split)
    outputs: Mapping[str, Any] = {}
    if examples is not None:
        if split == "test" or trained.outputs is None:
            result = evaluate_examples(prepared.task, trained.model, examples, settings)
            results[split], outputs = result.metrics, result.outputs
        else:
            outputs = trained.outputs
            results[split] = trained.metrics | prepared.task.evaluate(outputs, examples)
    if not distributed.first():
        return folder
    trained.model.save_pretrained(folder)
    prepared.tokenizer.save_pretrained(folder)
    if settings.model.lora:
        assert run.plan.lora is not None
        lora.save_adapters(folder / ADAPTERS, trained.trained, run.plan.lora, settings.model.id,
                           prepared.task.peft_type)  # fmt: skip
    if examples is not None:
        results["predictions"] = split
        predictions = prepared.task.predictions(outputs, examples)
        lines = [row | {"prediction": p} for row, p in zip(prepared.rows[split], predictions, strict=True)]
        texts = [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines]  # of Parquet, dates too
        _write(folder / PREDICTIONS, "".join(texts))
        if settings.task == "question-answering":  # as the official scripts of SQuAD take it
            ids = [line["row"] - 1 if line.get("id") is None else line["id"] for line in lines]
            answers = {str(id): line["prediction"]["answer"] for id, line in zip(ids, lines, strict=True)}
            _write(folder / ANSWERS, json.dumps(answers, ensure_ascii=False) + "\n")
    end(settings, results, settings.training.metric or prepared.task.metrics[0], began, console)
    return folder


def pretrain(settings: Pretraining, *, console: Console | None = None) -> Path:
    """Pretrains a model and leaves all about it in `settings.output.folder`.

    The same call after a kill goes on where it stood, in tokenizing and in training; after the end it does nothing.

    Returns:
        The folder.

    Raises:
        InputError: If the settings, the texts or the folder cannot be used.
        TrainingError: See `training.train`, as for the following.
        Interrupted: After Ctrl-C or SIGTERM.
        CheckpointError: If a shard is damaged, or a file cannot be written.
    """
    console, began = console or Console(quiet=True), time.perf_counter()
    folder = Path(settings.output.folder)
    distributed.agree("The settings", settings.to_yaml)
    if is_finished(settings, console):
        return folder
    source = settings.model.tokenizer or settings.model.id
    if source is None:
        raise InputError("model.tokenizer is not set; a network that begins anew needs a vocabulary.")
    tokenizer = Tokenizer.from_pretrained(source)
    examples = {split: read_corpus(settings, split, tokenizer, console) for split in ("train", "validation")}
    task = PreTraining() if settings.data.next_sentence else MaskedLanguageModeling()
    model, carried = starting_model(settings, tokenizer, task.model_class)
    max_length(settings, model.config)
    if settings.data.next_sentence:
        check_pairs(model.config)
    train = examples["train"]
    assert train is not None
    console.print(
        f"pretraining: {settings.model.id or 'a new network'}, {_sizes(model)}\n"
        f"examples: {len(train):,} of {int(train.lengths.sum()):,} tokens{carried}",
        highlight=False,
    )
    steps = steps_of(settings, train)
    run = set_up(settings, task, model, train, steps)
    begin(settings)
    trained = fit(settings, run, steps, examples["validation"], console)
    if not distributed.first():
        return folder
    trained.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = {"step": trained.step, "steps": trained.steps, "validation": trained.metrics}
    end(settings, results, settings.training.metric or task.metrics[0], began, console)
    return folder


def steps_of(settings: Settings | Pretraining, examples: Examples) -> int:
    """The number of steps of a run."""
    options = settings.training
    return options.max_steps or math.ceil(options.epochs * -(-len(examples) // options.batch_size))


def set_up(
    settings: Settings | Pretraining,
    task: Objective,
    model: BertPreTrainedModel,
    examples: Examples,
    steps: int,
    devices: Sequence[Any] | None = None,
) -> loop.Run:
    """Makes a run, for the devices of all processes or for those given.

    Raises:
        InputError: If the settings do not fit the model or the devices.
    """
    options = settings.model.lora
    adapters = lora.LoRA(options.rank, options.alpha, options.targets) if options else None
    return loop.set_up(
        model,
        task,
        examples,
        make_optimizer(settings, steps),
        batch_size=settings.training.batch_size,
        accumulation=settings.training.accumulation,
        packing=settings.data.packing,
        trainable=_trainable(settings, model),
        lora=adapters,
        mesh=sharding.mesh(**settings.mesh.model_dump(), devices=devices),
        seed=settings.training.seed,
        metric=settings.training.metric,
    )


def fit(
    settings: Settings | Pretraining, run: loop.Run, steps: int, validation: Examples | None, console: Console
) -> loop.Trained:
    """Carries out a run in the folder of the settings."""
    options = settings.training
    return loop.fit(
        run,
        steps=steps,
        validation=validation,
        evaluate_every=options.evaluate_every,
        evaluation_batch_size=options.evaluation_batch_size,
        patience=options.patience,
        folder=settings.output.folder,
        save_every=options.save_every,
        keep=options.keep,
        log_every=options.log_every,
        schedule=make_schedule(settings, steps),
        tensorboard=settings.output.tensorboard,
        console=console,
    )


def make_schedule(settings: Settings | Pretraining, steps: int) -> optax.Schedule:
    """The learning rate by step."""
    return optim.schedule(learning_rate=settings.optimizer.learning_rate, steps=steps, **settings.schedule.model_dump())


def make_optimizer(settings: Settings | Pretraining, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of a number of steps."""
    options = settings.optimizer
    adam = optax.scale_by_adam(options.beta1, options.beta2, options.epsilon)
    if options.name == "adamw" and not options.bias_correction:
        adam = optim.scale_by_uncorrected_adam(options.beta1, options.beta2, options.epsilon)
    transforms = {
        "adamw": adam,
        "lamb": adam,
        "lion": optax.scale_by_lion(options.beta1, options.beta2),
        "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    }
    return optim.by_path(
        transforms[options.name],
        make_schedule(settings, steps),
        max_grad_norm=options.max_grad_norm,
        trust_ratio=options.name == "lamb",
        **_rule_options(settings),
    )


def _rule_options(settings: Settings | Pretraining) -> dict[str, Any]:
    names = ("weight_decay", "no_decay", "lr_multipliers", "layer_decay")
    return {name: getattr(settings.optimizer, name) for name in names}


def _trainable(settings: Settings | Pretraining, model: BertPreTrainedModel) -> list[str]:
    """Patterns of the parameters to train beside adapters, a pattern for each.

    Raises:
        InputError: If a pattern of the settings matches nothing, or nothing is left to train.
    """
    paths = list(tree.split(model)[1].specs)
    chosen = paths
    if settings.model.lora:
        optim.check_patterns("model.lora.trained", [settings.model.lora.trained], paths)
        chosen = tree.select([settings.model.lora.trained, *settings.model.new], paths)
    optim.check_patterns("optimizer.frozen", settings.optimizer.frozen, paths)
    frozen = set(tree.select(settings.optimizer.frozen, paths))
    chosen = [re.escape(path) for path in chosen if path not in frozen]
    if not chosen and not settings.model.lora:
        raise InputError("optimizer.frozen matches all parameters; nothing is left to train.")
    return chosen


def read_corpus(settings: Pretraining, split: str, tokenizer: Tokenizer, console: Console) -> MaskedExamples | None:
    """A split's examples; its shards are made first where they are not there. None where it is not set.

    Raises:
        InputError: See `corpus.tokenize`.
        CheckpointError: If a shard is damaged.
    """
    places = getattr(settings.data, split)
    if not places:
        return None
    folder = Path(settings.data.shards or f"{settings.output.folder}.shards") / split
    files = [Path(place) for place in ([places] if isinstance(places, str) else places)]
    if not distributed.first():
        distributed.wait(split)
    data, seed = settings.data, settings.training.seed
    shards = corpus.tokenize(
        files,
        folder,
        tokenizer,
        corpus.Layout(data.max_length, data.next_sentence, data.short),
        seed=seed,
        format=data.format,
        text=data.text,
        processes=data.processes,
        console=console,
    )
    if distributed.first():
        distributed.wait(split)
    if replaced := shards.manifest["replaced"]:
        console.print(f"data.{split}: {replaced:,} characters that are no UTF-8 are U+FFFD now.")
    return MaskedExamples.of(shards, tokenizer, Masking(**data.masked.model_dump()), seed)


def starting_model(settings: Pretraining, tokenizer: Tokenizer, model_class: Any) -> tuple[BertPreTrainedModel, str]:
    """The model that training begins with, and what people should know of it.

    Raises:
        ConfigError: If model.config names no field of a config, or values that make no network.
        ModelNotFoundError: If there is no such checkpoint.
        CheckpointError: If it does not fit; `model.new` names what is to be drawn anew.
    """
    options: dict[str, Any] = {
        "compute_dtype": settings.precision.compute_dtype,
        "attention": settings.model.attention,
        "remat": settings.training.remat,
        "scan_layers": settings.training.scan_layers,
    }
    changes = dict(settings.model.config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if (value := getattr(settings.model, name)) is not None:
            changes[name] = value
    rngs = nnx.Rngs(settings.training.seed)
    if settings.model.id is None:
        config = BertConfig.base_cased().replace(**{"vocab_size": tokenizer.vocab_size, **changes})
        return model_class(config, rngs=rngs, **options), ""
    model = model_class.from_pretrained(
        settings.model.id,
        revision=settings.model.revision,
        new=settings.model.new,
        ignore=settings.model.ignore,
        rngs=rngs,
        **options,
        **changes,
    )
    params, skeleton = tree.split(model)
    flat, notes = tree.flatten(params), ""
    if TRANSFORM in tree.select(settings.model.new, flat):
        # Beside a pretrained encoder a head that changes nothing is a better beginning than one drawn at random.
        flat[TRANSFORM] = jnp.eye(model.config.hidden_size)
    before = Tokenizer.from_pretrained(settings.model.id, revision=settings.model.revision)
    if before.backend.get_vocab() != tokenizer.backend.get_vocab():
        sources, counts = vocabulary.carry(before, tokenizer)
        flat |= {path: jnp.asarray(vocabulary.rows(np.asarray(flat[path]), sources)) for path in (WORDS, BIAS)}
        config = model.config.replace(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id)
        _, skeleton = tree.split(model_class(config, **options))
        notes = "\nvocabulary: " + ", ".join(f"{n:,} {how}" for how, n in counts.items())
    return tree.merge(skeleton, tree.unflatten(flat)), notes


def is_finished(settings: Settings | Pretraining, console: Console) -> bool:
    """Whether a run's folder has its results, which the console is told.

    Raises:
        InputError: If the folder holds something else or the run of other settings, or the run could not end for
            something that is not installed.
    """
    check_extra("train", "grain", "sklearn", "matplotlib", "tensorboardX")  # now, and not after hours of training
    folder = Path(settings.output.folder)
    if not (folder / SETTINGS).exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"output.folder: {folder} holds files of something else; expected a new folder.")
        return False
    try:
        before = type(settings).from_file(folder / SETTINGS)
    except InputError as error:
        raise InputError(
            f"output.folder: {folder} holds a run of another kind; expected a new folder. {error}"
        ) from None
    if different := [line for line in before.differences(settings) if not line.startswith("output.")]:
        raise InputError(
            f"output.folder: {folder} holds a run with other settings (then, now):\n  " + "\n  ".join(different)
            + "\nTake another folder, or the settings of then."
        )  # fmt: skip
    if not (folder / RESULTS).exists():
        return False
    console.print(f"{folder} is finished and stays as it is, whatever has become of its data; its {RESULTS} has the "
                  "metrics. Another output.folder starts a new run.",
                  markup=False)  # fmt: skip
    return True


def begin(settings: Settings | Pretraining) -> None:
    """Makes a run's folder, its settings in it.

    Raises:
        InputError: If evaluations are to be counted and there are none, or the folder cannot be written.
    """
    if settings.training.patience and settings.data.validation is None:
        raise InputError("training.patience counts evaluations; expected data.validation, or no patience.")
    folder = Path(settings.output.folder)
    if distributed.first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"output.folder: cannot write {folder}: {error.strerror}.") from None
    distributed.share_folder(folder, SETTINGS)


def end(
    settings: Settings | Pretraining,
    results: dict[str, Any],
    metric: str,
    began: float,
    console: Console,
) -> None:
    """Leaves a run's curve, model card and, last, its results, which say that it is finished; tells what is there."""
    folder = Path(settings.output.folder)
    results |= {
        "seconds": time.perf_counter() - began,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {name: metadata.version(name) for name in ("bert-jax", "jax", "flax", "optax")},
    }
    report.learning_curve(log.read_journal(folder / log.METRICS), metric).savefig(folder / CURVE, dpi=120)
    _write(folder / CARD, model_card(settings, results))
    _write(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    if test := results.get("test"):
        console.print(f"test: {log.in_words(test)}", soft_wrap=True)
    predicted = f", predictions of {results['predictions']}" if "predictions" in results else ""
    console.print(
        f"{folder}: the model of step {results['step']} of {results['steps']}, its card, metrics{predicted}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def model_card(settings: Settings | Pretraining, results: Mapping[str, Any]) -> str:
    """The README.md of a run's model."""
    base, train = settings.model.id, settings.data.train or ()
    data, dataset, task = ", ".join([train] if isinstance(train, str) else train), None, "fill-mask"
    made = f"{f'`{base}`' if base else 'A new network'}, pretrained on {data}"
    if isinstance(settings, Settings):
        dataset, task = settings.data.id, settings.task
        made = f"`{base}` fine-tuned for {task} on {dataset or data}"
    return report.model_card(
        settings.output.folder, task, made, results, base=base, dataset=dataset, settings=settings.to_yaml()
    )


def evaluate(
    model_id: str, settings: Settings, split: str, *, ignore: Sequence[str] = (), console: Console | None = None
) -> dict[str, Any]:
    """Metrics of a fine-tuned model on a split of the settings' data; what its run found on validation counts.

    Args:
        model_id: A folder or an id on the Hub.
        settings: Say which data, how long, and how many at a time.
        split: "validation" or "test".
        ignore: Regular expressions of tensors in the checkpoint that are left out.
        console: Is told what people should know of the data; nobody by default.

    Raises:
        InputError: If the split is not set, has no labels, or not the model's.
        CheckpointError: If the model has no head for the task.
    """
    check_extra("train", "sklearn")
    loaded = read_split(settings, split)
    rows = loaded.rows
    if not rows:
        raise InputError(f"data.{split} is not set.")
    task_class = TASKS[settings.task]
    found = task_class.clean({split: rows}, _read_options(settings))
    tokenizer = Tokenizer.from_pretrained(model_id)
    model = task_class.model_class.from_pretrained(
        model_id, ignore=ignore, compute_dtype=settings.precision.compute_dtype
    )
    task = make_task(settings, tokenizer, _named(model.config, settings, loaded.labels))
    examples = featurize(task, {split: rows})[split]
    if not task.labelled(examples):
        raise InputError(f"data.{split} has no labels; `bert-jax predict` does without.")
    if (results := Path(model_id) / RESULTS).is_file():
        task.adopt(json.loads(results.read_text(encoding="utf-8"))["validation"])
    if console and found:
        console.print(found, highlight=False, markup=False)
    return evaluate_examples(task, model, examples, settings).metrics


def evaluate_held_out(
    models: Sequence[str], settings: HeldOut, split: str, *, ignore: Sequence[str] = (), console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluates pretrained models on the texts of a split; see `held_out.evaluate`."""
    texts = [row["text"] for row in read_split(settings, split).rows]
    if not texts:
        raise InputError(f"data.{split} is not set.")
    return held_out.evaluate(
        models,
        texts,
        task=settings.task,
        max_length=settings.data.max_length,
        words=settings.masking.words,
        share=settings.masking.share,
        seed=settings.seed,
        resamples=settings.resamples,
        compute_dtype=settings.precision.compute_dtype,
        ignore=ignore,
        console=console,
    )


def _check_order(settings: Settings, config: Mapping[str, Any]) -> None:
    """Refuses to name the labels of a checkpoint that was fine-tuned for the task in another order, unless asked to.

    Raises:
        InputError: Says how to keep the checkpoint's order.
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


def _named(config: BertConfig, settings: Settings, labels: tuple[str, ...] | None) -> BertConfig:
    """A model's config, LABEL_0, LABEL_1, … replaced by `data.labels` where these are set.

    Raises:
        InputError: If `data.labels` are of another number, or the labels are in another order than the model's, where
            a metric depends on the order.
    """
    given, names = settings.data.labels, config.labels
    if given and settings.task != "question-answering" and all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        if len(given) != len(names):
            raise InputError(f"data.labels has {len(given)} names; the model has {len(names)} labels, {listed(names)}.")
        return config.replace(id2label=given)
    expected = given or labels or names
    binary = settings.task == "text-classification" and len(names) == 2  # f1 is that of the second label
    if binary and expected != names and sorted(expected) == sorted(names):
        raise InputError(
            f"The labels of the model are, in the order of their ids, {listed(names)}, and those of the data are "
            f"{listed(expected)}; f1 is that of the second label. Set data.labels='{_as_yaml(names)}' for that of "
            f"{names[1]}, or train the model again for that of {expected[1]}."
        )
    return config


def _as_yaml(names: Sequence[str]) -> str:
    return yaml.safe_dump(list(names), default_flow_style=True, width=10**6, allow_unicode=True).strip()


def evaluate_examples(
    task: TrainableTask, model: BertPreTrainedModel, examples: Examples, settings: Settings
) -> measure.Evaluation:
    """A model in hand over examples."""
    mesh = sharding.mesh(**settings.mesh.model_dump())
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    params = tree.unflatten(sharding.put(flat, sharding.placements(mesh, flat)))
    return measure.evaluate(
        task,
        measure.program(task, skeleton),
        params,
        examples,
        batch_size=settings.training.evaluation_batch_size,
        packing=model.config.max_position_embeddings if settings.data.packing else None,
        multiple=attention.multiple(model.encoder.attention),
        mesh=mesh,
    )


def dry_run(settings: Settings, target: str | None = None, *, console: Console | None = None) -> str:
    """What a run would do, without a step: settings, first examples in words, shapes, parameters, memory, programs.

    Args:
        settings: Of the run.
        target: Chips to compile the step for that need not be here, `v5e:2x4`; this machine's devices by default.
        console: Where a target's programs are shown as they are compiled; nowhere by default.

    Raises:
        InputError: As `finetune`, or if there is no such target.
    """
    chips = aot.get(target) if target else None
    prepared = prepare(settings)
    examples, tokenizer = prepared.examples["train"], prepared.tokenizer
    parts = [settings.to_yaml(), _overview(settings, prepared)]
    for i in range(min(3, len(examples))):
        pieces = " ".join(str(tokenizer.backend.id_to_token(int(token))) for token in examples.input_ids[i])
        every: dict[str, Any] = {**examples.targets, **examples.token_targets}
        values = ", ".join(f"{name} {values[i].tolist()}" for name, values in every.items())
        row = examples.origins[i][1] if examples.origins else prepared.rows["train"][i]
        parts.append(f"example {i + 1}: {row}\n  tokens: {pieces}\n  {values}")
    steps = steps_of(settings, examples)
    run = set_up(settings, prepared.task, prepared.model, examples, steps, chips.devices if chips else None)
    loader, planned = run.loader, run.plan
    counts: Counter[str] = Counter()
    for path, rule in optim.rules(planned.trained, **_rule_options(settings)).items():
        counts[str(rule)] += planned.trained[path].size
    if planned.frozen:
        counts["frozen"] = sum(leaf.size for leaf in planned.frozen.values())
    parts.append("parameters:\n" + "\n".join(f"  {n:,}: {rule}" for rule, n in counts.most_common()))
    places = [loader.place(step) for step in range(min(steps, loader.steps_per_epoch))]
    shapes = sorted(Counter(place.shape for place in places).items())
    programs = [f"  [{shape.rows}, {shape.length}]: {n} steps an epoch" for shape, n in shapes]
    used = sum(int(examples.lengths[place.indices].sum()) for place in places)
    used_of = sum(place.shape.rows * place.shape.length for place in places)
    parts.append(
        "\n".join(
            [
                f"{steps} steps, {loader.steps_per_epoch} an epoch, {used / used_of:.0%} of their tokens "
                "examples'; programs by [rows, tokens]:",
                *programs,
            ]
        )
    )
    shape = max((shape for shape, _ in shapes), key=lambda shape: shape.rows * shape.length)
    if chips:
        parts.append(compile_for(chips, run, shape, prepared.model.config, console or Console(quiet=True)))
    elif found := peak_memory(settings, prepared, run, shape):
        parts.append(found)
    return "\n\n".join(parts)


def peak_memory(settings: Settings, prepared: Prepared, run: loop.Run, shape: Shape) -> str | None:
    """What a run takes at its peak, in words; None where the compiler does not tell.

    Where the devices are the host's processor, this is the memory of the whole process: what it occupies now, with its
    libraries, the data, the model and the programs, then the state of training, and the largest of what the phases of a
    run take in turn. Elsewhere it is the memory of one device, without the evaluations' parameters.

    Args:
        settings: Of the run.
        prepared: Its model and examples.
        run: Its steps.
        shape: Of the largest batch of training.
    """
    step = run.trace(shape).lower().compile().memory_analysis()
    if step is None:
        return None
    phases = {f"temporaries of a step of [{shape.rows}, {shape.length}]": step.temp_size_in_bytes}
    if validation := prepared.examples.get("validation"):
        largest, program = measure.largest(
            prepared.task, prepared.model, validation, batch_size=settings.training.evaluation_batch_size,
            packing=run.loader.packing, multiple=run.loader.multiple, mesh=run.mesh,
        )  # fmt: skip
        found: Any = program.memory_analysis()
        phases[f"temporaries of an evaluation of [{largest.rows}, {largest.length}]"] = found.temp_size_in_bytes
    counted = {"state and batch": step.argument_size_in_bytes}
    host = run.mesh.devices.flat[0].platform == "cpu"
    if host:
        phases["a checkpoint's copy of the state"] = step.argument_size_in_bytes
        for name in LOADED_LATER:
            importlib.import_module(name)
        memory.release()
        if (occupied := memory.resident()) is None:
            host = False
        else:
            counted["libraries, data, model and programs, measured now"] = occupied
    name = max(phases, key=phases.__getitem__)
    counted[name] = phases.pop(name)
    lines = [f"  {size / 1e6:,.0f} MB: {what}" for what, size in counted.items()]
    others = "; ".join(f"{what} {size / 1e6:,.0f} MB" for what, size in phases.items())
    return (
        f"memory of {'the process' if host else 'a device'} at its peak: {sum(counted.values()) / 1e6:,.0f} MB\n"
        + "\n".join(lines)
        + (f"\n  not at the same time: {others}" if others else "")
    )


def compile_for(chips: aot.Target, run: loop.Run, shape: Shape, config: BertConfig, console: Console) -> str:
    """What a target's compiler says of a run's step on a batch of some shape, and how many rows a batch may have."""
    share, per_device = run.loader.share, len(chips.devices)

    def check(n: int) -> aot.Check:
        found = aot.check(run.trace(shape._replace(rows=n * share)), chips)
        console.print(f"[{n * share}, {shape.length}]: {found.line}", highlight=False)
        return found

    first = check(shape.rows // share)
    flops = aot.train_flops(config, shape.rows, shape.length)
    most = share * aot.largest(check, shape.rows // share, first)
    return "\n".join(
        [
            f"the step on [{shape.rows}, {shape.length}] {first}",
            f"by formula, 6·B·T·L·(4D² + 2DF + 2TD): {flops / 1e12:.2f} TFLOP",
            f"the largest batch that fits: [{most}, {shape.length}], {most // per_device} rows a device",
        ]
    )


def _overview(settings: Settings, prepared: Prepared) -> str:
    sizes = ", ".join(
        f"{len(rows):,} {split}"
        + (f" ({windows:,} windows)" if (windows := len(prepared.examples[split])) != len(rows) else "")
        for split, rows in prepared.rows.items()
    )
    labels = getattr(prepared.task, "labels", ())
    return (
        f"{settings.task}: {settings.model.id}, {_sizes(prepared.model)}\n"
        f"examples: {sizes}"
        + (f"; labels: {', '.join(labels[:20])}{', …' if len(labels) > 20 else ''}" if labels else "")
        + (f"\n{prepared.found}" if prepared.found else "")
    )


def _sizes(model: BertPreTrainedModel) -> str:
    _, skeleton = tree.split(model)
    count = sum(spec.size for spec in skeleton.specs.values())
    return f"{count / 1e6:.1f} M parameters, {jax.device_count()} × {jax.devices()[0].device_kind}"


def _write(path: Path, text: str) -> None:
    with hub.replacing(path.parent) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
