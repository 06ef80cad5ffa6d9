"""The hooks a plugin may implement. Mark yours with `@trl_rewards.hookimpl`.

Declarations are called once, when plugins are loaded, and return `{name: class}` or `{name: "module:Class"}`; the
string form is imported only when the component is asked for, which keeps `trl-rewards list` quick.
Moments are called while a run goes on. Scoring never goes through a hook: a recipe is an ordered choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from trl_rewards.components import Advantage, Combiner, Objective, OutcomeObjective, Reward, Selector, Shaper, Tool
    from trl_rewards.recipe import Recipe

PROJECT = "trl_rewards"  # plugin manager, marker and entry-point group share this name
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_rewards() -> Mapping[str, type[Reward] | str]:
    """Reward sources, by the name that recipes use under `rewards:`."""
    return {}


@hookspec
def register_combiners() -> Mapping[str, type[Combiner] | str]:
    """Combiners (N, K) -> (N,), by the name that recipes use under `combine:`."""
    return {}


@hookspec
def register_shapers() -> Mapping[str, type[Shaper] | str]:
    """Shapers (N,) -> (N,), by the name that recipes use under `shape:`, of one source or of the total."""
    return {}


@hookspec
def register_advantages() -> Mapping[str, type[Advantage] | str]:
    """Advantages (N,) -> (N,) or (N, T), by the name that recipes use under `advantage:`."""
    return {}


@hookspec
def register_objectives() -> Mapping[str, type[Objective] | type[OutcomeObjective] | str]:
    """Objectives, by the name that recipes with `trainer: reward` or `trainer: kto` use under `objective:`."""
    return {}


@hookspec
def register_selectors() -> Mapping[str, type[Selector] | str]:
    """Selectors of training rows, by the name that `trl-rewards select --selector` uses."""
    return {}


@hookspec
def register_tools() -> Mapping[str, type[Tool] | str]:
    """Tools that a reward's model may call while it writes, by the name that recipes use under its `tools:`."""
    return {}


@hookspec
def trainer_ready(trainer: Any, recipe: Recipe) -> None:
    """A recipe's trainer has been built, before the first step. Add callbacks here. The return value is ignored."""


@hookspec
def batch_scored(batch: Any, step: int) -> None:
    """A training batch has its rewards, on every rank, before advantages. `batch`: a RewardBatch, to be read only."""
