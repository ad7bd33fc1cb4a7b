"""The Sphinx configuration of the documentation.

pip install -e '.[docs]' && sphinx-build -W docs docs/_build
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flax import nnx
from sphinx.application import Sphinx

import bert_jax
from bert_jax import hub
from bert_jax.inference.server import models
from bert_jax.inference.server.app import Access, Server
from bert_jax.inference.server.limits import Limits
from bert_jax.server_settings import Serving
from bert_jax.settings import HeldOut, Pretraining, Settings
from bert_jax.tasks.registry import TASKS

project = "bert_jax"
author = "the bert_jax developers"
version = release = bert_jax.__version__
html_theme = "furo"
html_title = "bert_jax"
exclude_patterns = ["_build"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
NOTEBOOKS = Path(os.environ.get("BERT_JAX_EXECUTED_NOTEBOOKS", Path(__file__).parents[1] / "notebooks"))
"""A folder with executed notebooks, which `pytest -m notebooks` fills. Without it, the pages have no outputs."""
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # docstrings enclose `code` in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_use_ivar = True

OPENAPI = Path(__file__).parent / "_build" / "openapi.json"


SETTINGS_FILES = {
    "Fine-tuning": Settings,
    "Pretraining": Pretraining,
    "Evaluation on held-out texts": HeldOut,
    "Serving": Serving,
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
"""Keys of JSON schemas that limit a number, and how the references show them."""


def write_openapi(app: Sphinx) -> None:
    """Writes the OpenAPI document of a server for all tasks. The page `reference/http` is made from this document."""
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    new_heads = ("text-classification", "token-classification", "question-answering", "multiple-choice")
    embedded = [task for task in TASKS if task not in new_heads]
    served = [models.load("bert-mini-cased", hub.download("bert-mini-cased"), tasks=embedded)]
    for task in new_heads:
        with tempfile.TemporaryDirectory() as folder:
            TASKS[task].model_class(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
            bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(folder)
            served.append(models.load(task, Path(folder)))
    guarded = Server(served, Limits(), Access()).app
    OPENAPI.parent.mkdir(exist_ok=True)
    OPENAPI.write_text(json.dumps(guarded.app.openapi()), encoding="utf-8")


def type_of(schema: dict[str, Any]) -> str:
    """Describes the type of a JSON schema in words. Each named object becomes a link."""
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(type_of, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "prefixItems" in schema:
        return f"[{', '.join(map(type_of, schema['prefixItems']))}]"
    if "items" in schema:
        inner = type_of(schema["items"])
        return f"array of ({inner})" if " or " in inner else f"array of {inner}"
    bounds = [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
    if bounds:
        return f"{schema['type']} {' and '.join(bounds)}"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"object with values of the type ({type_of(values)})"
    return schema.get("type", "any")


def fields_of(schema: dict[str, Any]) -> list[str]:
    """Returns the lines of a Markdown table of a JSON object's fields."""
    lines = ["", "| field | type | default |", "|---|---|---|"]
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        lines.append(f"| `{name}` | {type_of(field)} | {default} |")
    return [*lines, ""]


def on_one_line(schema: dict[str, Any]) -> str:
    """Returns the description in a JSON schema as one line."""
    return " ".join(schema.get("description", "").split())


def settings_reference() -> str:
    """Returns Markdown that lists the settings of each kind of file by section, with types, defaults and meanings."""
    lines: list[str] = []
    described: dict[str, str] = {}  # maps the name of each section's class to the heading of its description

    def add(schema: dict[str, Any], path: str, definitions: dict[str, Any]) -> None:
        """Adds the settings of an object, then those of its sections."""
        sections = {}
        for name, field in schema["properties"].items():
            if kinds := re.findall(r'"#/\$defs/(\w+)"', json.dumps(field)):
                sections[path + name] = (kinds[0], field)
                continue
            required = name in schema.get("required", ())
            default = "required" if required else f"default `{json.dumps(field.get('default', {}))}`"
            lines.extend([f"`{path}{name}`", f": *{type_of(field)}; {default}*", "", f"  {on_one_line(field)}", ""])
        for name, (kind, field) in sections.items():
            known = described.get(kind)
            lines.extend([f"### {name}", "", on_one_line(field), ""])
            if known:
                lines.extend([f"The settings are those of [{known}](#{known.replace('.', '')}) above.", ""])
                continue
            described[kind] = name
            lines.extend([on_one_line(definitions[kind]), ""])
            add(definitions[kind], f"{name}.", definitions)

    for title, file in SETTINGS_FILES.items():
        schema = file.model_json_schema()
        lines.extend(
            [f"## {title}", "", on_one_line(schema), "", f"In Python: `{file.__module__}.{file.__name__}`.", ""]
        )
        add(schema, "", schema.get("$defs", {}))
    return "\n".join(lines)


def http_reference(document: dict[str, Any]) -> str:
    """Returns Markdown that lists the routes of an OpenAPI document and the fields of their requests and responses."""
    lines = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            section = f"## {route.get('tags', ['Monitoring'])[0]}"
            if section not in lines:
                lines += [section, ""]
            lines += [f"### {method.upper()} {path}", "", route["description"]]
            task = TASKS.get(path.removeprefix("/v1/"))
            if task is not None:
                lines += [f"{{py:meth}}`~{task.__module__}.{task.__name__}.request` describes the parameters."]
            if body := route.get("requestBody"):
                schema = body["content"]["application/json"]["schema"]
                lines += ["", f"Request: {schema.get('description', 'an object.')}"]
                example = ["", f"    {json.dumps(schema.get('example'))}", ""]
                lines += fields_of(schema) if "properties" in schema else example
            ((media, response),) = route["responses"]["200"]["content"].items()
            shown = type_of(response["schema"]) if media == "application/json" else f"text of the type `{media}`"
            lines += ["", f"Response: {shown}", ""]
    lines += ["## Objects", ""]
    for name, schema in document["components"]["schemas"].items():
        if not name.endswith("ValidationError"):  # FastAPI's error format, which this server does not use
            lines += [f"### {name}", "", schema.get("description", ""), *fields_of(schema)]
    return "\n".join(lines)


def add_notebooks(app: Sphinx) -> None:
    """Copies the notebooks to the documentation's `notebooks` folder."""
    pages = Path(__file__).parent / "notebooks"
    pages.mkdir(exist_ok=True)
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        (pages / path.name).write_text(text.replace("](../docs/", "](../"), encoding="utf-8")


def add_references(app: Sphinx, page: str, source: list[str]) -> None:
    """Generates the reference pages, and replaces links to notebook files with links to their pages."""
    if page == "reference/commands":
        command = [sys.executable, "-m", "typer", "bert_jax.cli", "utils", "docs", "--name", "bert-jax"]
        done = subprocess.run([*command, "--title", "Commands"], capture_output=True, text=True, check=True)
        source[0] = done.stdout
    source[0] = re.sub(r"\]\(\.\./(notebooks/\w+\.ipynb)", r"](\1", source[0])
    if page == "reference/settings":
        source[0] += settings_reference()
    if page == "reference/http":
        source[0] += http_reference(json.loads(OPENAPI.read_text(encoding="utf-8")))


def setup(app: Sphinx) -> None:
    """Registers the functions that generate pages."""
    app.connect("builder-inited", write_openapi)
    app.connect("builder-inited", add_notebooks)
    app.connect("source-read", add_references)
