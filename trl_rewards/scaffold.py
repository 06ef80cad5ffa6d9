"""`trl-rewards new`: a third-party plugin, complete and small."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from trl_rewards.errors import PluginError

_MODULE = '''"""What this reward measures, in a sentence."""

from trl_rewards import Reward, hookimpl


class {cls}(Reward):
    """Share of the completion's words that are different, in [0, 1]. Replace this with your idea."""

    columns = ()  # dataset columns that you read with samples["name"]

    lower: bool = True
    """Count `The` and `the` as one word."""

    def score(self, samples):
        return [distinct_share(text.lower() if self.lower else text) for text in samples.texts]


def distinct_share(text: str) -> float | None:
    """Different words / words; None, "no opinion", where there are no words."""
    words = text.split()
    return len(set(words)) / len(words) if words else None


@hookimpl
def register_rewards():
    return {{"{name}": {cls}}}
'''

_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "The reward `{name}` for trl-rewards."
requires-python = ">=3.11"
dependencies = ["trl-rewards"]

[project.entry-points.trl_rewards]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""

_TEST = """from trl_rewards.testing import check_reward, make_samples

from {module} import {cls}


def test_keeps_the_contract():
    check_reward({cls}())


def test_repeated_words_cost():
    samples = make_samples(completions=["one two", "one one", ""])
    assert {cls}().score(samples) == [1.0, 0.5, None]
"""

_README = """# {distribution}

The reward `{name}` for [TRL](https://github.com/huggingface/trl) trainers, as a trl-rewards plugin.

    pip install -e . pytest && python -m pytest

In a recipe:

    rewards:
      - use: {name}
        with: {{lower: true}}

In a plain TRL script:

    from trl import GRPOTrainer
    from {module} import {cls}

    GRPOTrainer(reward_funcs=[{cls}()], ...)
"""


def write_plugin(name: str, folder: Path) -> Path:
    """Write the plugin into a new folder and return it. PluginError if the name or the folder will not do."""
    component = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", component) or keyword.iskeyword(component):
        raise PluginError(
            f"a plugin's name is lower-case letters, digits, '_' and '-', such as my_reward; got {name!r}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(f"{folder} exists and is not an empty folder; give another name, or --folder")
    words = {
        "name": component,
        "module": f"trl_rewards_{component}",
        "distribution": f"trl-rewards-{component.replace('_', '-')}",
        "cls": "".join(part.capitalize() for part in component.split("_")),
    }
    files = {
        f"{words['module']}.py": _MODULE,
        "pyproject.toml": _PYPROJECT,
        f"tests/test_{component}.py": _TEST,
        "README.md": _README,
    }
    for path, template in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(template.format(**words), encoding="utf-8")
    return folder
