"""Compiles programs of the shipped recipes for TPUs and GPUs that are not present, and writes docs/accelerators.md.

    python scripts/aot_check.py             # all programs; takes an hour on two cores
    python scripts/aot_check.py v5e change  # the programs whose names contain "v5e" or "change"

The script requires the `aot` extra and, for the program with cuDNN attention, the package `nvidia-cudnn-cu13`. Results
are stored in docs/accelerators.json. A program is recompiled only if the version of JAX, Flax or a compiler has
changed.
"""

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from bert_jax import BertConfig, attention, sharding
from bert_jax.data.loader import Examples, Loader, Shape
from bert_jax.inference.batches import Bucket
from bert_jax.inference.pipelines import Pipeline
from bert_jax.quantization import Dtype, hold
from bert_jax.recipes import preparation, runs
from bert_jax.settings import Settings
from bert_jax.tasks import registry
from bert_jax.tokenizer import Tokenizer
from bert_jax.tools import aot
from bert_jax.training import loop

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "accelerators.md", ROOT / "docs" / "accelerators.json"
SIZES = {"base": BertConfig.base_cased(), "large": BertConfig.large_cased()}
CHIPS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "h100:8")
LAYOUTS = {"data": {}, "fsdp": {"data": 1, "fsdp": 8}}
# Recipe -> rows and tokens per step, enough to keep the matrix units of each device busy.
RECIPES = {"emotion": (256, 128), "squad": (64, 384)}
INFERENCE: dict[registry.TaskName, int] = {"fill-mask": 2, "text-classification": 0}
"""Inference task -> number of masked positions per row."""
WORDS = "the quick brown fox jumps over the lazy dog and " * 60
ROWS = {
    "emotion": [{"text": WORDS, "label": "LABEL_0"}],
    "squad": [{"question": "who jumps", "context": WORDS, "answers": {"text": ["fox"], "answer_start": [16]}}],
}


def make_run(recipe: str, size: str, chips: aot.Target, **changes: Any) -> loop.Run:
    """Sets up a `bert-jax finetune` run of a shipped recipe in bfloat16.

    The run's parameters have shapes but no values.

    Args:
        recipe: Name of a file in configs/finetune, without ".yaml".
        size: Size of the model, "base" or "large".
        chips: The devices to compile for.
        changes: Settings section -> values that replace those of the recipe.
    """
    settings = Settings.from_file(
        ROOT / "configs" / "finetune" / f"{recipe}.yaml", ["precision.compute_dtype=bfloat16"]
    )
    tree = settings.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    settings = Settings.from_dict(tree)
    dropout = (
        {} if (rate := settings.model.attention_probs_dropout_prob) is None else {"attention_probs_dropout_prob": rate}
    )
    config = SIZES[size].replace(num_labels=6, **dropout)
    tokenizer = Tokenizer.from_pretrained("bert-mini-cased")  # has the same vocabulary as bert-base-cased
    model = registry.TASKS[settings.task].model_class(
        config,
        compute_dtype=settings.precision.compute_dtype,
        attention=settings.model.attention,
        remat=settings.training.remat,
        scan_layers=settings.training.scan_layers,
    )
    task = preparation.make_task(settings, tokenizer, config)
    return runs.set_up(settings, task, model, task.featurize(ROWS[recipe]), 1000, devices=chips.devices)


def finetune(chips: aot.Target, recipe: str, size: str, shape: Shape, **changes: Any) -> dict[str, Any]:
    """Compiles a fine-tuning step."""
    run = make_run(recipe, size, chips, **changes)
    check = aot.check(run.trace(shape), chips)
    flops = aot.train_flops(SIZES[size], shape.rows, shape.length)
    gradients = sum(leaf.size * 4 for leaf in run.plan.trained.values())
    return entry(check, flops) | {"gradient_bytes": gradients}


def inference(
    chips: aot.Target,
    size: str,
    bucket: Bucket,
    dtype: Dtype = "bfloat16",
    task: registry.TaskName = "fill-mask",
    **mesh: int,
) -> dict[str, Any]:
    """Compiles a pipeline's program for a bucket, on a mesh of the devices in `chips`."""
    kind, config = registry.TASKS[task], SIZES[size]
    tokenizer = Tokenizer.from_pretrained("bert-mini-cased")
    network = kind.model_class(config)
    hold(network.encoder, dtype)
    devices = sharding.mesh(**mesh, devices=chips.devices)
    pipe = Pipeline(kind(tokenizer, config, 512), network, tokenizer, 512, devices)
    check = aot.check(pipe.trace(bucket), chips)
    return entry(check, aot.train_flops(config, bucket.rows, bucket.length) / 3)


