"""The generated pages are what the registry, the recipes and the measured results say."""

from __future__ import annotations

import json
from pathlib import Path

from trl_rewards.docs import components_page, header, recipes_page
from trl_rewards.recipe import bundled_recipes

ROOT = Path(__file__).parent.parent
HINT = "out of date: run `python -m trl_rewards.docs`"


def test_the_components_page_is_generated():
    assert (ROOT / "plugins/README.md").read_text(encoding="utf-8") == components_page(), HINT


def test_the_recipes_page_is_generated():
    assert (ROOT / "recipes/README.md").read_text(encoding="utf-8") == recipes_page(), HINT


def test_results_are_of_recipes_that_exist():
    results = json.loads((ROOT / "recipes/results.json").read_text(encoding="utf-8"))
    assert set(results) <= set(bundled_recipes())


def test_every_recipe_says_what_it_is():
    assert all(header(file) for file in bundled_recipes().values())
