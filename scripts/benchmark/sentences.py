"""The cases `scores` and `layers`: pseudo-log-likelihoods of many sentences, and their vectors from one layer."""

import random
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
from bert_jax.training import memory

SENTENCES, LENGTHS, TURNS = 1000, range(4, 19), 3
"""Number of sentences, their lengths in words (as in BLiMP), and number of turns per side."""
BATCHES = (16, 64, 256)
"""Batch sizes for the loop, which uses the fastest one."""
TOLERANCE = 1e-4
"""Tolerance of scores, in nats per word."""

_score: Callable[[list[str], int], list[float]]
"""Texts and batch size -> scores, in this worker process."""


def open_scorer(side: str, folder: Path) -> None:
    global _score
    if side == "ours":
        memory.keep_freed(asynchronous=True)  # as `bert-jax predict` does
        import bert_jax

        pipe = bert_jax.pipeline("pseudo-log-likelihood", folder)

        def ours(texts: list[str], size: int) -> list[float]:
            return [found["score"] for found in pipe(texts)]

        _score = ours
        return
    import torch
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def score(texts: list[str], size: int) -> list[float]:
        """Masks each token in turn. Batches contain the rows of all texts in order, padded to the longest row."""
        encoded = tokenizer(texts)["input_ids"]
        rows = [(n, place, ids) for n, ids in enumerate(encoded) for place in range(1, len(ids) - 1)]
        scores = [0.0] * len(texts)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            inputs = tokenizer.pad({"input_ids": [ids for _, _, ids in batch]}, return_tensors="pt")
            here, places = torch.arange(len(batch)), torch.tensor([place for _, place, _ in batch])
            tokens = inputs["input_ids"][here, places].clone()
            inputs["input_ids"][here, places] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(**inputs).logits[here, places]
            found = torch.log_softmax(logits, dim=-1)[here, tokens]
            for (n, _, _), log_p in zip(batch, found.tolist(), strict=True):
                scores[n] += log_p
        return scores

    _score = score


def timed(texts: list[str], size: int) -> tuple[float, list[float]]:
    start = time.perf_counter()
    scores = _score(texts, size)
    return time.perf_counter() - start, scores


def sentences(folder: Path, count: int) -> list[str]:
    draw = random.Random(0)
    words = [w for w in (folder / "vocab.txt").read_text("utf-8").split("\n") if w.isascii() and w.isalpha()]
    return [" ".join(draw.choices(words, k=draw.choice(LENGTHS))) + "." for _ in range(count)]


def scores(folder: Path, console: Console) -> dict[str, Any]:
    folder = hub.EMBEDDED / EMBEDDED
    texts = sentences(folder, SENTENCES)
    with in_process(open_scorer, "ours", folder) as ours, in_process(open_scorer, "theirs", folder) as theirs:
        _, found = ours.submit(timed, texts, 0).result()  # compiles
        theirs.submit(timed, texts[:50], BATCHES[0]).result()  # warms up
        trials = {size: theirs.submit(timed, texts[:200], size).result()[0] for size in BATCHES}
        best = min(trials, key=trials.__getitem__)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(TURNS):
            times["ours"].append(ours.submit(timed, texts, 0).result()[0])
            time.sleep(PAUSE)
            seconds, expected = theirs.submit(timed, texts, best).result()
            times["theirs"].append(seconds)
            time.sleep(PAUSE)
    table = comparison(f"scores: {SENTENCES:,} sentences, s ({folder.name}; theirs in batches of {best})")
    add_row(table, "", times, 1.0, TARGETS["scores"])
    console.print(table)
    apart = max(abs(a - b) / len(text.split()) for a, b, text in zip(found, expected, texts, strict=True))
    return {"seconds": times, "difference": f"scores by {apart:.1e} a word" if not apart <= TOLERANCE else None}


def time_layers(folder: Path, count: int) -> tuple[dict[str, list[float]], float]:
    """Returns the pipeline's seconds for the last and a middle layer, and the error of the middle layer's vectors."""
    import numpy as np

    import bert_jax

    memory.keep_freed(asynchronous=True)
    texts = sentences(folder, count)
    pipe = bert_jax.pipeline("feature-extraction", folder)
    middle = pipe.config.num_hidden_layers // 2
    calls = {"last layer": {}, "middle layer": {"layers": [middle]}}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, 2 * TURNS):
        for name, options in calls.items():
            seconds = seconds_of(lambda options=options: pipe(texts, pooling="mean", **options))
            times[name] += [seconds] if turn >= 0 else []  # the first turn compiles
    model = bert_jax.BertModel.from_pretrained(folder, add_pooling_layer=False)
    found = pipe(texts, layers=[middle])
    whole = [np.asarray(model(**pipe.tokenizer([text])).hidden_states[middle][0]) for text in texts]
    return times, max(float(abs(a[0] - b).max()) for a, b in zip(found, whole, strict=True))


def layers(folder: Path, console: Console) -> dict[str, Any]:
    folder = hub.EMBEDDED / EMBEDDED
    with in_process() as worker:
        times, apart = worker.submit(time_layers, folder, SENTENCES // 2).result()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = medians["middle layer"] / medians["last layer"]
    table = Table("", "last layer", "middle layer", "ratio", "must", title=f"layers: {SENTENCES // 2} sentences, s")
    table.add_row("mean of the tokens", *(f"{seconds:.2f}" for seconds in medians.values()), f"{ratio:.3f}", "1.1")
    console.print(table)
    return {"seconds": times, "difference": f"hidden states by {apart:.1e}" if not apart <= 1e-5 else None}
