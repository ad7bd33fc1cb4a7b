"""How Sphinx builds the documentation.

pip install -e '.[docs]' && sphinx-build -W docs docs/_build
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flax import nnx
from sphinx.application import Sphinx

import bert_jax
from bert_jax import hub
from bert_jax.inference.server import models
from bert_jax.inference.server.app import Access, Server
from bert_jax.inference.server.limits import Limits
from bert_jax.tasks.registry import TASKS

project = "bert_jax"
author = "the bert_jax developers"
version = release = bert_jax.__version__
html_theme = "furo"
html_title = "bert_jax"
exclude_patterns = ["_build"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.openapi"]
nb_execution_mode = "off"
NOTEBOOKS = Path(os.environ.get("BERT_JAX_EXECUTED_NOTEBOOKS", Path(__file__).parents[1] / "notebooks"))
"""A folder with executed notebooks, which `pytest -m notebooks` fills. Without it, the pages have no outputs."""
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # docstrings have `code` in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_ivar = True

OPENAPI = Path(__file__).parent / "_build" / "openapi.json"


def write_openapi(app: Sphinx) -> None:
    """Writes the routes of a server with models for all tasks, for the page `reference/http`."""
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    served = [models.load("bert-mini-cased", hub.download("bert-mini-cased"))]
    for task in ("text-classification", "token-classification", "question-answering", "multiple-choice"):
        with tempfile.TemporaryDirectory() as folder:
            TASKS[task].model_class(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
            bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(folder)
            served.append(models.load(task, Path(folder)))
    guarded = Server(served, Limits(), Access()).app
    OPENAPI.parent.mkdir(exist_ok=True)
    OPENAPI.write_text(json.dumps(guarded.app.openapi()), encoding="utf-8")


def add_notebooks(app: Sphinx) -> None:
    """Copies the notebooks to the folder of the pages."""
    pages = Path(__file__).parent / "notebooks"
    pages.mkdir(exist_ok=True)
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        (pages / path.name).write_text(text.replace("](../docs/", "](../"), encoding="utf-8")


def add_commands(app: Sphinx, page: str, source: list[str]) -> None:
    """Writes the help of all commands, as Markdown, in the page `reference/commands`."""
    if page == "reference/commands":
        command = [sys.executable, "-m", "typer", "bert_jax.cli", "utils", "docs", "--name", "bert-jax"]
        done = subprocess.run([*command, "--title", "Commands"], capture_output=True, text=True, check=True)
        source[0] = done.stdout


def setup(app: Sphinx) -> None:
    """Adds the pages that the package's code writes."""
    app.connect("builder-inited", write_openapi)
    app.connect("builder-inited", add_notebooks)
    app.connect("source-read", add_commands)
