"""What the guides under docs/ say is true: their recipes are valid, their code runs, their names exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from trl_rewards import Recipe, load_plugins
from trl_rewards.recipe import _OLD_PPO_KEYS, TRAINERS

ROOT = Path(__file__).parent.parent
GUIDES = {file.name: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDES[guide], re.DOTALL | re.MULTILINE)


RECIPES = [(guide, text) for guide in GUIDES if guide != "claims.md" for text in blocks(guide, "yaml")]


@pytest.mark.parametrize(("guide", "text"), RECIPES)
def test_a_guides_recipe_is_valid(guide, text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    Recipe.load(file, {"use_cpu": True})


@pytest.mark.parametrize(("guide", "kind"), [("advantages.md", "advantage"), ("combiners.md", "combiner")])
def test_a_guides_tables_have_every_component_of_the_kind(guide, kind):
    firsts = [line.split("|")[1] for line in GUIDES[guide].splitlines() if line.startswith("| `")]
    named = [name for cell in firsts for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(entry.name for entry in load_plugins().of_kind(kind))


@pytest.mark.slow
def test_the_ppo_guides_script_runs(policy_path, tmp_path, monkeypatch):
    (script,) = blocks("ppo.md", "python")
    monkeypatch.chdir(tmp_path)
    script = script.replace("Qwen/Qwen2.5-0.5B", policy_path).replace("16)\n", "16, bf16=False, use_cpu=True)\n")
    found: dict = {}
    exec(compile(script, "ppo.md", "exec"), found)
    assert found["trainer"].state.global_step == 2


def test_the_ppo_guide_names_arguments_that_exist_and_none_that_went():
    from trl_rewards import PPOConfig

    known = {option.name for option in fields(PPOConfig)}
    *_, moved = GUIDES["ppo.md"].partition("## Moving from TRL's PPOTrainer")
    same = next(line for line in moved.splitlines() if line.endswith("| the same |"))
    assert set(re.findall(r"`(\w+)`", same)) <= known
    own = {option.name for option in fields(PPOConfig)} - {f.name for f in fields(PPOConfig.__mro__[1])}
    assert own <= set(re.findall(r"`(\w+)[:`]", GUIDES["ppo.md"]))
    assert not set(_OLD_PPO_KEYS) & known


def test_every_file_and_trainer_that_the_guides_name_is_there():
    for guide, text in GUIDES.items():
        for path in re.findall(r"`((?:recipes|tests|benchmarks)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{guide} names {path}"
    table = GUIDES["distributed.md"]
    assert all(f"`{name}`" in table for name in TRAINERS)


@pytest.mark.parametrize("key", sorted(_OLD_PPO_KEYS))
def test_a_key_of_trls_own_ppo_is_refused_with_what_became_of_it(key, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"trainer: ppo\nrewards: [length]\noutput_dir: out\n{key}: 1\n")
    with pytest.raises(Exception, match=f"{key}: a key of TRL's own PPO"):
        Recipe.load(file)
