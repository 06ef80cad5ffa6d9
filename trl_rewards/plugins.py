"""Finding components: installed plugins, one-file plugins, dotted paths. Hooks are declared in `hookspecs`.

A plugin is a module named in the entry-point group `trl_rewards`. One that cannot be imported, implements a hook that
does not exist, or raises while registering is listed as broken with its reason; all others go on working.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from trl_rewards import hookspecs
from trl_rewards.components import KINDS, Component, looked_in, resolve_path
from trl_rewards.errors import PluginError, did_you_mean

GROUP = hookspecs.PROJECT
logger = logging.getLogger(__name__)
_REGISTRATIONS = {  # hook -> kind of component it declares
    "register_rewards": "reward",
    "register_combiners": "combiner",
    "register_shapers": "shaper",
    "register_advantages": "advantage",
    "register_objectives": "objective",
    "register_selectors": "selector",
    "register_tools": "tool",
}
_VARIABLES = ("TRL_REWARDS_PLUGINS", "TRL_REWARDS_DISABLE")
_REASON = "{type}: {error}"


@dataclass(frozen=True)
class Plugin:
    """An installed plugin and what it offers."""

    name: str
    distribution: str
    version: str
    module: str
    hooks: tuple[str, ...] = ()
    broken: str | None = None
    """Why it could not be used; None for a working plugin."""


@dataclass(frozen=True)
class Entry:
    """A registered component: its name, its owner, and where its class is."""

    kind: str
    name: str
    owner: str
    target: type | str

    def load(self) -> Any:
        """The class itself; PluginError says which plugin failed and why."""
        if not isinstance(self.target, str):
            return self.target
        try:
            return _import_target(self.target)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.kind} {self.name!r} of plugin {self.owner!r} cannot be imported from {self.target!r}: "
                + _REASON.format(type=type(error).__name__, error=error)
            ) from error


@dataclass
class Registry:
    """What `load_plugins` found."""

    manager: pluggy.PluginManager
    plugins: list[Plugin] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.broken]

    def of_kind(self, kind: str) -> list[Entry]:
        return sorted((entry for entry in self.entries if entry.kind == kind), key=lambda entry: entry.name)

    def find(self, kind: str, name: str) -> Entry:
        """The entry for `name` or `plugin/name`; PluginError with both owners if claimed twice, or with a hint."""
        owner, _, bare = name.rpartition("/")
        named = [entry for entry in self.of_kind(kind) if entry.name == bare]
        found = [entry for entry in named if not owner or entry.owner == owner]
        if len(found) == 1:
            return found[0]
        if found:
            owners = " and ".join(repr(entry.owner) for entry in found)
            choices = " or ".join(f"'{entry.owner}/{bare}'" for entry in found)
            raise PluginError(f"{kind} {bare!r} is provided by both {owners}; write {choices}")
        raise PluginError(self._not_found(kind, name, named))

    def tell(self, hook: str, **news: Any) -> None:
        """Call a moment's hook in every plugin. One that raises is named in a warning; the run goes on."""
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                impl.function(*(news[name] for name in impl.argnames))
            except Exception:
                logger.warning("plugin %r failed in %s", impl.plugin_name, hook, exc_info=True)

    def _not_found(self, kind: str, name: str, named: list[Entry]) -> str:
        if not self.plugins:
            return f"no plugins found, so no {kind} {name!r}; {why_none()}"
        if named:
            return f"{kind} {name!r} does not exist; {named[0].name!r} is provided by {named[0].owner!r}"
        known = [entry.name for entry in self.of_kind(kind)]
        parts = [f"unknown {kind} {name!r}{did_you_mean(name, known)}"]
        elsewhere = sorted({entry.kind for entry in self.entries if entry.name == name})
        if elsewhere:
            parts.append(f"{name!r} is a {' and a '.join(elsewhere)}")
        for plugin in self.broken:
            parts.append(f"plugin {plugin.name!r} might provide it but is broken ({plugin.broken})")
        parts += [f"{name}={os.environ[name]!r} is set" for name in _VARIABLES if name in os.environ]
        parts.append(f"`trl-rewards list {kind}` shows all {len(known)}")
        return "; ".join(parts)


def load_plugins() -> Registry:
    """All installed plugins, found once per process.

    `TRL_REWARDS_DISABLE=a,b` leaves plugins out, `TRL_REWARDS_PLUGINS=a,b` takes only these.
    """
    return _in_use[-1] if _in_use else discover()


_in_use: list[Registry] = []


@contextmanager
def use_registry(registry: Registry) -> Generator[Registry]:
    """Inside the block, names are looked up in this registry."""
    _in_use.append(registry)
    try:
        yield registry
    finally:
        _in_use.pop()


@functools.cache
def discover() -> Registry:
    """Import what the entry points name. `discover.cache_clear()` makes the next call look again."""
    registry = new_registry()
    disabled, only = _names_in("TRL_REWARDS_DISABLE"), _names_in("TRL_REWARDS_PLUGINS")
    for entry_point in sorted(entry_points(group=GROUP), key=lambda found: found.name):
        if entry_point.name in (disabled or ()) or (only is not None and entry_point.name not in only):
            continue
        _add_entry_point(registry, entry_point)
    return registry


