"""Fine-tuning: `finetune` trains a model, `dry_run` describes what a run would do, and `evaluate` computes metrics."""

import importlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_jax import attention, distributed, processor, sharding, tree
from bert_jax.config import BertConfig
from bert_jax.data.loader import Examples, Shape
from bert_jax.errors import InputError, check_extra
from bert_jax.evaluation import measure
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.quantization import Dtype
from bert_jax.recipes import preparation, runs
from bert_jax.settings import Settings
from bert_jax.tasks.base import TrainableTask
from bert_jax.tasks.registry import TASKS
from bert_jax.tokenizer import Tokenizer
from bert_jax.tools import aot
from bert_jax.training import loop, lora, memory, optim

LOADED_LATER = ("grain", "sklearn.metrics")
"""Modules that a run imports only when it needs them.

They occupy 60 MB, so `peak_memory` imports them before it measures the memory of the process.
"""


def finetune(settings: Settings, *, console: Console | None = None) -> Path:
    """Fine-tunes a model and writes it, with its metrics and predictions, to `settings.output.folder`.

    If the run is interrupted, repeating the call with the same settings resumes it from its last checkpoint. If the run
    is finished, the call does nothing.

    Returns:
        The folder.

    Raises:
        InputError: If the settings, the data or the folder cannot be used.
        ModelNotFoundError: If the model does not exist, or if the Hub does not answer.
        CheckpointError: If the weights do not fit the model, or if a file cannot be written.
        TrainingError: If the loss or an output is not finite.
        OutOfMemoryError: If a batch does not fit in memory.
        Interrupted: If the process receives Ctrl-C or SIGTERM. The state is saved.
    """
    console, began = console or Console(quiet=True), time.perf_counter()
    folder = Path(settings.output.folder)
    if runs.is_finished(settings, console):
        return folder
    prepared = preparation.prepare(settings)
    task, examples = prepared.task, prepared.examples
    console.print(preparation.overview(settings, prepared), highlight=False, markup=False)
    train, validation = examples["train"], examples.get("validation")
    distributed.agree("The training examples", train.digest)
    loss = preparation.training_loss(settings, task, train)
    run = runs.set_up(settings, task, prepared.model, train, runs.steps_of(settings, train), loss=loss)
    if validation and not task.labeled(validation):
        raise InputError(
            f"data.validation ({settings.data.validation}) has no labels to choose the best checkpoint by. Set it as "
            "data.test, or leave it out."
        )
    trained = runs.fit(settings, run, validation, console)
    task = task.tuned(trained.metrics)
    split = "test" if "test" in examples else "validation"
    evaluated: measure.Evaluation | None = None
    if split == "validation" and trained.outputs is not None:
        adopted = task.evaluate(trained.outputs, examples[split])
        evaluated = measure.Evaluation(trained.metrics | adopted, trained.outputs)
    elif split in examples:
        evaluated = evaluate_examples(task, trained.model, examples[split], settings)
        if split == "validation":
            evaluated = replace(evaluated, metrics=trained.metrics | evaluated.metrics)
    if not distributed.first():
        return folder
    if run.plan.lora:
        place, start = folder / runs.ADAPTERS, settings.model
        lora.save_adapters(
            place,
            trained.trained,
            run.plan.lora,
            start.id,
            task.peft_type,
            revision=start.revision,
            model=trained.model,
        )
        prepared.tokenizer.save_pretrained(place)
    if evaluated:
        predictions = task.predictions(evaluated.outputs, examples[split])
        lines = [row | {"prediction": p} for row, p in zip(prepared.rows[split], predictions, strict=True)]
        # `default=str`, because rows from Parquet files may contain dates, which JSON cannot encode.
        texts = [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines]
        runs.write(folder / runs.PREDICTIONS, "".join(texts))
        for name, value in task.files(lines).items():
            runs.write(folder / name, json.dumps(value, ensure_ascii=False) + "\n")
    found = {split: evaluated.metrics, "predictions": split} if evaluated else {}
    runs.end(settings, run, trained, prepared.tokenizer, found, began, console)
    return folder


