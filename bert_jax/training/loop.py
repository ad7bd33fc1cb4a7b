"""The training loop: runs a compiled step, evaluates the model, saves checkpoints and resumes from them."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from bert_jax import attention, distributed, sharding, tree
from bert_jax.data.loader import Examples, Loader, Place, Shape
from bert_jax.errors import InputError, Interrupted, TrainingError, listed
from bert_jax.evaluation import measure
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.tasks.base import Loss, Objective
from bert_jax.training import memory
from bert_jax.training.checkpoint import Checkpoints
from bert_jax.training.log import Journal, Logger, in_words, progress_bar
from bert_jax.training.lora import LoRA
from bert_jax.training.step import Arrays, Plan, TrainState, init_state, make_step, plan, state_shapes

CHECKPOINTS = "checkpoints"
LESS_MEMORY = "Lower batch_size or the length of the examples, raise accumulation, or set remat."
Metric = Callable[[Mapping[str, Any], Examples], float]
"""Computes a metric from a model's outputs for all examples (`Evaluation.outputs`) and from the examples themselves."""
LOWER_IS_BETTER = ("loss", "mse", "mlm_loss", "nsp_loss", "pseudo_perplexity")


class Run(NamedTuple):
    """Everything that a run's steps need. The training step can be compiled for devices that this machine lacks.

    Attributes:
        mesh: The device mesh.
        task: Defines the loss and the metrics.
        loader: Creates the batches.
        plan: The parameters and the optimizer.
        layout: A `TrainState` that contains the sharding of each array instead of the array itself.
        step: The training step as a jitted function; see `make_step`.
        metric: The name of the metric by which the best parameters are chosen.
        metrics: Additional metrics, keyed by name.
        kernel: The name of the attention kernel that the steps use.
        reason: The reason for choosing this kernel.
    """

    mesh: jax.sharding.Mesh
    task: Objective
    loader: Loader
    plan: Plan
    layout: TrainState
    step: Any
    metric: str
    metrics: Mapping[str, Metric]
    kernel: str
    reason: str

    def trace(self, shape: Shape) -> jax.stages.Traced:
        """Traces the step for batches of `shape`. Compiling the result does not require the devices of `mesh`."""
        padding = self.loader.examples.batch(Place(np.zeros(0, int), np.zeros(0, int), shape))
        arguments = (
            sharding.abstract(state_shapes(self.plan), self.layout),
            sharding.abstract(self.plan.frozen, sharding.placements(self.mesh, self.plan.frozen)),
            sharding.abstract(padding, sharding.by_row(self.mesh)),
        )
        with jax.set_mesh(self.mesh):
            traced: jax.stages.Traced = self.step.trace(*arguments)
        return traced


