"""Puts a server on this machine under load and compares each of its responses with the result of a pipeline.

    pip install -e ".[serve]"
    python scripts/load_test.py                     # about four minutes
    python scripts/load_test.py --seconds 600       # ten minutes of load, to observe memory use
    python scripts/load_test.py --hostile           # with attackers; about three minutes longer

ready      the startup time if the programs are cached
batching   errors, throughput and latency with 64 clients that send single sentences
cost       the time that the server adds to a call: the latency of a single client minus the time of a pipeline call
overload   ten times as many clients as the queue has places: how many requests are refused and how soon, how long the
           others take, and how fast the server is afterward
SIGTERM    whether all requests that were accepted under load are answered
costly     16 connections send the most expensive requests possible. Meanwhile, one client sends one sentence per
           second, and another client polls /health.
broken     the same two clients, while other connections hang, send endless bodies, or send oversized headers
memory     the server's memory before and after the load, and its peak during each attack

By default, the model is the embedded model (`bert-mini-cased`). The exit status is 1 if an ordinary client gets a wrong
response or a status other than 200 or 429, if the server fails while under attack, or if it does not answer a request
that it has accepted.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import multiprocessing
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import bert_jax

CLIENTS, CALLS, QUEUE = 64, 300, 64
ATTACKERS, VARIATIONS, IDLE, SLOW = 16, 500, 5000, 200
WORDS = [
    "The [MASK] was closed when we arrived.", "She put the [MASK] on the table and left.", "It is a [MASK] film.",
    "He has lived in this [MASK] for twenty years, and knows everybody there.", "We had [MASK] for lunch today.",
    "The battery lasts two [MASK], which is more than the old one did.", "Nobody [MASK] what he meant.",
    "The food was [MASK] but the service was slow.", "They walked to the [MASK] in the rain.", "I [MASK] it.",
]  # fmt: skip
NAMES = ["Anna", "Peter", "Mary", "John", "Lucy", "Paul", "Emma", "Tom"]
KILLERS = [
    {"inputs": ["a [MASK] " * 800] * 128},
    {"inputs": "[MASK] " * 2800},
    {"inputs": "[MASK] " * 400, "joint": True, "top_k": 100},
    {"inputs": "a [MASK]", "targets": [f"word{n}" for n in range(90_000)]},
]


@dataclass
class Served:
    """A server in a separate process, its log so far, and the seconds until it was ready."""

    process: subprocess.Popen[Any]
    port: int
    log: Path
    seconds: float

    def get(self, path: str) -> str:
        """Returns the contents of a page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}") as answer:
            content: str = answer.read().decode()
            return content

    def memory(self, field: str = "VmRSS") -> int:
        """Returns the physical memory in bytes: the current use (`VmRSS`) or the peak since `forget_peak` (`VmHWM`)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def forget_peak(self) -> None:
        """Resets the peak memory."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def entries(self) -> list[dict[str, Any]]:
        """Returns the log entries of the server's requests."""
        return [entry for line in self.log.read_text().splitlines() if "status" in (entry := json.loads(line))]


@contextmanager
def served(model: str, **settings: Any) -> Iterator[Served]:
    """Starts a server and yields it when it is ready and has compiled all programs."""
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder) / "serve.yaml", Path(folder) / "log"
        config.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "bert_jax.cli", "serve", model, str(config), "--port", "0"]
        began = time.perf_counter()
        with log.open("w") as file, subprocess.Popen(command, stderr=file) as process:
            try:
                while not (found := re.search(r":(\d+) answers", log.read_text())):
                    time.sleep(0.02)
                    if process.poll() is not None:
                        sys.exit(log.read_text())
                server = Served(process, int(found[1]), log, 0.0)
                while "Ready" not in log.read_text():
                    time.sleep(0.02)
                server.seconds = time.perf_counter() - began
                while json.loads(server.get("health"))["programs_left"]:
                    time.sleep(0.2)
                yield server
            finally:
                process.terminate()