def dry_run(settings: Settings, target: str | None = None, *, console: Console | None = None) -> str:
    """Describes what a run would do, without performing a training step.

    The text contains the settings, the number of examples, the tokens of the first examples, the update rules for the
    parameters, the number of steps, the batch shapes, and the memory that the run needs.

    Args:
        settings: The settings of the run.
        target: The chips for which to compile the training step, for example, `v5e:2x4`. These chips need not
            be present in this machine. If None, the step is compiled for this machine's devices.
        console: The console that shows whether each batch shape fits the target, if a target is given; None for no
            output.

    Raises:
        InputError: If the settings or the data cannot be used, if the target is unknown, or if the compiler for the
            target is not installed.
    """
    chips = aot.get(target) if target else None
    prepared = preparation.prepare(settings)
    examples, tokenizer = prepared.examples["train"], prepared.tokenizer
    parts = [settings.to_yaml(), preparation.overview(settings, prepared)]
    for i in range(min(3, len(examples))):
        pieces = " ".join(str(tokenizer.backend.id_to_token(int(token))) for token in examples.input_ids[i])
        every: dict[str, Any] = {**examples.targets, **examples.token_targets}
        values = ", ".join(f"{name} {values[i].tolist()}" for name, values in every.items())
        row = examples.origins[i][1] if examples.origins else prepared.rows["train"][i]
        parts.append(f"example {i + 1}: {row}\n  tokens: {pieces}\n  {values}")
    steps = runs.steps_of(settings, examples)
    loss, devices = preparation.training_loss(settings, prepared.task, examples), chips.devices if chips else None
    run = runs.set_up(settings, prepared.task, prepared.model, examples, steps, loss=loss, devices=devices)
    if settings.model.attention == "auto":
        parts.append(f"attention of the training steps: {run.kernel}, because {run.reason}")
    loader, planned = run.loader, run.plan
    counts: Counter[str] = Counter()
    for path, rule in optim.rules(planned.trained, **runs.rule_options(settings)).items():
        counts[str(rule)] += planned.trained[path].size
    counts += Counter({"frozen": sum(leaf.size for leaf in planned.frozen.values())})  # `+=` drops "frozen" if it is 0
    parts.append("parameters:\n" + "\n".join(f"  {n:,}: {rule}" for rule, n in counts.most_common()))
    places = [loader.place(step) for step in range(min(steps, loader.steps_per_epoch))]
    shapes = sorted(Counter(place.shape for place in places).items())
    programs = "".join(f"\n  [{shape.rows}, {shape.length}]: {n} steps per epoch" for shape, n in shapes)
    used = sum(int(examples.lengths[place.indices].sum()) for place in places)
    used_of = sum(place.shape.rows * place.shape.length for place in places)
    parts.append(
        f"{steps} steps, {loader.steps_per_epoch} per epoch; {used / used_of:.0%} of the tokens are not padding. "
        f"Programs by [rows, tokens]:{programs}"
    )
    shape = max((shape for shape, _ in shapes), key=lambda shape: shape.rows * shape.length)
    if settings.precision.compute_dtype == "bfloat16" and not chips:
        parts.append(f"On this machine, bfloat16 {processor.speed('bfloat16')}.")
    if chips:
        parts.append(compile_for(chips, run, shape, prepared.model.config, console or Console(quiet=True)))
    elif found := peak_memory(settings, prepared, run, shape):
        parts.append(found)
    return "\n\n".join(parts)


