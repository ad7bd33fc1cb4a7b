"""Describes what a run would do, without a training step: data, examples, memory and what a compiler reports."""

import importlib
from collections import Counter
from typing import Any

from rich.console import Console

from bert_jax.config import BertConfig
from bert_jax.data.loader import Shape
from bert_jax.evaluation import measure
from bert_jax.recipes.preparation import Prepared, overview, prepare
from bert_jax.recipes.runs import rule_options, set_up, steps_of
from bert_jax.settings import Settings
from bert_jax.tools import aot
from bert_jax.training import loop, memory, optim

LOADED_LATER = ("grain", "sklearn.metrics")
"""Modules that a run imports only when it needs them; they occupy 60 MB."""


def dry_run(settings: Settings, target: str | None = None, *, console: Console | None = None) -> str:
    """Describes what a run would do, without a training step.

    The text has the settings, the first examples in words, shapes, parameters, memory and programs.

    Args:
        settings: The settings of the run.
        target: Chips to compile the step for, `v5e:2x4`, which need not be present; this machine's devices by default.
        console: Shows a target's programs as they are compiled; None shows nothing.

    Raises:
        InputError: See `finetune`; also if there is no such target.
    """
    chips = aot.get(target) if target else None
    prepared = prepare(settings)
    examples, tokenizer = prepared.examples["train"], prepared.tokenizer
    parts = [settings.to_yaml(), overview(settings, prepared)]
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
    for path, rule in optim.rules(planned.trained, **rule_options(settings)).items():
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
    """Describes the peak memory of a run; None if the compiler does not report memory.

    On CPU, this is the memory of the whole process, a sum of three parts: what the process occupies now (libraries,
    data, model and programs), the training state, and the most that any one phase of the run needs. On other devices,
    it is the memory of one device, without the parameters of evaluations.

    Args:
        settings: The settings of the run.
        prepared: The model and the examples of the run.
        run: The steps of the run.
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
    """What a target's compiler reports for a run's step on a batch of this shape, and the largest batch that fits."""
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