def entry(check: aot.Check, flops: float) -> dict[str, Any]:
    return {
        "fits": check.fits,
        "memory": check.memory,
        "resident": check.resident,
        "aliased": check.aliased,
        "seconds": round(check.seconds, 1),
        "flops": flops,
        "products": check.products,
        "collectives": check.collectives,
        "kernels": check.kernels,
        "bound": aot.bound(check) if check.fits else None,
    }


def largest(chips: aot.Target, size: str, length: int, **changes: Any) -> dict[str, Any]:
    """Finds the largest number of packed rows of `length` tokens per device at which a training step fits in memory."""
    run = make_run("squad", size, chips, data={"max_length": length}, **changes)
    n = len(chips.devices)
    tried: dict[int, bool] = {}

    def check(rows: int) -> aot.Check:
        found = aot.check(run.trace(Shape(rows * n, length, 2)), chips)
        tried[rows] = found.fits
        print("   ", rows, "rows a device:", found.line, flush=True)
        return found

    return {"rows": aot.largest(check, 48, check(48)), "tried": tried}


def packing(chips: aot.Target, lengths: np.ndarray, packed: bool) -> dict[str, Any]:
    """Compiles a step on a batch of 256 examples, either packed or padded to 128 tokens with one example per row.

    Args:
        chips: The devices to compile for.
        lengths: Number of tokens in each example from which the batch can be drawn.
        packed: Whether examples share rows.
    """
    run = make_run("emotion", "base", chips, data={"packing": packed}, training={"batch_size": 256})
    ids = [np.ones(n, np.int32) for n in lengths]
    examples = Examples(ids, ids, {"labels": np.zeros(len(ids), np.int32)})
    loader = Loader(examples, 256, seed=0, share=run.loader.share, packing=run.loader.packing)
    shape = loader.place(0).shape if packed else Shape(256, 128, 1)
    return finetune(chips, "emotion", "base", shape, data={"packing": packed}) | {"shape": shape}


