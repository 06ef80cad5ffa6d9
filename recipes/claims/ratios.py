"""Does training go on where ratios are extreme? What stable-reinforce.yaml asks besides.

    python ratios.py train OUT RECIPE --seed 0 --by stable       # or plain: REINFORCE++, without the limit

One token in 64 is planted a log-probability that is 100 off, more or less, as by a sampler that is not the policy that
it was taken for: the ratio is then infinite in float32, or 0. A run ends with the first gradient that is not finite,
which would leave no weight that is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from parts import run
from transformers import TrainerCallback

from trl_rewards import Recipe
from trl_rewards.train import build_trainer

METHODS = {"stable": {}, "plain": {"advantage": {"use": "reinforce_plus_plus"}, "pre_clip": False}}
SHARE, SIZE = 1 / 64, 100.0
STEPS = 32


class Finite(TrainerCallback):
    """Counts the updates with a finite gradient, and ends training with the first other one."""

    def __init__(self):
        self.updates = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        if all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None):
            self.updates += 1
        else:
            control.should_training_stop = True
        return control


def train(out: Path, recipe: Path, seed: int, by: str) -> None:
    """Write the share of the updates that had a finite gradient, and, as every run does, what answers are worth."""
    settings = {"output_dir": str(out), "seed": seed, "max_steps": STEPS, "eval_steps": STEPS, "eval_on_start": True}
    whole = Recipe.load(recipe, [f"--{key}={value}" for key, value in settings.items()])
    trainer, _ = build_trainer(Recipe.parse(whole.raw | METHODS[by]))
    generator = torch.Generator().manual_seed(seed)
    scored = trainer._generate_and_score_completions

    def planted(inputs: Any) -> Any:
        batch = scored(inputs)
        if not trainer.model.training:
            return batch
        logps = batch["old_per_token_logps"]
        hit = torch.rand(logps.shape, generator=generator) < SHARE
        sign = torch.rand(logps.shape, generator=generator).sub(0.5).sign()
        batch["old_per_token_logps"] = logps + SIZE * sign * hit
        return batch

    trainer._generate_and_score_completions = planted
    finite = Finite()
    trainer.add_callback(finite)
    trainer.train()
    (out / "finite.json").write_text(json.dumps({"finite": finite.updates / STEPS}) + "\n")


if __name__ == "__main__":
    run(__doc__, {train: {"recipe": Path, "--seed": int, "--by": list(METHODS)}})
