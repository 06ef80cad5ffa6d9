"""Clip and Delta: process rewards that adding steps cannot raise.  https://huggingface.co/papers/2410.15115

A sum of step rewards grows with the steps, so a policy learns to repeat a right but useless one. Values are those of a
process reward model for the text up to each step, at the step's last token; tokens it says nothing of are NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Samples, Scores, TokenShaper

if TYPE_CHECKING:
    from torch import Tensor


def clipped(rewards: Tensor, eta: float) -> Tensor:
    """min(r - η, 0): (N, T) -> (N, T). No step earns more than 0."""
    return (rewards - eta).clamp(max=0)


def differences(rewards: Tensor) -> Tensor:
    """Each step's value less the next one's: (N, T) -> (N, T), NaN where `rewards` is.

    The last step but one keeps its value and the last gets 0, so that a row sums to its first value, and what is still
    to come at a step is that step's value. A row of one step gets 0.
    """
    said = ~rewards.isnan()
    bent = rewards.clone()
    following = rewards.new_zeros(len(rewards))  # the value of the next step
    steps_after = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = said[:, t]
        value = rewards[:, t]
        less = (value - following).where(steps_after > 1, value)
        bent[:, t] = less.where(steps_after > 0, 0.0).where(here, value)
        following = value.where(here, following)
        steps_after += here
    return bent


class PRMClip(TokenShaper):
    """min(r - η, 0) of each step's process reward: at most 0, so more steps cannot earn more.

    https://huggingface.co/papers/2410.15115. The paper's η is not known to us: choose one that most good steps reach,
    such as the model's mean on right answers.
    """

    eta: float
    """What a step must reach to cost nothing, on the process reward's scale."""

    def shape_tokens(self, rewards: Tensor, scores: Scores, samples: Samples) -> Tensor:
        return clipped(rewards, self.eta)


class PRMDelta(TokenShaper):
    """Each step's process reward less the next one's: a row sums to its first step's, however many follow.

    https://huggingface.co/papers/2410.15115. What is still to come at a step is its own process reward, at every step
    but the last, which leaves that to the outcome. After `prm_clip` it is the paper's best.
    """

    def shape_tokens(self, rewards: Tensor, scores: Scores, samples: Samples) -> Tensor:
        return differences(rewards)
