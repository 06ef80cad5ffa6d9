"""NaN-aware statistics that components share. NaN is a hole: it enters no mean and no deviation.

Shapes: N rows, G group size, P = N / G groups; rows gG … gG+G-1 are group g. Statistics run in float64, because the
round-off of a float32 mean over a constant group, divided by its round-off deviation, is an advantage of 0.7.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def group_mean(rewards: Tensor, group_size: int) -> Tensor:
    """Each row's group mean: (N,) -> (N,) float64; NaN where a group has no scored row."""
    means = rewards.double().view(-1, group_size).nanmean(dim=1)
    return means.repeat_interleave(group_size)


def staying_groups(
    outcomes: Tensor, lengths: Tensor, group_size: int, low: float, high: float, limit: int | None = None
) -> Tensor:
    """(N / G,) whether each group's mean outcome is in [low, high], and none of its N lengths is `limit` or more.

    Bounds are inclusive. Holes do not count; a group without an outcome does not stay.
    """
    means = outcomes.double().view(-1, group_size).nanmean(dim=1)
    staying = (means >= low) & (means <= high)
    return staying if limit is None else staying & (lengths.view(-1, group_size) < limit).all(dim=1)


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


def less_others(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean of the other rows of its group: (N,) -> (N,) float64; holes stay NaN and out of it.

    Exactly 0 in constant groups and for a row alone.
    """
    scored = (~rewards.isnan()).view(-1, group_size).sum(dim=1).repeat_interleave(group_size)
    # r_i - (Σ - r_i) / (n - 1) = (r_i - mean) · n / (n - 1), which is exactly 0 in constant groups.
    return centered(rewards, group_size) * (scored / (scored - 1).clamp(min=1))


def zscore(rewards: Tensor, group_size: int, eps: float, ddof: int = 1) -> Tensor:
    """Group z-score (r - mean) / (std + eps): (N,) -> (N,) float64; exactly 0 in constant groups, holes stay NaN."""
    scale = group_std(rewards, group_size, ddof) + eps
    return centered(rewards, group_size) / scale.masked_fill(scale == 0, 1.0)


def standardized(values: Tensor, eps: float = 1e-8, ddof: int = 1, weights: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the batch: (N,) -> (N,) float64; holes stay NaN, 0 where nothing differs.

    `weights` (N,) count a value so many times: with lengths these are the moments over tokens.
    """
    import torch

    numbers, holes = values.double(), values.isnan()
    size = (torch.ones_like(numbers) if weights is None else weights.double()).masked_fill(holes, 0.0)
    found = numbers.masked_fill(holes, 0.0)
    total = size.sum()
    mean = (found * size).sum() / total.clamp(min=1e-300)
    variance = ((found - mean).square() * size).sum() / (total - ddof).clamp(min=1)
    result = (numbers - mean) * (variance + eps).rsqrt()
    return result.masked_fill(~holes & (std(numbers) == 0), 0.0)


def weighted_sum(values: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Σ_k w_k s_k, with weights renormalised over what is there where a row has holes.  (N,)

    `values` are (N, K), NaN for holes; `weights` (K,), or (N, K) where rows have their own.

    What is renormalised is how far the row's scores are from their group means m_k: a row with holes gets
    Σ_k w_k m_k + (Σ|w| / Σ_there |w|) · Σ_there w_k (s_k - m_k), so it stands where its other sources put it. Raw
    scores would not do: scaled up, a penalty in [-1, 0] or with a negative weight would make failing the best thing to
    do. A source without any score in the group is left out of the group, whose totals are scaled to all weights.

    A row on which only sources of weight 0 have a score is NaN, unless all weights are 0.
    """
    import torch

    there = ~values.isnan()
    used = weights != 0
    scored = (there & used).any(dim=1) | (there.any(dim=1) & ~used.any(dim=-1))
    values = values.masked_fill(~used, 0.0)  # neither a hole nor an infinity of what is watched matters
    there = ~values.isnan()
    plain = (values.masked_fill(~there, 0.0) * weights).sum(dim=1)
    if there.all():
        return plain.masked_fill(~scored, float("nan"))
    size = weights.abs().expand_as(values)
    groups = values.view(-1, group_size, values.shape[1])
    group_there = (~groups.isnan()).any(dim=1).repeat_interleave(group_size, dim=0)  # (N, K)
    means = groups.nanmean(dim=1).repeat_interleave(group_size, dim=0)
    level = (means.masked_fill(~group_there, 0.0) * weights).sum(dim=1) * _scale(group_there, size)
    deviations = (values - means).masked_fill(~there, 0.0)
    total = level + (deviations * weights).sum(dim=1) * _scale(there, size)
    return torch.where(there.all(dim=1), plain, total).masked_fill(~scored, float("nan"))


def _scale(there: Tensor, size: Tensor) -> Tensor:
    """Σ|w| / Σ_there |w| of each row, 1 where nothing is there."""
    present = (there * size).sum(dim=1)
    return (size.sum(dim=1) / present.masked_fill(present == 0, 1.0)).masked_fill(present == 0, 1.0)


def whiten_masked(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the entries where `mask` is 1, sample variance: (N, T) -> (N, T) float64.

    0 where the mask is 0. Without `shift_mean` the mean is kept. A constant or single entry is divided by sqrt(eps)
    only, so it gives 0 with `shift_mean`.
    """
    kept = mask.bool()
    chosen = values.double()[kept]
    if not len(chosen):
        return values.double() * 0
    mean = chosen.mean()
    variance = (chosen - mean).square().sum() / max(len(chosen) - 1, 1)
    whitened = (values.double() - mean) * (variance + eps).rsqrt()
    return (whitened if shift_mean else whitened + mean).masked_fill(~kept, 0.0)


def on_tokens(rewards: Tensor, mask: Tensor) -> Tensor:
    """Token rewards (N, t) as wide as the mask (N, T) of the policy's tokens, and 0 off it: -> (N, T) float32."""
    import torch

    tokens = torch.zeros(mask.shape, device=mask.device)
    width = min(rewards.shape[1], tokens.shape[1])
    tokens[:, :width] = rewards[:, :width]
    return tokens.masked_fill(~mask.bool(), 0.0)


def token_rewards(totals: Tensor, process: Tensor | None, mask: Tensor) -> Tensor:
    """Totals (N,), process rewards (N, t) or None, and the mask (N, T) of the policy's tokens -> (N, T) float32.

    A row's tokens sum to its total: the sources' process rewards are where they were given, the rest (other sources,
    and what shaping and combining made of it) is at the row's last token. 0 on rows without a total or without tokens.
    """
    import torch

    tokens = on_tokens(process, mask) if process is not None else torch.zeros(mask.shape, device=totals.device)
    mask = mask.bool()
    rest = totals.nan_to_num(nan=0.0) - tokens.sum(dim=1)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    tokens[torch.arange(len(tokens)), last] += rest * mask.any(dim=1)
    return tokens.masked_fill(totals.isnan()[:, None], 0.0)


def to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return-to-go, G_t = r_t + γ G_t+1: (N, T) -> (N, T) float64.

    Tokens where `mask` is 0 are no decisions of the policy: they get 0, and time does not pass on them.
    """
    kept = mask.bool()
    rewards = rewards.double().masked_fill(~kept, 0.0)
    if gamma == 1:
        return rewards.flip(1).cumsum(dim=1).flip(1).masked_fill(~kept, 0.0)
    returns = rewards.clone()
    coming = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        coming = (rewards[:, t] + gamma * coming).where(kept[:, t], coming)
        returns[:, t] = coming
    return returns.masked_fill(~kept, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation: (N, T) token rewards and values -> (N, T) float64.

    https://huggingface.co/papers/1506.02438, eq. 16: A_t = δ_t + γλ A_t+1 with δ_t = r_t + γ V_t+1 - V_t, and nothing
    after a row's last token. Tokens where `mask` is 0 (padding, a tool's words) are no decisions of the policy: they
    get 0, and time does not pass on them, so that the token before them looks at the token after them.
    """
    kept = mask.bool()
    rewards, values = rewards.double(), values.double()
    advantages = rewards.new_zeros(rewards.shape)
    advantage = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        found = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = found.where(kept[:, t], advantage)
        next_value = values[:, t].where(kept[:, t], next_value)
        advantages[:, t] = found.where(kept[:, t], advantages[:, t])
    return advantages


def shared_prefix(ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens that the two rows of each pair begin with alike: (2B, T) right-padded, first rows first -> (B,)."""
    (first, second), (there, also) = ids.chunk(2), mask.bool().chunk(2)
    return ((first == second) & there & also).long().cumprod(dim=1).sum(dim=1)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank: (n,) -> (n,) float64."""
    import torch

    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0).double()
    return (last - (counts.double() - 1) / 2)[place]


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation in [-1, 1]; 0 where one of them is constant, or has fewer than two rows."""
    one, other = ranks(one), ranks(other)
    one, other = one - one.mean(), other - other.mean()
    size = (one.square().sum() * other.square().sum()).sqrt()
    return ((one * other).sum() / size).item() if size > 0 else 0.0


def kendall_in_groups(one: Tensor, other: Tensor, group_size: int) -> float | None:
    """Kendall's τ-b in [-1, 1] over all pairs of rows of the same group: (N,), (N,); holes left out.

    None where one of the two tells no rows of a group apart.
    """
    differences = []
    for values in (one, other):
        groups = values.double().view(-1, group_size)
        differences.append((groups[:, :, None] - groups[:, None, :]).sign())
    # Every pair is there twice, and each row against itself as a 0, which changes nothing in a ratio.
    both = ~(differences[0] + differences[1]).isnan()
    first, second = differences[0][both], differences[1][both]
    size = (first.square().sum() * second.square().sum()).sqrt()
    return ((first * second).sum() / size).item() if size > 0 else None


def explained(one: Tensor, other: Tensor, group_size: int = 1) -> tuple[float, float]:
    """How `one` goes with `other`, both (N,), among the rows of a group, or of the batch where groups are of one row.

    Pearson's correlation of deviations from group means in [-1, 1], and the share of the first's variance there that
    the second explains: its square adjusted for chance, so that it is 0 on average where nothing is explained, and may
    be below. Rows with a hole are left out. NaN where one of them is constant, or where there are fewer than two
    degrees of freedom: rows less groups.
    """
    size = group_size if group_size > 1 else len(one)
    hole = one.isnan() | other.isnan()
    first, second = (centered(x.masked_fill(hole, float("nan")), size)[~hole] for x in (one, other))
    freedom = len(first) - int((~hole).view(-1, size).any(dim=1).sum())
    scale = (first.square().sum() * second.square().sum()).sqrt()
    if freedom < 2 or scale == 0:
        return math.nan, math.nan
    correlation = ((first * second).sum() / scale).item()
    return correlation, 1 - (1 - correlation**2) * freedom / (freedom - 1)


def repeated_share(items: Sequence[Hashable], n: int) -> float:
    """Share of n-grams that are there already, 1 - distinct / all, in [0, 1); 0 with fewer than n items.

    Of tokens it is seq-rep-n of https://huggingface.co/papers/1908.04319.
    """
    ngrams = list(zip(*(items[start:] for start in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class RunningMoments:
    """Count, mean and deviation of all values seen so far, merged batch by batch (Chan et al.); holes left out."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, rewards: Tensor) -> None:
        """Take in a batch (N,)."""
        there = rewards[~rewards.isnan()].double()
        if not there.numel():
            return
        mean, count = there.mean().item(), self.count + there.numel()
        delta = mean - self.mean
        self.mean += delta * there.numel() / count
        self.squares += (there - mean).square().sum().item() + delta**2 * self.count * there.numel() / count
        self.count = count

    def std(self, ddof: int = 0) -> float:
        """Deviation of what was seen, the population's or, with `ddof` 1, the sample's. 0.0 of equal values, and of
        fewer than ddof + 1."""
        if self.count <= ddof:
            return 0.0
        deviation = math.sqrt(self.squares / (self.count - ddof))
        return deviation if deviation > 1e-12 * abs(self.mean) else 0.0  # less is round-off: rewards are float32

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def column_values(values: Sequence[Any]) -> Any:
    """(n,) float32 of a dataset column of numbers, None among them (and None alone) as NaN; anything else as it is."""
    if not all(value is None or isinstance(value, int | float) for value in values):
        return list(values)
    import torch

    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)


class Bin(NamedTuple):
    """The answers whose confidence falls into one bin."""

    count: int
    confidence: float
    """Their mean confidence."""
    right: float
    """The share of right answers among them."""


def reliability(confidences: Sequence[float], right: Sequence[float], bins: int = 10) -> list[Bin]:
    """Bins of equal width over [0, 1] that hold an answer, in their order: what a reliability diagram shows.

    A bin holds its lower edge, the last one 1 too. `right` is in [0, 1].
    """
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for q, c in zip(confidences, right, strict=True):
        found[min(int(q * bins), bins - 1)].append((q, c))
    return [
        Bin(len(held), sum(q for q, _ in held) / len(held), sum(c for _, c in held) / len(held))
        for _, held in sorted(found.items())
    ]


def ece(confidences: Sequence[float], right: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error: |mean confidence - share of right answers| over bins of equal width, by their size.

    In [0, 1]; 0 is best.
    """
    held = reliability(confidences, right, bins)
    return sum(each.count * abs(each.confidence - each.right) for each in held) / len(right)


def brier(confidences: Sequence[float], right: Sequence[float]) -> float:
    """Mean of (q - c)², in [0, 1]; 0 is best."""
    return sum((q - c) ** 2 for q, c in zip(confidences, right, strict=True)) / len(right)


def log_loss(confidences: Sequence[float], right: Sequence[float], eps: float = 1e-6) -> float:
    """Mean of -c log q - (1 - c) log(1 - q), in nats; 0 is best. q is held to [eps, 1 - eps]."""
    held = [min(max(q, eps), 1 - eps) for q in confidences]
    return -sum(c * math.log(q) + (1 - c) * math.log(1 - q) for q, c in zip(held, right, strict=True)) / len(right)


def auroc(confidences: Sequence[float], right: Sequence[float]) -> float | None:
    """How often a right answer is more confident than a wrong one, ties half; None where all are right, or wrong."""
    ranked = sorted(zip(confidences, right, strict=True))
    wins, start, wrong = 0.0, 0, 0
    while start < len(ranked):
        end = start
        while end < len(ranked) and ranked[end][0] == ranked[start][0]:
            end += 1
        hits = sum(1 for _, c in ranked[start:end] if c)
        misses = end - start - hits
        wins += hits * (wrong + misses / 2)
        wrong += misses
        start = end
    pairs = wrong * (len(ranked) - wrong)
    return wins / pairs if pairs else None
