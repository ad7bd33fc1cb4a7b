"""Compares the metrics and learning curves of our runs with those of runs with `transformers.Trainer`.

    python scripts/compare_runs.py --ours runs/ours_* --theirs runs/trainer_* --chart curves.png

Each folder contains one run of `bert-jax finetune` (`--ours`) or `scripts/transformers_trainer.py` (`--theirs`). The
runs on each side have different seeds. The script prints a Markdown table.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bert_jax.recipes import runs
from bert_jax.training import log

COLORS = {"ours": "C0", "theirs": "C1"}
LABELS = {"ours": "bert_jax", "theirs": "transformers"}


def scores(run: Path) -> dict[str, Any]:
    """Returns a run's metrics by split.

    The validation metrics are read from the journal, because those in results.json are computed with the best
    `null_threshold` found in the evaluation, not with the threshold in the settings.
    """
    results: dict[str, Any] = json.loads((run / runs.RESULTS).read_text())
    for line in log.read_journal(run / log.METRICS):
        if "validation" in line and line["step"] == results.get("step"):
            results["validation"] = line["validation"]
    return results


def table(sides: dict[str, list[Path]]) -> str:
    """Returns a Markdown table of the metrics that both sides have, with their means and their values by seed."""
    results = {side: [scores(run) for run in folders] for side, folders in sides.items()}
    lines = ["| | ours, mean | by seed | theirs, mean | by seed | ours − theirs |", "|---|---|---|---|---|---|"]
    for split in ("validation", "test"):
        found = [[one[split] for one in many if split in one] for many in results.values()]
        if not all(found):
            continue
        for name, value in found[0][0].items():
            if not isinstance(value, float) or not all(name in one for many in found for one in many):
                continue
            ours, theirs = ([one[name] for one in many] for many in found)
            mean, their_mean = statistics.mean(ours), statistics.mean(theirs)
            cells = [f"{mean:.4f}", _by_seed(ours), f"{their_mean:.4f}", _by_seed(theirs), f"{mean - their_mean:+.4f}"]
            lines.append(f"| {split} {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_seed(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def chart(sides: dict[str, list[Path]], metric: str | None) -> Figure:
    """Plots the loss by step and, if given, a validation metric: thin lines for runs, thick lines for means."""
    journals = {side: [log.read_journal(run / log.METRICS) for run in folders] for side, folders in sides.items()}
    figure = Figure(figsize=(10 if metric else 5.5, 3.2), layout="constrained")
    axes = figure.subplots(1, 2 if metric else 1, squeeze=False)[0]
    for side, many in journals.items():
        _lines(axes[0], side, [[(line["step"], line["loss"]) for line in one if "loss" in line] for one in many])
        if metric:
            evaluations = [[line for line in one if "validation" in line] for one in many]
            points = [[(line["step"], line["validation"][metric]) for line in one] for one in evaluations]
            _lines(axes[1], side, points, marker="o")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")  # 0.2 instead of 2 × 10⁻¹
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    for panel, name in zip(axes, ("training loss, log scale", f"{metric} on validation"), strict=False):
        panel.set_title(name, fontsize="medium", loc="left")
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.supxlabel("thick lines: means over the seeds; thin lines: single runs", fontsize="small")
    return figure


def _lines(panel: Any, side: str, runs: list[list[tuple[int, float]]], **style: Any) -> None:
    for points in runs:
        panel.plot(*zip(*points, strict=True), color=COLORS[side], alpha=0.25, linewidth=0.8)
    shared = sorted(set.intersection(*({step for step, _ in points} for points in runs)))
    means = [np.mean([dict(points)[step] for points in runs]) for step in shared]
    panel.plot(shared, means, color=COLORS[side], label=LABELS[side], **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in COLORS:
        parser.add_argument(f"--{side}", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--metric", help="validation metric to plot in addition to the loss")
    parser.add_argument("--chart", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    sides = {side: getattr(arguments, side) for side in COLORS}
    for run in itertools.chain.from_iterable(sides.values()):
        if not (run / runs.RESULTS).exists():
            parser.error(f"{run} has no {runs.RESULTS}; expected the folder of a run that has ended")
    print(table(sides))
    if arguments.chart:
        chart(sides, arguments.metric).savefig(arguments.chart, dpi=120)


if __name__ == "__main__":
    main()
