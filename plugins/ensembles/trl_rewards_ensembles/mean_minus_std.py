"""Helping or Herding: mean of the members less their deviation.  https://huggingface.co/papers/2312.09244"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards import Samples, Scores, Unweighted
from trl_rewards.maths import std

if TYPE_CHECKING:
    from torch import Tensor


def mean_minus_std(members: Tensor, coef: float = 1.0, ddof: int = 0) -> Tensor:
    """Mean - coef · deviation of each row's members, holes left out: (N, K) -> (N,) float64, NaN for a row without."""
    return members.double().nanmean(dim=1) - coef * std(members, ddof)


class MeanMinusStd(Unweighted):
    """Mean of the members less their deviation: what they disagree on is worth less.

    https://huggingface.co/papers/2312.09244, which compares it with `mean` and `median`, for five members. The paper
    does not say which deviation. No combiner mends what all members get wrong alike (lists, length). A row with holes
    has the mean and the deviation of the members that score it; of one member the deviation is 0.
    """

    coef: float = 1.0
    """At least 0."""
    ddof: Literal[0, 1] = 0
    """0: population deviation, 1: sample deviation."""

    def __post_init__(self):
        if not self.coef >= 0:
            raise ValueError(f"coef must be at least 0, got {self.coef}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return mean_minus_std(self.members(scores), self.coef, self.ddof).to(scores.values.dtype)