def set_up(
    model: BertPreTrainedModel,
    task: Objective,
    examples: Examples,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int = 32,
    accumulation: int = 1,
    packing: bool = True,
    trainable: str | Sequence[str] | None = None,
    lora: LoRA | None = None,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    metric: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Run:
    """Prepares a run for `fit`. See `train` for the arguments.

    Raises:
        InputError: If the arguments do not fit the model, the task or the devices.
    """
    names = ("loss", *task.metrics, *(metrics or {}))
    if twice := {"loss", *task.metrics} & {*(metrics or {})}:
        raise InputError(f"metrics has {min(twice)!r}, which is a metric of the task; expected another name.")
    if metric not in (None, *names):
        raise InputError(f"metric is {metric!r}; expected one of {', '.join(names)}.")
    mesh, encoder = mesh or sharding.mesh(), model.encoder
    sharding.check(mesh, model.config)
    platform = mesh.devices.flat[0].platform
    facts: dict[str, Any] = {"platform": platform, "compute_dtype": encoder.compute_dtype}
    rate = model.config.attention_probs_dropout_prob
    kernel, reason = attention.choose(encoder.attention, dropout_rate=rate, **facts)
    attention.check(kernel, packed=packing, **facts)
    if examples.packed and kernel in attention.UNPACKED:
        raise InputError(
            f"attention is {kernel!r}, which does not support rows of several texts, but each example is such a row. "
            "Use 'plain' or 'auto'."
        )
    attention.check_dropout(kernel, rate)
    loader = Loader(
        examples, batch_size, seed=seed, share=accumulation * sharding.share(mesh), part=sharding.part(mesh),
        packing=model.config.max_position_embeddings if packing else None,
        multiple=attention.multiple(kernel),
    )  # fmt: skip
    planned = plan(model, optimizer, trainable=trainable, lora=lora, seed=seed)
    layout = sharding.placements(mesh, state_shapes(planned))
    everywhere = sharding.replicated(mesh)
    step = make_step(task, planned, loss=loss, accumulation=accumulation, out_shardings=(layout, everywhere))
    return Run(mesh, task, loader, planned, layout, step, metric or task.metrics[0], metrics or {}, kernel, reason)


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        model: The model with the parameters of the best evaluation. If there was no evaluation, or if the best
            checkpoint is damaged, the model has the parameters of the last step.
        trained: The trained parameters, keyed by path. Adapters are not merged into the weights.
        step: Number of steps after which the parameters of `model` were obtained.
        steps: Total number of completed steps.
        stopped: The reason why training stopped early; None if it did not stop early.
        metrics: The metrics of the evaluation after `step` steps; empty if there was no evaluation.
        outputs: The model's outputs in that evaluation (`Evaluation.outputs`). None if there was no evaluation, or if
            it took place before the run was resumed.
    """

    model: BertPreTrainedModel
    trained: Arrays
    step: int
    steps: int
    stopped: str | None
    metrics: dict[str, Any]
    outputs: Mapping[str, Any] | None


def train(
    model: BertPreTrainedModel,
    task: Objective,
    examples: Examples,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int = 32,
    accumulation: int = 1,
    packing: bool = True,
    trainable: str | Sequence[str] | None = None,
    lora: LoRA | None = None,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
    validation: Examples | None = None,
    evaluate_every: int | None = None,
    evaluation_batch_size: int = 64,
    loss: Loss | None = None,
    metric: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    patience: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    keep: int = 1,
    log_every: int = 10,
    schedule: optax.Schedule | None = None,
    loggers: Sequence[Logger] = (),
    console: Console | None = None,
) -> Trained:
    """Trains a model.

    For example::

        optimizer = optim.adamw(2e-5)  # or any optax transformation
        result = bert_jax.train(model, task, task.featurize(rows), optimizer, steps=500)
        result.model.save_pretrained("mine")

    If `folder` contains checkpoints, the run resumes from the newest one, and its result is byte-identical to that of
    an uninterrupted run.

    Args:
        model: The model to start from; it is not changed.
        task: Defines the loss and the metrics.
        examples: The training examples.
        optimizer: An `optax` transformation that operates on a flat dict of parameters, keyed by path.
        steps: Total number of steps.
        batch_size: Number of examples per step, across all devices.
        accumulation: Number of parts into which each batch is divided. To save memory, the parts are processed one
            after another (gradient accumulation).
        packing: Whether to pack several examples into a row. Each token attends only to tokens of the same example.
        trainable: One or more regular expressions that match the paths of the parameters to train. None trains all
            parameters or, if `lora` is given, only the adapters.
        lora: Low-rank adapters to train in addition to the parameters that `trainable` matches.
        mesh: The device mesh, created by `sharding.mesh`; all devices by default.
        seed: Seed for the order of the examples, the initial adapters and dropout.
        validation: Examples to evaluate on during the run, to find the best parameters; None disables evaluation. The
            evaluation before the first step is only reported; the initial parameters are never chosen as the best.
        evaluate_every: Number of steps between evaluations; one epoch by default.
        evaluation_batch_size: Number of examples per batch in evaluations.
        loss: The loss function for the training steps; `task.loss` by default. Evaluations always use `task.loss`.
            Classification losses accept options, for example `functools.partial(task.loss, label_smoothing=0.1)`.
        metric: The name of the metric by which the best parameters are chosen; the task's first metric by default.
            Higher is better, except for the metrics in `LOWER_IS_BETTER`.
        metrics: Additional metrics, keyed by name. Each is a function of two arguments: the `outputs` of an
            `Evaluation` and the examples. To obtain predictions, call `task.predictions` with the same two arguments.
        patience: Training stops after this number of consecutive evaluations in which the metric did not improve on its
            best value; None disables early stopping.
        folder: The folder for checkpoints and the journal (`metrics.jsonl`); if None, no files are written.
        save_every: Number of steps between additional checkpoints. In any case, a checkpoint is written every
            `evaluate_every` steps and after the last step.
        keep: Number of most recent checkpoints to keep, in addition to the best one.
        log_every: Number of steps between journal lines.
        schedule: The learning rate as a function of the step. It is only reported and does not change the optimizer.
        loggers: Objects that receive the journal's metrics; see `bert_jax.training.log.Logger`. Only the first process
            calls them.
        console: The console that shows the progress; None for no output.

    Raises:
        InputError: If the arguments do not fit the model, the task or the devices, if `folder` contains checkpoints
            from a run with different training examples, or if `validation` lacks the labels that `metric` requires.
        TrainingError: If the loss or the results of an evaluation are not finite.
        OutOfMemoryError: If the run's state or a batch does not fit in memory.
        Interrupted: If the process receives Ctrl-C or SIGTERM and `folder` is given. The state is saved, and repeating
            the call with the same arguments resumes the run.
        CheckpointError: If a checkpoint cannot be written or read.
    """
    run = set_up(
        model, task, examples, optimizer, batch_size=batch_size, accumulation=accumulation, packing=packing,
        trainable=trainable, lora=lora, mesh=mesh, seed=seed, loss=loss, metric=metric, metrics=metrics,
    )  # fmt: skip
    return fit(
        run, steps=steps, validation=validation, evaluate_every=evaluate_every,
        evaluation_batch_size=evaluation_batch_size, patience=patience, folder=folder,
        save_every=save_every, keep=keep, log_every=log_every, schedule=schedule, loggers=loggers, console=console,
    )  # fmt: skip


def fit(
    run: Run,
    *,
    steps: int,
    validation: Examples | None = None,
    evaluate_every: int | None = None,
    evaluation_batch_size: int = 64,
    patience: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    keep: int = 1,
    log_every: int = 10,
    schedule: optax.Schedule | None = None,
    loggers: Sequence[Logger] = (),
    console: Console | None = None,
) -> Trained:
    """Executes a run that `set_up` prepared. See `train` for the arguments and errors."""
    if patience is not None and patience < 1:
        raise InputError(f"patience is {patience}; expected at least 1, or None.")
    console, folder = console or Console(quiet=True), None if folder is None else Path(folder)
    # ── Devices, parameters, programs ────────────────────────────────────────────────────────────────────────────────
    mesh, task, loader, planned, layout, metric = run.mesh, run.task, run.loader, run.plan, run.layout, run.metric
    programs: dict[Shape, jax.stages.Compiled] = {}
    with memory.explain_out_of_memory(
        "The model with the state of its optimizer", "Use a mesh with a larger fsdp, freeze parameters, or use lora."
    ):
        state = sharding.put(init_state(planned, loader.seed), layout)
        frozen = sharding.put(planned.frozen, sharding.placements(mesh, planned.frozen))
    evaluate_batch = measure.program(task, planned.skeleton)
    combine: Any = planned.params
    # A compiled program is needed only to merge adapters; without adapters, it would only copy every parameter.
    if planned.lora:
        places = sharding.placements(mesh, dict(planned.skeleton.specs))
        combine = jax.jit(planned.params, out_shardings=tree.unflatten(places))

    # ── Checkpoint, progress, journal ─────────────────────────────────────────────────────────────────────────────────
    checkpoints = Checkpoints(folder / CHECKPOINTS, keep) if folder else None
    progress: dict[str, Any] = {
        "examples": loader.examples.digest(),
        "best": None,
        "evaluations_without_better": 0,
        "lines": [],  # metrics of the steps since the last line of the journal
    }
    start = 0
    if checkpoints and (restored := checkpoints.restore(state)):
        start, state, before = restored
        if before.get("examples") != progress["examples"]:
            raise InputError(
                f"The run in {folder} began with other training examples. Resume it with those, or use another folder."
            )
        progress |= before
        console.print(f"resuming at step {start} of {steps}")
    journal = Journal(folder, start, loggers) if distributed.first() else None
    every = evaluate_every or loader.steps_per_epoch

    # ── The steps ────────────────────────────────────────────────────────────────────────────────────────────────────
    step = start
    in_flight: list[tuple[int, Arrays]] = []
    lines: list[dict[str, float]] = progress["lines"]
    outputs: Mapping[str, Any] | None = None  # outputs of the best evaluation
    best_params: Arrays | None = None  # None if there is a folder: the best checkpoint contains them
    seen, since = 0, time.perf_counter()

    def take_in(n: int, metrics: Arrays) -> str | None:
        """Waits for a step and reads its metrics. Returns the text to show, or None if the step is not logged."""
        nonlocal seen, since
        place = loader.place(n - 1)
        with memory.explain_out_of_memory(f"A batch of {place.shape}", LESS_MEMORY):
            values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"The loss of step {n} is {values['loss']}, for rows {listed(loader.examples.rows(place.indices))} of "
                "the training data. Try a lower learning rate or a longer warm-up; earlier checkpoints remain."
            )
        lines.append(values)
        seen += len(place.indices)
        if n % log_every and n != steps:
            return None
        # The same clock reading ends this interval and starts the next. A second reading further below would leave out
        # the time during which `schedule` waits for the step in progress.
        now = time.perf_counter()
        rate, seen, since = seen / (now - since), 0, now
        means = {name: float(np.mean([line[name] for line in lines])) for name in values}
        learning_rate = {} if schedule is None else {"learning_rate": float(schedule(n - 1))}
        if journal:
            journal.write(n, {"epoch": n / loader.steps_per_epoch, **means, **learning_rate,
                              "examples_per_second": rate})  # fmt: skip
        lines.clear()
        shown = "".join(f"  rate {value:.1e}" for value in learning_rate.values())
        return f"loss {means['loss']:.4f}{shown}  {rate:.0f} examples/s"

    def evaluate(examples: Examples) -> measure.Evaluation:
        """Evaluates the parameters of the current step and adds the metrics to the journal."""
        nonlocal since
        paused = time.perf_counter()
        memory.release()
        result = measure.evaluate(
            task, evaluate_batch, combine(state.params, frozen), examples, batch_size=evaluation_batch_size,
            packing=loader.packing, multiple=loader.multiple, mesh=mesh,
        )  # fmt: skip
        if metric not in {*result.metrics, *run.metrics}:
            raise InputError(
                f"The validation examples have no labels; {metric} requires labels. Label them or omit them."
            )
        for name, compute in run.metrics.items():
            value = result.metrics[name] = float(compute(result.outputs, examples))
            if not math.isfinite(value):
                raise InputError(
                    f"The metric {name} is {result.metrics[name]} at step {step}; expected a finite number."
                )
        if journal:
            journal.write(step, {"validation": result.metrics})
        since += time.perf_counter() - paused
        return result

    with _signals(console, folder) as received, progress_bar(console, start, steps) as show, jax.set_mesh(mesh):
        if validation is not None and start == 0:
            # This evaluation is only reported. It never counts as the best, because the result of a run is a trained
            # model.
            console.print(f"step 0: {in_words(evaluate(validation).metrics)}  (before training)", soft_wrap=True)
        for batch in loader.batches(start, steps):
            if patience is not None and progress["evaluations_without_better"] >= patience:
                break
            shape = loader.place(step).shape
            with memory.explain_out_of_memory(f"A batch of {shape}", LESS_MEMORY):
                if shape not in programs:
                    programs[shape] = run.trace(shape).lower().compile()
                    memory.release()
                state, metrics = programs[shape](state, frozen, sharding.put_batch(batch, mesh))
            step += 1
            in_flight.append((step, metrics))
            stopping = bool(received) or distributed.asked_to_stop(step)
            evaluate_now = step % every == 0 or step == steps
            save_now = evaluate_now or stopping or bool(save_every and step % save_every == 0)
            # The metrics are read one step late, so that the device can compute the current step while the host
            # prepares the next one. Before an evaluation or a checkpoint, the metrics of the current step are also
            # read.
            while in_flight and (len(in_flight) > 1 or save_now):
                show(step, take_in(*in_flight.pop(0)))
            score = None
            if validation is not None and evaluate_now:
                result = evaluate(validation)
                score = _note_best(progress, step, result.metrics, metric)
                if score is not None:
                    outputs = result.outputs
                    best_params = None if folder else jax.tree.map(jnp.copy, state.params)
                console.print(
                    f"step {step}: {in_words(result.metrics)}{'  (best)' if score is not None else ''}", soft_wrap=True
                )
            if save_now and checkpoints:
                memory.release()
                checkpoints.save(step, state, progress, score)
                memory.release()
            if stopping:
                raise Interrupted(step, folder, received[0] if received else signal.SIGTERM)

    stopped = None
    if step < steps:
        times = "the last evaluation" if patience == 1 else f"the last {patience} evaluations"
        stopped = f"{metric} was not better in {times} than at step {progress['best']['step']}"
        console.print(f"stopped early at step {step} of {steps}: {stopped}", soft_wrap=True)

    # ── The best parameters ───────────────────────────────────────────────────────────────────────────────────────────
    best = progress["best"] or {"step": step, "metrics": {}}
    if best["step"] != step:
        if best_params is not None:
            state = replace(state, params=best_params)
        elif checkpoints and (restored := checkpoints.restore(state, best["step"])):
            state = restored[1]
        else:
            console.print(f"the best checkpoint (step {best['step']}) is damaged; the last step's parameters are used")
            best, outputs = {"step": step, "metrics": {}}, None
    if checkpoints:
        checkpoints.close()
    if journal:
        journal.close()
    params, trained = jax.device_put((combine(state.params, frozen), state.params), sharding.replicated(mesh))
    return Trained(tree.merge(planned.skeleton, params), trained, best["step"], step, stopped, best["metrics"], outputs)


def _note_best(progress: dict[str, Any], step: int, metrics: dict[str, Any], metric: str) -> float | None:
    """Records an evaluation. Returns the score (higher is better) if it is the best so far, otherwise None."""
    score: float = -metrics[metric] if metric in LOWER_IS_BETTER else metrics[metric]
    if progress["best"] is None or score > progress["best"]["score"]:
        progress.update(best={"step": step, "score": score, "metrics": metrics}, evaluations_without_better=0)
        return score
    progress["evaluations_without_better"] += 1
    return None


@contextlib.contextmanager
def _signals(console: Console, folder: Path | None) -> Iterator[list[int]]:
    """Handles Ctrl-C and SIGTERM. Yields a list to which the handler appends the number of the first signal.

    The second signal restores the previous handlers, so a third one ends the process as usual. If there are several
    processes, the list remains empty. In this case, JAX handles SIGTERM (see `distributed.asked_to_stop`). The first
    Ctrl-C restores the previous handler and sends SIGTERM to the process. If there is no folder, nothing can be saved,
    so signals are not handled.
    """
    received: list[int] = []
    # Python can set signal handlers only in the main thread.
    if folder is None or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[int, Any] = {}
    alone = jax.process_count() == 1

    def note(number: int, frame: Any) -> None:
        if alone and not received:
            console.print("stopping after this step; its state is saved")
            received.append(number)
            return
        for each, handler in before.items():
            signal.signal(each, handler)
        if alone:
            console.print("still saving; a third signal ends the run now, and it resumes from the previous checkpoint")
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    for asked in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
        before[asked] = signal.signal(asked, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
