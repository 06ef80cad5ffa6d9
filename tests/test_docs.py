"""The generated pages are what the registry, the recipes and the measured results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trl_rewards.commands.plan import GIB, PHASES, named_card
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
        card = named_card(bundled_recipes()[name].read_text(encoding="utf-8"))
        assert card, f"{name} names no card"
        if not made.fits(card):
            too_large[name] = {phase: made.at(phase) / GIB for phase in PHASES} | {"beside": made.beside / GIB}
    assert not too_large


def test_a_judges_server_has_a_share_of_the_card_or_another_one():
    for name, file in bundled_recipes().items():
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"^# +vllm serve .*", text, re.MULTILINE):
            shares, elsewhere = "--gpu-memory-utilization" in line, "another card" in line
            assert shares != elsewhere, f"{name}: {line}"
