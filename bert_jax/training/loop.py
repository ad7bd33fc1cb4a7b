"""Training: one pure, donated, compiled step, and the loop around it, a straight line."""

import contextlib
import json
import logging
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bert_jax import kernels, sharding, tree
from bert_jax.data.loader import Batch, Examples, Loader, Place, Shape
from bert_jax.errors import InputError, Interrupted, TrainingError
from bert_jax.evaluation import measure
from bert_jax.model import BertPreTrainedModel
from bert_jax.settings import Pretraining, Settings
from bert_jax.tasks.base import Objective
from bert_jax.training import distributed, lora, memory, optim
from bert_jax.training.checkpoint import Checkpoints

logger = logging.getLogger(__name__)

CHECKPOINTS, METRICS, TENSORBOARD = "checkpoints", "metrics.jsonl", "tensorboard"
LESS_MEMORY = "Lower training.batch_size or data.max_length, raise training.accumulation, or set training.remat."
LOWER_IS_BETTER = ("loss", "mse", "mlm_loss", "nsp_loss", "pseudo_perplexity")
Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
        step: int32 [], steps done.
        params: The parameters that are trained, float32, by path; LoRA's adapters are among them.
        opt_state: The optimizer's.
        key: uint32 key data; the dropout of a step is drawn from it and the step's number.
    """

    step: jax.Array
    params: Arrays
    opt_state: optax.OptState
    key: jax.Array


@dataclass(frozen=True)
class Plan:
    """What the settings make of a model: which parameters are trained and how.

    Attributes:
        skeleton: The model's.
        trained: Parameters by path, LoRA's adapters included.
        frozen: Those that stay as they are.
        rules: Of the trained ones and of the frozen.
        optimizer: Over the trained ones.
        schedule: Step -> learning rate.
        steps: Of the whole run.
        lora_scale: alpha / rank.
    """

    skeleton: tree.Skeleton
    trained: Arrays
    frozen: Arrays
    rules: dict[str, optim.Rule]
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]
    steps: int
    lora_scale: float

    def params(self, trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> tree.Params:
        """The model's parameters of the trained and the frozen ones."""
        return tree.unflatten(lora.merge({**frozen, **trained}, self.lora_scale))


def plan(model: BertPreTrainedModel, settings: Settings | Pretraining, steps: int) -> Plan:
    """Sorts a model's parameters into trained and frozen ones, and makes the optimizer.

    Raises:
        InputError: If a pattern of the settings matches nothing, or nothing is left to train.
    """
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    adapters: Arrays = {}
    if settings.model.lora:
        adapters = lora.init(settings.model.lora, skeleton.specs, jax.random.key(settings.training.seed))
        whole = tree.select([settings.model.lora.trained, *settings.model.new], flat)
        if not tree.select([settings.model.lora.trained], flat):
            raise InputError(f"model.lora.trained is {settings.model.lora.trained!r}, which matches no parameter.")
        rules = optim.rules(settings.optimizer, [*adapters, *whole])
        rules |= {path: optim.Rule(False, 0.0, 0.0, ("lora",)) for path in flat if path not in rules}
    else:
        rules = optim.rules(settings.optimizer, flat)
    schedule = optim.schedule(settings.schedule, settings.optimizer.learning_rate, steps)
    every = flat | adapters
    return Plan(
        skeleton=skeleton,
        trained={path: every[path] for path, rule in rules.items() if rule.trained},
        frozen={path: every[path] for path, rule in rules.items() if not rule.trained},
        rules=rules,
        optimizer=optim.adamw(settings.optimizer, schedule, rules),
        schedule=schedule,
        steps=steps,
        lora_scale=settings.model.lora.alpha / settings.model.lora.rank if settings.model.lora else 0.0,
    )