# ── Clients ──


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[str, bytes]:
    """Sends a request and returns the status and the body of the response."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    body = await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))  # type: ignore[index]
    return head.split()[1], body


async def client(
    port: int, bodies: list[bytes], expected: list[Any], until: float, seed: int, pause: float = 0.0
) -> list[tuple[str, float]]:
    """Sends requests one after another over one connection. Returns each request's status (or "wrong") and seconds."""
    draw, found = random.Random(seed), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        i = draw.randrange(len(bodies))
        began = time.perf_counter()
        try:
            status, body = await ask(reader, writer, bodies[i])
        except (OSError, asyncio.IncompleteReadError):
            if not pause:
                break  # the server was stopped
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        seconds = time.perf_counter() - began
        right = status != "200" or same(json.loads(body)["outputs"], expected[i])
        found.append((status if right else "wrong", seconds))
        if status == "429":
            await asyncio.sleep(1.0 + 0.5 * draw.random())  # as specified by Retry-After, but not all clients at once
        await asyncio.sleep(pause)
    writer.close()
    return found


def same(answer: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    return all(
        a["token"] == b["token"] and abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(answer, expected, strict=True)
    )


def load(
    port: int, clients: int, seconds: float, bodies: list[bytes], expected: list[Any], pause: float = 0.0
) -> list[tuple[str, float]]:
    async def all_of_them() -> list[Any]:
        until = time.perf_counter() + seconds
        return await asyncio.gather(*(client(port, bodies, expected, until, n, pause) for n in range(clients)))

    return [entry for found in asyncio.run(all_of_them()) for entry in found]


def health(port: int, seconds: float) -> list[float]:
    """Requests /health ten times per second. Returns the seconds of each request; infinity if there was no response."""
    found = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                answer.read()
            found.append(time.perf_counter() - began)
        except OSError:
            found.append(float("inf"))
        time.sleep(0.1)
    return found


def request(path: str, content: Any) -> bytes:
    body = json.dumps(content).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


# ── Attackers ──


def variation(draw: random.Random) -> bytes:
    """Returns a costly request within the size limits: many masks, texts, targets, beams or predictions."""
    size = int(10 ** draw.uniform(0, 4))
    kind = draw.randrange(7)
    if kind == 0:
        return request("/v1/fill-mask", {"inputs": ["a [MASK] " * min(size, 800)] * draw.randint(1, 128)})
    if kind == 1:
        return request("/v1/fill-mask", {"inputs": "[MASK] " * min(size, 2800), "top_k": draw.randint(1, 1000)})
    if kind == 2:
        masks = "[MASK] " * draw.randint(1, 500)
        return request("/v1/fill-mask", {"inputs": masks, "joint": True, "top_k": draw.randint(1, 200)})
    if kind == 3:
        targets = [draw.choice(NAMES) * draw.randint(1, 3) + str(n) for n in range(size * 5)]
        return request("/v1/fill-mask", {"inputs": "a [MASK] " * draw.randint(1, 20), "targets": targets})
    if kind == 4:
        pairs = [["she went " * draw.randint(1, 2000), "home " * draw.randint(1, 100)]] * draw.randint(1, 200)
        return request("/v1/next-sentence-prediction", {"inputs": pairs})
    if kind == 5:
        return request("/tokenize", {"inputs": ["x" * draw.randint(1, 20_000)] * draw.randint(1, 60)})
    return request("/score", {"inputs": {"input_string": ["a [MASK]"] * min(size, 2048)}, "parameters": {"top_k": 50}})


async def attack(port: int, requests: list[bytes]) -> list[str]:
    """Sends requests over one connection, or over a new one if the server closes it. Returns the statuses."""
    statuses = []
    for content in requests:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        try:
            statuses.append((await ask(reader, writer, content))[0])
        except (OSError, asyncio.IncompleteReadError):
            statuses.append("closed")
        writer.close()
    return statuses


async def hang(port: int, until: float) -> None:
    """Holds connections that send nothing, and others that send one byte of a request or of its body per second."""
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    writers = []
    for n in range(IDLE + SLOW):
        with contextlib.suppress(OSError):
            writers.append((await asyncio.open_connection("127.0.0.1", port))[1])
            if n >= IDLE:
                writers[-1].write(head + (b"\r\n" if n % 2 else b""))
    while time.perf_counter() < until:
        for writer in writers[-SLOW:]:
            with contextlib.suppress(OSError):
                writer.write(b"a")
        await asyncio.sleep(1)


async def flood(port: int, until: float) -> None:
    """Sends endless chunks, and headers of one megabyte."""
    endless = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    endless += b"Transfer-Encoding: chunked\r\n\r\n"
    while time.perf_counter() < until:
        for content in (
            endless + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 64,
            b"GET / HTTP/1.1\r\nA: " + b"x" * 2**20,
        ):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(content)
                await asyncio.wait_for(writer.drain(), 2)
                writer.close()
        await asyncio.sleep(0.2)


def costly(port: int) -> dict[str, int]:
    """Sends requests that are as costly as possible. Returns the number of requests by status."""
    draw = random.Random(0)
    requests = [request("/v1/fill-mask", killer) for killer in KILLERS]
    requests += [variation(draw) for _ in range(VARIATIONS)]
    draw.shuffle(requests)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(attack(port, requests[n::ATTACKERS]) for n in range(ATTACKERS)))

    return dict(Counter(status for statuses in asyncio.run(all_of_them()) for status in statuses))


