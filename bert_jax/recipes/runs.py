"""Code shared by fine-tuning and pretraining: sets up runs and writes the files in their output folders."""

import functools
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax
import yaml
from rich.console import Console

import bert_jax
from bert_jax import distributed, hub, sharding, tree
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError, check_extra
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.settings import Pretraining, Settings
from bert_jax.tasks.base import Loss, Objective
from bert_jax.tokenizer import Tokenizer
from bert_jax.tools import report
from bert_jax.training import log, loggers, loop, lora, optim

SETTINGS, RESULTS, CURVE, CARD = "settings.yaml", "results.json", "curve.png", "README.md"
PREDICTIONS, ADAPTERS = "predictions.jsonl", "adapters"
LENGTHS = {"training.epochs", "training.max_steps"}
"""The settings that determine the number of steps."""


def steps_of(settings: Settings | Pretraining, examples: Examples) -> int:
    """Returns the number of training steps in a run."""
    options = settings.training
    return options.max_steps or math.ceil(options.epochs * -(-len(examples) // options.batch_size))


def set_up(
    settings: Settings | Pretraining,
    task: Objective,
    model: BertPreTrainedModel,
    examples: Examples,
    steps: int,
    *,
    loss: Loss | None = None,
    devices: Sequence[Any] | None = None,
) -> loop.Run:
    """Sets up a run on the given devices or, if `devices` is None, on the devices of all processes.

    If `loss` is given, it replaces the task's loss in the training steps.

    Raises:
        InputError: If the settings do not fit the model or the devices, if a pattern in the settings matches no
            parameter, or if no parameters are left to train.
    """
    options = settings.model.lora
    chosen = paths = list(tree.split(model)[1].specs)
    if options:
        optim.check_patterns("model.lora.trained", [options.trained], paths)
        chosen = tree.select([options.trained, *settings.model.new], paths)
    optim.check_patterns("optimizer.frozen", settings.optimizer.frozen, paths)
    frozen = tree.select(settings.optimizer.frozen, paths)
    if not options and len(frozen) == len(paths):
        raise InputError("optimizer.frozen matches all parameters; leave out those to train.")
    return loop.set_up(
        model,
        task,
        examples,
        make_optimizer(settings, steps),
        batch_size=settings.training.batch_size,
        accumulation=settings.training.accumulation,
        packing=settings.data.packing,
        trainable=[re.escape(path) for path in chosen if path not in frozen],
        lora=lora.LoRA(options.rank, options.alpha, options.targets) if options else None,
        mesh=sharding.mesh(**settings.mesh.model_dump(), devices=devices),
        seed=settings.training.seed,
        loss=loss,
        metric=settings.training.metric,
    )


def fit(settings: Settings | Pretraining, run: loop.Run, validation: Examples | None, console: Console) -> loop.Trained:
    """Creates the run's folder, writes the settings to it, and trains the model.

    Raises:
        InputError: If `training.patience` is set without `data.validation`, if the folder cannot be written, if it
            contains checkpoints of a run with other training examples, or if a logger cannot start.
        TrainingError: If the loss or an output is not finite.
        OutOfMemoryError: If a batch does not fit in memory.
        Interrupted: If the process receives Ctrl-C or SIGTERM. The state is saved.
        CheckpointError: If a checkpoint cannot be written or read.
    """
    options, folder = settings.training, Path(settings.output.folder)
    if options.patience and validation is None:
        raise InputError("training.patience counts evaluations; set data.validation, or training.patience=null.")
    if distributed.first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"output.folder: cannot write {folder}: {error.strerror}.") from None
    distributed.share_folder(folder, SETTINGS)
    if settings.model.attention == "auto":
        console.print(
            f"attention of the training steps: {run.kernel}, because {run.reason}", highlight=False, soft_wrap=True
        )
    steps = steps_of(settings, run.loader.examples)
    names = settings.output.report_to if distributed.first() else ()
    with loggers.opened(names, folder, tree.flatten(settings.model_dump(mode="json"))) as opened:
        return loop.fit(
            run,
            steps=steps,
            validation=validation,
            evaluate_every=options.evaluate_every,
            evaluation_batch_size=options.evaluation_batch_size,
            patience=options.patience,
            folder=folder,
            save_every=options.save_every,
            keep=options.keep,
            log_every=options.log_every,
            schedule=make_schedule(settings, steps),
            loggers=opened,
            console=console,
        )


def make_schedule(settings: Settings | Pretraining, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    return optim.schedule(learning_rate=settings.optimizer.learning_rate, steps=steps, **settings.schedule.model_dump())


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


TRANSFORMS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optim.scale_by_adam,
    "lamb": functools.partial(optax.scale_by_adam, eps=1e-6),
    "lion": optax.scale_by_lion,
    "adafactor": _adafactor,
}
"""Maps each `optimizer.name` to a function that creates its gradient transformation, without the learning-rate
factor."""
KEYWORDS = {"beta1": "b1", "beta2": "b2", "epsilon": "eps", "bias_correction": "bias_correction"}
"""Maps the settings of `optimizer` to the keyword arguments of the functions in `TRANSFORMS`."""


def make_optimizer(settings: Settings | Pretraining, steps: int) -> optax.GradientTransformation:
    """Creates the optimizer for a run with the given number of steps.

    Raises:
        InputError: If the chosen optimizer does not support one of the given settings.
    """
    options = settings.optimizer
    make = TRANSFORMS[options.name]
    given = {
        keyword: getattr(options, name) for name, keyword in KEYWORDS.items() if getattr(options, name) is not None
    }
    for name, keyword in KEYWORDS.items():
        if keyword in given and keyword not in inspect.signature(make).parameters:
            raise InputError(
                f"optimizer.{name} is {given[keyword]}, but {options.name} has no {name}. Remove the setting."
            )
    return optim.by_path(
        make(**given),
        make_schedule(settings, steps),
        max_grad_norm=options.max_grad_norm,
        trust_ratio=options.name == "lamb",
        **rule_options(settings),
    )


def rule_options(settings: Settings | Pretraining) -> dict[str, Any]:
    """Returns the settings in `optimizer` that are arguments of `optim.rules`."""
    return settings.optimizer.model_dump(include={"weight_decay", "no_decay", "lr_multipliers", "layer_decay"})


def is_finished(settings: Settings | Pretraining, console: Console) -> bool:
    """Returns whether the run's folder already contains the run's results. If so, prints a message.

    Raises:
        InputError: If the settings differ between processes, if the folder contains unrelated files or a run with
            different settings, or if a package that the run needs is not installed.
    """
    distributed.agree("The settings", settings.to_yaml)
    # A missing package is reported now, not after hours of training.
    check_extra("train", "grain", "sklearn", "matplotlib")
    loggers.check(settings.output.report_to)
    folder = Path(settings.output.folder)
    if not (folder / SETTINGS).exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"output.folder: {folder} contains other files; expected a new or empty folder.")
        return False
    try:
        before = type(settings).from_file(folder / SETTINGS)
    except InputError as error:
        raise InputError(
            f"output.folder: {folder} contains a run of another kind, or of an earlier version; use a new folder. "
            f"{error}"
        ) from None
    if different := [line for line in before.differences(settings) if not line.startswith("output.")]:
        problem = f"output.folder: {folder} contains a run with other settings (old, new):\n  " + "\n  ".join(different)
        if (folder / RESULTS).exists() and {line.partition(":")[0] for line in different} & LENGTHS:
            raise InputError(
                f"{problem}\nA finished run cannot be made longer, because the learning rate depends on the number of "
                f"steps. To train its model further, set model.id={folder} and another output.folder."
            )
        raise InputError(f"{problem}\nUse another folder, or the old settings.")
    if not (folder / RESULTS).exists():
        return False
    console.print(
        f"The run in {folder} is finished; {RESULTS} has its metrics. Changes to its data have no effect. To start "
        f"another run, set another output.folder; to train this model further, set model.id={folder} as well.",
        markup=False,
    )
    return True


