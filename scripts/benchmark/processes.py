"""The cases `process`, `load` and `memory`: the command line as a process, loading of weights, and memory use."""

import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from fill_mask_calls import SENTENCES
from measuring import in_process, peak_bytes, run_process, seconds_of
from rich.console import Console
from rich.table import Table
from tables import TARGETS, add_row, comparison

RUNS, LOADS = 5, 3
"""Number of processes per side in the case `process`, and in total in the case `load`."""


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
                took, peak = run_process(command, os.environ | {"BERT_JAX_COMPILATION_CACHE": cache})
                if run >= 0:  # the first run fills the caches
                    seconds[side].append(took)
                    peaks[side].append(peak)
    table = comparison(f"process: {' '.join(commands['ours'][-4:-2])} ({folder.name})")
    add_row(table, "seconds", seconds, 1.0, TARGETS["process"])
    add_row(table, "peak memory, MB", peaks, 1e-6)
    console.print(table)
    return {"seconds": seconds, "peak_bytes": peaks}


def load_once(folder: Path) -> dict[str, float]:
    """Returns the seconds for loading a checkpoint and the increase in the process's peak memory in bytes."""
    import jax

    import bert_jax
    from bert_jax import tree

    jax.block_until_ready(jax.device_put(1.0))
    load = bert_jax.BertForPreTraining.from_pretrained
    before = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    seconds = seconds_of(lambda: jax.block_until_ready(tree.split(load(folder))[0]))
    return {"seconds": seconds, "bytes": peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before}


def load(folder: Path, console: Console) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    runs = []
    for _ in range(LOADS):
        with in_process() as worker:  # a new process each time
            runs.append(worker.submit(load_once, folder).result())
    seconds, height = (statistics.median(run[name] for run in runs) for name in ("seconds", "bytes"))
    table = Table("", "seconds", "file, MB", "memory, MB", "memory / file", "must", "aim",
                  title="load: medians", title_justify="left")  # fmt: skip
    table.add_row(folder.name, f"{seconds:.2f}", f"{size / 1e6:.0f}", f"{height / 1e6:.0f}", f"{height / size:.3f}",
                  *TARGETS["load"])  # fmt: skip
    console.print(table)
    return {"file_bytes": size, "runs": runs}


def memory_of(folder: Path, dtype: str) -> dict[str, int]:
    """Bytes that a fill-mask pipeline and its first result add to the memory of a process that has imported JAX."""
    import jax

    import bert_jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.ones(3)))
    before = _proportional()
    fill_mask: Any = bert_jax.pipeline("fill-mask", folder, dtype=dtype)  # type: ignore[call-overload]
    fill_mask(SENTENCES[1])
    return {"before": before, "pipeline": _proportional() - before,
            "peak": peak_bytes(resource.getrusage(resource.RUSAGE_SELF))}  # fmt: skip


def _proportional() -> int:
    """The memory of this process in bytes, including its share of shared pages (Linux's proportional set size)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


def memory(folder: Path, console: Console) -> dict[str, Any]:
    found = {}
    table = Table("", "process before, MB", "pipeline, MB", "of float32", "must", "peak of the process, MB",
                  title="memory: a fill-mask pipeline and its first answer", title_justify="left")  # fmt: skip
    for dtype, must in (("float32", ""), ("bfloat16", "0.6"), ("int8", "0.4")):
        with in_process() as worker:
            found[dtype] = worker.submit(memory_of, folder, dtype).result()
        before, pipeline, peak = (found[dtype][name] for name in ("before", "pipeline", "peak"))
        share = pipeline / found["float32"]["pipeline"]
        table.add_row(dtype, f"{before / 1e6:.0f}", f"{pipeline / 1e6:.0f}", f"{share:.2f}", must, f"{peak / 1e6:.0f}")
    console.print(table)
    return {"bytes": found}
