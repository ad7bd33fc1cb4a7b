"""Measures the embeddings per second of `bert-jax serve` and of sentence-transformers behind a dynamic batcher.

    pip install -e ".[serve,parity]"
    python scripts/embedding_load.py FOLDER         # a sentence-transformers model, such as all-MiniLM-L6-v2

16 clients send 1,000 sentences from this repository's documentation, one sentence per request, to the `/v1/embeddings`
route of one server and then of the other. This is repeated several times. Both servers use all cores. After the first
request, the batcher for sentence-transformers waits as long as our server does. It collects up to 64 sentences and pads
them to the longest one. The exit status is 1 if the embeddings differ.
"""

import argparse
import asyncio
import base64
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from load_test import ask, request, served

ROUNDS, CLIENTS, SENTENCES, WAIT, LARGEST = 5, 16, 1000, 0.0005, 64


def theirs(folder: str, port: int) -> None:
    """Serves sentence-transformers."""
    import uvicorn
    from fastapi import FastAPI, Request
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    queue: asyncio.Queue[tuple[str, asyncio.Future[Any]]] = asyncio.Queue()
    app = FastAPI()

    async def batcher() -> None:
        while True:
            batch = [await queue.get()]
            await asyncio.sleep(WAIT)
            while not queue.empty() and len(batch) < LARGEST:
                batch.append(queue.get_nowait())
            vectors = await asyncio.to_thread(model.encode, [text for text, _ in batch], batch_size=LARGEST)
            for (_, answer), vector in zip(batch, vectors, strict=True):
                answer.set_result(vector)

    tasks: list[asyncio.Task[None]] = []

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(batcher()))
        answer = asyncio.get_running_loop().create_future()
        await queue.put(((await request.json())["input"], answer))
        return {"data": [{"embedding": base64.b64encode(await answer).decode()}]}

    uvicorn.run(app, port=port, log_level="error")


async def load(port: int, requests: list[bytes]) -> tuple[float, list[np.ndarray]]:
    """Sends all requests. Returns the seconds that they took, and the embeddings."""
    found: list[Any] = [None] * len(requests)
    numbers = iter(range(len(requests)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for i in numbers:
            _, body = await ask(reader, writer, requests[i])
            found[i] = np.frombuffer(base64.b64decode(json.loads(body)["data"][0]["embedding"]), "<f4")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--serve-theirs", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_theirs:
        theirs(arguments.folder, arguments.serve_theirs)
        return
    root = Path(__file__).parents[1]
    pages = [path.read_text() for path in sorted([root / "README.md", root / "CHANGELOG.md", *root.glob("docs/*.md")])]
    sentences = [part for page in pages for part in re.split(r"(?<=[.:])\s", page) if 4 < len(part.split()) < 60]
    texts = (sentences * (SENTENCES // len(sentences) + 1))[:SENTENCES]
    requests = [
        request("/v1/embeddings", {"model": arguments.folder, "input": text, "encoding_format": "base64"})
        for text in texts
    ]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, __file__, arguments.folder, "--serve-theirs", str(port)]
    with subprocess.Popen(command) as peer, served(arguments.folder, truncate=True, wait=WAIT) as server:
        try:
            while True:
                try:
                    asyncio.run(load(port, requests[:64]))
                    break
                except OSError:
                    time.sleep(0.5)
            asyncio.run(load(server.port, requests[:64]))
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(ROUNDS):
                took, ours_found = asyncio.run(load(server.port, requests))
                seconds["ours"].append(took)
                took, theirs_found = asyncio.run(load(port, requests))
                seconds["theirs"].append(took)
        finally:
            peer.terminate()
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours_found, theirs_found, strict=True))
    rates = {side: SENTENCES / statistics.median(times) for side, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    print(f"embeddings per second: ours {rates['ours']:.0f}, sentence-transformers {rates['theirs']:.0f}")
    print(f"times as many: {statistics.median(ratios):.2f} (of {ROUNDS} rounds {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"largest difference of a number: {difference:.1e}")
    if difference > 1e-5:
        sys.exit("the embeddings differ")


if __name__ == "__main__":
    main()
