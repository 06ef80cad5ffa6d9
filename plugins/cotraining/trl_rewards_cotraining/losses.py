"""What a reward model in co-training minimises, one loss per row: plain functions of scores with gradient.

https://huggingface.co/papers/2508.05613 (Cooper) and https://huggingface.co/papers/2511.20256 (Adv-GRPO).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def preference_loss(better: Tensor, worse: Tensor) -> Tensor:
    """-log σ(better - worse): (B,), (B,) -> (B,). Cooper's, and Adv-GRPO's softmax over reference and generation."""
    from torch.nn.functional import softplus

    return softplus(worse - better)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(max(0, 1 - real) + max(0, 1 + fake)) / 2: (B,), (B,) -> (B,). Adv-GRPO's discriminator."""
    return 0.5 * ((1 - real).relu() + (1 + fake).relu())


def logistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-(log σ(real) + log σ(-fake)) / 2: (B,), (B,) -> (B,). The score learns the log density ratio.

    https://huggingface.co/papers/2509.25035 has it as a reward.
    """
    from torch.nn.functional import softplus

    return 0.5 * (softplus(-real) + softplus(fake))


def policy_reward(logit: float, threshold: float | None) -> float:
    """σ(logit); with a threshold 1 where that is above it, else 0."""
    import math

    value = 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
    return value if threshold is None else float(value > threshold)
