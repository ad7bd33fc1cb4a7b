"""The table and the recipes of docs/interventions.md, which also runs the recipes (`pytest -m docs`)."""

import re
from pathlib import Path

import pytest

from bert_jax.interventions import SITES

PAGE = (Path(__file__).parents[1] / "docs" / "interventions.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_recipes_are_short():
    assert all(len([line for line in recipe.splitlines() if line.strip()]) < 15 for recipe in RECIPES)


@pytest.mark.parametrize("site", SITES)
def test_the_table_has_every_site(site):
    written = PAGE.replace("`, `.", "`, `layers.{i}.attention.")
    assert f"`{site}`" in written
