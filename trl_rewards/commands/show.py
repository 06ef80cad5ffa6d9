"""What a component is, as text: for `trl-rewards show` and for the generated tables."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_rewards.components import KINDS, Advantage, Component, OutcomeObjective, Reward, Tool
from trl_rewards.errors import PluginError, did_you_mean
from trl_rewards.loading import option_docs, option_types, options_of, type_name
from trl_rewards.plugins import component_class, docstring, kinds, load_plugins, load_target
from trl_rewards.recipe_files import bundled_recipes

_PAPER = re.compile(r"https://(?:huggingface\.co/papers|arxiv\.org/abs)/[\w.]+")


class Option(NamedTuple):
    """One option of a component, as its author wrote it down."""

    name: str
    type: str
    default: str | None
    """As Python writes it; None where the option is required."""
    doc: str


class Description(NamedTuple):
    """Everything a YAML author wants to know of a component."""

    name: str
    kind: str
    traits: list[str]
    doc: str
    told: str
    """What a model is told of a tool; empty for others."""
    options: list[Option]
    """Those without a default first, then the component's own, then those of its bases."""
    columns: str
    paper: str
    recipes: list[str]
    example: str


def description(name: str, kind: str | None = None) -> Description:
    """What there is to say of a component. PluginError if there is none of that name."""
    if kind is not None and kind not in KINDS:
        raise PluginError(f"unknown kind {kind!r}; it is one of {', '.join(KINDS)}")
    kind = kind or _kind_of(name)
    cls: Any = component_class(kind, name)
    if not isinstance(cls, type):
        doc = inspect.getdoc(cls) or ""
        use = f"  rewards:\n    - {{use: {name}}}"
        return Description(name, kind, ["a TRL reward function"], doc, "", [], "", "", recipes_of(name, kind), use)
    types, docs = option_types(cls), option_docs(cls)
    options = [
        Option(o.name, type_name(types[o.name]), _default(o), " ".join(docs.get(o.name, "").split()))
        for o in _most_telling_first(cls)
    ]
    return Description(
        name,
        kind,
        _traits(cls),
        docstring(cls),
        cls.description if issubclass(cls, Tool) else "",
        options,
        _columns(cls),
        paper_of(cls),
        recipes_of(name, kind),
        example(name, kind, cls),
    )


def describe(name: str, kind: str | None = None) -> str:
    """A component's description as text. PluginError if there is none of that name."""
    said = description(name, kind)
    lines = [" · ".join([f"{said.name}", said.kind, *([", ".join(said.traits)] if said.traits else [])]), ""]
    lines += [said.doc or "no documentation", ""]
    if said.told:
        lines += [f"A model is told: {said.told}", ""]
    lines += ["Options" if said.options else "No options."]
    for option in said.options:
        default = f" = {option.default}" if option.default is not None else "  (required)"
        lines.append(f"  {option.name}: {option.type}{default}")
        if option.doc:
            lines.append(f"      {option.doc}")
    if said.columns:
        lines += ["", f"Reads dataset columns: {said.columns}"]
    if said.paper:
        lines += ["", f"Paper: {said.paper}"]
    if said.recipes:
        lines += ["", f"Recipes: {', '.join(said.recipes)}"]
    return "\n".join([*lines, "", place(said.kind), "", said.example])


def place(kind: str) -> str:
    """Where the example of a kind stands."""
    return "On the command line" if kind == "selector" else "In a recipe"


def _most_telling_first(cls: type[Component]) -> list[dataclasses.Field]:
    """Options without a default, then the component's own, then those of its bases."""
    depth: dict[str, int] = {}
    for level, base in enumerate(cls.__mro__):
        for name in inspect.get_annotations(base):
            depth.setdefault(name, level)
    return sorted(options_of(cls), key=lambda option: (_default(option) is not None, depth[option.name]))


def _kind_of(name: str) -> str:
    if ":" in name:
        found = load_target(name)
        fitting = [kind for kind, bases in KINDS.items() if isinstance(found, type) and issubclass(found, bases)]
        return fitting[0] if fitting else "reward"
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


def _traits(cls: type[Component]) -> list[str]:
    traits: list[str] = []
    if issubclass(cls, Reward):
        traits += ["sees whole groups"] if cls.scope == "group" else []
        traits += [] if cls.deterministic else ["not deterministic"]
    if issubclass(cls, Advantage):
        traits += [f"{cls.level} level"] + [f"needs {', '.join(sorted(cls.needs))}"] * bool(cls.needs)
    if issubclass(cls, Tool):
        traits += [f"answers to {', '.join(cls.answers_to)}"] * bool(cls.answers_to)
    return traits


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


@cache
def _used(file: Path) -> dict[str, set[str]]:
    """What a bundled recipe uses, by kind. Kept: each component's page asks every recipe."""
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
