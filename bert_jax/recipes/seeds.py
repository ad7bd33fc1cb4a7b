"""Fine-tunes a model once per seed and reports the mean and the standard deviation of each metric."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from bert_jax.errors import InputError, quoted
from bert_jax.recipes import finetuning, runs
from bert_jax.settings import Settings
from bert_jax.tools import report

SEEDS = "seeds.json"


def read_seeds(text: str) -> list[int]:
    """Parses a list of seeds, such as "1,2,3".

    Raises:
        InputError: If there are fewer than two seeds, if a seed occurs twice, or if a seed is not a non-negative
            integer.
    """
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if part.isdecimal() and len(part) < 10]
    if len(seeds) < max(2, len(parts)) or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds is {quoted(text)}; expected at least two different whole numbers, such as 1,2,3.")
    return seeds


def finetune_seeds(settings: Settings, seeds: Sequence[int], *, console: Console | None = None) -> Path:
    """Fine-tunes a model once per seed and saves each run in a subfolder of `settings.output.folder`, such as `seed-1`.

    For each split and metric, the file `seeds.json` in `settings.output.folder` contains the value for each seed, the
    number n of values, their mean, and their sample standard deviation (with n - 1 in the denominator). If a call is
    interrupted, repeating it with the same arguments resumes it; finished runs are not repeated.

    Args:
        settings: The settings of the runs. Each seed replaces `training.seed`.
        seeds: The seeds; at least two are required.
        console: The console that shows the progress of the runs and the table of metrics; None for no output.

    Returns:
        The folder.

    Raises:
        InputError: If `settings.output.folder` itself contains a run. `finetune` documents the other errors.
    """
    console, folder = console or Console(quiet=True), Path(settings.output.folder)
    if (folder / runs.SETTINGS).exists():
        raise InputError(f"output.folder: {folder} contains a single run; use another folder for several seeds.")
    found = []
    for n, seed in enumerate(seeds, 1):
        console.print(f"seed {seed} ({n} of {len(seeds)})", highlight=False)
        training = settings.training.model_copy(update={"seed": seed})
        output = settings.output.model_copy(update={"folder": str(folder / f"seed-{seed}")})
        one = finetuning.finetune(settings.model_copy(update={"training": training, "output": output}), console=console)
        found.append(json.loads((one / runs.RESULTS).read_text(encoding="utf-8")))
    metrics = {split: summary([each[split] for each in found]) for split in ("validation", "test") if split in found[0]}
    runs.write(folder / SEEDS, json.dumps({"seeds": list(seeds), "metrics": metrics}, indent=2) + "\n")
    rows = [
        [f"{split} {name}", f"{entry['mean']:.4f}", f"{entry['standard_deviation']:.4f}", str(entry["n"]),
         ", ".join(f"{value:.4f}" for value in entry["values"])]
        for split, entries in metrics.items() for name, entry in entries.items()
    ]  # fmt: skip
    console.print(Markdown(report.table(["metric", "mean", "standard deviation", "n", "by seed"], rows)))
    return folder


def summary(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the mean, sample standard deviation, count and values of each float metric that all runs report.

    Args:
        metrics: The metrics of each run, for at least two runs.
    """
    found = {
        name: [each[name] for each in metrics]
        for name, value in metrics[0].items()
        if isinstance(value, float) and all(name in each for each in metrics)
    }
    return {
        name: {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values),
            "n": len(values),
            "values": values,
        }
        for name, values in found.items()
    }
