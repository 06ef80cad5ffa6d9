"""Combiners that need no paper, and GDPO's.

All take scores (N, K) with NaN for holes and give (N,); a row without any score stays NaN. Weights (K,) come from the
recipe, schedules applied. Sources of weight 0 are watched, not combined.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rewards.components import Combiner, Scores
from trl_rewards.maths import std, zscore
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def weighted_sum(values: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Σ_k w_k s_k, with weights renormalised over what is there where a row has holes: (N, K), (K,) -> (N,).

    What is renormalised is how far the row's scores are from their group means m_k: a row with holes gets
    Σ_k w_k m_k + (Σ|w| / Σ_there |w|) · Σ_there w_k (s_k - m_k), so it stands where its other sources put it. Raw
    scores would not do: scaled up, a penalty in [-1, 0] or with a negative weight would make failing the best thing to
    do. A source without any score in the group is left out of the group, whose totals are scaled to all weights.

    A row on which only sources of weight 0 have a score is NaN, unless all weights are 0.
    """
    import torch

    there = ~values.isnan()
    used = weights != 0  # 0 · inf is no number
    plain = (values.masked_fill(~(there & used), 0.0) * weights).sum(dim=1)
    if there.all():
        return plain
    size = weights.abs()
    groups = values.view(-1, group_size, values.shape[1])
    group_there = (~groups.isnan()).any(dim=1).repeat_interleave(group_size, dim=0)  # (N, K)
    means = groups.nanmean(dim=1).repeat_interleave(group_size, dim=0)
    level = (means.masked_fill(~(group_there & used), 0.0) * weights).sum(dim=1) * _scale(group_there, size)
    deviations = (values - means).masked_fill(~(there & used), 0.0)
    total = level + (deviations * weights).sum(dim=1) * _scale(there, size)
    scored = (there & used).any(dim=1) | (there.any(dim=1) & ~used.any())
    return torch.where(there.all(dim=1), plain, total).masked_fill(~scored, float("nan"))


def _scale(there: Tensor, size: Tensor) -> Tensor:
    """Σ|w| / Σ_there |w| of each row, 1 where nothing is there."""
    present = (there * size).sum(dim=1)
    return (size.sum() / present.masked_fill(present == 0, 1.0)).masked_fill(present == 0, 1.0)


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


class _Unweighted(Combiner):
    """Weights only say which sources count: 0 is watched, anything above 0 counts."""

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0:
            name = type(self).__name__.lower()
            raise ValueError(
                f"combine: {name!r} knows no negative weight (got {min(weights):g}); turn that source with "
                "`shape: [{use: scale, with: {factor: -1.0}}]`, or use weighted_sum"
            )
        if len({weight for weight in weights if weight}) > 1:
            logger.warning("combine: %s takes every weight above 0 for 1", type(self).__name__.lower())


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
