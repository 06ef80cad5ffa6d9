"""ReNorm: process rewards that agree with the outcome in sign.  https://huggingface.co/papers/2509.25598"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import RewardError, Samples, Scores, TokenShaper

if TYPE_CHECKING:
    from torch import Tensor


def renormed(rewards: Tensor, outcomes: Tensor) -> Tensor:
    """r + o - 1 for step rewards (N, T) and outcomes (N,) in [0, 1]: (N, T) in [-1, 1], NaN where `rewards` is.

    Steps of a right answer earn at least 0, those of a wrong one at most 0.
    """
    return rewards + outcomes[:, None] - 1


class ReNorm(TokenShaper):
    """Each step's reward plus the outcome less 1: right answers' steps earn at least 0, wrong ones' at most 0.

    https://huggingface.co/papers/2509.25598. Both must be in [0, 1]. The outcome is another source's score; a row
    without one keeps its process rewards less 1/2, which is what an outcome of 1/2 makes of them.
    """

    outcome: str
    """Name of the source that says whether the answer is right."""

    def shape_tokens(self, rewards: Tensor, scores: Scores, samples: Samples) -> Tensor:
        if self.outcome not in scores.names:
            raise RewardError(f"renorm: no source {self.outcome!r}; there is {', '.join(scores.names)}")
        outcomes = scores.values[:, scores.names.index(self.outcome)]
        for what, values in (("process rewards", rewards), (f"scores of {self.outcome!r}", outcomes)):
            if ((values < 0) | (values > 1)).any():
                raise RewardError(f"renorm: {what} must be in [0, 1], got {values.nan_to_num(nan=0).abs().max():g}")
        return renormed(rewards, outcomes.nan_to_num(nan=0.5))
