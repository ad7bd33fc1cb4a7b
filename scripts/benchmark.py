"""Measures bert_jax on this machine's CPU, beside PyTorch transformers where that has the like.

    pip install -e ".[parity]"
    python scripts/benchmark.py                      # all cases, about four minutes and 3 GB of temporary disk
    python scripts/benchmark.py peers texts --json times.json --chart times.png
    python scripts/benchmark.py warm --model ~/bert-base-cased

    warm     one short sentence through a warm fill-mask pipeline, ours and transformers' in turns
    python   Python's share of such a call: the call, less the compiled program alone
    process  `bert-jax fill-mask` as a whole process with warm caches, and a script with transformers' pipeline
    load     memory that loading weights takes at its height, by the size of their file
    step     a step of fine-tuning, dropout on, ours and PyTorch's in turns; its share of the matrix-product rate
    keras    the same step, ours and KerasHub's (extra `bench`, and keras-hub==0.32.0 with --no-deps)
    peers    logits of two masks a row, of ours and of other runtimes (the same, and scripts/flax_peer.py)
    texts    1,000 sentences through pipelines: ours, transformers', and the runtimes fed in order, padded per batch,
             each at its best batch size (both in half an hour)
    pretrain a step of pretraining the embedded model's shape, 64 × 64, ours and PyTorch's in turns
    packing  tokens that count per second, training and prediction, of rows padded to 128, by length, and packed
    finetune `bert-jax finetune` as a whole process, one epoch, and transformers' Trainer (needs --finetune)

The first five are run unless cases are named.

The weights are random, of the published shapes (base; large for load), made in a temporary folder: nothing comes from
the Hub. The two sides never share a process, for their thread pools get in each other's way. Exit status 1 says that
their outputs differ; a figure that misses its target (columns must and aim) does not change it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bert_jax import hub
from bert_jax.training import memory

# This process imports neither jax nor torch. A child's peak memory counts from its parent's on (Linux's vfork), and
# so the parent of what is measured has to be small.

SENTENCES = [
    "The weather is [MASK] today.",
    "Paris is the [MASK] of France.",
    "She went to the [MASK] yesterday, and came back late.",
    "The committee will publish its final [MASK] on the state of the railways next week.",
    "In the long run he will be remembered for many things, of which this [MASK] is only the last one.",
]
TOLERANCE = 1e-5
"""Of a score, absolute."""
TURNS, CALLS, PAUSE = 6, 8, 0.3
"""Of warm: turns of each side, calls a turn, and seconds between turns, in which idle threads go to sleep."""
PAIRS = 100
"""Of python: calls, each with a run of the program alone beside it."""
RUNS, LOADS = 5, 3
"""Processes of each side."""
SHAPES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
EMBEDDED = "bert-mini-cased"
STEPS = {"8 × 128": (8, 128), "4 × 384": (4, 384)}
"""Rows and tokens of a training step."""
STEP_TURNS, STEP_CALLS = 4, 3
PRETRAINING = (64, 64)
PEER_SHAPES = {"1 × 16": (1, 16), "1 × 128": (1, 128), "8 × 128": (8, 128), "4 × 512": (4, 512)}
PEERS = ["transformers all", "flaxbert all", "kerashub head", "onnxruntime all", "onnxruntime gathered", "openvino all",
         "openvino gathered"]  # fmt: skip
"""Of peers.py, which says what the second word means."""
PEER_TOLERANCE = {"kerashub head": 1e-3}
"""Of logits, by the largest of them; 1e-5 of the others."""
PEER_TURNS = 6
LENGTHS = [3, 8, 11, 14, 16, 18, 20, 21, 23, 25, 27, 29, 31, 33, 36, 38, 41, 46, 51, 61, 215]
"""Tokens of a sentence of movie reviews (Pang and Lee 2004), every twentieth of them."""
TEXTS, TEXT_TURNS, TEXT_TOLERANCE = 1000, 4, 3e-5
TEXT_PEERS = ["transformers", "onnxruntime gathered", "openvino gathered"]
BATCHES = (1, 4, 16)
"""Rows that a peer may be fed at once; of more, most tokens are padding."""
PACKED, PACKING_TURNS = 256, 3


class Target(NamedTuple):
    """What a figure is held against."""

    must: str
    aim: str


TARGETS = {
    "warm": Target("0.7", "0.5"),
    "python": Target("2 ms", "1 ms"),
    "process": Target("0.7", "0.5"),
    "load": Target("1.3", "1.15"),
    "step 8 × 128": Target("0.8", "0.6"),
    "step 4 × 384": Target("0.95", "0.7"),
    "rate": Target("≥ 50 %", "≥ 60 %"),
    "step python": Target("5 ms", "2 ms"),
    "peers 1 × 16": Target("1.4", "1.1"),
    "peers 8 × 128": Target("1.15", "1.0"),
    "peers 4 × 512": Target("1.15", "1.0"),
    "texts gathered": Target("≥ 1.3", "≥ 1.6"),
    "texts transformers": Target("≥ 2.5", "≥ 4"),
    "pretrain": Target("0.7", "0.5"),
    "packing": Target("≥ 1.7", "≥ 3"),
    "finetune padded": Target("0.3", ""),
    "finetune grouped": Target("0.8", "0.5"),
    "finetune dynamic": Target("0.8", "0.5"),
}
NO_TARGET = Target("", "")
PACKAGES = ["bert-jax", "jax", "jaxlib", "flax", "torch", "transformers", "onnx", "onnxruntime", "openvino", "keras",
            "keras-hub"]  # fmt: skip
FLAX_PYTHON = "BERT_JAX_FLAX_PYTHON"
"""Variable that names the Python of FlaxBert's environment, see flax_peer.py."""