def init_state(plan: Plan, seed: int) -> TrainState:
    """The state before the first step; its arrays are copies, for steps overwrite them."""
    trained = {path: jnp.array(leaf, copy=True) for path, leaf in plan.trained.items()}
    return TrainState(jnp.int32(0), trained, plan.optimizer.init(trained), jax.random.key_data(jax.random.key(seed)))


def make_step(
    task: Objective, plan: Plan, *, accumulation: int = 1, out_shardings: Any = None
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Arrays]]:
    """The compiled step: state, frozen parameters and batch -> the next state, and `loss` and `grad_norm`.

    The loss is a mean over what counts in the whole batch, also where the batch is computed in parts. The state is
    donated: its arrays are overwritten.

    Args:
        task: Gives the loss.
        plan: Of the parameters.
        accumulation: Parts that the batch is cut into; they are computed one after another.
        out_shardings: Where the results are to live.
    """

    def mean_loss(trained: Arrays, frozen: Arrays, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return task.loss(tree.merge(plan.skeleton, plan.params(trained, frozen)), batch, key)

    def total_loss(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        mean, count = mean_loss(*arguments)
        return mean * count, count

    def train_step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Arrays]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulation == 1:  # the mean's own gradient: to divide the sum's costs a pass over memory
            (loss, _), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params, frozen, batch, key)
        else:
            gradient = jax.value_and_grad(total_loss, has_aux=True)
            # Every n-th row to the n-th part, so that padding rows, which come last, are shared out.
            parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

            def add(sums: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, gradient(state.params, frozen, *part)), None

            zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.params))
            ((total, count), gradients), _ = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulation)))
            count = jnp.maximum(count, 1.0)
            loss, gradients = total / count, jax.tree.map(lambda g: g / count, gradients)
        updates, opt_state = plan.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def packing(model: BertPreTrainedModel, settings: Settings | Pretraining) -> int | None:
    """Tokens that a row of several examples may have, as many as the model has positions; None without packing."""
    return model.config.max_position_embeddings if settings.data.packing else None


def multiple(settings: Settings | Pretraining) -> int:
    """What the tokens of a row have to be a multiple of."""
    return kernels.SPLASH_BLOCK if settings.model.attention == "splash" else 1


def make_loader(
    examples: Examples, model: BertPreTrainedModel, settings: Settings | Pretraining, mesh: jax.sharding.Mesh
) -> Loader:
    """The batches of a run."""
    return Loader(
        examples,
        settings.training.batch_size,
        seed=settings.training.seed,
        share=settings.training.accumulation * sharding.share(mesh),
        packing=packing(model, settings),
        multiple=multiple(settings),
        part=sharding.part(mesh),
    )


class Run(NamedTuple):
    """What a run's steps are made of, on devices that are there or not.

    Attributes:
        mesh: The devices.
        loader: The batches.
        steps: Of the whole run.
        plan: Of the parameters.
        layout: Where the state lives: a `TrainState` of shardings.
        step: The compiled step, see `make_step`.
    """

    mesh: jax.sharding.Mesh
    loader: Loader
    steps: int
    plan: Plan
    layout: TrainState
    step: Any

    def trace(self, shape: Shape) -> jax.stages.Traced:
        """The step on a batch of some shape, for a compiler; needs no more of the devices than their description."""
        plan, examples = self.plan, self.loader.examples
        place = Place(np.zeros(0, int), np.zeros(0, int), shape)  # of padding alone
        state = sharding.abstract(_state_shapes(plan), self.layout)
        frozen = sharding.abstract(plan.frozen, sharding.placements(self.mesh, plan.frozen))
        batch = sharding.abstract(examples.batch(place), sharding.by_row(self.mesh))
        with jax.set_mesh(self.mesh):
            traced: jax.stages.Traced = self.step.trace(state, frozen, batch)
        return traced


