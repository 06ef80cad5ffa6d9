"""DiDi-Instruct's grouped reward normalisation, for log-odds of a discriminator.  https://huggingface.co/papers/2509.25035"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import zscore

if TYPE_CHECKING:
    from torch import Tensor


class DiDi(Advantage):
    """(r - group mean) / (group deviation + eps) of rewards that are limited first.  One number per sequence.

    https://huggingface.co/papers/2509.25035, whose reward is a discriminator's log-odds log D / (1 - D), in groups of
    four. The paper says neither which deviation nor which eps; its code for this is not released. The limit is ours: a
    discriminator that is never wrong has log-odds without end.
    """

    limit: float | None = 10.0
    """Rewards are limited to [-limit, limit]; None: not at all."""
    eps: float = 1e-8
    """At least 0."""
    ddof: Literal[0, 1] = 1
    """1: sample deviation, 0: population deviation."""

    def __post_init__(self):
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be above 0, got {self.limit}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")

    def undoes_affine(self) -> bool:
        return self.limit is None

    def divides_by_group(self) -> bool:
        return True

    def __call__(self, batch: RewardBatch) -> Tensor:
        rewards = batch.rewards if self.limit is None else batch.rewards.clamp(-self.limit, self.limit)
        return zscore(rewards, batch.scores.group_size, self.eps, self.ddof).nan_to_num(nan=0.0)