def programs() -> dict[str, Any]:
    """Program name -> function that compiles the program. The programs in the memory table come first."""
    found: dict[str, Any] = {}
    for name in CHIPS:
        for recipe, (rows, length) in RECIPES.items():
            for size in SIZES:
                for layout, mesh in LAYOUTS.items():
                    key = f"{name} finetune {recipe} {size} {layout} {rows}x{length}"
                    shape = Shape(rows, length, 4)
                    found[key] = lambda c, r=recipe, s=size, m=mesh, h=shape: finetune(c, r, s, h, mesh=m)
        for size in SIZES:
            for dtype in ("bfloat16", "int8"):
                found[f"{name} fill-mask {dtype} {size} one 16x128"] = lambda c, s=size, d=dtype: inference(
                    c, s, Bucket(16, 128, 2), d, data=1
                )
            for task, masks in INFERENCE.items():
                for layout, mesh in LAYOUTS.items():
                    bucket = Bucket(128, 128, masks)
                    found[f"{name} {task} bfloat16 {size} {layout} 128x128"] = (
                        lambda c, s=size, b=bucket, t=task, m=mesh: inference(c, s, b, task=t, **m)
                    )
    fused = {"attention_probs_dropout_prob": 0.0}  # fused kernels do not support attention dropout
    for name, what, changes in (
        ("v5e:2x4", "plain", {"model": fused}),
        ("v5e:2x4", "remat", {"model": fused, "training": {"remat": True}}),
        ("v5e:2x4", "splash", {"model": fused | {"attention": "splash"}}),
        ("v5e:2x4", "splash and remat", {"model": fused | {"attention": "splash"}, "training": {"remat": True}}),
        ("h100:8", "plain", {"model": fused}),
        ("h100:8", "remat", {"model": fused, "training": {"remat": True}}),
        ("h100:8", "triton", {"model": fused | {"attention": "triton"}}),
        ("h100:8", "cudnn", {"model": fused | {"attention": "cudnn"}, "data": {"packing": False}}),
    ):
        shape = Shape(256, 512, 1 if what == "cudnn" else 4)
        changes = {"data": {"max_length": 512}} | changes
        found[f"{name} change {what}"] = lambda c, h=shape, k=changes: finetune(c, "squad", "base", h, **k)
    remat = {"training": {"remat": True}}
    found["v5e:2x4 largest large 512 remat"] = lambda c: largest(c, "large", 512, **remat)
    for size in SIZES:
        shape = Shape(256 * 32, 128, 4)
        found[f"v5e:16x16 finetune emotion {size} data 8192x128"] = lambda c, s=size, h=shape: finetune(
            c, "emotion", s, h
        )
    # Packing: a batch of 256 examples, either padded to 128 tokens or packed.
    lengths = np.random.default_rng(0).gamma(3.2, 7.0, 256 * 8).clip(4, 128).astype(int)
    for packed in (False, True):
        found[f"v5e:2x4 packing {packed}"] = lambda c, p=packed: packing(c, lengths, p)
    found["v5e:2x4 too much"] = lambda c: finetune(c, "squad", "large", Shape(512, 512, 4), data={"max_length": 512})
    return found


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(versions: dict[str, str], results: dict[str, Any]) -> str:
    """Returns the text of docs/accelerators.md."""
    gib = aot.GIB
    results = {name: results[name] for name in programs() if name in results}
    parts = [
        "# TPUs and GPUs",
        "This package's programs can be compiled for v5e, v6e and v5p TPUs and for H100 GPUs. They were compiled with "
        "the\ncompilers for these chips, on a machine that has none of them. **They have never been run on any of "
        "these chips.** This\npage shows the memory, communication and data types that the compilers report, and "
        "theoretical lower bounds on the\nstep time. It says nothing about the actual speed.",
        "```sh\npip install '.[aot]'\n"
        "bert-jax finetune configs/finetune/emotion.yaml precision.compute_dtype=bfloat16 --dry-run --target v5e:2x4\n"
        "python scripts/aot_check.py    # writes this page\n```",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".\nIn training, activations are bfloat16, and parameters and the optimizer state are float32. The state is "
        "donated. Rows are\npacked unless stated otherwise. TPU programs are compiled with "
        "`exec_time_optimization_effort` −1, and H100\nprograms without autotuning.",
    ]  # fmt: skip
    table = ["| program | layout | " + " | ".join(CHIPS) + " |", "|---|---|" + "---|" * len(CHIPS)]
    kinds = list(
        dict.fromkeys(name.split(" ", 1)[1] for name in programs() if name.split()[1] in ("finetune", *INFERENCE))
    )
    for kind in kinds:
        task, *recipe, size, layout, shape = kind.split()
        cells = [results.get(f"{chip} {kind}") for chip in CHIPS]
        if any(cells):
            words = [f"{'' if c['fits'] else '**does not fit** '}{c['memory'] / gib:.2f}" if c else "" for c in cells]
            rows = f"{' '.join([task, *recipe])}, {size}, [{shape.replace('x', ', ')}]"
            table.append(f"| {rows} | {layout} | " + " | ".join(words) + " |")
    room = ", ".join(f"{aot.CHIPS[chip.split(':')[0]].memory / gib:.2f} GiB ({chip})" for chip in CHIPS)
    parts += [
        f"## Memory per device, GiB\n\nOne device has this much memory: {room}.\nShapes are [rows on all "
        "devices, tokens per row].",
        "\n".join(table),
    ]

    reports: dict[str, dict[str, list[str]]] = {}  # program -> compiler report -> devices
    for name, found in results.items():
        if name.split()[1] in ("finetune", *INFERENCE) and " one " not in name and found["fits"]:
            said = ", ".join(f"{n} {kind} ({size / 1e6:,.1f})" for kind, (n, size) in found["collectives"].items())
            flops = {kinds.split()[0]: flops for kinds, (_, flops) in found["products"].items()}
            share = flops["bfloat16"] / sum(flops.values())
            gradients = f"{found['gradient_bytes'] / 1e6:,.1f}" if "gradient_bytes" in found else ""
            chip, program = name.split(" ", 1)
            reports.setdefault(program, {}).setdefault(f"{said} | {gradients} | {share:.2%}", []).append(chip)
    lines = [
        "| program | devices | collectives (MB per device) | gradients, MB | matrix products in bfloat16 |",
        "|---|---|---|---|---|",
        *(
            f"| {program} | {', '.join(chips)} | {report} |"
            for program, found in reports.items()
            for report, chips in found.items()
        ),
    ]
    parts += [
        "## Communication between devices\n\nData-parallel steps communicate only to sum gradients, and data-parallel "
        "pipelines do not\ncommunicate at all. Each program name ends with the model size, the layout, and the batch "
        "shape (rows on all devices ×\ntokens per row). The last column shows the percentage of matrix-product "
        "operations that are in bfloat16.",
        "\n".join(lines),
    ]

    lines = [
        "| target | change | GiB per device | TFLOP in matrix products, all devices | custom kernels |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        if " change " in name:
            chip, what = name.split(" change ")
            kernels = ", ".join(f"{n} × `{kernel}`" for kernel, n in found["kernels"].items()) or "none"
            flops = sum(flops for _, flops in found["products"].values()) / 1e12
            fits = "" if found["fits"] else "**does not fit** "
            lines.append(f"| {chip} | {what} | {fits}{found['memory'] / gib:.2f} | {flops:.1f} | {kernels} |")
    parts += [
        "## What fused attention, remat and packing change\n\nThe table compares training steps of the base model "
        "on eight devices, with the batch shape [256, 512] and\nwithout attention dropout. Matrix products inside "
        "custom kernels are not counted.",
        "\n".join(lines),
    ]
    padded, packed = (results.get(f"v5e:2x4 packing {packed}") for packed in (False, True))
    if padded and packed:
        parts.append(
            "For a batch of 256 texts with 4 to 128 tokens each (22 on average), packing changes the shape from "
            f"{padded['shape'][:2]} to\n{packed['shape'][:2]}. On v5e:2x4, packing reduces the memory per device from "
            f"{padded['memory'] / gib:.2f} to {packed['memory'] / gib:.2f} GiB. The number of\noperations, which is "
            f"calculated from a formula, decreases from {padded['flops'] / 1e12:.1f} to {packed['flops'] / 1e12:.1f} "
            "TFLOP."
        )
    if found := results.get("v5e:2x4 largest large 512 remat"):
        parts.append(
            f"With remat, the large model can be trained on v5e:2x4 with {found['rows']} rows of 512 tokens per chip. "
            "This is the largest\nbatch that was found to fit."
        )
    if found := results.get("v5e:2x4 too much"):
        parts.append(
            "Without remat, a training step of the large model with the batch shape [512, 512] "
            f"{'fits' if found['fits'] else 'does not fit'} on v5e:2x4. According to\nthe compiler, it needs "
            f"{found['memory'] / gib:.1f} GiB per chip."
        )
    lines = [
        "| devices | activations | attention dropout | tokens per row | kernel | reason |",
        "|---|---|---|---|---|---|",
    ]
    for devices, dtype, dropout, length in (
        ("tpu", "bfloat16", 0.0, 512),
        ("gpu", "bfloat16", 0.0, 512),
        ("tpu", "bfloat16", 0.0, 64),
        ("gpu", "bfloat16", 0.1, 512),
        ("tpu", "float32", 0.0, 512),
        ("cpu", "bfloat16", 0.0, 512),
    ):
        kernel, reason = attention.choose(
            "auto", platform=devices, compute_dtype=dtype, dropout_rate=dropout, length=length
        )
        lines.append(f"| {devices.upper()} | {dtype} | {dropout:g} | {length} | {kernel} | {reason} |")
    parts += [
        "## What `attention: auto` chooses\n\nFused kernels never store the attention probabilities, so they cannot "
        "apply dropout to them. The published configs have\nan attention dropout of 0.1. To fine-tune with a fused "
        "kernel, set `model.attention_probs_dropout_prob=0`\n([what this changes](training_quality.md#attention-"
        "dropout)). The kernels are from JAX (`jax.experimental.pallas.ops`).\nThe tokamax kernels were tried, "
        "too, but they cannot be compiled without a GPU.",
        "\n".join(lines),
    ]
    lines = ["| program | matrix products | memory | interconnect | lower bound |", "|---|---|---|---|---|"]
    for name, found in results.items():
        if (
            found.get("bound")
            and " finetune emotion " in name
            and " data " in name
            and name.startswith(("v5e", "h100"))
        ):
            seconds = found["bound"]
            cells = " | ".join(f"{1e3 * value:.2f}" for value in seconds.values())
            lines.append(f"| {name} | {cells} | {1e3 * max(seconds.values()):.2f} |")
    parts += [
        "## Theoretical lower bounds\n\nThe table shows lower bounds on the step time, in milliseconds. They are "
        "computed only from the published rates of\neach chip (`bert_jax.tools.aot.CHIPS`). The `matrix products` "
        "column shows the minimum time for the program's matrix\nproducts at the peak bfloat16 rate. The `memory` "
        "column shows the minimum time for moving the program's arguments and\nresults through memory once. The "
        "`interconnect` column shows the minimum time for the program's all-reduces. The lower\nbound is the largest "
        "of the three times. These are bounds on what is possible, not measurements or promises.",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax")}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = kept.get("results", {}) if kept.get("versions") == versions else {}
    for name, compile_it in programs().items():
        target = name.split()[0]
        if name in results or not any(word in name for word in sys.argv[1:] or [""]):
            continue
        results[name] = compile_it(aot.get(target))
        print(name, {k: v for k, v in results[name].items() if k in ("fits", "memory", "seconds", "rows")}, flush=True)
        jax.clear_caches()
        RESULTS.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")
    PAGE.write_text(page(versions, results), encoding="utf-8")


if __name__ == "__main__":
    main()
