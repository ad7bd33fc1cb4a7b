"""The case `packing`: throughput of rows padded to 128 tokens, rows padded by length, and packed rows."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import in_process, sentence_lengths
from rich.console import Console
from rich.table import Table
from tables import NO_TARGET, TARGETS

from bert_jax.training import memory

SENTENCES, TURNS = 256, 3

_epochs: dict[str, Callable[[], tuple[int, float]]]
"""This worker process's passes; see `training_sides.arrangements`."""


def open_packing(folder: Path, lengths: list[int]) -> None:
    global _epochs
    memory.keep_freed()
    import training_sides

    _epochs = training_sides.arrangements(folder, lengths)


def time_epoch(name: str) -> tuple[int, float]:
    return _epochs[name]()


def packing(folder: Path, console: Console) -> dict[str, Any]:
    """Measures throughput for the same sentences in three kinds of rows. Tests check that the results are equal."""
    lengths = [min(length, 128) for length in sentence_lengths(SENTENCES)]
    names = [f"{what}, {how}" for what in ("training", "prediction") for how in ("padded", "by length", "packed")]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with in_process(open_packing, folder, lengths) as worker:
        for turn in range(-1, TURNS):
            for name in names:
                tokens, seconds = worker.submit(time_epoch, name).result()
                if turn >= 0:
                    rates[name].append(tokens / seconds)
    table = Table("", "best", "median", "packed is faster by", "must", "aim",
                  title=f"packing: tokens / s of {SENTENCES} sentences, {sum(lengths):,} tokens ({folder.name})",
                  title_justify="left")  # fmt: skip
    for name, values in rates.items():
        ratio = statistics.median(rates[f"{name.partition(',')[0]}, packed"]) / statistics.median(values)
        target = TARGETS["packing"] if name.endswith("padded") else NO_TARGET
        table.add_row(name, f"{max(values):.0f}", f"{statistics.median(values):.0f}", f"{ratio:.2f}", *target)
    console.print(table)
    return {"rates": rates}
