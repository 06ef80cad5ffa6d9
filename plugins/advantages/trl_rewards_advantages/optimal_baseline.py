"""OPO: the baseline of least variance, a mean reward weighted by length.  https://huggingface.co/papers/2505.23585"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import centered

if TYPE_CHECKING:
    from torch import Tensor


def less_length_weighted_mean(rewards: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """r - Σ l r / Σ l of its group: (N,), (N,) -> (N,) float64; holes stay NaN. Exactly 0 in groups of equal
    rewards."""
    deviations = centered(rewards, group_size)
    size = lengths.double().masked_fill(deviations.isnan(), 0.0).view(-1, group_size)
    shift = (deviations.nan_to_num(nan=0.0).view(-1, group_size) * size).sum(dim=1) / size.sum(dim=1).clamp(min=1)
    return deviations - shift.repeat_interleave(group_size)


class OptimalBaseline(Advantage):
    """r - Σ l r / Σ l over the group, l the lengths in tokens: OPO's baseline.  One number per sequence.

    https://huggingface.co/papers/2505.23585. The baseline of least variance weights rewards by squared gradients; the
    paper takes these to grow with length. Checked over all answers of a small policy whose squared gradients do: the
    variance is least there. It is for exact on-policy training: one update per batch, no KL, no entropy
    term. Not divided by a deviation.
    """

    def __call__(self, batch: RewardBatch) -> Tensor:
        lengths = batch.rewards.new_tensor(batch.samples.lengths)
        return less_length_weighted_mean(batch.rewards, lengths, batch.scores.group_size).nan_to_num(nan=0.0)
