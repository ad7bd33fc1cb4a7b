"""The cases `warm` and `python`: calls of a fill-mask pipeline with short sentences."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import EMBEDDED, PAUSE, in_process, seconds_of
from rich.console import Console
from rich.table import Table
from tables import TARGETS, add_row, comparison

from bert_jax import hub

SENTENCES = [
    "The weather is [MASK] today.",
    "Paris is the [MASK] of France.",
    "She went to the [MASK] yesterday, and came back late.",
    "The committee will publish its final [MASK] on the state of the railways next week.",
    "In the long run he will be remembered for many things, of which this [MASK] is only the last one.",
]
TOLERANCE = 1e-5
"""Absolute tolerance of scores."""
TURNS, CALLS = 6, 8
"""Number of turns per side, and number of calls per turn."""
PAIRS = 100
"""Number of calls, each of which is paired with a run of the compiled program alone."""

_fill_mask: Callable[[str], list[dict[str, Any]]]
"""The pipeline of this worker process."""


def open_pipeline(side: str, folder: Path) -> None:
    global _fill_mask
    if side == "ours":
        import bert_jax

        _fill_mask = bert_jax.pipeline("fill-mask", folder)
    else:
        import transformers

        _fill_mask = transformers.pipeline("fill-mask", model=str(folder), device="cpu")


def answer(text: str) -> list[dict[str, Any]]:
    return _fill_mask(text)


def time_calls(text: str, calls: int) -> list[float]:
    return [seconds_of(lambda: _fill_mask(text)) for _ in range(calls)]


def time_call_and_program(folder: Path, text: str) -> dict[str, list[float]]:
    """Returns the seconds per call of our pipeline and per run of the compiled program on the inputs of such a call."""
    import jax

    import bert_jax

    fill_mask = bert_jax.pipeline("fill-mask", folder)
    fill_mask(text)
    [(bucket, program)] = fill_mask._programs.items()
    recorded: list[Any] = []
    fill_mask._programs[bucket] = lambda *arguments: recorded.append(arguments) or program(*arguments)
    fill_mask(text)
    fill_mask._programs[bucket] = program
    arguments = jax.block_until_ready(jax.device_put(recorded[0]))
    times: dict[str, list[float]] = {"call": [], "program": []}
    for n in range(PAIRS + 5):
        pair = {
            "call": seconds_of(lambda: fill_mask(text)),
            "program": seconds_of(lambda: jax.block_until_ready(program(*arguments))),
        }
        for name in times if n >= 5 else ():
            times[name].append(pair[name])
    return times


def warm(folder: Path, console: Console) -> dict[str, Any]:
    table = comparison(f"warm: one sentence, ms ({folder.name})")
    sentences = []
    with in_process(open_pipeline, "ours", folder) as ours, in_process(open_pipeline, "theirs", folder) as theirs:
        sides = {"ours": ours, "theirs": theirs}
        for text in SENTENCES:
            outputs = {side: worker.submit(answer, text).result() for side, worker in sides.items()}
            difference = _difference(outputs["ours"], outputs["theirs"])
            times: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(-1, TURNS):
                for side, worker in sides.items():
                    seconds = worker.submit(time_calls, text, CALLS).result()
                    times[side] += seconds if turn >= 0 else []  # the first turn warms up
                    time.sleep(PAUSE)
            sentences.append({"text": text, "seconds": times, "difference": difference})
            add_row(table, f"{len(text.split())} words", times, 1e3)
    every = {side: [second for entry in sentences for second in entry["seconds"][side]] for side in sides}
    add_row(table, "all", every, 1e3, TARGETS["warm"])
    console.print(table)
    return {"sentences": sentences}


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    """Describes how the two sides' predictions differ; None if the tokens are equal and the scores are close."""
    tokens = [[entry["token"] for entry in side] for side in (ours, theirs)]
    if tokens[0] != tokens[1]:
        return f"tokens {tokens[0]} and {tokens[1]}"
    apart = max(abs(a["score"] - b["score"]) for a, b in zip(ours, theirs, strict=True))
    return f"scores by {apart:.1e}" if not apart <= TOLERANCE else None


def python(folder: Path, console: Console) -> dict[str, Any]:
    table = Table("", "call", "program alone", "Python", "share", "must", "aim",
                  title="python: medians, ms", title_justify="left")  # fmt: skip
    results = {}
    for model in [folder, hub.EMBEDDED / EMBEDDED]:
        with in_process() as worker:
            times = worker.submit(time_call_and_program, model, SENTENCES[1]).result()
        call, program = statistics.median(times["call"]), statistics.median(times["program"])
        # The median of the differences, not the difference of the medians, because the machine may become slower
        # midway.
        share = statistics.median(a - b for a, b in zip(times["call"], times["program"], strict=True))
        table.add_row(model.name, f"{call * 1e3:.2f}", f"{program * 1e3:.2f}", f"{share * 1e3:.2f}",
                      f"{share / call:.1%}", *TARGETS["python"])  # fmt: skip
        results[model.name] = {"seconds": times}
    console.print(table)
    return results
