"""Uncertainty-weighted optimisation: mean of the members less their variance.  https://huggingface.co/papers/2310.02743"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards import Samples, Scores, Unweighted
from trl_rewards.maths import std

if TYPE_CHECKING:
    from torch import Tensor


def uwo(members: Tensor, coef: float = 0.5, ddof: int = 0) -> Tensor:
    """Mean - coef · variance of each row's members, holes left out: (N, K) -> (N,) float64, NaN for a row without."""
    return members.double().nanmean(dim=1) - coef * std(members, ddof).square()


class UWO(Unweighted):
    """Mean of the members less `coef` times their variance: what they disagree on is worth less.

    https://huggingface.co/papers/2310.02743. The paper's WCO, the worst member, is `combine: {use: min}`. The members
    should be on one scale: reward models trained alike, at best with `center` in `bradley_terry` to pin their offsets.

    A row with holes has the mean and the variance of the members that score it; of one member the variance is 0.
    Deviation from the authors' code (tlc4418/llm_optimization@416b03c): a coefficient of 0 is 0 here, the plain mean,
    where a falsy check there makes 1 of it.
    """

    coef: float = 0.5
    """λ, at least 0: 0.5 for best-of-n and 0.1 for PPO in the authors' code."""
    ddof: Literal[0, 1] = 0
    """0: population variance, as in the paper and in the best-of-n code; 1: sample variance, as in the PPO code."""

    def __post_init__(self):
        if not self.coef >= 0:
            raise ValueError(f"coef must be at least 0, got {self.coef}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return uwo(self.members(scores), self.coef, self.ddof).to(scores.values.dtype)
