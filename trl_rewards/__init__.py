"""trl-rewards: reward sources, shaping, aggregation and advantages for TRL trainers, as plugins composed in YAML."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl_rewards.components import (
    Advantage,
    Combiner,
    Context,
    Objective,
    OutcomeObjective,
    Outcomes,
    Preferences,
    Reward,
    RewardBatch,
    Score,
    Scores,
    Selector,
    Shaper,
    Status,
    TokenReward,
    TokenShaper,
    Tool,
    ToolCall,
    TrainableReward,
    Unweighted,
)
from trl_rewards.errors import PluginError, RecipeError, RewardError, ToolError
from trl_rewards.hookspecs import hookimpl
from trl_rewards.preclip import PreClip
from trl_rewards.samples import Failed, Samples, Traced

if TYPE_CHECKING:
    from trl_rewards.loading import (
        load_advantage,
        load_combiner,
        load_objective,
        load_reward,
        load_selector,
        load_shaper,
        load_tool,
    )
    from trl_rewards.pairs import PairOptions
    from trl_rewards.pipeline import Pipeline
    from trl_rewards.plugins import load_plugins, load_target
    from trl_rewards.recipe import Recipe
    from trl_rewards.scoring import World
    from trl_rewards.steps import StepReward
    from trl_rewards.trainers.dpo import DPOTrainer
    from trl_rewards.trainers.grpo import GRPOTrainer
    from trl_rewards.trainers.kto import KTOTrainer
    from trl_rewards.trainers.ppo import PPOTrainer
    from trl_rewards.trainers.ppo_config import PPOConfig
    from trl_rewards.trainers.reward import RewardTrainer
    from trl_rewards.trainers.rloo import RLOOTrainer

__version__ = "0.1.0"

_LAZY = {  # name -> module; loaded on first use, since torch and trl take seconds
    "load_reward": "loading",
    "load_combiner": "loading",
    "load_shaper": "loading",
    "load_advantage": "loading",
    "load_objective": "loading",
    "load_selector": "loading",
    "load_tool": "loading",
    "load_plugins": "plugins",
    "load_target": "plugins",
    "Recipe": "recipe",
    "Pipeline": "pipeline",
    "StepReward": "steps",
    "World": "scoring",
    "PairOptions": "pairs",
    "DPOTrainer": "trainers.dpo",
    "GRPOTrainer": "trainers.grpo",
    "KTOTrainer": "trainers.kto",
    "PPOConfig": "trainers.ppo_config",
    "PPOTrainer": "trainers.ppo",
    "RLOOTrainer": "trainers.rloo",
    "RewardTrainer": "trainers.reward",
}

__all__ = [
    "Advantage",
    "Combiner",
    "Context",
    "DPOTrainer",
    "Failed",
    "GRPOTrainer",
    "KTOTrainer",
    "Objective",
    "OutcomeObjective",
    "Outcomes",
    "PPOConfig",
    "PPOTrainer",
    "PairOptions",
    "Pipeline",
    "PluginError",
    "PreClip",
    "Preferences",
    "RLOOTrainer",
    "Recipe",
    "RecipeError",
    "Reward",
    "RewardBatch",
    "RewardError",
    "RewardTrainer",
    "Samples",
    "Score",
    "Scores",
    "Selector",
    "Shaper",
    "Status",
    "StepReward",
    "TokenReward",
    "TokenShaper",
    "Tool",
    "ToolCall",
    "ToolError",
    "Traced",
    "TrainableReward",
    "Unweighted",
    "World",
    "hookimpl",
    "load_advantage",
    "load_combiner",
    "load_objective",
    "load_plugins",
    "load_reward",
    "load_selector",
    "load_shaper",
    "load_target",
    "load_tool",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
