"""What a component is, as text: for `trl-rewards show` and for the generated tables."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from trl_rewards.components import KINDS, Advantage, Component, OutcomeObjective, Reward, Tool
from trl_rewards.errors import PluginError, did_you_mean
from trl_rewards.loading import option_docs, option_types, options_of, type_name
from trl_rewards.plugins import component_class, docstring, kinds, load_plugins
from trl_rewards.recipe import bundled_recipes

_PAPER = re.compile(r"https://(?:huggingface\.co/papers|arxiv\.org/abs)/[\w.]+")


def describe(name: str, kind: str | None = None) -> str:
    """Everything a YAML author wants to know of a component. PluginError if there is none of that name."""
    if kind is not None and kind not in KINDS:
        raise PluginError(f"unknown kind {kind!r}; it is one of {', '.join(KINDS)}")
    kind = kind or _kind_of(name)
    cls: Any = component_class(kind, name)
    if not isinstance(cls, type):
        return f"{name} (a TRL reward function)\n\n{inspect.getdoc(cls) or 'no documentation'}"
    lines = [f"{name} · {kind}{_traits(cls)}", "", docstring(cls) or "no documentation", ""]
    if issubclass(cls, Tool):
        lines += [f"A model is told: {cls.description}", ""]
    lines += ["Options" if options_of(cls) else "No options."]
    types, docs = option_types(cls), option_docs(cls)
    for option in _most_telling_first(cls):
        default = _default(option)
        said = f" = {default}" if default is not None else "  (required)"
        lines.append(f"  {option.name}: {type_name(types[option.name])}{said}")
        if option.name in docs:
            lines.append("      " + " ".join(docs[option.name].split()))
    if columns := _columns(cls):
        lines += ["", f"Reads dataset columns: {columns}"]
    if paper := paper_of(cls):
        lines += ["", f"Paper: {paper}"]
    if recipes := recipes_of(name, kind):
        lines += ["", f"Recipes: {', '.join(recipes)}"]
    place = "On the command line" if kind == "selector" else "In a recipe"
    return "\n".join([*lines, "", place, "", example(name, kind, cls)])


def _most_telling_first(cls: type[Component]) -> list[dataclasses.Field]:
    """Options without a default, then the component's own, then those of its bases."""
    depth: dict[str, int] = {}
    for level, base in enumerate(cls.__mro__):
        for name in inspect.get_annotations(base):
            depth.setdefault(name, level)
    return sorted(options_of(cls), key=lambda option: (_default(option) is not None, depth[option.name]))


def _kind_of(name: str) -> str:
    if ":" in name:
        return "reward"
    registry = load_plugins()
    bare = name.rpartition("/")[2]
    found = [kind for kind in kinds() if any(entry.name == bare for entry in registry.of_kind(kind))]
    if not found:
        known = [entry.name for entry in registry.entries]
        broken = "".join(f"; plugin {plugin.name!r} is broken ({plugin.broken})" for plugin in registry.broken)
        raise PluginError(f"no component {name!r}{did_you_mean(name, known)}; `trl-rewards list` shows all{broken}")
    if len(found) > 1:
        raise PluginError(f"{name!r} is a {' and a '.join(found)}; say which with --kind")
    return found[0]


def _traits(cls: type[Component]) -> str:
    traits = []
    if issubclass(cls, Reward):
        traits += ["sees whole groups"] if cls.scope == "group" else []
        traits += [] if cls.deterministic else ["not deterministic"]
    if issubclass(cls, Advantage):
        traits += [f"{cls.level} level"] + [f"needs {', '.join(sorted(cls.needs))}"] * bool(cls.needs)
    if issubclass(cls, Tool):
        traits += [f"answers to {', '.join(cls.answers_to)}"] * bool(cls.answers_to)
    return f" · {', '.join(traits)}" if traits else ""


def _default(option: dataclasses.Field) -> str | None:
    if option.default is not dataclasses.MISSING:
        return repr(option.default)
    if option.default_factory is not dataclasses.MISSING:
        return repr(option.default_factory())
    return None


def _columns(cls: type[Component]) -> str:
    """Columns read with default options; empty where required options decide."""
    try:
        return ", ".join("all" if name == "*" else name for name in cls().reads())
    except (TypeError, ValueError):
        return ", ".join("all" if name == "*" else name for name in cls.columns)


def paper_of(cls: type[Component]) -> str:
    """The first paper link of the class's docstring."""
    found = _PAPER.search(cls.__doc__ or "")
    return found.group().rstrip(".") if found else ""


def recipes_of(name: str, kind: str) -> list[str]:
    """Bundled recipes that use a component."""
    return [recipe for recipe, file in bundled_recipes().items() if name in _used(file)[kind]]


@functools.cache
def _used(file: Path) -> dict[str, set[str]]:
    raw = yaml.safe_load(file.read_text()) or {}
    sources = [entry if isinstance(entry, dict) else {"use": entry} for entry in raw.get("rewards") or []]
    shapers = [*(raw.get("shape") or []), *(spec for source in sources for spec in source.get("shape") or [])]

    def names(specs: list[Any]) -> set[str]:
        return {spec if isinstance(spec, str) else spec.get("use", "") for spec in specs if spec}

    return {
        "reward": names(sources),
        "shaper": names(shapers),
        "combiner": names([raw.get("combine", "weighted_sum")] if sources else []),
        "advantage": names([raw.get("advantage")]),
        "objective": names([raw.get("objective")]),
        "selector": set(),
        "tool": names([tool for source in sources for tool in (source.get("with") or {}).get("tools") or []]),
    }


def _trainer_of(objective: type[Component]) -> str:
    return "kto" if issubclass(objective, OutcomeObjective) else "reward"


def example(name: str, kind: str, cls: type[Component]) -> str:
    """The YAML, or command, that uses a component with its required options."""
    required = {o.name: f"<{o.name}>" for o in options_of(cls) if _default(o) is None}
    use = (
        f"{{use: {name}"
        + (f", with: {{{', '.join(f'{k}: {v}' for k, v in required.items())}}}" if required else "")
        + "}"
    )
    return {
        "reward": f"  rewards:\n    - {use}",
        "shaper": f"  shape: [{use}]",
        "combiner": f"  combine: {use}",
        "advantage": f"  advantage: {use}",
        "objective": f"  trainer: {_trainer_of(cls)}\n  objective: {use}",
        "selector": f"  trl-rewards select --selector {repr(use) if required else name} --count <count> …",
        "tool": f"  rewards:\n    - use: <a reward that uses tools>\n      with: {{tools: [{use}]}}",
    }.get(kind, f"  {use}")