def set_up(
    task: Objective,
    model: BertPreTrainedModel,
    examples: Examples,
    settings: Settings | Pretraining,
    devices: Sequence[Any] | None = None,
) -> Run:
    """Makes what `train` runs, for the devices of all processes or for those given.

    Raises:
        InputError: If the settings do not fit the model or the devices.
    """
    options = settings.training
    if options.metric not in (None, "loss", *task.metrics):
        raise InputError(f"training.metric is {options.metric!r}; this task has loss, {', '.join(task.metrics)}.")
    mesh = sharding.mesh(**settings.mesh.model_dump(), devices=devices)
    sharding.check(mesh, model.config)
    kernels.check(
        settings.model.attention,
        platform=mesh.devices.flat[0].platform,
        compute_dtype=settings.precision.compute_dtype,
        packed=settings.data.packing,
    )
    kernels.check_dropout(settings.model.attention, model.config.attention_probs_dropout_prob)
    loader = make_loader(examples, model, settings, mesh)
    steps = options.max_steps or math.ceil(options.epochs * loader.steps_per_epoch)
    planned = plan(model, settings, steps)
    layout = sharding.placements(mesh, _state_shapes(planned))
    step = make_step(
        task, planned, accumulation=options.accumulation, out_shardings=(layout, sharding.replicated(mesh))
    )
    return Run(mesh, loader, steps, planned, layout, step)


