"""What the guides under docs/ say is true: their recipes are valid, their code and commands run, their names exist.

The README's own are in test_readme.py, and a served reward model's in test_served.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer

from trl_rewards import Pipeline, Recipe, RecipeError, load_advantage, load_plugins
from trl_rewards.cli import app
from trl_rewards.loading import as_reward
from trl_rewards.recipe_files import bundled_recipes
from trl_rewards.scoring import Source
from trl_rewards.trl_keys import OLD_PPO_KEYS, TRAINERS

ROOT = Path(__file__).parent.parent
GUIDES = {file.name: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = GUIDES | {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
MADE = {"my_reward.py": "write-a-reward.md", "my_advantage.py": "write-an-advantage.md"}  # what readers write
OWN_TEST = {"ppo.md", "overoptimisation.md", "serving.md", "README.md"}  # whose Python needs a stand-in


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[guide], re.DOTALL | re.MULTILINE)


def python_of(guide: str) -> str:
    """The Python of a guide, as one file."""
    return "\n\n".join(blocks(guide, "python"))


def write_made(folder: Path) -> None:
    for name, told in MADE.items():
        (folder / name).write_text(python_of(told))


def imported(guide: str, folder: Path, monkeypatch) -> ModuleType:
    """The Python of a guide, run."""
    name = "guide_" + re.sub(r"\W", "_", guide)
    (folder / f"{name}.py").write_text(python_of(guide))
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


RECIPES = [(guide, text) for guide in GUIDES if guide != "claims.md" for text in blocks(guide, "yaml")]


@pytest.mark.parametrize(("guide", "text"), RECIPES)
def test_a_guides_recipe_is_valid(guide, text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    write_made(tmp_path)
    Recipe.load(file, {"use_cpu": True})


def test_there_is_no_block_that_nothing_tests():
    languages = {
        language for text in TEXTS.values() for language in re.findall(r"^```(\w*)\n(?!\n)(?=.)", text, re.MULTILINE)
    }
    assert languages - {""} == {"bash", "diff", "python", "text", "toml", "yaml"}


@pytest.mark.parametrize("guide", [guide for guide in TEXTS if blocks(guide, "python") and guide not in OWN_TEST])
def test_a_guides_python_runs(guide, tmp_path, monkeypatch, capsys):
    if guide == "sandbox.md":
        from trl_rewards.sandbox import open_sandbox

        try:
            open_sandbox().close()
        except Exception as error:
            pytest.skip(f"no sandbox here: {error}")
    imported(guide, tmp_path, monkeypatch)
    if guide == "sandbox.md":
        assert capsys.readouterr().out.splitlines()[0] == "ok hi"


def test_the_table_of_holes_is_what_comes_out(tmp_path, monkeypatch):
    guide = imported("failures.md", tmp_path, monkeypatch)

    def said(values):
        return ", ".join("–" if value != value else f"{value:.2f}" if value else "0" for value in values.tolist())

    table = [line.strip("| ").split(" | ") for line in GUIDES["failures.md"].splitlines() if line.startswith("| `")]
    rows = {row[0].strip("`"): row[1:3] for row in table if len(row) == 4}
    assert list(rows) == ["renormalize", "group_mean", "drop_row", "drop_group"]
    for policy, wanted in rows.items():
        judge = Source("judge", as_reward(guide.judge), on_missing=policy)
        pipeline = Pipeline([guide.right, judge], advantage=load_advantage("group_norm"))
        batch = pipeline.score(guide.samples, group_size=4)
        assert [said(batch.rewards), said(pipeline.advantages(batch))] == wanted


def test_the_entry_point_of_the_guide_is_one():
    (text,) = blocks("write-a-reward.md", "toml")
    assert tomllib.loads(text)["project"]["entry-points"]["trl_rewards"] == {"brief": "my_reward"}


def test_the_guides_alarm_is_added_to_a_trainer():
    added: list = []  # a stand-in for a trainer, of which the block asks no more
    scope = {"trainer": SimpleNamespace(add_callback=added.append, last_batch=None, last_advantages=None)}
    (block,) = blocks("overoptimisation.md", "python")
    exec(compile(block, "overoptimisation.md", "exec"), scope)
    assert [type(callback).__name__ for callback in added] == ["RunRecorder", "AlarmWatch"]


SMALL = "max_steps=1, per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to='none', save_strategy='no'"


@pytest.mark.slow
@pytest.mark.parametrize(("index", "metric"), [(0, "rewards/short/mean"), (1, "rewards/bleuberi/mean"), (2, "loss")])
def test_a_changed_trl_script_trains(index, metric, policy_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diff = blocks("trl-script.md", "diff")[index]
    before, after = ("".join(line[1:] + "\n" for line in diff.splitlines() if line[0] != gone) for gone in "+-")
    compile(before, "before", "exec")
    rows = [{"prompt": f"the cat ran {n}", "references": ["the cat ran 3 times", "the dog sat"]} for n in range(8)]
    Path("my_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (rewards,) = blocks("trl-script.md", "yaml")
    Path("rewards.yaml").write_text(rewards, encoding="utf-8")
    for written, stand_in in {  # a tiny policy, one step on a CPU, and no cache outside this folder
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(policy_path),
        'split="train")': 'split="train", cache_dir="cache")',
        'from_recipe("rewards.yaml")': 'from_recipe("rewards.yaml", use_cpu=True)',
        'GRPOConfig("runs/grpo"': f'GRPOConfig("runs/grpo", max_completion_length=8, {SMALL}',
        'RLOOConfig("runs/rloo"': f'RLOOConfig("runs/rloo", max_completion_length=8, {SMALL}',
        'DPOConfig("runs/dpo"': f'DPOConfig("runs/dpo", {SMALL}, logging_steps=1',
        "max_new_tokens=256": "max_new_tokens=8, choose_truncated=True",
    }.items():
        after = after.replace(written, stand_in)
    scope: dict = {}
    exec(compile(after, "trl-script.md", "exec"), scope)
    assert any(metric in log for log in scope["trainer"].state.log_history)


def commands(guide: str) -> list[list[str]]:
    """The words of each command of a guide."""
    lines = "".join(blocks(guide, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


COMMANDS = [words for guide in TEXTS for words in commands(guide)]
NOT_OURS = ("vllm", "lmdeploy", "sglang.launch_server")  # servers, which are not here to be asked


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_guides_command_exists_with_its_options(words, tmp_path, monkeypatch):
    match words:
        case ["trl-rewards", name, *rest]:
            context = typer.main.get_command(app).commands[name].make_context(name, rest)  # as it is, but not run
            recipe = context.params.get("recipe")
            if any("weihgt" in word for word in words):
                with pytest.raises(RecipeError, match="did you mean 'weight'"):
                    Recipe.load(recipe, context.args)
            elif recipe in bundled_recipes():
                write_made(tmp_path)
                monkeypatch.chdir(tmp_path)
                Recipe.load(recipe, [*context.args, "--use_cpu", "true"])
        case ["accelerate", "launch", *rest] | ["torchrun", *rest]:
            assert "recipes/train.py" in rest or rest[:2] == ["-m", "trl_rewards.train"]
            named = [word for word in rest if word.endswith((".py", ".yaml")) and word != "mine.yaml"]
            assert all((ROOT / word).is_file() for word in named)
        case ["python", "-m", name, *rest] if name not in NOT_OURS:
            found = importlib.util.find_spec(name)
            assert found is not None
            if name.startswith("trl_rewards"):
                source = Path(found.origin).read_text(encoding="utf-8")
                assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
        case ["python", script, *rest] if script != "-m":
            source = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
        case ["pip", "install", "-e", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert what.removeprefix(".[").removesuffix("]") in extras
        case ["mkdocs", "serve"]:
            assert (ROOT / "mkdocs.yml").is_file()
        case _:
            assert set(words) & set(NOT_OURS), f"what is {words[0]}?"


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
    assert not set(OLD_PPO_KEYS) & known


def test_every_file_and_trainer_that_the_guides_name_is_there():
    for guide, text in GUIDES.items():
        for path in re.findall(r"`((?:recipes|tests|benchmarks)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{guide} names {path}"
    table = GUIDES["distributed.md"]
    assert all(f"`{name}`" in table for name in TRAINERS)


@pytest.mark.parametrize("key", sorted(OLD_PPO_KEYS))
def test_a_key_of_trls_own_ppo_is_refused_with_what_became_of_it(key, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"trainer: ppo\nrewards: [length]\noutput_dir: out\n{key}: 1\n")
    with pytest.raises(Exception, match=f"{key}: a key of TRL's own PPO"):
        Recipe.load(file)
