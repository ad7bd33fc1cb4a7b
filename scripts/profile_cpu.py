"""Shows how long each kind of operation takes in a fill-mask call on a CPU, and the rate of matrix products.

    python scripts/profile_cpu.py                     # BERT-base's shape, random weights; under a minute

Each row contains one text or is packed, with two masks per text. XLA fuses the softmax into the matrix product that
follows it.

The time of an operation is the time from its start to its end, on all cores. Query, key and value are computed
simultaneously and share the cores, but the whole time is counted for each of them. Their rates therefore appear lower
than they are, and the times of all kinds add up to more than the time of a call. For comparison, the first row of the
table contains the rate of a large matrix product on the same machine.
"""

import argparse
import collections
import functools
import glob
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from benchmark.measuring import matrix_product_rate
from flax import nnx
from rich.console import Console
from rich.table import Table

import bert_jax
from bert_jax import tree
from bert_jax.training import memory

SHAPES = {"8 × 128": (8, 128, 1), "4 × 512": (4, 512, 1), "16 × 128, four texts a row": (16, 128, 4)}
KINDS = {
    "feed-forward": r"feed_forward/\.\.\.i,oi",
    "query, key, value, output": r"attention/\.\.\.i,oi",
    "scores": "bnth,bnsh->bnts",
    "softmax and context": "bnts,bnsh->bnth",
    "head": "predictions/.*->",
}
"""Kind of operation -> regular expression that matches a part of the names of such operations."""
CALLS = 5


def batch(rows: int, tokens: int, texts: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    inputs = {
        "input_ids": random.integers(1000, 28000, (rows, tokens)),
        "masked_positions": random.integers(0, tokens, (rows, 2 * texts)),
    }
    number, place = np.divmod(np.arange(tokens), tokens // texts)
    if texts > 1:
        inputs |= {"document_ids": np.tile(1 + number, (rows, 1)), "position_ids": np.tile(place, (rows, 1))}
    else:
        inputs["attention_mask"] = np.ones((rows, tokens))
    return {name: array.astype(np.int32) for name, array in inputs.items()}


def kinds(program: str) -> dict[str, str]:
    """Operation of a compiled program -> its kind, inferred from the operations fused into it; "" if unknown."""
    names: dict[str, str] = collections.defaultdict(str)  # computation or operation -> `op_name`s in it
    inside = ""
    calls: dict[str, str] = {}
    for line in program.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = begins[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            name = "".join(re.findall(r'op_name="([^"]*)"', line)) + " "
            names[operation[1]] += name
            names[inside] += name
            if called := re.search(r"calls=%?([\w.-]+)", line):
                calls[operation[1]] = called[1]
    return {
        operation: next(
            (kind for kind, pattern in KINDS.items() if re.search(pattern, name + names[calls.get(operation, "")])), ""
        )
        for operation, name in list(names.items())
    }


def flops(config: bert_jax.BertConfig, rows: int, tokens: int, texts: int) -> dict[str, int]:
    """Returns the number of floating-point operations of each kind.

    The last layer (except its keys and values) and the head are computed only at the masked positions.
    """
    size, inner = config.hidden_size, config.intermediate_size
    read = 2 * texts
    queries = (config.num_hidden_layers - 1) * tokens + read
    counts = {
        "feed-forward": queries * 2 * size * inner,
        "query, key, value, output": (2 * queries + 2 * config.num_hidden_layers * tokens) * size**2,
        "scores": queries * tokens * size,
        "softmax and context": queries * tokens * size,
        "head": read * (size**2 + size * config.vocab_size),
    }
    return {kind: 2 * rows * count for kind, count in counts.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    memory.keep_freed()
    config = bert_jax.BertConfig(vocab_size=28996)
    model = bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0))
    params, skeleton = tree.split(model)
    forward = jax.jit(lambda params, inputs: tree.merge(skeleton, params)(**inputs).logits)
    columns: list[tuple[float, dict[str, float], dict[str, int]]] = []
    for shape in SHAPES.values():
        inputs: Any = batch(*shape)
        compiled = forward.lower(params, inputs).compile()
        of = kinds(compiled.as_text())
        jax.block_until_ready(compiled(params, inputs))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                whole = statistics.median(seconds(functools.partial(compiled, params, inputs)))
            (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
            events = json.loads(gzip.decompress(Path(file).read_bytes()))["traceEvents"]
        spent: dict[str, list[float]] = collections.defaultdict(list)  # operation -> durations of its events
        for event in events:
            if "hlo_op" in event.get("args", {}):
                spent[event["args"]["hlo_op"]].append(event["dur"] / 1e6)
        by_kind: dict[str, float] = collections.Counter()
        for operation, times in spent.items():
            by_kind[of.get(operation, "")] += sum(times) / CALLS
        columns.append((whole, by_kind, flops(config, *shape)))
    table = Table("ms (GFLOP/s)", *SHAPES, title="a call of fill-mask", title_justify="left")
    table.add_row("a product of 2048 × 2048", *[f"({matrix_product_rate() / 1e9:.0f})"] * len(SHAPES))
    for kind in KINDS:
        table.add_row(
            kind, *(f"{spent[kind] * 1e3:.0f} ({count[kind] / spent[kind] / 1e9:.0f})" for _, spent, count in columns)
        )
    table.add_row("the rest", *(f"{spent[''] * 1e3:.0f}" for _, spent, _ in columns))
    table.add_row(
        "whole", *(f"{whole * 1e3:.0f} ({sum(count.values()) / whole / 1e9:.0f})" for whole, _, count in columns)
    )
    Console().print(table)


def seconds(call: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
