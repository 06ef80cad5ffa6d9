"""How far the members of an ensemble are apart, and combiners that say so.  https://huggingface.co/papers/2310.02743"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Context, Scores, Unweighted
from trl_rewards.maths import std

if TYPE_CHECKING:
    from torch import Tensor


def disagreement(members: Tensor) -> Tensor:
    """Population deviation of each row's members, holes left out: (N, K) -> (N,) float64; NaN where fewer than two
    score a row."""
    return std(members, ddof=0).masked_fill((~members.isnan()).sum(dim=1) < 2, float("nan"))


class Disagreeing(Unweighted):
    """A combiner that looks at how far its members are apart, and logs the batch's mean as `<name>/disagreement`."""

    def __post_init__(self):
        self._context = Context()

    def setup(self, context: Context) -> None:
        self._context = context

    def members(self, scores: Scores) -> Tensor:
        found = super().members(scores)
        apart = disagreement(found)
        if self._context.log_metric and not apart.isnan().all():
            self._context.log_metric(f"{self.display_name}/disagreement", apart.nanmean().item())
        return found
