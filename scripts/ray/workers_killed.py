"""Makes predictions for 100,000 sentences on a Ray cluster of two workers, kills a worker twice, and counts the rows.

    pip install '.[ray,serve]' && python scripts/ray/workers_killed.py          # ten minutes on two cores

The script then compares the time for 20,000 sentences on a running cluster with that of `bert-jax predict` without Ray.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

SENTENCE = "the film was a long and quiet story of people who live by old towns"


def write(path: Path, count: int) -> None:
    draw = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            words = draw.choices(SENTENCE.split(), k=draw.randint(4, 24))
            words[draw.randrange(len(words))] = "[MASK]"
            file.write(json.dumps({"id": i, "text": " ".join(words)}) + "\n")


def predict(source: Path, output: Path, *options: str) -> float:
    command = [
        sys.executable, "-m", "bert_jax.cli", "predict", "bert-mini-cased", "--task", "fill-mask", "--input", source,
        "--output", output, "--parameter", "top_k=1", *options,
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def workers() -> list[int]:
    found = subprocess.run(["pgrep", "-f", "ray::MapWorker"], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in found.split()]


def kill_twice(output: Path, stop: threading.Event) -> None:
    """Kills one worker when the first files exist and another when more files exist."""
    for files in (4, 12):
        while not stop.is_set() and len(list(output.glob("*.jsonl"))) < files:
            time.sleep(0.5)
        for pid in workers()[:1]:
            print(f"{len(list(output.glob('*.jsonl')))} files are written; worker {pid} is killed", flush=True)
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--timed-rows", type=int, default=20_000)
    given = parser.parse_args()
    ray = ["--engine", "ray", "--address", "auto"]
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run(["ray", "start", "--head", "--num-cpus", "2"], check=True)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder / "many.jsonl", given.rows)
            stop = threading.Event()
            killer = threading.Thread(target=kill_twice, args=(folder / "many", stop))
            killer.start()
            seconds = predict(folder / "many.jsonl", folder / "many", *ray, "--workers", "2")
            stop.set()
            killer.join()
            lines = [line for path in (folder / "many").glob("*.jsonl") for line in path.read_text().splitlines()]
            times = Counter(json.loads(line)["id"] for line in lines)
            lost, twice = given.rows - len(times), sum(n > 1 for n in times.values())
            print(f"{given.rows:,} rows, {seconds:.0f} s: {lost} lost, {twice} written twice", flush=True)

            write(folder / "timed.jsonl", given.timed_rows)
            here = predict(folder / "timed.jsonl", folder / "here.jsonl")
            there = predict(folder / "timed.jsonl", folder / "there", *ray)
            print(f"{given.timed_rows:,} rows: predict {here:.1f} s, with Ray {there:.1f} s ({there / here:.2f})")
    finally:
        subprocess.run(["ray", "stop", "--force"], check=False)


if __name__ == "__main__":
    main()
