"""DR-IRL's scales: how hard the data is, and how well the policy responds.  https://huggingface.co/papers/2503.18991

No code was published; names and formulas are those of two independent notes on the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_rewards import Samples, Shaper

if TYPE_CHECKING:
    from torch import Tensor


def data_scale(hardness: Tensor, mean: float) -> Tensor:
    """α_D = σ(δ) / σ(mean δ), above 1 for what is harder than the mean: (N,) -> (N,)."""
    return hardness.sigmoid() * (1 + math.exp(-mean))


def response_scale(gaps: Tensor, tau: float) -> float:
    """α_M = σ(mean of the kept) / σ(mean) of reward gaps (N,); kept are those within √τ of the mean.

    1 where none is kept, or there is none. A gap is what the policy's answer lacks to the demonstration's reward.
    """
    there = gaps[~gaps.isnan()].double()
    if not there.numel():
        return 1.0
    mean = there.mean()
    kept = there[(there - mean).square() <= tau]
    return (kept.mean().sigmoid() / mean.sigmoid()).item() if kept.numel() else 1.0


class DifficultyScale(Shaper):
    """α · r, with the same α for all answers to a prompt: more for prompts that are hard.

    https://huggingface.co/papers/2503.18991. α = α_D · α_M: α_D = σ(δ) / σ(mean δ of the category) of the prompt's
    hardness δ, the mean running over all rows seen; α_M = σ(mean gap without outliers) / σ(mean gap) over the batch's
    rows of the category, a gap being what an answer lacks to the demonstration's reward. A z-score within groups would
    undo it: with `advantage: {use: center}` an answer's advantage is α · (r - group mean). The paper scales the z-score
    itself, which takes an advantage and not a shaper.
    """

    hardness: str = "hardness"
    """Dataset column with δ = 1 - W per prompt, W as `clause_similarity` gives it. A row without one has α_D = 1."""
    demonstration: str | None = None
    """Dataset column with the reward of the demonstration, by the source that is shaped; None: α_M is 1."""
    category: str | None = None
    """Dataset column whose values each have means of their own; None: all rows are one."""
    tau: float = 4.0
    """Gaps whose square distance from their mean is more are outliers; the paper's value is not known to us."""

    def __post_init__(self):
        if self.tau < 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")
        self._hardness: dict[str, list[float]] = {}
        """Sum and count of δ, by category."""

    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.hardness, self.demonstration, self.category) if name)

    def affine(self) -> bool:
        return True

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        import torch

        found = rewards.double().clone()
        categories = [str(value) for value in samples[self.category]] if self.category else [""] * len(samples)
        demonstrated = _numbers(samples[self.demonstration], rewards) if self.demonstration else rewards * torch.nan
        gaps = demonstrated - rewards.double()
        hardness = _numbers(samples[self.hardness], rewards)
        scored = ~rewards.isnan()
        for category in dict.fromkeys(categories):
            rows = torch.tensor([each == category for each in categories], device=rewards.device)
            known = hardness[rows & scored & ~hardness.isnan()]
            total, count = self._hardness.get(category, [0.0, 0])
            total, count = total + known.sum().item(), count + known.numel()
            self._hardness[category] = [total, count]
            scales = data_scale(hardness[rows], total / count if count else 0.0)
            found[rows] *= scales.nan_to_num(nan=1.0) * response_scale(gaps[rows], self.tau)
        return found.to(rewards.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"hardness": self._hardness}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hardness = state["hardness"]


def _numbers(values: Sequence[Any], like: Tensor) -> Tensor:
    """(N,) float64 of a column of numbers, None as NaN."""
    import torch

    numbers = [math.nan if value is None else value for value in values]
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)
