"""Puts a server on this machine under load, and compares each of its answers with that of a pipeline.

    pip install -e ".[serve]"
    python scripts/load_test.py                     # about three minutes
    python scripts/load_test.py --seconds 600       # ten minutes of load, to see what memory does

    clients    errors, throughput and latency of 64 clients that send single sentences
    cost       the time that the server adds to a call: latency of a single client minus that of a pipeline's call
    overload   ten times as many clients as the queue has places: how many requests are refused, how long the others
               take, and how fast the server is afterwards
    memory     memory of the server when it is ready, and after the load of 64 clients

The model is bert-mini-cased by default. The exit status is 1 if an answer was wrong or missing, or had a status other
than 200 and 429.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import bert_jax

CLIENTS, CALLS, QUEUE = 64, 300, 64
WORDS = [
    "The [MASK] was closed when we arrived.", "She put the [MASK] on the table and left.", "It is a [MASK] film.",
    "He has lived in this [MASK] for twenty years, and knows everybody there.", "We had [MASK] for lunch today.",
    "The battery lasts two [MASK], which is more than the old one did.", "Nobody [MASK] what he meant.",
    "The food was [MASK] but the service was slow.", "They walked to the [MASK] in the rain.", "I [MASK] it.",
]  # fmt: skip
NAMES = ["Anna", "Peter", "Mary", "John", "Lucy", "Paul", "Emma", "Tom"]


@contextmanager
def served(model: str, **settings: Any) -> Iterator[tuple[int, int]]:
    """Starts a server in a process of its own. Once it is ready, yields its port and process id."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "serve.yaml"
        config.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "bert_jax.cli", "serve", model, str(config), "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                port = int(re.search(r":(\d+) answers", process.stderr.readline())[1])  # type: ignore[union-attr,index]
                while fetch(port, "health", none_on_error=True) is None:
                    time.sleep(0.2)
                yield port, process.pid
            finally:
                process.terminate()


def fetch(port: int, path: str, *, none_on_error: bool = False) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
            return answer.read().decode()
    except OSError:
        if none_on_error:
            return None
        raise


def memory(pid: int) -> int:
    """Bytes of physical memory that a process occupies."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


async def client(
    port: int, bodies: list[bytes], expected: list[Any], until: float, seed: int
) -> list[tuple[str, float]]:
    """Sends one request after another over one connection; returns the status (or "wrong") and the seconds of each."""
    draw, found = random.Random(seed), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        i = draw.randrange(len(bodies))
        began = time.perf_counter()
        writer.write(bodies[i])
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))  # type: ignore[index]
        seconds = time.perf_counter() - began
        status = head.split()[1]
        right = status != "200" or same(json.loads(body)["outputs"], expected[i])
        found.append((status if right else "wrong", seconds))
        if status == "429":
            await asyncio.sleep(0.2)
    writer.close()
    return found


def same(answer: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    return all(
        a["token"] == b["token"] and abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(answer, expected, strict=True)
    )


def load(port: int, clients: int, seconds: float, bodies: list[bytes], expected: list[Any]) -> list[tuple[str, float]]:
    async def all_of_them() -> list[Any]:
        until = time.perf_counter() + seconds
        return await asyncio.gather(*(client(port, bodies, expected, until, n) for n in range(clients)))

    return [entry for found in asyncio.run(all_of_them()) for entry in found]


def summary(found: list[tuple[str, float]], seconds: float) -> dict[str, Any]:
    times = sorted(s for status, s in found if status == "200")
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    return {"statuses": dict(Counter(status for status, _ in found)), "per second": len(times) / seconds,
            "p50": p50, "p99": p99, "p99 / p50": p99 / p50}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-mini-cased")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    texts = [f"{name}: {sentence}" if n % 2 else sentence for n, sentence in enumerate(WORDS) for name in NAMES]
    pipe = bert_jax.pipeline("fill-mask", arguments.model)
    expected = pipe(texts)
    bodies = []
    for text in texts:
        content = json.dumps({"inputs": text}).encode()
        head = ["POST /v1/fill-mask HTTP/1.1", "Host: x", "Content-Type: application/json"]
        bodies.append("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
    report: dict[str, Any] = {}
    with served(arguments.model) as (port, pid):
        fetch(port, "health")
        load(port, 4, 2.0, bodies, expected)
        before, programs = memory(pid), programs_of(port)
        alone = [s for _, s in load(port, 1, 5.0, bodies, expected)]
        times = []
        for n in range(CALLS):
            began = time.perf_counter()
            pipe(texts[n % len(texts)])
            times.append(time.perf_counter() - began)
        report["cost"] = statistics.median(alone) - statistics.median(times)
        report["batching"] = summary(load(port, CLIENTS, arguments.seconds, bodies, expected), arguments.seconds)
        report["memory"] = {"ready": before, "after": memory(pid)}
        report["programs"] = {"ready": programs, "after": programs_of(port)}
    with served(arguments.model, max_queue_tokens=16 * QUEUE) as (port, _):
        report["overload"] = summary(load(port, 10 * QUEUE, 20.0, bodies, expected), 20.0)
        report["after overload"] = summary(load(port, 1, 2.0, bodies, expected), 2.0)
    show(report, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    statuses = {status for case in report.values() if isinstance(case, dict) for status in case.get("statuses", ())}
    if wrong := statuses - {"200", "429"}:
        sys.exit(f"answers that are wrong: {', '.join(wrong)}")


def programs_of(port: int) -> float:
    return float(re.search(r"\nbert_jax_programs (\S+)", fetch(port, "metrics") or "")[1])  # type: ignore[index]


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("", "answered", "refused", "per second", "p50", "p99", "p99 / p50")
    for name in ("batching", "overload", "after overload"):
        case = report[name]
        counts = [f"{case['statuses'].get(status, 0):,}" for status in ("200", "429")]
        times = [f"{case[key] * 1e3:.1f} ms" for key in ("p50", "p99")]
        table.add_row(name, *counts, f"{case['per second']:.0f}", *times, f"{case['p99 / p50']:.1f}")
    console.print(table)
    ready, after = report["memory"]["ready"], report["memory"]["after"]
    programs = report["programs"]
    console.print(f"the server's own cost of a request: {report['cost'] * 1e3:.1f} ms")
    console.print(f"memory: {ready / 1e6:.0f} MB when ready, {after / 1e6:.0f} MB after ({after / ready - 1:+.1%})")
    console.print(f"programs: {programs['ready']:.0f} when ready, {programs['after']:.0f} after")


if __name__ == "__main__":
    main()
