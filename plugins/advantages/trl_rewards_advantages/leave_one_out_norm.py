"""Leave-one-out z-scores that do not spike where all other rewards are equal.

The baseline is RLOO's, https://huggingface.co/papers/2402.14740.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import group_mean, group_std, less_others

if TYPE_CHECKING:
    from torch import Tensor


def others_std(rewards: Tensor, group_size: int) -> Tensor:
    """Sample deviation of the other scored rows of each row's group: (N,) -> (N,) float64; 0 of fewer than two."""
    scored = (~rewards.isnan()).view(-1, group_size).sum(dim=1).repeat_interleave(group_size)
    deviations = rewards.double() - group_mean(rewards, group_size)
    squares = group_std(rewards, group_size, ddof=0).square() * scored
    # Σ over the others of (r - their mean)² = Σ over all of (r - mean)² - d_i² · n / (n - 1).
    rest = squares - deviations.square() * scored / (scored - 1).clamp(min=1)
    return (rest.clamp(min=0.0) / (scored - 2).clamp(min=1)).sqrt().masked_fill(scored < 3, 0.0)


def leave_one_out_zscore(rewards: Tensor, group_size: int, floor: float = 1.0) -> Tensor:
    """(r - mean of the others) / max(deviation of the others, floor · group's): (N,) -> (N,) float64, holes stay NaN.

    Sample deviations; exactly 0 in groups of equal rewards and for a row alone. With a floor of 1 its size is at most
    √n in a group of n.
    """
    own = group_std(rewards, group_size)
    scale = others_std(rewards, group_size).maximum(floor * own)
    return less_others(rewards, group_size) / scale.masked_fill(own == 0, 1.0)


class LeaveOneOutNorm(Advantage):
    """RLOO's r - mean of the others, over the others' deviation, which is never taken for 0.  One number per sequence.

    The baseline is https://huggingface.co/papers/2402.14740. Divided by the deviation of the others alone, the one
    right answer among seven equal ones gets 1 / eps. Here the divisor is at least `floor` times the deviation of the
    whole group. Unlike a group z-score, the row is no part of what it is measured with, where the others differ.
    """

    floor: float = 1.0
    """Least divisor, in deviations of the whole group; above 0. With 1, advantages are at most √n in a group of n."""

    def __post_init__(self):
        if not self.floor > 0:
            raise ValueError(f"floor must be above 0, got {self.floor}")

    def undoes_affine(self) -> bool:
        return True

    def __call__(self, batch: RewardBatch) -> Tensor:
        return leave_one_out_zscore(batch.rewards, batch.scores.group_size, self.floor).nan_to_num(nan=0.0)
