"""What fine-tuning and pretraining runs share: the arguments of the loop, the folder, and the first and last steps."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console

from bert_jax import hub, sharding, tree
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError, check_extra
from bert_jax.model import BertPreTrainedModel
from bert_jax.settings import Pretraining, Settings
from bert_jax.tasks.base import Objective
from bert_jax.tools import report
from bert_jax.training import distributed, log, loop, lora, optim

SETTINGS, RESULTS, PREDICTIONS, CURVE, CARD = (
    "settings.yaml", "results.json", "predictions.jsonl", "curve.png", "README.md",
)  # fmt: skip
ADAPTERS, ANSWERS = "adapters", "answers.json"


def steps_of(settings: Settings | Pretraining, examples: Examples) -> int:
    """The number of training steps of a run."""
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
    """Makes a run on the given devices; None uses the devices of all processes.

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
    """Trains a run in the folder that the settings name."""
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
    """The learning rate as a function of the step."""
    return optim.schedule(learning_rate=settings.optimizer.learning_rate, steps=steps, **settings.schedule.model_dump())


def make_optimizer(settings: Settings | Pretraining, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run with this number of steps."""
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
        **rule_options(settings),
    )


def rule_options(settings: Settings | Pretraining) -> dict[str, Any]:
    """The settings of `optimizer` that decide how each parameter is updated; see `optim.rules`."""
    names = ("weight_decay", "no_decay", "lr_multipliers", "layer_decay")
    return {name: getattr(settings.optimizer, name) for name in names}


def _trainable(settings: Settings | Pretraining, model: BertPreTrainedModel) -> list[str]:
    """Patterns of the parameters to train in addition to adapters, one pattern per parameter.

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


def is_finished(settings: Settings | Pretraining, console: Console) -> bool:
    """Whether the run's folder already has its results; if so, prints that the run is finished.

    Raises:
        InputError: If the folder holds other files or a run with other settings, or a package that the run needs is not
            installed.
    """
    check_extra("train", "grain", "sklearn", "matplotlib", "tensorboardX")  # fails now, not after hours of training
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
    """Creates the run's folder and writes the settings to it.

    Raises:
        InputError: If training.patience is set without data.validation, or the folder cannot be written.
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
    """Writes the run's curve, model card and, last, its results, which mark it as finished; prints a summary."""
    folder = Path(settings.output.folder)
    results |= {
        "seconds": time.perf_counter() - began,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {name: metadata.version(name) for name in ("bert-jax", "jax", "flax", "optax")},
    }
    report.learning_curve(log.read_journal(folder / log.METRICS), metric).savefig(folder / CURVE, dpi=120)
    write(folder / CARD, model_card(settings, results))
    write(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    if test := results.get("test"):
        console.print(f"test: {log.in_words(test)}", soft_wrap=True)
    predicted = f", predictions of {results['predictions']}" if "predictions" in results else ""
    console.print(
        f"{folder}: the model of step {results['step']} of {results['steps']}, its card, metrics{predicted}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def model_card(settings: Settings | Pretraining, results: Mapping[str, Any]) -> str:
    """The text of README.md, the model card of a run's model."""
    base, train = settings.model.id, settings.data.train or ()
    data, dataset, task = ", ".join([train] if isinstance(train, str) else train), None, "fill-mask"
    made = f"{f'`{base}`' if base else 'A new network'}, pretrained on {data}"
    if isinstance(settings, Settings):
        dataset, task = settings.data.id, settings.task
        made = f"`{base}` fine-tuned for {task} on {dataset or data}"
    return report.model_card(
        settings.output.folder, task, made, results, base=base, dataset=dataset, settings=settings.to_yaml()
    )


def write(path: Path, text: str) -> None:
    """Writes a file, either completely or not at all."""
    with hub.replacing(path.parent) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