def peak_memory(settings: Settings, prepared: preparation.Prepared, run: loop.Run, shape: Shape) -> str | None:
    """Returns a description of a run's peak memory use; None if the compiler does not report memory use.

    On CPUs, the description covers the whole process, whose peak memory is the sum of three parts:

    1. The memory that the process occupies now (libraries, data, model and programs).
    2. The training state with a batch.
    3. The additional memory that the largest phase of the run needs.

    On other devices, the description covers one device, whose peak memory is the sum of only the last two parts. If the
    run uses LoRA, the sum does not include the merged weights that an evaluation needs.

    Args:
        settings: The settings of the run.
        prepared: The model and the examples of the run.
        run: The run, as returned by `runs.set_up`.
        shape: The shape of the largest training batch.
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
    owner = "a device"
    if run.mesh.devices.flat[0].platform == "cpu":
        phases["a checkpoint's copy of the state"] = step.argument_size_in_bytes
        for name in LOADED_LATER:
            importlib.import_module(name)
        memory.release()
        if occupied := memory.resident():
            owner = "the process"
            counted["libraries, data, model and programs, measured now"] = occupied
    name = max(phases, key=phases.__getitem__)
    counted[name] = phases.pop(name)
    lines = "".join(f"\n  {size / 1e6:,.0f} MB: {what}" for what, size in counted.items())
    others = "; ".join(f"{what} {size / 1e6:,.0f} MB" for what, size in phases.items())
    return f"memory of {owner} at its peak: {sum(counted.values()) / 1e6:,.0f} MB{lines}" + (
        f"\n  not at the same time: {others}" if others else ""
    )


def compile_for(chips: aot.Target, run: loop.Run, shape: Shape, config: BertConfig, console: Console) -> str:
    """Describes the training step, compiled for a batch of `shape`, and the largest batch that fits in memory.

    A batch fits if each chip has enough memory for the step. The search for the largest batch varies only the
    number of rows.
    """
    share = run.loader.share

    def check(n: int) -> aot.Check:
        found = aot.check(run.trace(shape._replace(rows=n * share)), chips)
        console.print(f"[{n * share}, {shape.length}]: {found.line}", highlight=False)
        return found

    first = check(shape.rows // share)
    flops = aot.train_flops(config, shape.rows, shape.length)
    most = share * aot.largest(check, shape.rows // share, first)
    return (
        f"the step on [{shape.rows}, {shape.length}] {first}\n"
        f"by formula, 6·B·T·L·(4D² + 2DF + 2TD): {flops / 1e12:.2f} TFLOP\n"
        f"the largest batch that fits: [{most}, {shape.length}], {most // len(chips.devices)} rows per device"
    )


def evaluate(
    model_id: str,
    settings: Settings,
    split: str,
    *,
    dtype: Dtype | None = None,
    ignore: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a fine-tuned model on one split of the data set specified in the settings.

    A run may tune values, such as a threshold, on its validation split. These values are applied if the model's folder
    contains the run's results.

    Args:
        model_id: A model folder or a model id on the Hub.
        settings: Settings that specify the task, the data, the maximum length and the batch size.
        split: "validation" or "test".
        dtype: The dtype in which the model is loaded: "float32", "bfloat16" or "int8". By default, the model is loaded
            in float32, and the activations have the dtype `precision.compute_dtype`, which the run also uses.
        ignore: Regular expressions for the checkpoint tensors to skip. A tensor is skipped if an expression matches its
            full name.
        console: The console that shows notes on the data; None for no output.

    Returns:
        The metrics.

    Raises:
        InputError: If the split is not set, if it has no labels, or if it has labels that the model does not have.
        CheckpointError: If the model has no head for the task.
    """
    check_extra("train", "sklearn")
    loaded = preparation.read_split(settings, split)
    if not loaded.rows:
        raise InputError(f"data.{split} is not set; expected labeled examples.")
    task_class = TASKS[settings.task]
    rows, found = task_class.clean({split: loaded.rows}, preparation.read_options(settings))
    tokenizer = Tokenizer.from_pretrained(model_id)
    model = task_class.model_class.from_pretrained(model_id, ignore=ignore, dtype=dtype or "float32")
    if dtype is None:
        model.encoder.compute_dtype = settings.precision.compute_dtype
    task = preparation.make_task(settings, tokenizer, preparation.named(model.config, settings, loaded.labels))
    examples = preparation.featurize(task, rows)[split]
    if not task.labeled(examples):
        raise InputError(f"data.{split} has no labels; expected some. Use `bert-jax predict` for unlabeled examples.")
    for folder in (Path(model_id), Path(model_id).parent if Path(model_id).name == runs.ADAPTERS else Path(model_id)):
        if (results := folder / runs.RESULTS).is_file():
            task = task.tuned(json.loads(results.read_text(encoding="utf-8"))["validation"])
            break
    else:
        if settings.decision.tune:
            raise InputError(
                f"decision.tune is set, but {model_id} has no {runs.RESULTS} with the threshold of a run. Set "
                "decision.threshold, and decision.tune=false."
            )
    if console and found:
        console.print(found, highlight=False, markup=False)
    return evaluate_examples(task, model, examples, settings).metrics


def evaluate_examples(
    task: TrainableTask, model: BertPreTrainedModel, examples: Examples, settings: Settings
) -> measure.Evaluation:
    """Evaluates a loaded model on examples."""
    mesh, encoder = sharding.mesh(**settings.mesh.model_dump()), model.encoder
    kernel, _ = attention.choose(
        encoder.attention, platform=mesh.devices.flat[0].platform, compute_dtype=encoder.compute_dtype
    )
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    return measure.evaluate(
        task,
        measure.program(task, skeleton),
        tree.unflatten(sharding.put(flat, sharding.placements(mesh, flat))),
        examples,
        batch_size=settings.training.evaluation_batch_size,
        packing=model.config.max_position_embeddings if settings.data.packing else None,
        multiple=attention.multiple(kernel),
        mesh=mesh,
    )
