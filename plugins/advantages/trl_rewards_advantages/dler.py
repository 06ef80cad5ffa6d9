"""DLER: batch-wise normalisation for length-penalised rewards, and its dynamic sampling.  https://huggingface.co/papers/2510.15110"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import group_std
from trl_rewards_advantages.reinforce_plus_plus import standardized_deviations
from trl_rewards_advantages.weighting import Weighting, counts

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def mixed_groups(scores: Tensor, group_size: int) -> Tensor:
    """Which rows are in a group whose scores differ, or that has one score only: (N,) -> (N,) boolean."""
    scored = (~scores.isnan()).view(-1, group_size).sum(dim=1).repeat_interleave(group_size)
    return (group_std(scores, group_size, ddof=0) > 0) | (scored == 1)


class DLER(Advantage):
    """Reward less group mean, less its mean and over its deviation in the batch.  One number per sequence.

    https://huggingface.co/papers/2510.15110, equation 3. A length penalty makes rewards vary differently from
    prompt to prompt, which biases a deviation per group. It is not TRL's `scale_rewards: batch` (`batch_norm`), which
    divides by the deviation of the raw rewards. The formula is that of `reinforce_plus_plus_baseline`; this has DLER's
    filter too.
    """

    weighting: Weighting = "sequence"
    """`sequence`: the equation. `token`: as released (NVlabs/DLER@ea7d4f7b), moments over tokens; long answers count
    more."""
    eps: float = 1e-8
    """Beside the variance, which is the sample's."""
    filter_by: str | None = None
    """DLER's dynamic sampling: groups in which this source's raw scores do not differ get 0 and enter no moment. Name
    the source that says whether the answer is right. Such groups are lost; the recipe's `filter:` samples others.
    `total` filters by the shaped total, which a length penalty makes differ where all answers are right or wrong."""
    boost: float = 0.0
    """Added to the advantage of rows whose total is at least `boost_from`; 0.1 in a script of the release."""
    boost_from: float = 1.0

    def __post_init__(self):
        if self.filter_by == "total":
            logger.warning(
                "dler filters groups by the shaped total: a group of equal outcomes stays in if only its penalties "
                "differ, and is then trained on these alone; name the source of the outcome in filter_by"
            )

    def check_sources(self, names: Sequence[str]) -> None:
        if self.filter_by not in (None, "total", *names):
            raise ValueError(f"filter_by: no source {self.filter_by!r}; there is {', '.join(names)}")

    def __call__(self, batch: RewardBatch) -> Tensor:
        rewards, group_size = batch.rewards, batch.scores.group_size
        if self.filter_by is not None:
            names = batch.scores.names
            raw = rewards if self.filter_by == "total" else batch.scores.values[:, names.index(self.filter_by)]
            rewards = rewards.masked_fill(
                ~mixed_groups(raw.masked_fill(rewards.isnan(), float("nan")), group_size), float("nan")
            )
        found = standardized_deviations(rewards, group_size, self.eps, counts(batch, self.weighting))
        return (found + self.boost * (rewards >= self.boost_from)).nan_to_num(nan=0.0)
