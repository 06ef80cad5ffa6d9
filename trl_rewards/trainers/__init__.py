"""TRL's trainers with one more argument or two: `pipeline=`, `pairs=`, `objective=`."""

from __future__ import annotations

import importlib

_CLASSES = {
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
    "ppo": "PPOTrainer",
    "dpo": "DPOTrainer",
    "reward": "RewardTrainer",
    "kto": "KTOTrainer",
}


def trainer_class(name: str) -> type:
    """The trainer that a recipe's `trainer:` names."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])
