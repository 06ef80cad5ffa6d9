"""StableReinforce's advantage filter: standardised over the batch, and what is far out counts nothing.  https://huggingface.co/papers/2505.02835"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import centered, group_std, standardized
from trl_rewards_advantages.weighting import Weighting, counts

if TYPE_CHECKING:
    from torch import Tensor


def filtered(advantages: Tensor, k: float = 3.0, release: bool = False, weights: Tensor | None = None) -> Tensor:
    """z-scores over the batch, population deviation, 0 where |z| > k: (N,) -> (N,) float64, holes stay NaN.

    `release`: 0 where |z - mean of the raw advantages| > k or |z| > 10, so a mean other than 0 moves the band.
    """
    z = standardized(advantages, 1e-8, ddof=0, weights=weights)
    if not release:
        return z.masked_fill(z.abs() > k, 0.0)
    numbers = advantages.double()
    size = (~numbers.isnan()).double() if weights is None else weights.double().masked_fill(numbers.isnan(), 0.0)
    mean = (numbers.nan_to_num(nan=0.0) * size).sum() / size.sum().clamp(min=1)
    return z.masked_fill(((z - mean).abs() > k) | (z.abs() > 10), 0.0)


class StableReinforce(Advantage):
    """z-score over the batch, and 0 for what is beyond three deviations: an outlier is dropped and not clipped.

    https://huggingface.co/papers/2505.02835. The paper has one completion per prompt and no group baseline. Its other
    half, the clipping of log-ratios before the exponential, is in the loss: `pre_clip: true` of a recipe.

    `compat: release` does as yfzhang114/r1_reward@3693413a: the band is around the mean of the raw rewards, so with a
    mean other than 0 it is off, and beyond 10 deviations all goes.
    """

    compares_groups: ClassVar[bool] = False  # without baseline: group

    baseline: Literal["none", "group"] = "none"
    """`group`: the mean of the row's group is taken off first."""
    k: float = 3.0
    """Deviations beyond which a row counts nothing, above 0."""
    weighting: Weighting = "sequence"
    """`token`: moments over tokens, so that long answers count more, as in the release."""
    compat: Literal["paper", "release"] = "paper"

    def __post_init__(self):
        if not self.k > 0:
            raise ValueError(f"k must be above 0, got {self.k}")

    def __call__(self, batch: RewardBatch) -> Tensor:
        rewards, group_size = batch.rewards, batch.scores.group_size
        grouped = self.baseline == "group"
        signal = centered(rewards, group_size) if grouped else rewards
        found = filtered(signal, self.k, self.compat == "release", counts(batch, self.weighting))
        if grouped:
            found = found.masked_fill(group_std(rewards, group_size) == 0, 0.0)
        return found.nan_to_num(nan=0.0)
