"""The KL penalty of PPO: estimators per token, and the controller of its coefficient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ESTIMATORS = ("k1", "k2", "k3")


def kl_per_token(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str) -> torch.Tensor:
    """An estimate of KL(policy ‖ reference) from each sampled token's log-probabilities, same shape, float32.

    With d = log π - log π_ref (http://joschu.net/blog/kl-approx.html): k1 = d is unbiased and may be negative,
    k2 = d²/2 is biased and never negative, k3 = exp(-d) - 1 + d is unbiased and never negative.
    """
    difference = logps.float() - ref_logps.float()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")


@dataclass
class KLController:
    """The KL coefficient; with a target, one that moves toward it.

    https://huggingface.co/papers/1909.08593, section 2.2: after n sequences whose KL sums to `kl` on average, the
    coefficient is multiplied by 1 + n/horizon · clip(kl/target - 1, -0.2, 0.2). Never by less than a half: with a
    batch much larger than the horizon the formula would make it negative.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, sequences: int) -> None:
        """Look at a batch: its mean KL per sequence in nats, and how many sequences it had."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= max(1 + error * sequences / self.horizon, 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]
