"""Code that all cases share: random models, worker processes, and measurements of time and memory."""

import contextlib
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_jax import hub

PAUSE = 0.3
"""Seconds to wait between turns, so that the threads of one side are idle before the other side starts."""
EMBEDDED = "bert-mini-cased"
SHAPES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
LENGTHS = [3, 8, 11, 14, 16, 18, 20, 21, 23, 25, 27, 29, 31, 33, 36, 38, 41, 46, 51, 61, 215]
"""Quantiles 0, 0.05, …, 1 of the number of tokens per sentence in movie reviews (Pang and Lee 2004)."""
FLAX_PYTHON = "BERT_JAX_FLAX_PYTHON"
"""The environment variable that contains the path of a Python interpreter with FlaxBert installed; see flax_peer.py."""


def make_model(folder: Path, shape: str) -> None:
    """Writes a model that has a published shape, seeded random weights and the embedded model's vocabulary."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(vocab_size=28996, **SHAPES[shape]))
    with torch.no_grad():  # otherwise, all words would be about equally likely
        model.cls.predictions.transform.LayerNorm.weight.fill_(8.0)
    model.save_pretrained(folder)
    for name in ["vocab.txt", "tokenizer_config.json"]:
        shutil.copyfile(hub.EMBEDDED / EMBEDDED / name, folder / name)


@contextlib.contextmanager
def in_process(initializer: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=initializer, initargs=arguments) as executor:
        yield executor


def run_process(command: Sequence[str], environment: dict[str, str]) -> tuple[float, int]:
    """Runs a command. Returns its run time in seconds and its peak memory in bytes."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')}")
    return seconds, peak_bytes(usage)


def installed(sides: list[str], console: Console) -> list[str]:
    """Returns the peers that are installed and prints those that are not."""
    modules = {"ours": "bert_jax", "kerashub": "keras_hub", "openvino gathered int8": "nncf"}
    there = []
    for side in sides:
        name = side.split()[0]
        if (
            FLAX_PYTHON in os.environ
            if name == "flaxbert"
            else importlib.util.find_spec(modules.get(side, modules.get(name, name)))
        ):
            there.append(side)
        else:
            console.print(f"left out, because it is not installed: {side}", highlight=False)
    return there


def sentence_lengths(count: int) -> list[int]:
    """Returns the lengths of `count` sentences, in ascending order, interpolated from `LENGTHS`."""
    found = []
    for n in range(count):
        place, part = divmod(n / count * (len(LENGTHS) - 1), 1)
        found.append(round(LENGTHS[int(place)] * (1 - part) + LENGTHS[int(place) + 1] * part))
    return found


def matrix_product_rate() -> float:
    """Returns the FLOP/s of a large float32 matrix product in XLA: the best of several runs."""
    import jax

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision="highest"))
    seconds = [seconds_of(lambda: product(x).block_until_ready()) for _ in range(6)]
    return 2 * 2048**3 / min(seconds)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