def _state_shapes(plan: Plan) -> TrainState:
    def state(trained: Arrays) -> TrainState:
        return init_state(replace(plan, trained=trained), 0)

    return jax.eval_shape(state, plan.trained)


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        model: With the parameters of the best checkpoint, or the last where there is no validation.
        trained: The trained parameters by path, adapters not merged.
        step: Steps of that checkpoint.
        steps: Steps done in all.
        metrics: Of validation at that checkpoint.
        outputs: And what `Objective.outputs` returned there; None if an earlier process did that evaluation.
    """

    model: BertPreTrainedModel
    trained: Arrays
    step: int
    steps: int
    metrics: dict[str, Any]
    outputs: Mapping[str, Any] | None


def train(
    task: Objective,
    model: BertPreTrainedModel,
    examples: Examples,
    validation: Examples | None,
    settings: Settings | Pretraining,
    *,
    console: Console | None = None,
) -> Trained:
    """Trains a model; where the settings' folder has checkpoints, goes on from the newest.

    Args:
        task: Gives loss and metrics.
        model: What to start from; is left as it is.
        examples: To learn from.
        validation: To choose the best checkpoint by, or None.
        settings: Of the run.
        console: Where progress is shown; nowhere by default.

    Raises:
        InputError: If the settings do not fit the model or the devices.
        TrainingError: If the loss is not finite any more; names step and examples.
        Interrupted: After Ctrl-C or SIGTERM; the state is saved, and the same call goes on.
        CheckpointError: If a checkpoint cannot be written or read.
    """
    options, folder = settings.training, Path(settings.output.folder)
    console = console or Console(quiet=True)
    metric = options.metric or task.metrics[0]

    # ── Devices, parameters, programs ────────────────────────────────────────────────────────────────────────────────
    run = set_up(task, model, examples, settings)
    mesh, loader, steps, planned, layout, _ = run
    programs: dict[Shape, jax.stages.Compiled] = {}
    for path, rule in planned.rules.items():
        logger.info("%s: %s", path, rule)
    state = sharding.put(init_state(planned, options.seed), layout)
    frozen = sharding.put(planned.frozen, sharding.placements(mesh, planned.frozen))
    evaluate_batch = measure.program(task, planned.skeleton)
    combine: Any = planned.params
    if settings.model.lora:  # without it there is nothing to compute, and a program would copy all parameters
        whole = tree.unflatten(sharding.placements(mesh, dict(planned.skeleton.specs)))
        combine = jax.jit(planned.params, out_shardings=whole)

    # ── Where the run stands ─────────────────────────────────────────────────────────────────────────────────────────
    checkpoints = Checkpoints(folder / CHECKPOINTS, options.keep)
    progress: dict[str, Any] = {
        "examples": examples.digest(),
        "best": None,
        "evaluations_without_better": 0,
        "lines": [],  # metrics of the steps since the journal's last line
    }
    start = 0
    if restored := checkpoints.restore(state):
        start, state, before = restored
        if before.get("examples") != progress["examples"]:
            raise InputError(
                f"The training examples are not those that the run in {folder} began with. Go on with those, or take "
                "another output.folder."
            )
        progress |= before
        console.print(f"going on from step {start} of {steps}")
    journal = Journal(folder, start, tensorboard=settings.output.tensorboard) if distributed.first() else None
    every = options.evaluate_every or loader.steps_per_epoch

    # ── The steps ────────────────────────────────────────────────────────────────────────────────────────────────────
    step = start
    flying: list[tuple[int, Arrays]] = []
    lines: list[dict[str, float]] = progress["lines"]
    outputs: Mapping[str, Any] | None = None  # of the best evaluation
    seen, since = 0, time.perf_counter()

    def take_in(n: int, metrics: Arrays) -> str | None:
        """Reads a step's metrics, which waits for it; returns what to show when the journal has got a line."""
        nonlocal seen, since
        place = loader.place(n - 1)
        with measure.out_of_memory(place.shape, LESS_MEMORY):
            values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"The loss of step {n} is {values['loss']}, on the examples in rows "
                f"{', '.join(map(str, examples.rows(place.indices)))} of the training data. "
                "A lower optimizer.learning_rate or a longer warm-up may help; checkpoints before that step stand."
            )
        lines.append(values)
        seen += len(place.indices)
        if n % options.log_every and n != steps:
            return None
        now = time.perf_counter()  # once: what follows waits for the step in flight, which would be nobody's time
        rate, seen, since = seen / (now - since), 0, now
        learning_rate = float(planned.schedule(n - 1))
        means = {name: float(np.mean([line[name] for line in lines])) for name in values}
        if journal:
            journal.write(n, {"epoch": n / loader.steps_per_epoch, **means, "learning_rate": learning_rate,
                              "examples_per_second": rate})  # fmt: skip
        lines.clear()
        return f"loss {means['loss']:.4f}  rate {learning_rate:.1e}  {rate:.0f} examples/s"

    with _signals(console) as received, _progress_bar(console, start, steps) as show, jax.set_mesh(mesh):
        for batch in loader.batches(start, steps):
            if _finished(progress, options.patience):
                break
            shape = loader.place(step).shape
            with measure.out_of_memory(shape, LESS_MEMORY):
                if shape not in programs:
                    programs[shape] = run.trace(shape).lower().compile()
                    memory.release()
                state, metrics = programs[shape](state, frozen, sharding.put_batch(batch, mesh))
            step += 1
            flying.append((step, metrics))
            stopping = bool(received) or distributed.asked_to_stop(step)
            evaluate_now = step % every == 0 or step == steps
            save_now = evaluate_now or stopping or bool(options.save_every and step % options.save_every == 0)
            # The loss of the step before: waiting for this one's would leave the device idle meanwhile.
            while flying and (len(flying) > 1 or save_now):
                show(step, take_in(*flying.pop(0)))
            score = None
            if validation is not None and evaluate_now:
                paused = time.perf_counter()
                memory.release()
                params = combine(state.params, frozen)
                result = measure.evaluate(
                    task,
                    evaluate_batch,
                    params,
                    validation,
                    batch_size=options.evaluation_batch_size,
                    packing=loader.packing,
                    multiple=loader.multiple,
                    mesh=mesh,
                )
                score = _note_best(progress, step, result.metrics, metric)
                outputs = outputs if score is None else result.outputs
                if journal:
                    journal.write(step, {"validation": result.metrics})
                console.print(
                    f"step {step}: {in_words(result.metrics)}{'  (best)' if score is not None else ''}", soft_wrap=True
                )
                since += time.perf_counter() - paused
            if save_now:
                memory.release()
                checkpoints.save(step, state, progress, score)
                memory.release()
            if stopping:
                raise Interrupted(step, folder, received[0] if received else signal.SIGTERM)

    # ── The best ─────────────────────────────────────────────────────────────────────────────────────────────────────
    best = progress["best"] or {"step": step, "metrics": {}}
    if best["step"] != step:
        if restored := checkpoints.restore(state, best["step"]):
            state = restored[1]
        else:
            console.print(f"the best checkpoint, of step {best['step']}, is damaged; the last one takes its place")
            best, outputs = {"step": step, "metrics": {}}, None
    checkpoints.close()
    if journal:
        journal.close()
    params, trained = jax.device_put((combine(state.params, frozen), state.params), sharding.replicated(mesh))
    return Trained(tree.merge(planned.skeleton, params), trained, best["step"], step, best["metrics"], outputs)