def end(
    settings: Settings | Pretraining,
    run: loop.Run,
    trained: loop.Trained,
    tokenizer: Tokenizer,
    found: Mapping[str, Any],
    began: float,
    console: Console,
) -> None:
    """Writes the files of a finished run and prints a summary.

    The files are the model, the tokenizer, the learning curve, the model card and the results. The results are written
    last, because they mark the run as finished.

    Args:
        settings: The settings of the run.
        run: The run.
        trained: The result of training.
        tokenizer: The tokenizer of the model.
        found: Additional results, if there are any. The metrics of a split are stored under the key "validation" or
            "test". The name of the split for which predictions were made is stored under the key "predictions".
        began: The value of `time.perf_counter()` when the run began.
        console: The console that shows the summary.
    """
    folder = Path(settings.output.folder)
    trained.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    others = {name: metadata.version(name) for name in ("jax", "flax", "optax")}
    results = {
        "step": trained.step,
        "steps": trained.steps,
        "planned_steps": steps_of(settings, run.loader.examples),
        "stopped_early": trained.stopped,
        "validation": trained.metrics,
        **found,
        "seconds": time.perf_counter() - began,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {"bert-jax": bert_jax.__version__} | others,
    }
    curve = report.learning_curve(
        log.read_journal(folder / log.METRICS), run.metric, best=trained.step if trained.metrics else None,
        unit="squared unit of the labels" if "mse" in run.task.metrics else "nats",
    )  # fmt: skip
    curve.savefig(folder / CURVE, dpi=120)
    write(folder / CARD, model_card(settings, results))
    write(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    if test := found.get("test"):
        console.print(f"test: {log.in_words(test)}", soft_wrap=True)
    predictions = f", and the predictions of {found['predictions']}" if found else ""
    console.print(
        f"{folder} contains the model of step {trained.step} of {trained.steps}, its card and metrics{predictions}.",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def model_card(settings: Settings | Pretraining, results: Mapping[str, Any]) -> str:
    """Returns the model card (`README.md`) of a run's model. The card contains no local paths."""
    model, data = settings.model, settings.data
    places = {split: getattr(data, split, None) or () for split in ("train", "validation", "test")}
    names = {split: ", ".join(Path(place).name for place in ([given] if isinstance(given, str) else given))
             for split, given in places.items()}  # fmt: skip
    datasets: dict[str, dict[str, str | None]] = {
        split: {"dataset_type": "unknown", "dataset_name": name, "dataset_split": split}
        for split, name in names.items()
    }
    base = "A new network" if model.id is None else _shown(model.id) or "A local checkpoint"
    task, made = "fill-mask", f"{base}, pretrained on {names['train']}"
    metadata = _license_and_language(settings)
    if model.id and hub.is_hub_id(model.id):
        metadata["base_model"] = model.id
    if isinstance(settings, Settings):
        dataset, task, made = settings.data.id, settings.task, f"{base} fine-tuned for {settings.task} on "
        if dataset and hub.is_hub_id(dataset):
            metadata["datasets"], made = [dataset], made + dataset
            for split, entry in datasets.items():
                entry |= {
                    "dataset_type": dataset, "dataset_name": dataset, "dataset_config": settings.data.name,
                    "dataset_split": names[split], "dataset_revision": settings.data.revision,
                }  # fmt: skip
        else:
            made += names["train"]
    return report.model_card(
        Path(settings.output.folder).absolute().name,
        task,
        made,
        results,
        metadata=metadata,
        datasets=datasets,
        settings=public_settings(settings),
    )


def _license_and_language(settings: Settings | Pretraining) -> dict[str, Any]:
    """Returns a model's `license` and `language` metadata from the settings or, if not set, from the base model's card.

    The language from the card is omitted if the card declares several languages, because the model may have been
    trained on any of them. It is also omitted if the vocabulary differs from that of the base model.
    """
    model, output = settings.model, settings.output
    card = hub.read_card(model.id, model.revision) if model.id else {}
    names = ("license", "license_name", "license_link")
    found: dict[str, Any] = {name: card[name] for name in names if isinstance(card.get(name), str)}
    if output.license:
        found = {"license": output.license}
    language, kept = card.get("language"), isinstance(settings, Settings) or not settings.model.tokenizer
    if isinstance(language, list) and len(language) == 1:
        (language,) = language
    if output.language:
        found["language"] = output.language if isinstance(output.language, str) else list(output.language)
    elif kept and isinstance(language, str):  # YAML reads `no`, the code for Norwegian, as a boolean
        found["language"] = language
    return found


def public_settings(settings: Settings | Pretraining) -> str:
    """Returns YAML with the settings that differ from their defaults, except local paths."""
    tree = settings.model_dump(mode="json", exclude_defaults=True, exclude={"output"})
    model, data = tree.get("model", {}), tree.get("data", {})
    for name in ("id", "tokenizer"):
        if name in model and _shown(model[name]) is None:
            del model[name]
    if not hub.is_hub_id(data.get("id", "")):
        for name in ("id", "train", "validation", "test", "shards"):
            data.pop(name, None)
    return yaml.safe_dump({name: value for name, value in tree.items() if value}, sort_keys=False, allow_unicode=True)


def _shown(model_id: str) -> str | None:
    """Returns a model's name for a model card; None if the model is in a local folder."""
    return f"`{model_id}`" if hub.is_hub_id(model_id) or model_id in hub.embedded() else None


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with hub.replacing(path.parent) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
