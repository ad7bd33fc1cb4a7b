"""Measures the memory use of `bert-jax finetune` on CPU or compares its speed with that of another checkout.

    python scripts/finetune_memory.py CONFIG [KEY=VALUE …]
    python scripts/finetune_memory.py CONFIG [KEY=VALUE …] --beside CHECKOUT --pairs 15 --steps 2

The first form runs `bert-jax finetune` as a whole process, with evaluations and checkpoints. It prints the process's
peak memory, the estimate from `--dry-run`, and their ratio. For a short run, set training.max_steps and
training.evaluate_every.

The second form starts one process for this checkout and one for the other. Each process prepares the data and the model
and compiles the step. The processes then take turns, each computing a few steps per turn. The script prints the ratio
of this checkout's speed to the other's, as the median over all turns.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parents[1]


def run(checkout: Path, arguments: list[str], output: str) -> tuple[str, int]:
    """Runs `bert-jax finetune`. Returns its output and its peak memory in bytes."""
    command = [sys.executable, "-c", "from bert_jax.cli import main; main()", "finetune", *arguments]
    with tempfile.TemporaryFile("w+") as file:
        child = subprocess.Popen(command, env=environment(checkout), stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        printed = file.read()
    if child.returncode:
        sys.exit(f"{output} failed:\n{printed}")
    return printed, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000",
        "BERT_JAX_COMPILATION_CACHE": os.environ.get("BERT_JAX_COMPILATION_CACHE", "off"),
    }  # fmt: skip


def memory(checkout: Path, arguments: list[str]) -> None:
    said, _ = run(checkout, [*arguments, "--dry-run"], "the dry run")
    with tempfile.TemporaryDirectory() as folder:
        _, peak = run(checkout, [*arguments, f"output.folder={folder}/run"], "the run")
    text = said[said.index("memory of") :]
    figures = [float(number.replace(",", "")) for number in re.findall(r"([\d,]+) MB", text)]
    # Older checkouts print the memory for the state and the additional memory for the step, but not the sum.
    figure = figures[0] if "peak" in text else sum(figures[:2])
    print(text.strip())
    print(f"peak of the run: {peak / 1e6:,.0f} MB, {peak / 1e6 / figure:.3f} of the dry run's {figure:,.0f} MB")


def serve(arguments: list[str]) -> None:
    """Runs in a separate process. For each number n on stdin, computes n training steps.

    Prints "ready" and then, for each number, the seconds for its steps, the loss of the last step, and the peak memory.
    """
    from bert_jax.training import memory

    memory.keep_freed()
    import jax

    from bert_jax import sharding
    from bert_jax.recipes import preparation, runs
    from bert_jax.settings import Settings
    from bert_jax.training.step import init_state

    settings = Settings.from_file(arguments[0], arguments[1:])
    prepared = preparation.prepare(settings)
    steps = runs.steps_of(settings, prepared.examples["train"])
    run = runs.set_up(settings, prepared.task, prepared.model, prepared.examples["train"], steps)
    state = sharding.put(init_state(run.plan, settings.training.seed), run.layout)
    frozen = sharding.put(run.plan.frozen, sharding.placements(run.mesh, run.plan.frozen))
    batches = run.loader.batches(0, 100_000)
    step = run.step
    if hasattr(memory, "release"):  # compiles as `loop.fit` does; older checkouts cannot
        step = run.trace(run.loader.place(0).shape).lower().compile()
        memory.release()
    print("ready", flush=True)
    for line in sys.stdin:
        start, waiting = time.perf_counter(), []
        for _ in range(int(line)):
            with jax.set_mesh(run.mesh):
                state, metrics = step(state, frozen, sharding.put_batch(next(batches), run.mesh))
            waiting.append(metrics)
            if len(waiting) > 1:  # one step stays in flight, as in the training loop
                float(waiting.pop(0)["loss"])
        loss = float(waiting.pop()["loss"])
        print(json.dumps([time.perf_counter() - start, loss, peak()]), flush=True)


def peak() -> float:
    """Peak memory of this process, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(pipe: IO[str] | None) -> str:
    assert pipe is not None
    if not (line := pipe.readline()):
        sys.exit("A process ended early; its message is above.")
    return line


def speed(checkouts: list[Path], arguments: list[str], pairs: int, steps: int) -> None:
    children = []
    for checkout in checkouts:
        command = [sys.executable, __file__, *arguments, "--serve"]
        children.append(
            subprocess.Popen(
                command, env=environment(checkout), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        answer(children[-1].stdout)
    ratios = []
    for turn in range(-5, pairs):  # five warm-up turns, in which heaps reach their final size
        order = [0, 1] if turn % 2 else [1, 0]
        seconds, losses, peaks = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        for n in order:
            pipe = children[n].stdin
            assert pipe is not None
            pipe.write(f"{steps}\n")
            pipe.flush()
            seconds[n], losses[n], peaks[n] = json.loads(answer(children[n].stdout))
        if turn >= 0:
            ratios.append(seconds[1] / seconds[0])
        shown = f"{seconds[0] / steps:.2f} s and {seconds[1] / steps:.2f} s a step, {seconds[1] / seconds[0]:.3f}"
        print(f"turn {turn + 1}: {shown}; loss {losses[0]:.4f} and {losses[1]:.4f}; "
              f"{peaks[0] / 1e6:,.0f} and {peaks[1] / 1e6:,.0f} MB", flush=True)  # fmt: skip
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"speed over that of {checkouts[1]}: median {statistics.median(ratios):.3f}, quartiles {low:.3f} and "
          f"{high:.3f}, of {pairs} pairs of {steps} steps; load {os.getloadavg()[0]:.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="CONFIG [KEY=VALUE …]")
    parser.add_argument("--checkout", type=Path, default=HERE, help="checkout to measure; default: this one")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, to compare the speed")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="number of steps per turn")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.settings)
    elif given.beside:
        speed([given.checkout.resolve(), given.beside.resolve()], given.settings, given.pairs, given.steps)
    else:
        memory(given.checkout.resolve(), given.settings)


if __name__ == "__main__":
    main()
