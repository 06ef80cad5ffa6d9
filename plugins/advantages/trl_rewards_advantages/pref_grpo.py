"""Pref-GRPO: group z-scores of win rates, and of each reward alone where there are several.  https://huggingface.co/papers/2508.20751"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import std, weighted_sum, zscore

if TYPE_CHECKING:
    from torch import Tensor


class PrefGRPO(Advantage):
    """Σ_k w_k · group z-score of source k, limited: win rates and other rewards by their weights.  One per sequence.

    https://huggingface.co/papers/2508.20751. Point-wise scores that differ in the third decimal become advantages of
    ±1 in a z-score; win rates of a judge that compares a group's answers (`pairwise_win_rate`) do not. Sources count
    after their own `shape:`; `combine:` and the `shape:` of the total are passed over. A single source uses the total.
    Holes are renormalised as in `weighted_sum`.
    """

    renormalize: bool = False
    """z-score of the sum over the batch at the end, `apply_gdpo` in the authors' code (CodeGoat24/Pref-GRPO@3e787f6d).
    `combine: {use: normalize_then_sum}` is the same with another eps."""
    clip: float | None = 5.0
    """Advantages are limited to [-clip, clip]; None: not at all."""
    eps: float = 1e-8
    """Added to the sample deviations."""

    def __post_init__(self):
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")

    def passes_over(self) -> tuple[str, ...]:
        return ("combine", "shape")

    def divides_by_group(self) -> bool:
        return True

    def __call__(self, batch: RewardBatch) -> Tensor:
        import torch

        scores, group_size = batch.scores, batch.scores.group_size
        used = scores.weights != 0
        if batch.shaped is None or used.sum() < 2:
            total = zscore(batch.rewards, group_size, self.eps)
        else:
            # A row without a total enters no baseline, whatever single sources say of it.
            shaped = batch.shaped.masked_fill(batch.rewards.isnan()[:, None], float("nan"))[:, used]
            columns = [zscore(column, group_size, self.eps) for column in shaped.unbind(dim=1)]
            total = weighted_sum(torch.stack(columns, dim=1), scores.weights[used].double(), group_size)
        if self.renormalize:
            flat = (total.view(-1, group_size).nan_to_num(nan=0.0) == 0).all(dim=1).repeat_interleave(group_size)
            total = ((total - total.nanmean()) / (std(total) + self.eps)).masked_fill(flat, 0.0)
        found = total if self.clip is None else total.clamp(-self.clip, self.clip)
        return found.nan_to_num(nan=0.0)
