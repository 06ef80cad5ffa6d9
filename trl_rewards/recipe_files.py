"""Recipes as files and as words of the command line: where they are, how YAML is read, what overrides change."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from trl_rewards.errors import RecipeError, did_you_mean

OWN_KEYS = (
    "trainer",
    "rewards",
    "combine",
    "shape",
    "advantage",
    "pairs",
    "objective",
    "members",
    "share_base",
    "filter",
    "alarms",
    "pre_clip",
    "dataset",
    "base_dir",
)
"""What is not TRL's in a recipe."""


def recipe_folders() -> list[Path]:
    """Where bundled recipes are: in an installed wheel, or in the checkout."""
    here = Path(__file__).parent
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()]


def bundled_recipes() -> dict[str, Path]:
    """{name: file} of the recipes that come with the project, such as `quickstart` or `bleuberi/cpu`."""
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in recipe_folders()
        for file in sorted(folder.rglob("*.yaml"))
        if file.parent.name not in ("accelerate", "claims")  # launch configurations, and what compares recipes
    }


def find_recipe(source: str) -> str:
    """The file of a path or bundled name. RecipeError if there is neither."""
    if os.path.isfile(source):
        return source
    known = bundled_recipes()
    if source in known:
        return str(known[source])
    hint = did_you_mean(source, known) or f"; there are {len(known)}, such as {', '.join(list(known)[:5])}"
    raise RecipeError([f"no such file, nor a bundled recipe{hint}"], source=source)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML is 1.1: `1e-6` is a number, `no` (TRL's `save_strategy: no`) a word, keys come once."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as the text it is, such as '1e5'."""


_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """What YAML says, read as recipes are. yaml.YAMLError if it is none."""
    return yaml.load(text, _Loader)  # a SafeLoader


def read_yaml(file: str, source: str, what: str = "a recipe") -> dict[str, Any]:
    try:
        raw = load_yaml(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        raise RecipeError([f"not YAML: {line}{getattr(error, 'problem', None) or error}"], source=source) from None
    if raw is None:
        raise RecipeError([f"the file is empty; {what} is a mapping of keys"], source=source)
    if not isinstance(raw, dict):
        raise RecipeError([f"{what} is a mapping of keys, got a {type(raw).__name__}"], source=source)
    return raw


def write_yaml(file: Path, comment: str, raw: Mapping[str, Any]) -> None:
    """Write what `read_yaml` reads as the same, below lines of comment."""
    text = yaml.dump(dict(raw), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    file.write_text(f"{comment}{text}", encoding="utf-8")


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Put overrides into a raw recipe. A dotted path goes into our keys, a plain name is one of TRL's."""
    problems: list[str] = []
    pairs = dict(overrides) if isinstance(overrides, Mapping) else _words_to_pairs(overrides, problems)
    for path, value in pairs.items():
        head, *rest = path.split(".")
        if rest and head not in OWN_KEYS:
            problems.append(f"--{path}: {head!r} is not one of {', '.join(OWN_KEYS)}{did_you_mean(head, OWN_KEYS)}")
        elif problem := _put(raw, [head, *rest], value):
            problems.append(f"--{path}: {problem}")
    return problems


def _words_to_pairs(words: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """`--a 1 --b.c=2 --flag` -> {"a": 1, "b.c": 2, "flag": True}; several words after a name make a list."""
    pairs: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            pairs[name] = [value] if equals else []
        elif name is None:
            problems.append(f"unexpected word {word!r}; overrides are written --name value")
        else:
            pairs[name].append(word)
    values = {name: [word_value(word) for word in found] for name, found in pairs.items()}
    return {name: True if not found else found[0] if len(found) == 1 else found for name, found in values.items()}


def word_value(word: str) -> Any:
    """A word of the command line: a number, true, null, "quoted text", [a, b] or {a: b} as in YAML; else the text."""
    try:
        value = load_yaml(word)
    except yaml.YAMLError:
        return word
    if isinstance(value, str):
        return value if word[0] in "\"'" else word
    if isinstance(value, dict | list):
        return value if word[0] in "{[" else word
    return word if value is None and word not in ("null", "~") else value


def _put(target: Any, path: list[str], value: Any) -> str | None:
    """Set a value deep in nested mappings and lists; returns what is wrong with the path, or None."""
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(target, list):
            index = _index(target, key)
            if index is None:
                names = ", ".join(source_name(entry) for entry in target)
                return f"no entry {key!r} among {len(target)} ({names})"
            if last:
                target[index] = value
                return None
            if isinstance(target[index], str):  # the short form `- bleuberi`
                target[index] = {"use": target[index]}
            target = target[index]
        elif isinstance(target, dict):
            if last:
                if key == "use" and target.get("use") != value:
                    target.pop("with", None)  # the options of another component
                target[key] = value
                return None
            if isinstance(target.get(key), str):
                target[key] = {"use": target[key]}
            if target.get(key) is None:  # absent, or an empty `with:`
                target[key] = {}
            target = target[key]
        else:
            return f"{'.'.join(path[:depth])} is {target!r}, which has no {key!r}"
    return None


def _index(entries: list, key: str) -> int | None:
    if key.isdecimal():
        return int(key) if int(key) < len(entries) else None
    return next((index for index, entry in enumerate(entries) if source_name(entry) == key), None)


def source_name(entry: Any) -> str:
    """The display name of an entry under `rewards:`: `as`, or the last part of `use`."""
    named = str((entry.get("as") or entry.get("use")) if isinstance(entry, dict) else entry)
    return named.rpartition(":")[2] if ":" in named else named.rpartition("/")[2]
