"""The commands in the headers of recipes: of ours with options that exist, of Python with files that do."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
import typer

from trl_rewards import Recipe
from trl_rewards.cli import app
from trl_rewards.recipe import spec_of_word
from trl_rewards.recipe_files import bundled_recipes

ROOT = Path(__file__).parent.parent
STARTS = ("trl-rewards ", "accelerate launch ", "python ", "… ")


def header_commands(file: Path) -> list[list[str]]:
    """The words of the commands in a recipe's header, indented by three blanks; `…` is the recipe's launch."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    joined = "\n".join(lines).replace("\\\n#", " ").splitlines()
    said = [line[1:].strip() for line in joined if line.startswith("#   ")]
    return [shlex.split(line, comments=True) for line in said if line.startswith(STARTS)]


COMMANDS = [
    pytest.param(name, words, id=f"{name}: {' '.join(words)}")
    for name, file in bundled_recipes().items()
    for words in header_commands(file)
]


@pytest.mark.parametrize(("name", "words"), COMMANDS)
def test_a_headers_command_exists_with_its_options(name, words):
    match words:
        case ["trl-rewards", command, *rest]:
            context = typer.main.get_command(app).commands[command].make_context(command, rest)
            if config := context.params.get("config"):
                Recipe.load(config, check_trl=False)
            for reward in context.params.get("reward") or ():
                spec_of_word(reward, "--reward")
        case ["accelerate", "launch", "recipes/train.py", "--config", recipe, *overrides]:
            Recipe.load(ROOT / recipe, ["--use_cpu", "true", *overrides])
        case ["…", *overrides]:
            Recipe.load(name, ["--use_cpu", "true", *overrides])
        case ["python", "-m", module, *rest]:
            source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("--") and word != "--help")
        case ["python", script, *rest]:
            source = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
        case _:
            assert words[:3] == ["accelerate", "launch", "--config_file"]
            assert (ROOT / words[3]).is_file()
