"""NaN-aware statistics that components share. NaN is a hole: it enters no mean and no deviation.

Shapes: N rows, G group size, P = N / G groups; rows gG … gG+G-1 are group g. Statistics run in float64, because the
round-off of a float32 mean over a constant group, divided by its round-off deviation, is an advantage of 0.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def group_mean(rewards: Tensor, group_size: int) -> Tensor:
    """Each row's group mean: (N,) -> (N,) float64; NaN where a group has no scored row."""
    means = rewards.double().view(-1, group_size).nanmean(dim=1)
    return means.repeat_interleave(group_size)


def std(rewards: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation over the last dimension, holes left out: (…, n) -> (…,) float64.

    `ddof` 1 is the sample deviation, 0 the population's. Exactly 0 for constant values and where fewer than ddof + 1
    values are scored.
    """
    values, holes = rewards.double(), rewards.isnan()
    count = (~holes).sum(dim=-1)
    squares = (values - values.nanmean(dim=-1, keepdim=True)).square().nansum(dim=-1)
    infinity = float("inf")
    spread = values.masked_fill(holes, -infinity).amax(dim=-1) - values.masked_fill(holes, infinity).amin(dim=-1)
    deviation = (squares / (count - ddof).clamp(min=1)).sqrt()
    return deviation.masked_fill((spread <= 0) | (count <= ddof), 0.0)


def group_std(rewards: Tensor, group_size: int, ddof: int = 1) -> Tensor:
    """Each row's group deviation: (N,) -> (N,) float64; 0 for a constant group."""
    return std(rewards.view(-1, group_size), ddof).repeat_interleave(group_size)


def centered(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus group mean, exactly 0 in constant groups: (N,) -> (N,) float64, holes stay NaN."""
    deviations = rewards.double() - group_mean(rewards, group_size)
    constant = (group_std(rewards, group_size) == 0) & ~rewards.isnan()
    return deviations.masked_fill(constant, 0.0)


def zscore(rewards: Tensor, group_size: int, eps: float, ddof: int = 1) -> Tensor:
    """Group z-score (r - mean) / (std + eps): (N,) -> (N,) float64; exactly 0 in constant groups, holes stay NaN."""
    scale = group_std(rewards, group_size, ddof) + eps
    return centered(rewards, group_size) / scale.masked_fill(scale == 0, 1.0)


def shared_prefix(ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens that the two rows of each pair begin with alike: (2B, T) right-padded, first rows first -> (B,)."""
    (first, second), (there, also) = ids.chunk(2), mask.bool().chunk(2)
    return ((first == second) & there & also).long().cumprod(dim=1).sum(dim=1)