def new_registry() -> Registry:
    """A registry without any plugin, for tests and for tools that register their own."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    return Registry(manager)


def add_plugin(registry: Registry, module: Any, name: str, distribution: str = "", version: str = "") -> Plugin:
    """Register one plugin object and call its declarations; a broken one is listed with its reason."""
    hooks: list[str] = []
    entries: list[Entry] = []
    broken = None
    known = registry.manager.is_registered(module)  # under another name: that one must go on working
    try:
        _refuse_unknown_hooks(registry.manager, module)
        registry.manager.register(module, name=name)
        for hook, kind in _REGISTRATIONS.items():
            for impl in getattr(registry.manager.hook, hook).get_hookimpls():
                if impl.plugin is module:
                    entries += _declared(hook, kind, name, impl.function())
        hooks = [caller.name for caller in registry.manager.get_hookcallers(module) or ()]
    except (Exception, SystemExit) as error:
        broken = _REASON.format(type=type(error).__name__, error=error)
        if registry.manager.is_registered(module) and not known:
            registry.manager.unregister(module)
    plugin = Plugin(name, distribution, version, getattr(module, "__name__", repr(module)), tuple(hooks), broken)
    registry.plugins.append(plugin)
    if not broken:
        registry.entries += entries
    return plugin


def _add_entry_point(registry: Registry, entry_point: EntryPoint) -> None:
    distribution = entry_point.dist.name if entry_point.dist else ""
    version = entry_point.dist.version if entry_point.dist else ""
    try:
        module = entry_point.load()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything, or call sys.exit()
        reason = _REASON.format(type=type(error).__name__, error=error)
        registry.plugins.append(Plugin(entry_point.name, distribution, version, entry_point.value, broken=reason))
        return
    add_plugin(registry, module, entry_point.name, distribution, version)


def _refuse_unknown_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    known = {name for name in vars(hookspecs) if manager.parse_hookspec_opts(hookspecs, name)}
    for attribute in dir(module):
        if manager.parse_hookimpl_opts(module, attribute) is not None and attribute not in known:
            raise PluginError(f"implements an unknown hook {attribute!r}{did_you_mean(attribute, known)}")


def _declared(hook: str, kind: str, owner: str, declared: Any) -> list[Entry]:
    if not hasattr(declared, "items"):
        raise TypeError(f'{hook} must return {{name: class or "module:Class"}}, got {type(declared).__name__}')
    for name, target in declared.items():
        if not isinstance(name, str) or not name or "/" in name or ":" in name:
            raise ValueError(f"{hook}: a name must be a non-empty string without '/' and ':', got {name!r}")
        wanted = KINDS.get(kind)
        if not isinstance(target, str) and wanted and not (isinstance(target, type) and issubclass(target, wanted)):
            raise TypeError(f"{hook}: {name!r} must be a {_names(wanted)} class or 'module:Class', got {target!r}")
    return [Entry(kind, name, owner, target) for name, target in declared.items()]


def component_class(kind: str, use: str, base_dir: str = ".") -> Any:
    """What `use:` names: a component class, or for rewards also a plain TRL reward function.

    `use` is a registered name, `plugin/name`, `./file.py:attribute` or `package.module:attribute`. Relative files are
    looked for in `base_dir` (the recipe's folder), then in the working directory. Raises PluginError.
    """
    found = load_target(use, base_dir) if ":" in use else load_plugins().find(kind, use).load()
    wanted = KINDS[kind]
    if isinstance(found, type) and issubclass(found, wanted):
        return found
    if kind == "reward" and callable(found) and not isinstance(found, type):
        return found
    raise PluginError(f"{use!r} is not a {_names(wanted)} class but {found!r}; subclass trl_rewards.{_names(wanted)}")


def _names(classes: tuple[type[Component], ...]) -> str:
    return " or ".join(cls.__name__ for cls in classes)


def load_target(target: str, base_dir: str = ".") -> Any:
    """The object that `./file.py:attribute` or `package.module:attribute` names; PluginError says what is there."""
    place, _, attribute = target.rpartition(":")
    try:
        module = _load_file(place, base_dir) if place.endswith(".py") else _import_module(place)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        reason = _REASON.format(type=type(error).__name__, error=error)
        raise PluginError(f"{place!r} (in {target!r}) cannot be imported: {reason}") from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise PluginError(f"{place!r} has no {attribute!r}{did_you_mean(attribute, public)}") from None


def _import_module(name: str) -> ModuleType:
    """A module by its dotted name, from the working directory too, as `trl grpo --reward_funcs` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _load_file(path: str, base_dir: str) -> ModuleType:
    resolved = os.path.realpath(resolve_path(path, base_dir))
    if not os.path.isfile(resolved):
        raise PluginError(f"no file {path!r} in {looked_in(base_dir)}")
    # One module per file, so that two components of one file share it and its classes pickle within the process.
    digest = hashlib.blake2b(resolved.encode(), digest_size=6).hexdigest()
    name = f"trl_rewards_file_{os.path.splitext(os.path.basename(resolved))[0]}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None  # always so for a path that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_target(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def why_none() -> str:
    """What to do where no plugin was found at all."""
    for variable in _VARIABLES:
        if variable in os.environ:
            return f"{variable}={os.environ[variable]!r} leaves none; unset it or name others"
    return 'run "pip install -e ." in the checkout'


def _names_in(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def first_sentence(cls: type[Component]) -> str:
    """The first sentence of a component's docstring, for lists."""
    doc = docstring(cls).split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<!\bDr)\.\s", doc)[0].removesuffix(".") + "." if doc else ""


def docstring(cls: type) -> str:
    """What a class says of itself; empty where it is only what dataclass wrote, its signature."""
    doc = cls.__doc__ or ""
    return "" if doc.startswith(f"{cls.__name__}(") else inspect.cleandoc(doc)


def kinds() -> list[str]:
    """The kinds of component that plugins register."""
    return list(_REGISTRATIONS.values())
