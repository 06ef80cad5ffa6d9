"""What the README says is true: its code runs, its tables are the registry's, its commands work as written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from trl_rewards import Recipe, ToolCall, load_plugins, load_reward
from trl_rewards.recipe_files import OWN_KEYS
from trl_rewards.scoring import ON_MISSING, Source
from trl_rewards.testing import check_objective, check_reward, check_tool, plugin_manager
from trl_rewards.toolbox import Toolbox
from trl_rewards.trl_keys import TRAINERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def table(title: str) -> list[list[str]]:
    """The cells of the table whose header row starts with a title, backticks taken off."""
    lines = README.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_the_recipe_is_valid(write):
    first, models, ppo, pairs, shared = (Recipe.load(write("readme.yaml", text)) for text in blocks("yaml"))
    assert [source.name for source in first.rewards] == ["bleuberi", "accuracy", "length"]
    assert [source.name for source in models.rewards] == ["skywork", "judge", "rewardanything"]
    assert ppo.trl["critic"] == "adapter"
    assert pairs.pairs.rounds == 3
    assert shared.share_base


def test_the_plugin_is_a_plugin(tmp_path, monkeypatch):
    plugin = blocks("python")[0]
    (tmp_path / "readme_plugin.py").write_text(plugin)
    monkeypatch.syspath_prepend(str(tmp_path))
    import readme_plugin

    with plugin_manager({"readme": readme_plugin}):
        shouting = load_reward("shouting", power=2.0)
    check_reward(shouting)
    assert shouting(prompts=["p"], completions=["AbCd"]) == [0.25]


def test_the_objective_is_an_objective():
    scope: dict = {"__name__": "readme"}
    exec(compile(blocks("python")[3], "README.md", "exec"), scope)
    check_objective(scope["Weighted"](), strength=[1.0, 2.0, 0.5])


def test_the_tool_is_a_tool():
    scope: dict = {"__name__": "readme"}
    exec(compile(blocks("python")[4], "README.md", "exec"), scope)
    tool = scope["register_tools"]()["population"]()
    check_tool(tool, "Oslo", "Bergen")
    (found,) = Toolbox([tool]).run([("Atlantis", ToolCall("population"))])
    assert found.text == "I do not know of a city 'Atlantis'."


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2])
def test_the_scripts_train(block, policy_path, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import GRPOConfig

    monkeypatch.chdir(tmp_path)
    text = blocks("python")[block].replace("Qwen/Qwen2.5-0.5B-Instruct", policy_path)
    options = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 8}
    options |= {"max_completion_length": 8, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    # The README's own GRPOConfig is made small, as the model is.
    text = text.replace("GRPOConfig(max_completion_length=512)", "args")
    references = [["the cat ran 3 times", "the dog sat"]] * 8
    dataset = Dataset.from_dict({"prompt": [f"the cat ran {n}" for n in range(8)], "references": references})
    scope = {"dataset": dataset, "args": GRPOConfig(**options)}
    exec(compile(text, "README.md", "exec"), scope)
    scope["trainer"].train()
    assert "rewards/bleuberi/mean" in scope["trainer"].state.log_history[0]


@pytest.mark.slow
def test_the_commands_work_as_written(tmp_path):
    (block,) = (block for block in blocks("bash") if block.startswith("trl-rewards validate"))
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert len(commands) == 13
    rows = [{"prompt": "What is 2 + 3?", "completion": "5", "answer": "5", "references": ["It is 5."]}] * 3
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = {"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "6", "references": ["It is 5."]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    labelled = [{**rows[0], "completion": str(row % 3 + 4), "label": row % 3 == 1} for row in range(12)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    scripts = Path(sys.executable).parent
    for command in commands:
        words = shlex.split(command)
        words[0] = str(scripts / words[0])
        if "train" in command:  # as written, but short; accelerate goes through the module
            words += ["--max_steps", "2", "--eval_strategy", "no"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert len((tmp_path / "best.jsonl").read_text().splitlines()) == 20
    assert len((tmp_path / "hard.jsonl").read_text().splitlines()) == 10
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 1 + 3
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()


def test_the_two_commands_are_the_ones_ci_runs():
    first, second = blocks("bash")[:2]
    assert "accelerate launch recipes/train.py --config recipes/quickstart.yaml" in first
    assert "python -m pytest" in second
    assert "python -m pytest\n" in (ROOT / ".ci" / "run").read_text()


def test_the_component_table_is_the_registry():
    registry = load_plugins()
    for kind, names in table("kind"):
        assert re.findall(r"`(\w+)`", names) == [entry.name for entry in registry.of_kind(kind)]
    assert {row[0] for row in table("kind")} == {entry.kind for entry in registry.entries}


def test_the_trainer_table_is_true():
    rows = table("trainer")
    assert [row[0].strip("`") for row in rows] == list(TRAINERS)
    for row, kind in zip(rows, TRAINERS.values(), strict=True):
        assert row[1].startswith("✓") == row[2].startswith("✓") == row[3].startswith("✓") == ("rewards" in kind.keys)
        assert row[4].startswith("✓") == ("sequence" in kind.levels)
        assert row[5].startswith("✓") == ("token" in kind.levels)
        assert row[6].startswith("✓") == ("objective" in kind.keys)


def test_the_key_tables_are_complete():
    keys = table("key")
    named = {name for row in keys for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(OWN_KEYS)
    lines = README.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| key | default"))
    rows = [line.split(" | ") for line in lines[start + 2 : start + 11]]
    documented = {row[0].strip("| `"): row[1].strip("` ") for row in rows}
    source = {option.name: option.default for option in fields(Source)}
    said = {"none": None, "false": False, "renormalize": "renormalize", "0": 0, "0.5": 0.5}
    for name, default in documented.items():
        if name == "weight":
            continue
        assert source[name] == said[default] or (name == "cache" and source[name] is None), name
    assert set(ON_MISSING) <= set(re.findall(r"`(\w+)`", README))


def test_every_file_of_the_tree_is_there():
    tree = next(block for block in blocks("text") if block.startswith("trl_rewards/"))
    for name in re.findall(r"[\w/]+\.py", tree):
        places = [ROOT / name, ROOT / "trl_rewards" / name, *ROOT.glob(f"*/*/{name}")]
        assert any(place.is_file() for place in places), name
