"""The generated pages are what the registry, the recipes and the measured results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trl_rewards.commands.plan import GIB, PHASES
from trl_rewards.docs import components_page, gpu_plans, header, recipes_page
from trl_rewards.recipe_files import bundled_recipes

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


def test_gpu_recipes_fit_the_card_that_they_name():
    too_large = {}
    for name, made in gpu_plans().items():
        named = re.search(r"GPUs? of (\d+) GB", bundled_recipes()[name].read_text(encoding="utf-8"))
        assert named, f"{name} names no card"
        if not made.fits(float(named[1])):
            too_large[name] = {phase: made.at(phase) / GIB for phase in PHASES}
    assert not too_large
