"""Tables of measurements with targets, and a chart."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.table import Table


class Target(NamedTuple):
    """The required value and the desired value of a figure, formatted for tables."""

    must: str
    aim: str


TARGETS = {
    "warm": Target("0.7", "0.5"),
    "python": Target("2 ms", "1 ms"),
    "process": Target("0.7", "0.5"),
    "load": Target("1.3", "1.15"),
    "step 8 × 128": Target("0.8", "0.6"),
    "step 4 × 384": Target("0.95", "0.7"),
    "rate": Target("≥ 50%", "≥ 60%"),
    "step python": Target("5 ms", "2 ms"),
    "peers 1 × 16": Target("1.4", "1.1"),
    "peers 8 × 128": Target("1.15", "1.0"),
    "peers 4 × 512": Target("1.15", "1.0"),
    "texts gathered": Target("≥ 1.3", "≥ 1.6"),
    "texts transformers": Target("≥ 2.5", "≥ 4"),
    "pretrain": Target("0.7", "0.5"),
    "scores": Target("0.4", "0.25"),
    "packing": Target("≥ 1.7", "≥ 3"),
    "finetune padded": Target("0.3", ""),
    "finetune grouped": Target("0.8", "0.5"),
    "finetune dynamic": Target("0.8", "0.5"),
}
NO_TARGET = Target("", "")


def comparison(title: str) -> Table:
    columns = [f"{side} {what}" for side in ("ours", "theirs") for what in ("best", "median", "10–90%")]
    return Table("", *columns, "ratio", "must", "aim", title=title, title_justify="left")


def add_row(table: Table, name: str, values: dict[str, list[float]], unit: float, target: Target = NO_TARGET) -> None:
    """Adds a row to a table that `comparison` created. The row contains the ratio of the medians."""
    cells = [cell for side in ("ours", "theirs") for cell in _cells([value * unit for value in values[side]], min)]
    ratio = statistics.median(values["ours"]) / statistics.median(values["theirs"])
    table.add_row(name, *cells, f"{ratio:.3f}", *target)


def ranking(title: str) -> Table:
    return Table("", "", "best", "median", "10–90%", "ours / theirs", "must", "aim", title=title, title_justify="left")


def rank(
    table: Table, name: str, values: dict[str, list[float]], best: Callable[..., Any], targets: dict[str, Target]
) -> None:
    """Adds rows to a table that `ranking` created. The last of our sides is compared with all others.

    A target is shown in the row of the best side whose name contains the target's key.
    """
    medians = {side: statistics.median(found) for side, found in values.items()}
    beside = {best((side for side in values if word in side), key=medians.get, default=""): target
              for word, target in targets.items()}  # fmt: skip
    *_, ours = (side for side in values if side.startswith("ours"))
    for side, found in values.items():
        ratio = "" if side == ours else f"{medians[ours] / medians[side]:.2f}"
        table.add_row(name, side, *_cells(found, best), ratio, *beside.get(side, NO_TARGET))
        name = ""
    table.add_section()


def _cells(values: list[float], best: Callable[..., float]) -> list[str]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [_digits(best(values)), _digits(statistics.median(values)), f"{_digits(deciles[0])}–{_digits(deciles[-1])}"]


WORK = {
    "C0": "ours, bert_jax: all layers but the last in full; the last layer and the head only at the masks",
    "0.6": "“gathered”: the same work",
    "0.8": "“all”: the head at every token; “head”: all layers in full, the head only at the masks",
}
"""Maps each color to a description of the sides that the chart shows in this color."""


def chart(cases: dict[str, Any]) -> Any:
    """Draws the medians and deciles for the cases `peers` and `texts`, one panel per shape."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = {
        f"{name} tokens, ms (shorter is better)": {side: [1e3 * t for t in found] for side, found in times.items()}
        for name, times in cases.get("peers", {}).get("seconds", {}).items()
    }
    if found := cases.get("texts"):
        panels[f"{found['sentences']:,} sentences, sentences per second (longer is better)"] = found["rates"]
    figure = Figure(figsize=(10, 2.6 * -(-len(panels) // 2)), layout="constrained")
    for n, (title, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, n)
        medians = [statistics.median(found) for found in values.values()]
        deciles = [statistics.quantiles(found, n=10, method="inclusive") for found in values.values()]
        around = [[median - low for median, (low, *_) in zip(medians, deciles, strict=True)],
                  [high - median for median, (*_, high) in zip(medians, deciles, strict=True)]]  # fmt: skip
        colors = ["C0" if side.startswith("ours") else "0.6" if "gathered" in side else "0.8" for side in values]
        bars = axes.barh(list(values), medians, xerr=around, color=colors, ecolor="0.3")
        axes.bar_label(bars, [_digits(median) for median in medians], padding=3)
        axes.margins(x=0.15)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    labels = [Patch(color=color, label=work) for color, work in WORK.items()]
    figure.legend(handles=labels, loc="outside upper left", frameon=False)
    figure.supxlabel("bars: medians; lines: from the 10th to the 90th percentile", fontsize="small")
    return figure


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