def _note_best(progress: dict[str, Any], step: int, metrics: dict[str, Any], metric: str) -> float | None:
    """Keeps in mind the best evaluation; the score if this one is it, higher being better."""
    if metric not in metrics:
        raise InputError("The validation examples have no labels; without them there is no best checkpoint.")
    score = -metrics[metric] if metric in LOWER_IS_BETTER else metrics[metric]
    if progress["best"] is None or score > progress["best"]["score"]:
        progress["best"] = {"step": step, "score": score, "metrics": metrics}
        progress["evaluations_without_better"] = 0
        return score
    progress["evaluations_without_better"] += 1
    return None


def _finished(progress: dict[str, Any], patience: int | None) -> bool:
    return patience is not None and progress["evaluations_without_better"] >= patience


def in_words(metrics: Mapping[str, Any]) -> str:
    """The numbers of some metrics, on a line; f1 of two labels says of which one it is."""
    of = {"f1": f" of {metrics['f1_label']}"} if "f1_label" in metrics else {}
    return "  ".join(
        f"{name}{of.get(name, '')} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)
    )


class Journal:
    """The metrics of a run by step: a line of JSON each, and events for TensorBoard.

    Args:
        folder: Of the run.
        start: Steps done; what an earlier process wrote of later ones is dropped, for they come again.
        tensorboard: Whether to write events.
    """

    def __init__(self, folder: Path, start: int, *, tensorboard: bool):
        path = folder / METRICS
        kept = [line for line in read_journal(path) if line["step"] <= start]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes values, of which there may be trees."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events:
            for name, value in tree.flatten(values).items():
                if isinstance(value, float):
                    self._events.add_scalar(name.replace(".", "/"), value, step)
            self._events.flush()

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        if self._events:
            self._events.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that a kill cut off is dropped."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def _signals(console: Console) -> Iterator[list[int]]:
    """The list that Ctrl-C and SIGTERM put their number in; a third one ends the process as ever, saved or not.

    Of several processes, JAX takes in SIGTERM (`processes.asked_to_stop`), and Ctrl-C becomes one.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one may ask
        yield received
        return
    before: dict[signal.Signals, Any] = {}

    alone = jax.process_count() == 1

    def note(number: int, frame: Any) -> None:
        if received:
            console.print("still saving; once more ends the run at once, and it goes on from the checkpoint before")
            signal.signal(number, before[signal.Signals(number)])
        elif alone:
            console.print("stopping after this step, which is saved")
            received.append(number)
        else:
            signal.signal(number, before[signal.Signals(number)])
            os.kill(os.getpid(), signal.SIGTERM)

    for asked in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
        before[asked] = signal.signal(asked, note)
    try:
        yield received
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)


@contextlib.contextmanager
def _progress_bar(console: Console, start: int, steps: int) -> Iterator[Callable[[int, str | None], None]]:
    columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
               TimeRemainingColumn()]  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, completed=start, text="")

        def show(step: int, text: str | None) -> None:
            bar.update(task, completed=step)
            if text is not None:
                bar.update(task, text=text)

        yield show