# ── In processes of their own ────────────────────────────────────────────────────────────────────────────────────────

_fill_mask: Callable[[str], list[dict[str, Any]]]
"""A worker's pipeline."""


def make_model(folder: Path, shape: str) -> None:
    """Seeded random weights of a published shape, with the embedded model's vocabulary."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(vocab_size=28996, **SHAPES[shape]))
    with torch.no_grad():  # as drawn, all words are equally likely: no scores to compare
        model.cls.predictions.transform.LayerNorm.weight.fill_(8.0)
    model.save_pretrained(folder)
    for name in ["vocab.txt", "tokenizer_config.json"]:
        shutil.copyfile(hub.EMBEDDED / EMBEDDED / name, folder / name)


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
    return [_seconds(lambda: _fill_mask(text)) for _ in range(calls)]


def time_call_and_program(folder: Path, text: str) -> dict[str, list[float]]:
    """Seconds of our calls, and of the compiled program on the inputs that such a call gives it."""
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
            "call": _seconds(lambda: fill_mask(text)),
            "program": _seconds(lambda: jax.block_until_ready(program(*arguments))),
        }
        for name in times if n >= 5 else ():
            times[name].append(pair[name])
    return times


def load_once(folder: Path) -> dict[str, float]:
    """Seconds of loading a checkpoint, and bytes by which it raised the process's peak of memory."""
    import jax

    import bert_jax
    from bert_jax import tree

    jax.block_until_ready(jax.device_put(1.0))
    load = bert_jax.BertForPreTraining.from_pretrained
    before = _peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    seconds = _seconds(lambda: jax.block_until_ready(tree.split(load(folder))[0]))
    return {"seconds": seconds, "bytes": _peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before}


_train_step: Callable[[int, int], tuple[float, float, float]]
"""A worker's step: rows, tokens -> seconds, what of these calling takes, and the loss."""


def open_training(side: str, folder: Path, dropout: bool) -> None:
    global _train_step
    if side.startswith("ours"):
        memory.keep_freed()  # as `bert-jax finetune` does
    import steps

    _train_step = steps.SIDES[side](folder, dropout)


def train_steps(rows: int, tokens: int, calls: int) -> list[tuple[float, float, float]]:
    return [_train_step(rows, tokens) for _ in range(calls)]


