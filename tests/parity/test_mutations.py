"""Each known way to get BERT wrong, put into a copy of the package, must make the parity suite fail."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bert_jax

PACKAGE = Path(bert_jax.__file__).parent
TESTS = Path(__file__).parent.parent

MUTATIONS = {
    "tanh GELU in the encoder": (
        "model.py",
        "ACTIVATIONS[self.config.hidden_act](self.intermediate(x))",
        'ACTIVATIONS["gelu_new"](self.intermediate(x))',
    ),
    "tanh GELU in the head": (
        "heads.py",
        "ACTIVATIONS[self.config.hidden_act](self.transform(hidden))",
        'ACTIVATIONS["gelu_new"](self.transform(hidden))',
    ),
    "eps 1e-6": ("nn.py", "        self.eps = eps\n", "        self.eps = 1e-6\n"),
    "layers in string order": (
        "model.py",
        "run(self.layers[i], ",
        "run(self.layers[int(sorted(map(str, range(n)))[i])], ",
    ),
    "token types dropped": ("model.py", "self.token_type_embeddings(token_type_ids)", "0.0"),
    "mask ignored": (
        "attention.py",
        "    if attended is not None:\n        scores",
        "    if False:\n        scores",
    ),
    "a square kernel transposed": (
        "weights.py",
        "_converted(tensor, specs",
        "_converted(tensor.T if path.endswith('query.weight') else tensor, specs",
    ),
    "pooler without tanh": ("model.py", "jnp.tanh(self.pooler", "(self.pooler"),
}


def run_suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The parity suite's small shape over the package in this folder."""
    command = [sys.executable, "-m", "pytest", "-m", "parity", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    # Without the flags of the parity suite, programs are compiled the quickest way.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, str(folder / "tests" / "parity" / "test_network.py"), "-k", "small and (heads or submodules)"],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=300,
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "bert_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_copy_passes_unchanged(copy):
    run = run_suite(copy)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(copy, name):
    file, text, instead = MUTATIONS[name]
    source = (copy / "bert_jax" / file).read_text()
    assert source.count(text) == 1, f"{name}: the code to be changed is no longer there; adapt the mutation"
    (copy / "bert_jax" / file).write_text(source.replace(text, instead))
    run = run_suite(copy)
    assert run.returncode == 1, f"{name} was not caught:\n{run.stdout}"
    caught = re.search(r"AssertionError: (.*)", run.stdout)
    assert caught, run.stdout  # it failed by a difference, and not by an error of another kind
    print(f"{name}: caught by {caught[1]}")
