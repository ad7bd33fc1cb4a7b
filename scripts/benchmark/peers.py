"""The cases `peers` and `texts`: other runtimes on the same batches and on many sentences."""

import contextlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import PAUSE, in_process, installed, seconds_of, sentence_lengths
from rich.console import Console
from tables import NO_TARGET, TARGETS, rank, ranking

from bert_jax.training import memory

SHAPES = {"1 × 16": (1, 16), "1 × 128": (1, 128), "8 × 128": (8, 128), "4 × 512": (4, 512)}
PEERS = {
    "float32": ["ours", "transformers all", "flaxbert all", "kerashub head", "onnxruntime all", "onnxruntime gathered",
                "openvino all", "openvino gathered"],
    "bfloat16": ["ours gathered bfloat16", "transformers all bfloat16", "openvino gathered bfloat16"],
    "int8": ["ours gathered int8", "transformers all int8", "onnxruntime gathered int8", "openvino gathered int8"],
}  # fmt: skip
"""The sides by dtype; runtimes.py explains their names."""
TOLERANCE = {"kerashub head": 1e-3, "bfloat16": 0.05, "int8": 0.15}
"""Tolerance of logits by side or dtype, relative to the largest logit; 1e-5 for sides that are not listed."""
TURNS = 6
TEXTS, TEXT_TURNS, TEXT_TOLERANCE = 1000, 4, 3e-5
TEXT_PEERS = {
    "float32": ["ours", "transformers", "onnxruntime gathered", "openvino gathered"],
    "bfloat16": ["ours gathered bfloat16", "openvino gathered bfloat16"],
    "int8": ["ours gathered int8", "onnxruntime gathered int8", "openvino gathered int8"],
}
BATCHES = (1, 4, 16)
"""Rows per batch of a peer. With more rows, most tokens would be padding."""

_peer: Any
"""The function that this worker process opened with `runtimes.open_peer` or `runtimes.open_texts`."""


def make_graphs(folder: Path) -> None:
    import runtimes

    runtimes.export(folder)


def make_int8_graphs(folder: Path) -> None:
    import runtimes

    runtimes.quantize(folder)


def open_peer(side: str, folder: Path) -> None:
    global _peer
    if side.startswith("ours"):
        memory.keep_freed(asynchronous=True)  # as `bert-jax predict` does
    import runtimes

    _peer = runtimes.open_peer(side, folder)


def open_texts(side: str, folder: Path) -> None:
    global _peer
    if side.startswith("ours"):
        memory.keep_freed(asynchronous=True)
    import runtimes

    _peer = runtimes.open_texts(side, folder)


