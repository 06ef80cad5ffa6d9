"""REINFORCE++: rewards normalised over the whole batch, with a group mean or without.  https://huggingface.co/papers/2501.03262"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import centered, group_std, standardized
from trl_rewards_advantages.weighting import Weighting, counts

if TYPE_CHECKING:
    from torch import Tensor


def standardized_deviations(
    rewards: Tensor, group_size: int, eps: float = 1e-8, weights: Tensor | None = None
) -> Tensor:
    """Reward less group mean, standardised over the batch: (N,) -> (N,) float64, holes stay NaN.

    Exactly 0 in a group of equal rewards, which the moments know of all the same.
    """
    found = standardized(centered(rewards, group_size), eps, weights=weights)
    return found.masked_fill((group_std(rewards, group_size) == 0) & ~rewards.isnan(), 0.0)


class ReinforcePlusPlus(Advantage):
    """(r - batch mean) / batch deviation: REINFORCE++, which needs no groups.  One number per sequence.

    https://huggingface.co/papers/2501.03262. With the reward at a row's last token and no discount, what is still to
    come is the same at all its tokens. The paper has a KL penalty in the reward too, r - β Σ k1 over the tokens to
    come; here it is where the trainer has it. Centring is checked over all outcomes of small policies: n - 1 times the
    gradient of the mean reward in a batch of n. The division is by one number for the whole batch.
    """

    compares_groups: ClassVar[bool] = False

    weighting: Weighting = "sequence"
    """`sequence`: moments over rows. `token`: over tokens, so that long answers count more, as verl does."""
    eps: float = 1e-8
    """Beside the variance, which is the sample's."""

    def __call__(self, batch: RewardBatch) -> Tensor:
        return standardized(batch.rewards, self.eps, weights=counts(batch, self.weighting)).nan_to_num(nan=0.0)


class ReinforcePlusPlusBaseline(Advantage):
    """Reward less group mean, over the batch's deviation of that: REINFORCE++-baseline.  One number per sequence.

    https://huggingface.co/papers/2501.03262. Unlike a group z-score it does not make much of a group whose rewards
    hardly differ. `batch_norm`, TRL's, divides by the deviation of the raw rewards instead. A group of equal rewards
    gets exactly 0; with token weights the releases move it by the batch's mean.
    """

    weighting: Weighting = "sequence"
    """`sequence`: moments over rows. `token`: over tokens, so that long answers count more, as verl does."""
    eps: float = 1e-8
    """Beside the variance, which is the sample's."""

    def __call__(self, batch: RewardBatch) -> Tensor:
        weights = counts(batch, self.weighting)
        found = standardized_deviations(batch.rewards, batch.scores.group_size, self.eps, weights)
        return found.nan_to_num(nan=0.0)
