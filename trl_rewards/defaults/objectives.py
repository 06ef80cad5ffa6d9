"""What reward models learn from preference pairs: Bradley-Terry's ranking, and regression to ratings.

The functions are the papers' equations for B pairs; the classes hold options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards.components import Objective, Preferences
from trl_rewards.errors import RewardError

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """(B,), (B,) -> () mean of -log σ(r_chosen - r_rejected - margin).

    Pairs whose margin is NaN enter no mean; without any pair it is 0, with a graph.
    """
    from torch.nn.functional import logsigmoid

    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return _mean_of_known(-logsigmoid(difference.nan_to_num()), difference)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,), (B,) -> () mean of (r_chosen + r_rejected)²: what keeps rewards around 0, which ranking leaves open."""
    return (chosen + rejected).square().mean()


def squared_error(rewards: Tensor, ratings: Tensor) -> Tensor:
    """(N,), (N,) -> () mean of (reward - rating)² over the rewards that have a rating, which is NaN for the others.

    Without any rating it is 0, with a graph.
    """
    return _mean_of_known((rewards - ratings.nan_to_num()).square(), ratings)


def _mean_of_known(terms: Tensor, values: Tensor) -> Tensor:
    """The mean of the terms where `values` are no NaN; 0 with a graph where none is."""
    known = ~values.isnan()
    return terms.where(known, 0.0).sum() / known.sum().clamp(min=1)


def _numbers(batch: Preferences, column: str) -> Tensor:
    values = batch.columns[column]
    if isinstance(values, list):
        raise RewardError(
            f"dataset column {column!r} must hold numbers, or none where there is no value; got {values[:3]}"
        )
    return values


class BradleyTerry(Objective):
    """Ranking: mean of -log σ(r_chosen - r_rejected - margin).  https://huggingface.co/papers/2203.02155

    Equal to TRL's own loss with the same settings. The margin, a column of numbers, is Llama 2's
    (https://huggingface.co/papers/2307.09288, equation 2); pairs without one do not enter the mean. The centring term,
    `center` · mean of (r_chosen + r_rejected)², is that of https://huggingface.co/papers/2312.09244, which has 0.01.
    """

    own_loss = True

    margin: str | None = None
    """Dataset column with how much better the chosen answer is, on the rewards' scale. None: no margin."""
    center: float = 0.0
    """Weight of the centring term, TRL's `center_rewards_coefficient`. 0: none."""

    def __post_init__(self):
        if self.center < 0:
            raise ValueError(f"center must not be negative, got {self.center}")

    def reads(self) -> tuple[str, ...]:
        return (self.margin,) if self.margin else ()

    def loss(self, batch: Preferences) -> Tensor:
        margin = _numbers(batch, self.margin) if self.margin else None
        loss = bradley_terry(batch.chosen, batch.rejected, margin)
        return loss + self.center * centring(batch.chosen, batch.rejected) if self.center else loss


class Regression(Objective):
    """HelpSteer2's regression: mean of (reward - rating)² over answers.  https://huggingface.co/papers/2406.08673

    Each answer has a rating of its own; one without (None or NaN) enters no mean. `rank` adds Bradley-Terry's loss of
    all pairs: mean (reward - rating)² + rank · mean -log σ(r_chosen - r_rejected). The paper trains a head per
    attribute; this is one of them.
    """

    own_loss = True

    chosen_rating: str = "chosen_rating"
    """Dataset column with the chosen answer's rating."""
    rejected_rating: str = "rejected_rating"
    """Dataset column with the rejected answer's rating."""
    scale: list[float] | None = None
    """Lowest and highest rating, which become rewards of 0 and 1. None: rewards are ratings as they are."""
    rank: float = 0.0
    """Weight of Bradley-Terry's loss. 0: regression alone."""

    def __post_init__(self):
        if self.scale is not None and (len(self.scale) != 2 or not self.scale[0] < self.scale[1]):
            raise ValueError(f"scale must be [lowest, highest], got {self.scale}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def reads(self) -> tuple[str, ...]:
        return (self.chosen_rating, self.rejected_rating)

    def loss(self, batch: Preferences) -> Tensor:
        import torch

        ratings = torch.cat([_numbers(batch, self.chosen_rating), _numbers(batch, self.rejected_rating)])
        if self.scale is not None:
            low, high = self.scale
            ratings = (ratings - low) / (high - low)
        loss = squared_error(torch.cat([batch.chosen, batch.rejected]), ratings)
        return loss + self.rank * bradley_terry(batch.chosen, batch.rejected) if self.rank else loss
