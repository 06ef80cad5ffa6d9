"""Combiners that need no paper, and GDPO's.

All take scores (N, K) with NaN for holes and give (N,); a row without any score stays NaN. Weights (K,) come from the
recipe, schedules applied. Sources of weight 0 are watched, not combined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trl_rewards.components import Combiner, Scores, Unweighted
from trl_rewards.maths import std, weighted_sum, zscore
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor


class WeightedSum(Combiner):
    """Weighted sum of the sources; on a row with holes, weights are renormalised over what is there.

    What is scaled up is the distance of the row's scores from their group means, so a row with a hole stands where its
    other sources put it, whatever the scales of the sources are.
    """

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return weighted_sum(scores.values, scores.weights, scores.group_size)


class NormalizeThenSum(Combiner):
    """GDPO: z-score each source within its group, weighted sum, then z-score over the batch.

    https://huggingface.co/papers/2601.05242

    With `advantage: {use: center}` this is TRL's `multi_objective_aggregation="normalize_then_sum"`, save that a hole
    is renormalised and a constant group is exactly 0. Sample deviations. Under GRPO's own group z-score the batch
    z-score would be undone, so set `advantage: {use: center}` or `scale_rewards: none`.
    """

    eps: float = 1e-4
    """Above 0: without it a constant group would be 0 / 0."""

    def __post_init__(self):
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        import torch

        columns = [zscore(column, scores.group_size, self.eps) for column in scores.values.unbind(dim=1)]
        total = weighted_sum(torch.stack(columns, dim=1), scores.weights.double(), scores.group_size)
        return ((total - total.nanmean()) / (std(total) + self.eps)).to(scores.values.dtype)


class Mean(Unweighted):
    """Unweighted mean of the sources, ignoring holes. Weights only say which sources count (0: watched)."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return self.members(scores).nanmean(dim=1)


class Median(Unweighted):
    """Median of the sources, ignoring holes; the mean of the middle two where an even number is there."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return self.members(scores).nanquantile(0.5, dim=1)


class Min(Unweighted):
    """The lowest source, ignoring holes: every source must be satisfied."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = self.members(scores)
        holes = values.isnan()
        return values.masked_fill(holes, float("inf")).amin(dim=1).masked_fill(holes.all(dim=1), float("nan"))


class Product(Unweighted):
    """Product of the sources, ignoring holes: for scores in [0, 1], a soft AND. Weights say which sources count."""

    one_thing: ClassVar[bool] = False

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = self.members(scores)
        holes = values.isnan()
        return values.masked_fill(holes, 1.0).prod(dim=1).masked_fill(holes.all(dim=1), float("nan"))


class Max(Unweighted):
    """The highest source, ignoring holes: no paper's advice, but what an ensemble has to be better than."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = self.members(scores)
        holes = values.isnan()
        return values.masked_fill(holes, -float("inf")).amax(dim=1).masked_fill(holes.all(dim=1), float("nan"))


def trimmed_mean(values: Tensor, share: float) -> Tensor:
    """Mean of a row's scores without the lowest and the highest floor(share · n) of its n: (N, K) -> (N,) float64."""
    import torch

    count = (~values.isnan()).sum(dim=1, keepdim=True)
    away = (count * share).floor()
    ordered = values.double().nan_to_num(nan=float("inf")).sort(dim=1).values  # holes come last
    place = torch.arange(values.shape[1], device=values.device)
    kept = (place >= away) & (place < count - away)
    return ordered.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1)  # 0 / 0 is NaN


class Trimmed(Unweighted):
    """Mean of the sources without the lowest and the highest, ignoring holes: one broken source moves nothing."""

    share: float = 0.2
    """Share of a row's scores that goes at each end, rounded down: of five sources 0.2 takes one; in [0, 0.5)."""

    def __post_init__(self):
        if not 0 <= self.share < 0.5:
            raise ValueError(f"share must be at least 0 and below 0.5, got {self.share}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return trimmed_mean(self.members(scores), self.share).to(scores.values.dtype)