_epochs: dict[str, Callable[[], tuple[int, float]]]
"""A worker's passes over the same examples: what is done with them -> tokens and seconds."""


def open_packing(folder: Path, lengths: list[int]) -> None:
    global _epochs
    memory.keep_freed()
    import steps

    _epochs = steps.arrangements(folder, lengths)


def time_epoch(name: str) -> tuple[int, float]:
    return _epochs[name]()


_peer: Any
"""A worker's `peers.Forward`, or its answers by batch size."""


def make_graphs(folder: Path) -> None:
    import peers

    peers.export(folder)


def open_peer(side: str, folder: Path) -> None:
    global _peer
    if side == "ours":
        memory.keep_freed(asynchronous=True)  # as `bert-jax predict` does
    import peers

    _peer = peers.open_peer(side, folder)


def open_texts(side: str, folder: Path) -> None:
    global _peer
    if side == "ours":
        memory.keep_freed(asynchronous=True)
    import peers

    _peer = peers.open_texts(side, folder)


def _peer_batch(rows: int, tokens: int, padding: int = 0) -> Any:
    import numpy as np

    ids = np.random.default_rng(0).integers(1000, 28000, (rows, tokens))
    mask = np.ones_like(ids)
    mask[-1, tokens - padding :] = 0
    return ids, mask, np.array([[tokens // 3, tokens // 2]] * rows)


def peer_logits(rows: int, tokens: int) -> Any:
    """Of the batch that is timed, and of one with padding, which must not count."""
    import numpy as np

    return np.stack([_peer(*_peer_batch(rows, tokens, padding)) for padding in (0, tokens // 4)])


def time_peer(rows: int, tokens: int, seconds: float) -> list[float]:
    """Calls for so long, and one at least."""
    batch, times = _peer_batch(rows, tokens), []
    while not times or sum(times) < seconds:
        times.append(_seconds(lambda: _peer(*batch)))
    return times


def time_texts(texts: list[str], size: int) -> tuple[float, Any]:
    answer = _peer(size)
    start = time.perf_counter()
    answers = answer(texts)
    return time.perf_counter() - start, answers


def matrix_product_rate() -> float:
    """Floating-point operations a second of a large float32 product through XLA: the best of several."""
    import jax

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision="highest"))
    seconds = [_seconds(lambda: product(x).block_until_ready()) for _ in range(6)]
    return 2 * 2048**3 / min(seconds)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ── Cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Each takes a folder, prints its table, and returns what goes to the JSON file.


def warm(folder: Path, console: Console) -> dict[str, Any]:
    table = _comparison(f"warm: one sentence, ms ({folder.name})")
    sentences = []
    with _worker(open_pipeline, "ours", folder) as ours, _worker(open_pipeline, "theirs", folder) as theirs:
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
            _add(table, f"{len(text.split())} words", times, 1e3)
    every = {side: [second for entry in sentences for second in entry["seconds"][side]] for side in sides}
    _add(table, "all", every, 1e3, TARGETS["warm"])
    console.print(table)
    return {"sentences": sentences}


def python(folder: Path, console: Console) -> dict[str, Any]:
    table = Table("", "call", "program alone", "Python", "share", "must", "aim",
                  title="python: medians, ms", title_justify="left")  # fmt: skip
    results = {}
    for model in [folder, hub.EMBEDDED / EMBEDDED]:
        with _worker() as worker:
            times = worker.submit(time_call_and_program, model, SENTENCES[1]).result()
        call, program = statistics.median(times["call"]), statistics.median(times["program"])
        # Pair by pair: should the machine turn slower midway, the two medians may fall on either side of that.
        share = statistics.median(a - b for a, b in zip(times["call"], times["program"], strict=True))
        table.add_row(model.name, f"{call * 1e3:.2f}", f"{program * 1e3:.2f}", f"{share * 1e3:.2f}",
                      f"{share / call:.1%}", *TARGETS["python"])  # fmt: skip
        results[model.name] = {"seconds": times}
    console.print(table)
    return results


def process(folder: Path, console: Console) -> dict[str, Any]:
    script = Path(sys.executable).with_name("bert-jax")
    ours = [str(script)] if script.exists() else [sys.executable, "-m", "bert_jax.cli"]
    theirs = f"import transformers\nprint(transformers.pipeline('fill-mask', model={str(folder)!r}, device='cpu')"
    commands = {
        "ours": [*ours, "fill-mask", SENTENCES[1], "--model", str(folder)],
        "theirs": [sys.executable, "-c", f"{theirs}({SENTENCES[1]!r}))"],
    }
    seconds: dict[str, list[float]] = {side: [] for side in commands}
    peaks: dict[str, list[float]] = {side: [] for side in commands}
    with tempfile.TemporaryDirectory() as cache:
        for run in range(-1, RUNS):
            for side, command in commands.items():
                took, peak = _run(command, os.environ | {"BERT_JAX_COMPILATION_CACHE": cache})
                if run >= 0:  # the first run fills the caches
                    seconds[side].append(took)
                    peaks[side].append(peak)
    table = _comparison(f"process: {' '.join(commands['ours'][-4:-2])} ({folder.name})")
    _add(table, "seconds", seconds, 1.0, TARGETS["process"])
    _add(table, "peak memory, MB", peaks, 1e-6)
    console.print(table)
    return {"seconds": seconds, "peak_bytes": peaks}


def load(folder: Path, console: Console) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    runs = []
    for _ in range(LOADS):
        with _worker() as worker:  # a fresh one each time
            runs.append(worker.submit(load_once, folder).result())
    seconds, height = (statistics.median(run[name] for run in runs) for name in ("seconds", "bytes"))
    table = Table("", "seconds", "file, MB", "memory, MB", "memory / file", "must", "aim",
                  title="load: medians", title_justify="left")  # fmt: skip
    table.add_row(folder.name, f"{seconds:.2f}", f"{size / 1e6:.0f}", f"{height / 1e6:.0f}", f"{height / size:.3f}",
                  *TARGETS["load"])  # fmt: skip
    console.print(table)
    return {"file_bytes": size, "runs": runs}


def step(folder: Path, console: Console) -> dict[str, Any]:
    results = _steps("theirs", folder, console)
    with (
        _worker(open_training, "ours", folder, False) as ours,
        _worker(open_training, "theirs", folder, False) as theirs,
    ):
        losses = [[loss for _, _, loss in worker.submit(train_steps, 2, 64, 3).result()] for worker in (ours, theirs)]
    apart = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    return results | {"difference": f"losses without dropout by {apart:.1e}" if not apart <= 1e-4 else None}


def keras(folder: Path, console: Console) -> dict[str, Any]:
    os.environ["KERAS_BACKEND"] = "jax"
    return _steps("keras", folder, console)


def _steps(peer: str, folder: Path, console: Console) -> dict[str, Any]:
    table = _comparison(f"{'keras' if peer == 'keras' else 'step'}: fine-tuning, ms ({folder.name})")
    shares = Table("", "operations", "rate", "product alone", "share", "must", "aim", "Python", "must", "aim",
                   title="step: the device's and Python's share, best of ours", title_justify="left")  # fmt: skip
    results: dict[str, Any] = {}
    with _worker(open_training, "ours", folder, True) as ours, _worker(open_training, peer, folder, True) as theirs:
        sides = {"ours": ours, "theirs": theirs}
        for name, (rows, tokens) in STEPS.items():
            runs: dict[str, list[Any]] = {side: [] for side in sides}
            rates = []
            for turn in range(-1, STEP_TURNS):
                for side, worker in sides.items():
                    done = worker.submit(train_steps, rows, tokens, STEP_CALLS).result()
                    runs[side] += done if turn >= 0 else []  # the first turn compiles
                    time.sleep(PAUSE)
                rates.append(ours.submit(matrix_product_rate).result())
            times = {side: [seconds for seconds, _, _ in runs[side]] for side in sides}
            _add(table, name, times, 1e3, TARGETS[f"step {name}"] if peer == "theirs" else NO_TARGET)
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
    """Masked tokens alone, for the peer has no head for both; without dropout the losses are the same."""
    rows, tokens = PRETRAINING
    runs: dict[str, list[Any]] = {"ours": [], "theirs": []}
    losses = {}
    with contextlib.ExitStack() as stack:
        sides = {
            side: stack.enter_context(_worker(open_training, f"{side} pretraining", folder, True)) for side in runs
        }
        for turn in range(-1, STEP_TURNS):
            for side, worker in sides.items():
                done = worker.submit(train_steps, rows, tokens, STEP_CALLS).result()
                runs[side] += done if turn >= 0 else []
                time.sleep(PAUSE)
    for side in runs:
        with _worker(open_training, f"{side} pretraining", folder, False) as worker:
            losses[side] = [loss for *_, loss in worker.submit(train_steps, 8, tokens, 3).result()]
    table = _comparison("pretrain: a step of the embedded model's shape, masked tokens alone, ms")
    times = {side: [seconds for seconds, _, _ in done] for side, done in runs.items()}
    _add(table, f"{rows} × {tokens}", times, 1e3, TARGETS["pretrain"])
    console.print(table)
    apart = max(abs(a - b) / abs(b) for a, b in zip(*losses.values(), strict=True))
    return {"runs": runs, "difference": f"losses without dropout by {apart:.1e}" if not apart <= 1e-4 else None}


def packing(folder: Path, console: Console) -> dict[str, Any]:
    """The same sentences in three arrangements; that their numbers are the same is what tests show."""
    lengths = [min(length, 128) for length in _sentence_lengths(PACKED)]
    names = [f"{what}, {how}" for what in ("training", "prediction") for how in ("padded", "by length", "packed")]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with _worker(open_packing, folder, lengths) as worker:
        for turn in range(-1, PACKING_TURNS):
            for name in names:
                tokens, seconds = worker.submit(time_epoch, name).result()
                if turn >= 0:
                    rates[name].append(tokens / seconds)
    table = Table("", "best", "median", "packed is faster by", "must", "aim",
                  title=f"packing: tokens / s of {PACKED} sentences, {sum(lengths):,} tokens ({folder.name})",
                  title_justify="left")  # fmt: skip
    for name, values in rates.items():
        ratio = statistics.median(rates[f"{name.partition(',')[0]}, packed"]) / statistics.median(values)
        target = TARGETS["packing"] if name.endswith("padded") else NO_TARGET
        table.add_row(name, f"{max(values):.0f}", f"{statistics.median(values):.0f}", f"{ratio:.2f}", *target)
    console.print(table)
    return {"rates": rates}


def finetune(folder: Path, console: Console) -> dict[str, Any]:
    """Whole processes of a YAML file of settings, in turns, one run each."""
    script = Path(sys.executable).with_name("bert-jax")
    peer = [sys.executable, str(Path(__file__).with_name("transformers_trainer.py"))]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        commands = {name: [str(script), "finetune"] for name in ("ours", "ours again")}
        commands |= {name: [*peer, "--accuracy", *ARRANGEMENTS[name]] for name in AGAINST}
        for name, command in commands.items():
            output = f"output.folder={temporary}/{name.replace(' ', '_')}"
            command = [*command, *FINETUNE, "training.epochs=1", output]
            results[name], _ = _run(command, os.environ | {"BERT_JAX_COMPILATION_CACHE": f"{temporary}/cache"})
            console.print(f"finetune, {name}: {results[name]:.0f} s", highlight=False)
    table = Table("", "ours", "with a warm cache", "theirs", "ratio", "warm", "must", "aim",
                  title=f"finetune: one epoch of {FINETUNE[0]}, whole process, s", title_justify="left")  # fmt: skip
    for name in AGAINST:
        seconds = [results[key] for key in ("ours", "ours again", name)]
        table.add_row(f"Trainer, {name}", *(f"{value:.0f}" for value in seconds), f"{seconds[0] / seconds[2]:.2f}",
                      f"{seconds[1] / seconds[2]:.2f}", *TARGETS[f"finetune {name}"])  # fmt: skip
    console.print(table)
    return results


def peers(folder: Path, console: Console) -> dict[str, Any]:
    os.environ["KERAS_BACKEND"] = "jax"
    sides = ["ours", *_those_there(PEERS, console)]
    table = _ranking(f"peers: logits of two masks a row, ms ({folder.name})")
    results: dict[str, Any] = {}
    apart: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(_worker(open_peer, side, folder)) for side in sides}
        for name, shape in PEER_SHAPES.items():
            logits = {side: worker.submit(peer_logits, *shape).result() for side, worker in workers.items()}
            largest = abs(logits["ours"]).max()
            apart[name] = {side: float(abs(found - logits["ours"]).max() / largest) for side, found in logits.items()}
            times: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(-1, PEER_TURNS):
                for side, worker in workers.items():
                    seconds = worker.submit(time_peer, *shape, 0.5).result()
                    times[side] += seconds if turn >= 0 else []  # the first turn warms up
                    time.sleep(PAUSE)
            scaled = {side: [second * 1e3 for second in seconds] for side, seconds in times.items()}
            _rank(table, name, scaled, min, {"gathered": TARGETS.get(f"peers {name}", NO_TARGET)})
            results[name] = times
    console.print(table)
    differences = [f"{name}: {side} by {found:.1e}" for name, sides_apart in apart.items()
                   for side, found in sides_apart.items() if not found <= PEER_TOLERANCE.get(side, 1e-5)]  # fmt: skip
    return {"seconds": results, "apart": apart, "difference": "; ".join(differences)}


def texts(folder: Path, console: Console) -> dict[str, Any]:
    sentences = _sentences(folder)
    sides = ["ours", *_those_there(TEXT_PEERS, console)]
    sizes = dict.fromkeys(sides, BATCHES) | {"ours": (0,)}  # ours makes its batches itself
    trials: dict[str, dict[int, float]] = {side: {} for side in sides}
    answers: list[Any] = []
    apart: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(_worker(open_texts, side, folder)) for side in sides}
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
    table = _ranking(f"texts: {TEXTS:,} sentences, how many a second ({folder.name})")
    names = {side: f"{side}, batches of {best[side]}" if best[side] else side for side in sides}
    rates = {names[side]: [TEXTS / second for second in seconds] for side, seconds in times.items()}
    _rank(table, f"{TEXTS:,}", rates, max, {word: TARGETS[f"texts {word}"] for word in ("gathered", "transformers")})
    console.print(table)
    tried = [f"{side} {', '.join(f'{size}: {TEXTS / seconds:.1f}' for size, seconds in trials[side].items())}"
             for side in sides[1:]]  # fmt: skip
    console.print(f"a first time, by batch size: {'; '.join(tried)}", highlight=False)
    differences = [f"{name}, by {found:.1e}" for name, found in apart.items() if not found <= TEXT_TOLERANCE]
    return {"trials": trials, "seconds": times, "apart": apart, "difference": "; ".join(differences)}


def _sentences(folder: Path) -> list[str]:
    """Words at random with one mask each, as long as sentences of movie reviews are."""
    draw = random.Random(0)
    words = [
        word for word in (folder / "vocab.txt").read_text("utf-8").split("\n") if word.isascii() and word.isalpha()
    ]
    sentences = []
    for length in _sentence_lengths(TEXTS):
        chosen = draw.choices(words, k=length - 3)  # beside [CLS], [MASK] and [SEP]
        chosen.insert(draw.randint(0, len(chosen)), "[MASK]")
        sentences.append(" ".join(chosen))
    draw.shuffle(sentences)
    return sentences


def _sentence_lengths(count: int) -> list[int]:
    """Tokens of so many sentences, as `LENGTHS` has them."""
    found = []
    for n in range(count):
        place, part = divmod(n / count * (len(LENGTHS) - 1), 1)
        found.append(round(LENGTHS[int(place)] * (1 - part) + LENGTHS[int(place) + 1] * part))
    return found


def _apart(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float:
    """How far two lists of likeliest tokens differ in score; one that the other lacks is at most its last."""
    scores = dict(theirs)
    return max(abs(score - scores.get(token, theirs[-1][1])) for token, score in ours)


def _those_there(sides: list[str], console: Console) -> list[str]:
    """Of the peers those that are installed; says which are not."""
    modules = {"kerashub": "keras_hub"}
    there = []
    for side in sides:
        name = side.split()[0]
        if FLAX_PYTHON in os.environ if name == "flaxbert" else importlib.util.find_spec(modules.get(name, name)):
            there.append(side)
        else:
            console.print(f"left out, for it is not installed: {side}", highlight=False)
    return there


CASES = {"warm": warm, "python": python, "process": process, "load": load, "step": step, "keras": keras,
         "pretrain": pretrain, "packing": packing, "peers": peers, "texts": texts, "finetune": finetune}  # fmt: skip
DEFAULT = ("warm", "python", "process", "load", "step")
FINETUNE: list[str] = []
"""A YAML file and its overrides, from the command line; `AGAINST` likewise."""
AGAINST: list[str] = []
ARRANGEMENTS = {"grouped": [], "dynamic": ["--random"], "padded": ["--pad"]}


@contextlib.contextmanager
def _worker(initializer: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=initializer, initargs=arguments) as executor:
        yield executor


def _run(command: Sequence[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak bytes of a whole process."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')}")
    return seconds, _peak_bytes(usage)


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    """What differs between two fillings of a mask; None if nothing does."""
    tokens = [[entry["token"] for entry in side] for side in (ours, theirs)]
    if tokens[0] != tokens[1]:
        return f"tokens {tokens[0]} and {tokens[1]}"
    apart = max(abs(a["score"] - b["score"]) for a, b in zip(ours, theirs, strict=True))
    return f"scores by {apart:.1e}" if not apart <= TOLERANCE else None


def _comparison(title: str) -> Table:
    columns = [f"{side} {what}" for side in ("ours", "theirs") for what in ("best", "median", "10–90 %")]
    return Table("", *columns, "ratio", "must", "aim", title=title, title_justify="left")


def _add(table: Table, name: str, values: dict[str, list[float]], unit: float, target: Target = NO_TARGET) -> None:
    """A row of `_comparison`; the ratio is of the medians."""
    cells = [cell for side in ("ours", "theirs") for cell in _cells([value * unit for value in values[side]], min)]
    ratio = statistics.median(values["ours"]) / statistics.median(values["theirs"])
    table.add_row(name, *cells, f"{ratio:.3f}", *target)


def _ranking(title: str) -> Table:
    return Table("", "", "best", "median", "10–90 %", "ours / theirs", "must", "aim", title=title, title_justify="left")


def _rank(
    table: Table, name: str, values: dict[str, list[float]], best: Callable[..., Any], targets: dict[str, Target]
) -> None:
    """Rows of `_ranking`; a target stands beside the best of the sides that have its word in their names."""
    medians = {side: statistics.median(found) for side, found in values.items()}
    beside = {best((side for side in values if word in side), key=medians.get, default=""): target
              for word, target in targets.items()}  # fmt: skip
    for side, found in values.items():
        ratio = "" if side == "ours" else f"{medians['ours'] / medians[side]:.2f}"
        table.add_row(name, side, *_cells(found, best), ratio, *beside.get(side, NO_TARGET))
        name = ""
    table.add_section()


def _cells(values: list[float], best: Callable[..., float]) -> list[str]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [_digits(best(values)), _digits(statistics.median(values)), f"{_digits(deciles[0])}–{_digits(deciles[-1])}"]


def chart(cases: dict[str, Any]) -> Any:
    """Medians of the cases peers and texts with their deciles, a panel a shape."""
    from matplotlib.figure import Figure

    panels = {f"{name}, ms": {side: [second * 1e3 for second in seconds] for side, seconds in times.items()}
              for name, times in cases.get("peers", {}).get("seconds", {}).items()}  # fmt: skip
    if found := cases.get("texts"):
        panels[f"{TEXTS:,} sentences, how many a second"] = {
            side: [TEXTS / second for second in seconds] for side, seconds in found["seconds"].items()
        }
    figure = Figure(figsize=(10, 2.6 * -(-len(panels) // 2)), layout="constrained")
    for n, (title, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, n)
        medians = [statistics.median(found) for found in values.values()]
        deciles = [statistics.quantiles(found, n=10, method="inclusive") for found in values.values()]
        around = [[median - low for median, (low, *_) in zip(medians, deciles, strict=True)],
                  [high - median for median, (*_, high) in zip(medians, deciles, strict=True)]]  # fmt: skip
        colors = ["C0" if side == "ours" else "0.6" if "gathered" in side else "0.8" for side in values]
        bars = axes.barh(list(values), medians, xerr=around, color=colors, ecolor="0.3")
        axes.bar_label(bars, [_digits(median) for median in medians], padding=3)
        axes.margins(x=0.15)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    report = {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if FLAX_PYTHON in os.environ:
        there = Path(os.environ[FLAX_PYTHON]).absolute().parents[1].glob("lib/python*/site-packages")
        report["flaxbert versions"] = _versions(path=[str(folder) for folder in there])
    return report


def _versions(**where: Any) -> dict[str, str]:
    found = {distribution.name.lower(): distribution.version for distribution in metadata.distributions(**where)}
    return {name: found[name] for name in PACKAGES if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all by default")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="weights to take instead of random ones")
    parser.add_argument("--finetune", nargs="+", metavar=("YAML", "KEY=VALUE"), help="settings for the case finetune")
    parser.add_argument("--against", nargs="+", choices=ARRANGEMENTS, default=["grouped", "padded"],
                        help="how Trainer pads: to a batch's longest, of examples grouped by length or in random order "
                        "(dynamic), or to data.max_length; grouped and padded by default")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every time that was measured")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draws the cases peers and texts")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(CASES)}")
    if arguments.model and not (arguments.model / hub.CONFIG_FILE).is_file():
        parser.error(f"{arguments.model} holds no {hub.CONFIG_FILE}")
    FINETUNE[:], AGAINST[:] = arguments.finetune or [], arguments.against
    cases = arguments.cases or [name for name in CASES if name in DEFAULT]
    if "finetune" in cases and not FINETUNE:
        parser.error("finetune needs --finetune YAML [KEY=VALUE …] with local files as data")
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = _machine()
    console.print(f"{report['cpu']}, {report['cores']} cores, load {report['load_average'][0]:.1f}", highlight=False)
    console.print(", ".join(f"{name} {version}" for name, version in report["versions"].items()), highlight=False)
    report["cases"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in cases:
            shape = "large" if name == "load" else "base"
            folder = Path(temporary) / (arguments.model.absolute().name if arguments.model else f"bert-{shape}")
            if not folder.exists() and arguments.model:
                folder.mkdir()  # of links, for the graphs come beside the weights
                for file in arguments.model.absolute().iterdir():
                    (folder / file.name).symlink_to(file)
            elif not folder.exists():
                with _worker() as worker:
                    worker.submit(make_model, folder, shape).result()
            if name in ("peers", "texts") and not (folder / "gathered.onnx").exists():
                with _worker() as worker:
                    worker.submit(make_graphs, folder).result()
            report["cases"][name] = CASES[name](folder, console)
    report["load_average_after"] = os.getloadavg()
    if arguments.chart:
        chart(report["cases"]).savefig(arguments.chart, dpi=150)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    compared = [*report["cases"].get("warm", {}).get("sentences", ()), *report["cases"].values()]
    if differences := [entry["difference"] for entry in compared if entry.get("difference")]:
        sys.exit("\n".join(f"differs: {difference}" for difference in differences))


if __name__ == "__main__":
    main()