def broken(port: int) -> dict[str, int]:
    """Holds hanging connections and floods others for 30 seconds."""

    async def all_of_them() -> None:
        until = time.perf_counter() + 30
        await asyncio.gather(hang(port, until), flood(port, until))

    asyncio.run(all_of_them())
    return {}


def hostile(
    server: Served, attackers: Callable[[int], dict[str, int]], bodies: list[bytes], expected: list[Any]
) -> dict[str, Any]:
    """Measures the requests of an ordinary client (one per second) and of a /health client during an attack."""
    server.forget_peak()
    before = server.memory()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        attacking = pool.apply_async(attackers, (server.port,))
        found, times = [], []
        while not attacking.ready():
            asking = pool.apply_async(health, (server.port, 5.0))
            found += load(server.port, 1, 5.0, bodies, expected, pause=1.0)
            times += asking.get()
        statuses = attacking.get()
    errors = [entry for entry in server.entries() if entry["status"] >= 500 and entry["status"] not in (503, 504)]
    return {
        "attackers": statuses, "statuses": dict(Counter(status for status, _ in found)),
        "p50": quantile([s for _, s in found], 0.5), "p99": quantile([s for _, s in found], 0.99),
        "health p99": quantile(times, 0.99), "ready": before, "peak": server.memory("VmHWM"), "faults": len(errors),
        "tracebacks": server.log.read_text().count("Traceback"),
    }  # fmt: skip


def terminated(server: Served, bodies: list[bytes], expected: list[Any]) -> dict[str, Any]:
    """Stops the server under load. It must answer all requests that it has accepted."""
    before = sum(entry["status"] == 200 for entry in server.entries())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        loading = pool.apply_async(load, (server.port, CLIENTS, 10.0, bodies, expected))
        time.sleep(4)
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
        answered = sum(status == "200" for status, _ in loading.get())
    accepted = sum(entry["status"] == 200 for entry in server.entries()) - before
    return {"exit": status, "accepted": accepted, "answered": answered}


# ── The report ──


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[int(len(times) * q)]


