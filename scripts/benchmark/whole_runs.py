"""The case `finetune`: a whole `bert-jax finetune` process, and `transformers.Trainer` with the same settings."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import run_process
from rich.console import Console
from rich.table import Table
from tables import TARGETS

ARRANGEMENTS = {"grouped": [], "dynamic": ["--random"], "padded": ["--pad"]}
"""How Trainer forms batches -> options of transformers_trainer.py."""


def finetune(settings: Sequence[str], against: Sequence[str], console: Console) -> dict[str, Any]:
    """Runs `bert-jax finetune` with a cold and a warm program cache, then `Trainer` once per arrangement."""
    script = Path(sys.executable).with_name("bert-jax")
    peer = [sys.executable, str(Path(__file__).parents[1] / "transformers_trainer.py")]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        commands = {name: [str(script), "finetune"] for name in ("ours", "ours again")}
        commands |= {name: [*peer, "--accuracy", *ARRANGEMENTS[name]] for name in against}
        for name, command in commands.items():
            output = f"output.folder={temporary}/{name.replace(' ', '_')}"
            command = [*command, *settings, "training.epochs=1", output]
            results[name], _ = run_process(command, os.environ | {"BERT_JAX_COMPILATION_CACHE": f"{temporary}/cache"})
            console.print(f"finetune, {name}: {results[name]:.0f} s", highlight=False)
    table = Table("", "ours", "with a warm cache", "theirs", "ratio", "warm", "must", "aim",
                  title=f"finetune: one epoch of {settings[0]}, whole process, s", title_justify="left")  # fmt: skip
    for name in against:
        seconds = [results[key] for key in ("ours", "ours again", name)]
        table.add_row(f"Trainer, {name}", *(f"{value:.0f}" for value in seconds), f"{seconds[0] / seconds[2]:.2f}",
                      f"{seconds[1] / seconds[2]:.2f}", *TARGETS[f"finetune {name}"])  # fmt: skip
    console.print(table)
    return results
