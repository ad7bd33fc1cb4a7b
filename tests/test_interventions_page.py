"""Runs the recipes of docs/interventions.md."""

import re
from pathlib import Path

import numpy as np
import pytest

from bert_jax.interventions import SITES

PAGE = (Path(__file__).parents[1] / "docs" / "interventions.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    names = {}
    exec("\n".join(RECIPES), names)
    return names


def test_recipes_are_short():
    assert all(len([line for line in recipe.splitlines() if line.strip()]) < 15 for recipe in RECIPES)


def test_what_the_recipes_find(names):
    clean = float(-names["loss"](np.ones((6, 12))))
    assert names["importance"].shape == names["losses"].shape == (6, 12)
    assert names["importance"].max() > 1e-3
    assert names["effect"][5][names["place"]] == pytest.approx(clean, abs=1e-4)  # all that is read comes from there
    assert float(names["log_p"]) != pytest.approx(clean, abs=1e-3)
    assert names["change"] > 0.01
    assert np.ptp(names["ablated"], axis=1).max() < 1e-3  # all tokens have the same state
    vectors, score = names["vectors"], names["score"]
    assert float(names["attributions"].sum()) == pytest.approx(float(score(vectors) - score(0 * vectors)), rel=0.01)
    assert np.allclose(names["rollout"].sum(axis=1), 1, atol=1e-5)
    assert names["good"]["score"] > names["bad"]["score"]
    assert [vectors.shape for vectors in names["layer_vectors"]] == [(2, 384)] * 2


@pytest.mark.parametrize("site", SITES)
def test_the_table_has_every_site(site):
    written = PAGE.replace("`, `.", "`, `layers.{i}.attention.")
    assert f"`{site}`" in written
