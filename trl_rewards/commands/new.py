"""`trl-rewards new`: a third-party plugin, complete and small."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import NamedTuple

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

_TOOL_MODULE = '''"""What this tool finds out, in a sentence."""

from trl_rewards import Tool, ToolError, hookimpl


class {cls}(Tool):
    """Counts the words of its input, or of the answer where there is none. Replace this with your idea."""

    description = "Counts words. Input: a text, or nothing for the answer itself."
    answers_to = ()  # further names that a model may write for it
    columns = ()  # dataset columns that you read with call.row["name"]

    at_most: int = 1000
    """Words that it is willing to count."""

    def call(self, input, call):
        count = len((input or call.answer).split())
        if count > self.at_most:
            raise ToolError(f"There are more than {{self.at_most}} words.")  # the model reads this
        return str(count)


@hookimpl
def register_tools():
    return {{"{name}": {cls}}}
'''

_SELECTOR_MODULE = '''"""Which rows this selector chooses, in a sentence."""

from trl_rewards import Selector, hookimpl


class {cls}(Selector):
    """The rows that score in a range, lowest first. Replace this with your idea."""

    low: float = 0.0
    """The lowest score that is chosen."""
    high: float = 0.5
    """The highest."""

    def select(self, scores, count, seed=0):
        rows = [row for row, score in enumerate(scores) if score is not None and self.low <= score <= self.high]
        return sorted(rows, key=lambda row: scores[row])[:count]


@hookimpl
def register_selectors():
    return {{"{name}": {cls}}}
'''

_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "The {kind} `{name}` for trl-rewards."
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

_TOOL_TEST = """from trl_rewards import ToolCall
from trl_rewards.testing import check_tool

from {module} import {cls}


def test_keeps_the_contract():
    check_tool({cls}(), "some words", "one")


def test_counts_the_answer_where_there_is_no_input():
    assert {cls}().call("", ToolCall("{name}", answer="one two")) == "2"
"""

_SELECTOR_TEST = """from trl_rewards.testing import check_selector

from {module} import {cls}


def test_keeps_the_contract():
    check_selector({cls}())


def test_rows_out_of_range_or_without_a_score_are_left():
    assert {cls}(high=0.5).select([0.4, 0.9, None, 0.1], 3) == [3, 0]
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


_TOOL_README = """# {distribution}

The tool `{name}` for trl-rewards: for reward models that use tools before they score.

    pip install -e . pytest && python -m pytest

In a recipe, among the tools of a reward that uses some:

    rewards:
      - use: themis
        with: {{path: my_model, tools: [calculator, {name}]}}

In Python:

    from trl_rewards import ToolCall, load_tool
    from trl_rewards.toolbox import Toolbox

    Toolbox([load_tool("{name}")]).run([("some words", ToolCall("{name}"))])
"""


_SELECTOR_README = """# {distribution}

The selector `{name}` for trl-rewards: it chooses training rows by their scores.

    pip install -e . pytest && python -m pytest

On the command line:

    trl-rewards select --selector "{{use: {name}, with: {{high: 0.3}}}}" --count 1000 --data ... --reward ... --out ...

In Python:

    from trl_rewards import load_selector

    rows = load_selector("{name}", high=0.3).select([0.2, 0.4, None], count=1000)
"""


class _Templates(NamedTuple):
    module: str
    test: str
    readme: str


_TEMPLATES = {
    "reward": _Templates(_MODULE, _TEST, _README),
    "selector": _Templates(_SELECTOR_MODULE, _SELECTOR_TEST, _SELECTOR_README),
    "tool": _Templates(_TOOL_MODULE, _TOOL_TEST, _TOOL_README),
}


def write_plugin(name: str, folder: Path, kind: str = "reward") -> Path:
    """Write a plugin with a reward, a selector or a tool into a new folder and return it.

    PluginError if the name, the folder or the kind will not do.
    """
    if kind not in _TEMPLATES:
        raise PluginError(f"new: --kind is one of {', '.join(_TEMPLATES)}, got {kind!r}")
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
        "kind": kind,
        "cls": "".join(part.capitalize() for part in component.split("_")),
    }
    templates = _TEMPLATES[kind]
    files = {
        f"{words['module']}.py": templates.module,
        "pyproject.toml": _PYPROJECT,
        f"tests/test_{component}.py": templates.test,
        "README.md": templates.readme,
    }
    for path, template in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(template.format(**words), encoding="utf-8")
    return folder