def _peer_batch(rows: int, tokens: int, padding: int = 0) -> Any:
    import numpy as np

    ids = np.random.default_rng(0).integers(1000, 28000, (rows, tokens))
    mask = np.ones_like(ids)
    mask[-1, tokens - padding :] = 0
    return ids, mask, np.array([[tokens // 3, tokens // 2]] * rows)


def peer_logits(rows: int, tokens: int) -> Any:
    """Returns logits of the timed batch, and of a batch whose last row contains padding, which must have no effect."""
    import numpy as np

    return np.stack([_peer(*_peer_batch(rows, tokens, padding)) for padding in (0, tokens // 4)])


def time_peer(rows: int, tokens: int, seconds: float) -> list[float]:
    """Returns the seconds of each call. Makes at least one call and stops when the calls have taken `seconds`."""
    batch, times = _peer_batch(rows, tokens), []
    while not times or sum(times) < seconds:
        times.append(seconds_of(lambda: _peer(*batch)))
    return times


def time_texts(texts: list[str], size: int) -> tuple[float, Any]:
    answer = _peer(size)
    start = time.perf_counter()
    answers = answer(texts)
    return time.perf_counter() - start, answers


def _sides(known: dict[str, list[str]], dtypes: Sequence[str], console: Console) -> list[str]:
    """Returns our float32 side, with which all others are compared, followed by the sides with the given dtypes."""
    return installed(list(dict.fromkeys(["ours", *(side for dtype in dtypes for side in known[dtype])])), console)


def _tolerance(side: str, exact: float) -> float:
    return TOLERANCE.get(side, TOLERANCE.get(side.split(",")[0].split()[-1], exact))


def peers(folder: Path, console: Console, dtypes: Sequence[str]) -> dict[str, Any]:
    os.environ["KERAS_BACKEND"] = "jax"
    sides = _sides(PEERS, dtypes, console)
    table = ranking(f"peers: logits of two masks per row, ms ({folder.name})")
    results: dict[str, Any] = {}
    apart: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(in_process(open_peer, side, folder)) for side in sides}
        for name, shape in SHAPES.items():
            logits = {side: worker.submit(peer_logits, *shape).result() for side, worker in workers.items()}
            largest = abs(logits["ours"]).max()
            apart[name] = {side: float(abs(found - logits["ours"]).max() / largest) for side, found in logits.items()}
            times: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(-1, TURNS):
                for side, worker in workers.items():
                    seconds = worker.submit(time_peer, *shape, 0.5).result()
                    times[side] += seconds if turn >= 0 else []  # the first turn warms up
                    time.sleep(PAUSE)
            scaled = {side: [second * 1e3 for second in seconds] for side, seconds in times.items()}
            rank(table, name, scaled, min, {"gathered": TARGETS.get(f"peers {name}", NO_TARGET)})
            results[name] = times
    console.print(table)
    differences = [f"{name}: {side} by {found:.1e}" for name, sides_apart in apart.items()
                   for side, found in sides_apart.items() if not found <= _tolerance(side, 1e-5)]  # fmt: skip
    return {"seconds": results, "apart": apart, "difference": "; ".join(differences)}


def texts(folder: Path, console: Console, dtypes: Sequence[str]) -> dict[str, Any]:
    sentences = _sentences(folder)
    sides = _sides(TEXT_PEERS, dtypes, console)
    sizes = {side: (0,) if side.startswith("ours") else BATCHES for side in sides}  # our side forms batches itself
    trials: dict[str, dict[int, float]] = {side: {} for side in sides}
    answers: list[Any] = []
    apart: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(in_process(open_texts, side, folder)) for side in sides}
        for side, worker in workers.items():
            for size in sizes[side]:
                trials[side][size], found = worker.submit(time_texts, sentences, size).result()
                answers = answers or found
                apart[f"{side}, batches of {size}"] = max(map(_apart, answers, found))
        best = {side: min(found, key=found.__getitem__) for side, found in trials.items()}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(TEXT_TURNS):
            for side, worker in workers.items():
                times[side].append(worker.submit(time_texts, sentences, best[side]).result()[0])
                time.sleep(PAUSE)
    table = ranking(f"texts: {TEXTS:,} sentences, sentences per second ({folder.name})")
    names = {side: f"{side}, batches of {best[side]}" if best[side] else side for side in sides}
    rates = {names[side]: [TEXTS / second for second in seconds] for side, seconds in times.items()}
    rank(table, f"{TEXTS:,}", rates, max, {word: TARGETS[f"texts {word}"] for word in ("gathered", "transformers")})
    console.print(table)
    tried = [f"{side} {', '.join(f'{size}: {TEXTS / seconds:.1f}' for size, seconds in trials[side].items())}"
             for side in sides if not side.startswith("ours")]  # fmt: skip
    console.print(f"first run, by batch size: {'; '.join(tried)}", highlight=False)
    differences = [
        f"{name}, by {found:.1e}" for name, found in apart.items() if not found <= _tolerance(name, TEXT_TOLERANCE)
    ]
    return {
        "sentences": TEXTS, "trials": trials, "seconds": times, "rates": rates, "apart": apart,
        "difference": "; ".join(differences),
    }  # fmt: skip


def _sentences(folder: Path) -> list[str]:
    """Returns sentences of random words, each with one mask. Their lengths match those in movie reviews."""
    draw = random.Random(0)
    words = [
        word for word in (folder / "vocab.txt").read_text("utf-8").split("\n") if word.isascii() and word.isalpha()
    ]
    sentences = []
    for length in sentence_lengths(TEXTS):
        chosen = draw.choices(words, k=length - 3)  # in addition to [CLS], [MASK] and [SEP]
        chosen.insert(draw.randint(0, len(chosen)), "[MASK]")
        sentences.append(" ".join(chosen))
    draw.shuffle(sentences)
    return sentences


def _apart(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float:
    """Returns the largest score difference between two lists of the most likely tokens.

    A token that occurs only in `ours` is compared with the last score in `theirs`, because its score there cannot be
    higher.
    """
    scores = dict(theirs)
    return max(abs(score - scores.get(token, theirs[-1][1])) for token, score in ours)
