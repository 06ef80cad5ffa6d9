"""A reward that is far off now and then, for stable-reinforce.yaml."""

from __future__ import annotations

import random

CHANCE, SIZE = 1 / 32, 20.0


def glitch(completions, trainer_state, **_) -> list[float]:
    """-20 or 20 for one answer of 32, like a judge's number with a digit too many, and 0 for the others."""
    rng = random.Random(f"{trainer_state.global_step} {completions}")
    return [rng.choice((-SIZE, SIZE)) if rng.random() < CHANCE else 0.0 for _ in completions]