def summary(found: list[tuple[str, float]], seconds: float) -> dict[str, Any]:
    times = [s for status, s in found if status == "200"]
    p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
    return {"statuses": dict(Counter(status for status, _ in found)), "per second": len(times) / seconds,
            "p50": p50, "p99": p99, "p99 / p50": p99 / p50}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-mini-cased")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the load")
    parser.add_argument("--hostile", action="store_true", help="also test with attackers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    texts = [f"{name}: {sentence}" if n % 2 else sentence for n, sentence in enumerate(WORDS) for name in NAMES]
    pipe = bert_jax.pipeline("fill-mask", arguments.model, dtype=arguments.dtype)
    expected = pipe(texts)
    bodies = [request("/v1/fill-mask", {"inputs": text}) for text in texts]
    report: dict[str, Any] = {}
    serve = functools.partial(served, arguments.model, dtype=arguments.dtype)
    with serve():
        pass  # caches the programs
    with serve() as server:
        report["ready"] = server.seconds
        load(server.port, 4, 2.0, bodies, expected)
        before, programs = server.memory(), programs_of(server)
        alone = [s for _, s in load(server.port, 1, 5.0, bodies, expected)]
        times = []
        for n in range(CALLS):
            began = time.perf_counter()
            pipe(texts[n % len(texts)])
            times.append(time.perf_counter() - began)
        report["cost"] = statistics.median(alone) - statistics.median(times)
        report["batching"] = summary(load(server.port, CLIENTS, arguments.seconds, bodies, expected), arguments.seconds)
        report["memory"] = {"ready": before, "after": server.memory()}
        report["programs"] = {"ready": programs, "after": programs_of(server)}
        if arguments.hostile:
            for attackers in (costly, broken):
                report[attackers.__name__] = hostile(server, attackers, bodies, expected)
        report["SIGTERM"] = terminated(server, bodies, expected)
    with serve(max_queue_tokens=16 * QUEUE) as server:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            asking = pool.apply_async(health, (server.port, 20.0))
            report["overload"] = summary(load(server.port, 10 * QUEUE, 20.0, bodies, expected), 20.0)
            report["overload"]["health p99"] = quantile(asking.get(), 0.99)
        refused = [entry["seconds"] for entry in server.entries() if entry["status"] == 429]
        report["overload"]["refused within"] = quantile(refused, 0.99)
        report["after overload"] = summary(load(server.port, 1, 2.0, bodies, expected), 2.0)
    show(report, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    statuses = {status for case in report.values() if isinstance(case, dict) for status in case.get("statuses", ())}
    problems = sorted(statuses - {"200", "429"})
    problems += [
        key for case in ("costly", "broken") for key in ("faults", "tracebacks") if report.get(case, {}).get(key)
    ]
    problems += ["SIGTERM"] * (report["SIGTERM"]["accepted"] != report["SIGTERM"]["answered"])
    if problems:
        sys.exit(f"answers that are wrong or missing: {', '.join(problems)}")


def programs_of(server: Served) -> float:
    return float(re.search(r"\nbert_jax_programs (\S+)", server.get("metrics"))[1])  # type: ignore[index]


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("", "answered", "refused", "per second", "p50", "p99", "p99 / p50")
    for name in ("batching", "overload", "after overload"):
        case = report[name]
        counts = [f"{case['statuses'].get(status, 0):,}" for status in ("200", "429")]
        times = [f"{case[key] * 1e3:.1f} ms" for key in ("p50", "p99")]
        table.add_row(name, *counts, f"{case['per second']:.0f}", *times, f"{case['p99 / p50']:.1f}")
    console.print(table)
    ready, after = report["memory"]["ready"], report["memory"]["after"]
    programs, overload = report["programs"], report["overload"]
    console.print(f"ready with cached programs: {report['ready']:.1f} s")
    console.print(f"the server's own cost of a request: {report['cost'] * 1e3:.1f} ms")
    console.print(f"memory: {ready / 1e6:.0f} MB when ready, {after / 1e6:.0f} MB after ({after / ready - 1:+.1%})")
    console.print(f"programs: {programs['ready']:.0f} when ready, {programs['after']:.0f} after")
    console.print(
        f"overload: 99% refused within {overload['refused within'] * 1e3:.0f} ms of the server's own time; "
        f"/health p99 {overload['health p99'] * 1e3:.0f} ms"
    )
    console.print(f"SIGTERM under load: {report['SIGTERM']}")
    for name in {"costly", "broken"} & report.keys():
        case = report[name]
        console.print(
            f"{name}: attackers got {case['attackers']}; a client got {case['statuses']}, p50 {case['p50']:.2f} s, p99 "
            f"{case['p99']:.2f} s; /health p99 {case['health p99'] * 1e3:.0f} ms; memory {case['ready'] / 1e6:.0f} MB, "
            f"at most {case['peak'] / 1e6:.0f} MB; {case['faults']} faults, {case['tracebacks']} tracebacks"
        )


if __name__ == "__main__":
    main()
