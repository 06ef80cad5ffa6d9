"""Pass@k training: what an answer is worth to the best of k.  https://huggingface.co/papers/2508.10751"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from trl_rewards import Advantage, RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n over k, -inf where k is above n or below 0; float64."""
    import torch

    fine = (k >= 0) & (k <= n)
    n, k = torch.where(fine, n, 0).double(), torch.where(fine, k, 0).double()
    found = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return found.masked_fill(~fine, -float("inf"))


def best_of_k(rewards: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all sets of k among each group's n scored rows: mean and deviation of their best, and the mean of the best of
    those sets that a row is in.  (P, G) -> (P, 1), (P, 1), (P, G) float64, NaN where a row has no score or n < k.

    Exact, by counting: sorted upwards, the j-th row is the best of C(j - 1, k - 1) of the C(n, k) sets.
    """
    import torch

    holes = rewards.isnan()
    order = rewards.double().masked_fill(holes, -float("inf")).argsort(dim=1, stable=True)  # holes come first
    ordered = rewards.double().nan_to_num(nan=0.0).gather(1, order)
    count = (~holes).sum(dim=1, keepdim=True)
    j = torch.arange(1, rewards.shape[1] + 1, device=rewards.device) - (rewards.shape[1] - count)  # 1 … n, holes below
    size = torch.full_like(j, k)
    best = (choose(j - 1, size - 1) - choose(count, size)).exp()  # chance to be the best of a set
    mean = (best * ordered).sum(dim=1, keepdim=True)
    deviation = (best * (ordered - mean).square()).sum(dim=1, keepdim=True).sqrt()
    # Sets that have row i: k - 1 others of n - 1. i is the best of C(i - 1, k - 1), a higher j of C(j - 2, k - 2).
    among = choose(count - 1, size - 1)
    own = (choose(j - 1, size - 1) - among).exp()
    other = (choose(j - 2, size - 2) - among).exp() * ordered
    above = other.flip(1).cumsum(dim=1).flip(1) - other
    with_row = torch.empty_like(ordered).scatter_(1, order, own * ordered + above)
    few = count < k
    return (
        mean.masked_fill(few, torch.nan),
        deviation.masked_fill(few, torch.nan),
        with_row.masked_fill(holes | few, torch.nan),
    )


def pass_at_k(rewards: Tensor, group_size: int, k: int, eps: float = 0.0) -> Tensor:
    """(mean best of k with the row - mean best of k) / (deviation of the best + eps): (N,) -> (N,) float64.

    Holes stay NaN. 0 in groups where no set of k differs in its best from another, such as those of k rows or fewer.
    """
    groups = rewards.double().view(-1, group_size)
    holes = groups.isnan()
    least = groups.masked_fill(holes, float("inf")).amin(dim=1, keepdim=True)
    spread = groups.masked_fill(holes, -float("inf")).amax(dim=1, keepdim=True) - least
    groups = groups - least  # so that rounding is small beside the spread
    mean, deviation, with_row = best_of_k(groups, k)
    signal = (spread > 0) & (deviation > 1e-9 * spread)
    found = ((with_row - mean) / (deviation + eps)).where(signal, 0.0)
    return found.masked_fill(holes, float("nan")).flatten()


class PassAtK(Advantage):
    """What an answer adds to the best of k answers, over that best's deviation.  One number per sequence.

    https://huggingface.co/papers/2508.10751, its analytical form: all sets of k among the group's answers, each worth
    its best reward. For rewards of 0 and 1 with pass rate ρ = 1 - C(wrong, k) / C(n, k) a right answer gets
    (1 - ρ) / σ and a wrong one (1 - ρ - C(wrong - 1, k - 1) / C(n - 1, k - 1)) / σ, σ² = ρ (1 - ρ). For other rewards
    the same counting is used, which the paper does not have. Easy prompts count little: where all sets of k hold a
    right answer, all is 0. k = 1 is a group z-score with the population's deviation. Checked against all sets one by
    one and over all outcomes of small policies: before the division, the sum over rows follows (n - k) / k times the
    gradient of the expected best of k.
    """

    k: int = 4
    """At least 1, and below the group's size: groups of k answers have one set of k, and give no signal."""
    eps: float = 0.0
    """Added to the deviation."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        self._told = False

    def __call__(self, batch: RewardBatch) -> Tensor:
        group_size = batch.scores.group_size
        if group_size <= self.k and not self._told:
            self._told = True
            logger.warning(
                "pass_at_k with k %s gives no signal in groups of %s; make num_generations larger or k smaller",
                self.k,
                group_size,
            )
        return pass_at_k(batch.rewards, group_size, self.k, self.eps).nan_to_num(nan=0.0)
