"""Which rows are chosen, in which order: the authors' choices, ties, holes, small pools."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trl_rewards import Recipe, load_selector
from trl_rewards.recipe_files import find_recipe

# Scores with the ties that the choices recorded of the authors' code tell of: rows 1, 2 and 9 are equal, and 5, 6, 8.
SCORES = [0.8, 0.1, 0.1, 0.95, 0.0, 0.5, 0.5, 0.9, 0.5, 0.1]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("hard", [1, 2, 9, 4]), ("easy", [3, 7, 0, 5]), ("medium", [5, 6, 8, 9]), ("random", [8, 1, 5, 0])],
)
def test_the_authors_choices_of_4_in_10_with_seed_42(name, wanted):
    assert load_selector(name).select(SCORES, 4, seed=42) == wanted


@pytest.mark.parametrize("name", ["hard", "easy", "medium", "random"])
def test_a_pool_that_is_not_larger_is_kept_best_first(name):
    for count in (10, 11):
        assert load_selector(name).select(SCORES, count, seed=1) == [3, 7, 0, 5, 6, 8, 1, 2, 9, 4]


def test_an_odd_rest_leaves_the_window_of_medium_nearer_to_the_low_end():
    assert load_selector("medium").select([0.0, 1.0, 2.0, 3.0, 4.0], 2) == [2, 1]


def test_holes_are_no_part_of_the_pool():
    scores = [None, 0.3, None, 0.1, 0.2, 0.4]
    assert load_selector("hard").select(scores, 2) == [4, 3]
    assert load_selector("medium").select(scores, 2) == [1, 4]
    assert load_selector("hard").select(scores, 6) == [5, 1, 4, 3]
    assert set(load_selector("random").select(scores, 3, seed=5)) < {1, 3, 4, 5}


def test_holes_fill_up_where_they_are_asked_for():
    scores = [None, 0.3, None, 0.1]
    assert load_selector("hard", holes=True).select(scores, 2) == [1, 3]
    assert load_selector("hard", holes=True).select(scores, 3) == [1, 3, 0]
    assert load_selector("easy", holes=True).select(scores, 9) == [1, 3, 0, 2]


def header_of(recipe: str) -> str:
    """The comments at the top of a recipe, without their marks and with continued lines joined."""
    text = Path(find_recipe(recipe)).read_text(encoding="utf-8").partition("\ntrainer:")[0]
    return re.sub(r"\\\n\s*", "", re.sub(r"^# ?", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("variant", "sources", "combine"),
    [("rm", ["model"], "weighted_sum"), ("bleu_rm", ["bleuberi", "model"], "bleu_rm")],
)
def test_the_variants_in_the_recipe_s_header_are_recipes(variant, sources, combine):
    (words,) = re.findall(rf"^ *{variant}: +(--.*)$", header_of("bleuberi/gpu-7b-4bit"), re.MULTILINE)
    recipe = Recipe.load("bleuberi/gpu-7b-4bit", shlex.split(words), check_trl=False)
    assert [source.name for source in recipe.rewards] == sources
    assert recipe.combine.use == combine
    assert recipe.rewards[-1].options["load_in_4bit"] is True


@pytest.mark.slow
def test_the_cpu_recipe_s_selection_works_as_written_and_its_rows_are_the_recipe_s_data(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from trl_rewards.cli import app

    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^ *trl-rewards (select .*)$", header_of("bleuberi/cpu"), re.MULTILINE)
    done = CliRunner().invoke(app, [*shlex.split(command), "--limit", "6", "--count", "3"])
    assert done.exit_code == 0, done.exception
    checked = CliRunner().invoke(app, ["validate", "bleuberi/cpu"])
    assert checked.exit_code == 0, checked.exception
    assert "dataset runs/bleuberi/hard: test 200, train 3 rows" in checked.output
