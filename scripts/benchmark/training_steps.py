"""The cases `step`, `keras` and `pretrain`: training steps of both sides."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import PAUSE, SHAPES, in_process, matrix_product_rate
from rich.console import Console
from rich.table import Table
from tables import NO_TARGET, TARGETS, add_row, comparison

from bert_jax.training import memory

STEPS = {"8 × 128": (8, 128), "4 × 384": (4, 384)}
"""Number of rows, and tokens per row, in a training step."""
TURNS, CALLS = 4, 3
PRETRAINING = (64, 64)

_train_step: Callable[[int, int], tuple[float, float, float]]
"""This worker process's training step; see training_sides.py."""


def open_training(side: str, folder: Path, dropout: bool) -> None:
    global _train_step
    if side.startswith("ours"):
        memory.keep_freed()  # as `bert-jax finetune` does
    import training_sides

    _train_step = training_sides.SIDES[side](folder, dropout)


def train_steps(rows: int, tokens: int, calls: int) -> list[tuple[float, float, float]]:
    return [_train_step(rows, tokens) for _ in range(calls)]


def step(folder: Path, console: Console, dtypes: Sequence[str]) -> dict[str, Any]:
    """Compares steps in float32 or, if the dtypes include bfloat16, with our compute_dtype and PyTorch's autocast."""
    if "bfloat16" in dtypes:
        return _steps("ours bfloat16", "theirs bfloat16", folder, console)
    results = _steps("ours", "theirs", folder, console)
    with (
        in_process(open_training, "ours", folder, False) as ours,
        in_process(open_training, "theirs", folder, False) as theirs,
    ):
        losses = [[loss for _, _, loss in worker.submit(train_steps, 2, 64, 3).result()] for worker in (ours, theirs)]
    apart = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    return results | {"difference": f"losses without dropout by {apart:.1e}" if not apart <= 1e-4 else None}


def keras(folder: Path, console: Console) -> dict[str, Any]:
    os.environ["KERAS_BACKEND"] = "jax"
    return _steps("ours", "keras", folder, console)


def _steps(side: str, peer: str, folder: Path, console: Console) -> dict[str, Any]:
    table = comparison(f"{side} and {peer}: fine-tuning, ms ({folder.name})")
    shares = Table("", "operations", "rate", "product alone", "share", "must", "aim", "Python", "must", "aim",
                   title="step: the device's and Python's share, best of ours", title_justify="left")  # fmt: skip
    results: dict[str, Any] = {}
    with (
        in_process(open_training, side, folder, True) as ours,
        in_process(open_training, peer, folder, True) as theirs,
    ):
        sides = {"ours": ours, "theirs": theirs}
        for name, (rows, tokens) in STEPS.items():
            runs: dict[str, list[Any]] = {side: [] for side in sides}
            rates = []
            for turn in range(-1, TURNS):
                for side, worker in sides.items():
                    done = worker.submit(train_steps, rows, tokens, CALLS).result()
                    runs[side] += done if turn >= 0 else []  # the first turn compiles
                    time.sleep(PAUSE)
                rates.append(ours.submit(matrix_product_rate).result())
            times = {side: [seconds for seconds, _, _ in runs[side]] for side in sides}
            add_row(table, name, times, 1e3, TARGETS[f"step {name}"] if peer == "theirs" else NO_TARGET)
            layers, width, inner = (
                SHAPES["base"][key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
            )
            operations = 6 * rows * tokens * layers * (4 * width**2 + 2 * width * inner + 2 * tokens * width)
            best = operations / min(times["ours"])
            host = statistics.median(host for _, host, _ in runs["ours"])
            shares.add_row(name, f"{operations / 1e9:.0f} G", f"{best / 1e9:.0f} G/s", f"{max(rates) / 1e9:.0f} G/s",
                           f"{best / max(rates):.0%}", *TARGETS["rate"], f"{host * 1e3:.1f} ms",
                           *TARGETS["step python"])  # fmt: skip
            results[name] = {"runs": runs, "rates": rates}
    console.print(table)
    if peer == "theirs":
        console.print(shares)
    return results


def pretrain(folder: Path, console: Console) -> dict[str, Any]:
    """Compares steps of masked-language modeling alone. Also checks that losses agree without dropout."""
    rows, tokens = PRETRAINING
    runs: dict[str, list[Any]] = {"ours": [], "theirs": []}
    losses = {}
    with contextlib.ExitStack() as stack:
        sides = {
            side: stack.enter_context(in_process(open_training, f"{side} pretraining", folder, True)) for side in runs
        }
        for turn in range(-1, TURNS):
            for side, worker in sides.items():
                done = worker.submit(train_steps, rows, tokens, CALLS).result()
                runs[side] += done if turn >= 0 else []
                time.sleep(PAUSE)
    for side in runs:
        with in_process(open_training, f"{side} pretraining", folder, False) as worker:
            losses[side] = [loss for *_, loss in worker.submit(train_steps, 8, tokens, 3).result()]
    table = comparison("pretrain: a step of the embedded model's shape, masked tokens alone, ms")
    times = {side: [seconds for seconds, _, _ in done] for side, done in runs.items()}
    add_row(table, f"{rows} × {tokens}", times, 1e3, TARGETS["pretrain"])
    console.print(table)
    apart = max(abs(a - b) / abs(b) for a, b in zip(*losses.values(), strict=True))
    return {"runs": runs, "difference": f"losses without dropout by {apart:.1e}" if not apart <= 1e-4 else None}
