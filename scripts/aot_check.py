"""Compiles the shipped recipes' programs for TPUs and GPUs that are not here, and writes docs/accelerators.md.

    python scripts/aot_check.py             # all targets; an hour on two cores
    python scripts/aot_check.py v5e         # the programs of one chip

What has been compiled with these versions is kept in docs/accelerators.json and not compiled again.
"""

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from bert_jax import BertConfig, recipes, targets, training
from bert_jax.data.loader import Shape
from bert_jax.pipelines import TASKS, Bucket, Pipeline
from bert_jax.settings import Settings
from bert_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "accelerators.md", ROOT / "docs" / "accelerators.json"
SIZES = {"base": BertConfig.base_cased(), "large": BertConfig.large_cased()}
CHIPS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "h100:8")
LAYOUTS = {"data": {}, "fsdp": {"data": 1, "fsdp": 8}}
# A step's rows and tokens by recipe: as many tokens a device as keep its units of products busy.
RECIPES = {"emotion": (256, 128), "squad": (64, 384)}
WORDS = "the quick brown fox jumps over the lazy dog and " * 60
ROWS = {
    "emotion": [{"text": WORDS, "label": "LABEL_0"}],
    "squad": [{"question": "who jumps", "context": WORDS, "answers": {"text": ["fox"], "answer_start": [16]}}],
}


def make_run(recipe: str, size: str, chips: targets.Target, **changes: Any) -> training.Run:
    """What `bert-jax finetune configs/finetune/RECIPE.yaml` would run, its parameters' shapes alone.

    Args:
        recipe: Name of the file.
        size: Of the published model.
        chips: To compile for.
        changes: Settings of sections, laid over the file's.
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
    tokenizer = Tokenizer.from_pretrained("bert-mini-cased")  # its vocabulary is the published one
    model = recipes.TASKS[settings.task].model_class(
        config,
        compute_dtype=settings.precision.compute_dtype,
        attention=settings.model.attention,
        remat=settings.training.remat,
        scan_layers=settings.training.scan_layers,
    )
    task = recipes.make_task(settings, tokenizer, config)
    return training.set_up(task, model, task.featurize(ROWS[recipe]), settings, chips.devices)


def finetune(chips: targets.Target, recipe: str, size: str, shape: Shape, **changes: Any) -> dict[str, Any]:
    """A step of fine-tuning, compiled."""
    run = make_run(recipe, size, chips, **changes)
    check = targets.check(run.trace(shape), chips)
    flops = targets.train_flops(SIZES[size], shape.rows, shape.length)
    gradients = sum(leaf.size * 4 for leaf in run.plan.trained.values())
    return entry(check, flops) | {"gradient_bytes": gradients}


def fill_mask(chips: targets.Target, size: str, bucket: Bucket) -> dict[str, Any]:
    """The program of `bert-jax fill-mask` for a bucket, on one device."""
    kind, config = TASKS["fill-mask"], SIZES[size]
    tokenizer = Tokenizer.from_pretrained("bert-mini-cased")
    pipe = Pipeline(kind(tokenizer, config, 512), kind.model_class(config, compute_dtype="bfloat16"), tokenizer, 512)
    check = targets.check(pipe.trace(bucket, device=chips.devices[0]), chips)
    return entry(check, targets.train_flops(config, bucket.rows, bucket.length) / 3)


def entry(check: targets.Check, flops: float) -> dict[str, Any]:
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
        "bound": targets.bound(check, flops) if check.fits else None,
    }


def largest(chips: targets.Target, size: str, length: int, **changes: Any) -> dict[str, Any]:
    """The most rows of so many tokens that fit, in programs with rows of several texts."""
    run = make_run("squad", size, chips, data={"max_length": length}, **changes)
    n = len(chips.devices)
    tried: dict[int, bool] = {}

    def check(rows: int) -> targets.Check:
        found = targets.check(run.trace(Shape(rows * n, length, 2)), chips)
        tried[rows] = found.fits
        print("   ", rows, "rows a device:", found.line, flush=True)
        return found

    return {"rows": targets.largest(check, 48, check(48)), "tried": tried}


def programs() -> dict[str, Any]:
    """Name -> what compiles it, those of the table first."""
    found: dict[str, Any] = {}
    for name in CHIPS:
        for recipe, (rows, length) in RECIPES.items():
            for size in SIZES:
                for layout, mesh in LAYOUTS.items():
                    key = f"{name} finetune {recipe} {size} {layout} {rows}x{length}"
                    shape = Shape(rows, length, 4)
                    found[key] = lambda c, r=recipe, s=size, m=mesh, h=shape: finetune(c, r, s, h, mesh=m)
        for size in SIZES:
            bucket = Bucket(16, 128, 2)
            found[f"{name} fill-mask {size} one 16x128"] = lambda c, s=size, b=bucket: fill_mask(c, s, b)
    no_dropout = {"model": {"attention_probs_dropout_prob": 0.0}}
    for what, changes in {
        "plain": no_dropout,
        "scan": no_dropout | {"training": {"scan_layers": True}},
        "remat": no_dropout | {"training": {"remat": True}},
        "splash": {"model": {"attention_probs_dropout_prob": 0.0, "attention": "splash"}},
    }.items():
        found[f"v5e:2x4 change {what} base 256x512"] = lambda c, k=changes: finetune(
            c, "squad", "base", Shape(256, 512, 4), data={"max_length": 512}, **k
        )
    remat = {"training": {"remat": True}}
    found["v5e:2x4 largest large 512 remat"] = lambda c: largest(c, "large", 512, **remat)
    for size in SIZES:
        shape = Shape(256 * 32, 128, 4)
        found[f"v5e:16x16 finetune emotion {size} data 8192x128"] = lambda c, s=size, h=shape: finetune(
            c, "emotion", s, h
        )
    return found


def main() -> None:
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax")}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = kept.get("results", {}) if kept.get("versions") == versions else {}
    for name, compile_it in programs().items():
        target = name.split()[0]
        if name in results or (len(sys.argv) > 1 and not target.startswith(tuple(sys.argv[1:]))):
            continue
        results[name] = compile_it(targets.get(target))
        print(name, {k: v for k, v in results[name].items() if k in ("fits", "memory", "seconds", "rows")}, flush=True)
        jax.clear_caches()
        RESULTS.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
