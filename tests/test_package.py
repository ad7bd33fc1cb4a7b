"""The house's own rules: light to import, and each module imports from lower floors alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bert_jax

PACKAGE = Path(bert_jax.__file__).parent

# Lowest first; modules of one floor do not import each other.
FLOORS = [
    ["errors", "compilation", "tools.figure"],
    [
        "hub",
        "porting",
        "outputs",
        "distributed",
        "processor",
        "training.memory",
        "inference.ray_files",
        "data.formats",
    ],
    [
        "upload",
        "config",
        "tree",
        "interventions",
        "losses",
        "evaluation.metrics",
        "data.labels",
        "data.sources",
        "data.rows",
    ],
    ["data.loader"],
    ["weights", "tokenizer_files", "sharding", "sentence_embedding"],
    ["tokenizer", "adapters"],
    ["random"],
    ["nn"],
    ["attention", "quantization"],
    ["pretrained"],
    ["model", "tools.aot", "data.corpus", "vocabulary"],
    ["data.masking", "heads"],
    ["convert", "training.optim", "training.lora", "training.checkpoint", "training.log"],
    ["tasks.base", "training.loggers"],
    [
        "tasks.masked_lm",
        "tasks.next_sentence_prediction",
        "tasks.feature_extraction",
        "tasks.sequence_classification",
        "tasks.token_classification",
        "tasks.question_answering",
        "tasks.multiple_choice",
        "tasks.pretraining",
    ],
    ["tasks.pseudo_log_likelihood", "inference.batches"],
    ["tasks.registry"],
    ["inference.run"],
    ["evaluation.measure", "inference.pipelines", "tools.export", "tools.report", "training.step"],
    ["training.loop", "tools.verify", "inference.catalog"],
    [
        "inference.prediction",
        "inference.server.limits",
        "inference.server.log",
        "inference.server.models",
        "inference.server.attention",
        "tools.check",
        "tools.viz",
        "evaluation.held_out",
    ],
    [
        "inference.ray",
        "inference.server.batcher",
        "inference.server.programs",
        "inference.server.connections",
        "inference.server.guard",
    ],
    ["inference.server.engine"],
    ["inference.server.tasks"],
    ["inference.server.openai"],
    ["inference.server.tei"],
    ["inference.server.app"],
    ["yaml_file"],
    ["settings"],
    ["server_settings"],
    ["recipes.preparation", "recipes.runs"],
    ["recipes.pretraining", "recipes.finetuning"],
    ["recipes.seeds"],
    ["cli.options"],
    ["cli.inference", "cli.training", "cli.files"],
    ["cli.__main__"],
]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    names = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    return {name.removeprefix("bert_jax.") for name in found if name and name.startswith("bert_jax.")} & names


def test_imports_go_down():
    floor = {module: i for i, modules in enumerate(FLOORS) for module in modules}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.endswith("__init__"):
            continue
        upward = [name for name in imported(path) if floor[name] >= floor[module]]
        assert not upward, f"{module} imports {upward}, which are not below it"


@pytest.mark.parametrize("code", ["import bert_jax", "import bert_jax.cli", "import bert_jax; dir(bert_jax)"])
def test_importing_loads_nothing_heavy(code):
    check = "import sys; print([m for m in ('jax', 'flax', 'numpy', 'tokenizers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", bert_jax.__all__)
def test_contents_are_there(name):
    assert getattr(bert_jax, name).__name__.rpartition(".")[2] == name


def test_unknown_name():
    with pytest.raises(AttributeError, match="BertForEverything"):
        bert_jax.BertForEverything  # noqa: B018
