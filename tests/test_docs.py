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


PAPERS_WITHOUT_A_RECIPE = {
    "1506.02438": "GAE: ppo/cpu uses it",
    "2402.03300": "GRPO: the quickstart and most others use it",
    "1904.09675": "BERTScore needs an encoder that has read much",
    "1706.04599": "calibrated takes what `trl-rewards calibrate` fits to data of the user's",
}


def test_every_paper_with_a_component_has_a_recipe_for_a_cpu():
    papers = set(re.findall(r"huggingface\.co/papers/([\d.]+\d)", components_page()))
    texts = [file.read_text(encoding="utf-8") for name, file in bundled_recipes().items() if "gpu" not in name]
    lacking = {paper for paper in papers if not any(paper in text for text in texts)}
    assert lacking == set(PAPERS_WITHOUT_A_RECIPE)


def test_every_folder_with_a_gpu_recipe_has_one_for_24_gb_and_one_for_80():
    named: dict[str, set[float | None]] = {}
    for name, file in bundled_recipes().items():
        if "gpu" in name:
            named.setdefault(name.split("/")[0], set()).add(named_card(file.read_text(encoding="utf-8")))
    assert {folder for folder, cards in named.items() if not {24, 80} <= cards} == set()


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
