"""Measures `bert_jax`, `transformers` in PyTorch and other runtimes on the same tasks, on this machine's CPU.

    pip install -e ".[parity]"
    python scripts/benchmark                      # the first five cases; four minutes and 3 GB of temporary disk space
    python scripts/benchmark peers texts --json times.json --chart times.png
    python scripts/benchmark peers texts --dtype bfloat16 int8
    python scripts/benchmark warm --model ~/bert-base-cased

    warm     calls of a warm fill-mask pipeline with one short sentence, alternating between our pipeline and that
             of `transformers`
    python   the time spent in Python in such a call of our pipeline: the call minus the compiled program
    process  `bert-jax fill-mask` as a whole process with warm caches, and a script with the `transformers` pipeline
    load     peak memory while weights are loaded, relative to the size of the weights file
    memory   memory of a fill-mask pipeline in each dtype, after its first result
    step     a fine-tuning step with dropout, alternating between ours and PyTorch's, and the rate of our step relative
             to that of a large matrix product
    keras    the same step, ours and KerasHub's (requires the `bench` extra, and keras-hub==0.32.0 with --no-deps)
    peers    logits of two masks per row, ours and those of other runtimes (same requirements as keras; for FlaxBert,
             see flax_peer.py)
    texts    1,000 sentences through our pipeline, the `transformers` pipeline and other runtimes; all except ours take
             the sentences in order, pad each batch to its longest sentence, and use their best batch size (half an
             hour together with peers)
    scores   pseudo-log-likelihoods of 1,000 sentences, with our pipeline and with a batch loop in `transformers`
    layers   vectors of 500 sentences from a middle layer and from the last layer, both with our pipeline
    pretrain a pretraining step of the embedded model on 64 rows of 64 tokens, alternating between ours and PyTorch's
    packing  tokens per second (excluding padding) in training and in prediction: rows padded to 128 tokens, rows padded
             by length, and packed rows
    finetune `bert-jax finetune` as a whole process, one epoch, and `transformers.Trainer` (requires --finetune)

The weights are random and have the published shapes: BERT-large for load, BERT-base for most other cases. They are
written to a temporary folder; nothing is downloaded. Sides never share a process, because their thread pools would
interfere with each other. The exit status is 1 if the outputs of two sides differ, but not if a figure misses its
target (the "must" and "aim" columns).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from fill_mask_calls import python, warm
from measuring import FLAX_PYTHON, in_process, make_model
from packing import packing
from peers import make_graphs, make_int8_graphs, peers, texts
from processes import load, memory, process
from rich.console import Console
from sentences import layers, scores
from tables import chart
from training_steps import keras, pretrain, step
from whole_runs import ARRANGEMENTS, finetune

from bert_jax import hub

# This process imports neither JAX nor PyTorch. A child's peak memory includes its parent's (Linux's vfork), so the
# parent of a measured process must be small.

CASES = {"warm": warm, "python": python, "process": process, "load": load, "memory": memory, "step": step,
         "keras": keras, "pretrain": pretrain, "packing": packing, "scores": scores, "layers": layers, "peers": peers,
         "texts": texts}  # fmt: skip
DEFAULT = ("warm", "python", "process", "load", "step")
PACKAGES = ["bert-jax", "jax", "jaxlib", "flax", "torch", "transformers", "onnx", "onnxruntime", "openvino", "keras",
            "keras-hub", "nncf"]  # fmt: skip


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
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}, finetune; {', '.join(DEFAULT)} by default"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="weights to use instead of random weights")
    parser.add_argument("--finetune", nargs="+", metavar=("YAML", "KEY=VALUE"), help="settings for the finetune case")
    parser.add_argument("--against", nargs="+", choices=ARRANGEMENTS, default=["grouped", "padded"],
                        help="how Trainer pads: to the longest example of a batch, with examples grouped by length or "
                        "in random order (dynamic), or to data.max_length; default: grouped and padded")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "int8"], default=["float32"],
                        help="dtypes for peers and texts, next to ours in float32; bfloat16 also for step")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to a file")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw a chart of the cases peers and texts")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - {*CASES, "finetune"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(CASES)}, finetune")
    if arguments.model and not (arguments.model / hub.CONFIG_FILE).is_file():
        parser.error(f"{arguments.model} has no {hub.CONFIG_FILE}")
    cases = arguments.cases or [name for name in CASES if name in DEFAULT]
    if "finetune" in cases and not arguments.finetune:
        parser.error("finetune needs --finetune YAML [KEY=VALUE …] with local files as data")
    if "step" in cases and "int8" in arguments.dtype:
        parser.error("a training step has no dtype int8; expected float32 or bfloat16")
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = _machine()
    console.print(f"{report['cpu']}, {report['cores']} cores, load {report['load_average'][0]:.1f}", highlight=False)
    console.print(", ".join(f"{name} {version}" for name, version in report["versions"].items()), highlight=False)
    report["cases"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in cases:
            if name == "finetune":
                report["cases"][name] = finetune(arguments.finetune, arguments.against, console)
                continue
            shape = "large" if name == "load" else "base"
            folder = Path(temporary) / (arguments.model.absolute().name if arguments.model else f"bert-{shape}")
            if not folder.exists() and arguments.model:
                folder.mkdir()  # contains links, because graphs are written next to the weights
                for file in arguments.model.absolute().iterdir():
                    (folder / file.name).symlink_to(file)
            elif not folder.exists():
                with in_process() as worker:
                    worker.submit(make_model, folder, shape).result()
            if name in ("peers", "texts") and not (folder / "gathered.onnx").exists():
                with in_process() as worker:
                    worker.submit(make_graphs, folder).result()
            if name in ("peers", "texts") and "int8" in arguments.dtype:
                with in_process() as worker:
                    worker.submit(make_int8_graphs, folder).result()
            options = [arguments.dtype] if name in ("peers", "texts", "step") else []
            report["cases"][name] = CASES[name](folder, console, *options)
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
