"""Combiners that need no paper, and GDPO's.  https://huggingface.co/papers/2601.05242

All take scores (N, K) with NaN for holes and give (N,); a row without any score stays NaN. Weights (K,) come from the
recipe, schedules applied. Sources of weight 0 are watched, not combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rewards.components import Combiner, Scores
from trl_rewards.maths import std, zscore
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k s_k over what is there, scaled up by Σ|w| / Σ|w there|: (N, K), (K,) -> (N,).

    The scaling lets a hole count as what the other sources said on average, where leaving it out would count it as 0.
    A row on which only sources of weight 0 have a score is NaN, unless all weights are 0.
    """
    there = ~values.isnan()
    total = (values.masked_fill(~there, 0.0) * weights).sum(dim=1)
    size = weights.abs()
    present = (there * size).sum(dim=1)
    scored = (present > 0) | (there.any(dim=1) & (size.sum() == 0))
    scale = size.sum() / present.masked_fill(present == 0, 1.0)
    # A row without holes must be the plain sum to the last bit, as in TRL.
    scale = scale.masked_fill(there.all(dim=1) | (present == size.sum()), 1.0)
    return (total * scale).masked_fill(~scored, float("nan"))


class WeightedSum(Combiner):
    """Weighted sum of the sources; on a row with holes, weights are renormalised over what is there."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return weighted_sum(scores.values, scores.weights)


class NormalizeThenSum(Combiner):
    """GDPO: z-score each source within its group, weighted sum, then z-score over the batch.

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
        total = weighted_sum(torch.stack(columns, dim=1), scores.weights.double())
        return ((total - total.nanmean()) / (std(total) + self.eps)).to(scores.values.dtype)


class _Unweighted(Combiner):
    """Weights only say which sources count: 0 is watched, anything above 0 counts."""

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0:
            name = type(self).__name__.lower()
            raise ValueError(
                f"combine: {name!r} knows no negative weight (got {min(weights):g}); turn that source with "
                "`shape: [{use: scale, with: {factor: -1.0}}]`, or use weighted_sum"
            )


def _in_use(scores: Scores) -> Tensor:
    """The columns with a weight other than 0, (N, K') ; all of them if every weight is 0."""
    used = scores.weights != 0
    return scores.values[:, used] if used.any() else scores.values


class Mean(_Unweighted):
    """Unweighted mean of the sources, ignoring holes. Weights only say which sources count (0: watched)."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return _in_use(scores).nanmean(dim=1)


class Median(_Unweighted):
    """Median of the sources, ignoring holes; the mean of the middle two where an even number is there."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        return _in_use(scores).nanquantile(0.5, dim=1)


class Min(_Unweighted):
    """The lowest source, ignoring holes: every source must be satisfied."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = _in_use(scores)
        holes = values.isnan()
        return values.masked_fill(holes, float("inf")).amin(dim=1).masked_fill(holes.all(dim=1), float("nan"))


class Product(_Unweighted):
    """Product of the sources, ignoring holes: for scores in [0, 1], a soft AND. Weights say which sources count."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = _in_use(scores)
        holes = values.isnan()
        return values.masked_fill(holes, 1.0).prod(dim=1).masked_fill(holes.all(dim=1), float("nan"))
