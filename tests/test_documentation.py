"""Builds the site of the documentation, and looks up what the package has in it."""

import html
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer.main

import bert_jax
from bert_jax import cli, server_settings, settings
from bert_jax.tasks.registry import TASKS
from bert_jax.yaml_file import Section, SettingsFile

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site. A warning, such as one of a broken link, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def names(site):
    """The full names of everything in Python that has an entry."""
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}


def test_every_public_name_has_an_entry(names):
    for name in bert_jax.__all__:
        value = getattr(bert_jax, name)
        assert f"bert_jax.{name}" in names or (inspect.ismodule(value) and value.__name__ in names), name
        assert inspect.getdoc(value), name


def keys(kind, path=""):
    """The keys of a settings file, as overrides write them."""
    for name, field in kind.model_fields.items():
        sections = [part for part in (field.annotation, *typing.get_args(field.annotation))
                    if inspect.isclass(part) and issubclass(part, Section)]  # fmt: skip
        assert sections or field.description, f"{kind.__name__}.{name} has no docstring"
        for section in sections:
            yield from keys(section, f"{path}{name}.")
        if not sections:
            yield path + name


def test_every_setting_has_an_entry(site):
    page = html.unescape((site / "reference" / "settings.html").read_text(encoding="utf-8"))
    entries = re.sub("<[^>]+>", "", " ".join(re.findall("<dt>.*?</dt>", page, re.DOTALL))).split()
    files = [kind for module in (settings, server_settings) for _, kind in inspect.getmembers(module, inspect.isclass)
             if issubclass(kind, SettingsFile) and kind is not SettingsFile]  # fmt: skip
    assert len({*files}) == 4
    found = {key for kind in files for key in keys(kind)}
    assert len(found) > 100
    assert found == {*entries}


def test_docstrings_are_read_as_meant(site):
    """An indented example without "::" would be a quotation, and "The x: y" in an attribute's docstring a type."""
    for page in (site / "reference").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<blockquote" not in text, page.name
        assert not re.search(r">Type<", text), page.name


def test_every_command_has_an_entry(site):
    page = html.unescape((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    text = re.sub("<[^>]+>", "", page)
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert f"bert-jax {name}" in text
        assert command.help
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
            shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or parameter.name
            assert shown in text, f"{name} {shown}"


def test_every_route_has_an_entry_with_the_fields_of_its_request(site):
    page = html.unescape(re.sub("<[^>]+>", "", (site / "reference" / "http.html").read_text(encoding="utf-8")))
    routes = json.loads((ROOT / "docs" / "_build" / "openapi.json").read_text(encoding="utf-8"))["paths"]
    assert {f"/v1/{task}" for task in TASKS} < set(routes)
    for path, methods in routes.items():
        for method, route in methods.items():
            (_, after) = page.split(f"{method.upper()} {path}¶")
            entry = after.split("¶")[0].split()
            content = route.get("requestBody", {"content": {"application/json": {"schema": {}}}})["content"]
            for field in content["application/json"]["schema"].get("properties", {}):
                assert field in entry, f"{path} {field}"


def test_every_notebook_has_a_page(site):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / f"{path.stem}.html").is_file()
    for page in site.glob("*.html"):  # a link to the file instead of the page would be a download
        assert not re.search(r'href="[^"]*\.ipynb"', page.read_text(encoding="utf-8")), page.name


@pytest.mark.parametrize("pattern", ["*.md", "docs/*.md", "docs/reference/*.md", "notebooks/*.ipynb"])
def test_every_link_in_a_source_leads_to_a_file(pattern):
    """As on GitHub, where nothing that the build of the site writes exists."""
    built = {ROOT / "docs" / "notebooks", ROOT / "docs" / "_build"}
    links = [(page, link) for page in ROOT.glob(pattern)
             for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))]  # fmt: skip
    assert links
    for page, link in links:
        path = (page.parent / link).resolve()
        assert path.exists(), f"{page.relative_to(ROOT)}: {link}"
        assert not built & {*path.parents}, f"{page.relative_to(ROOT)}: {link}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
