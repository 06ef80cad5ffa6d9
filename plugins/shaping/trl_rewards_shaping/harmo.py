"""A length term that compares a group's answers, after HARMO.  https://huggingface.co/papers/2510.05283"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Samples, Shaper

if TYPE_CHECKING:
    from torch import Tensor


def short_answers(lengths: Tensor, right: Tensor, group_size: int, most: float, tau: float) -> Tensor:
    """-most · (1 - exp(-(1 - length / L) / τ)) where an answer is shorter than L: (N,), (N,) bool -> (N,) float64.

    L is the mean length of the right answers of its group; 0 in groups without any, and for answers as long as L.
    """
    right = right.view(-1, group_size).double()
    count = right.sum(dim=1, keepdim=True)
    lengths = lengths.double().view(-1, group_size)
    mean = (lengths * right).sum(dim=1, keepdim=True) / count.clamp(min=1)
    lacking = (1 - lengths / mean.clamp(min=1)).clamp(min=0)
    penalty = most * (1 - (-lacking / tau).exp())
    return -(penalty * (mean > 0)).view(-1)  # it is 0 without a right answer, or where all are empty


class HarmoLength(Shaper):
    """Takes up to `max_penalty` off answers that are shorter than the right ones of their group. A reconstruction.

    After https://huggingface.co/papers/2510.05283, of whose length penalty is known to us that it compares an answer
    with the lengths in its group, discourages short ones, is there only if one of the group is right, and has a
    largest value and a τ. The formula is ours. HARMO adds the term to rewards of correctness and form, and divides by
    no deviation (`advantage: {use: center}`).

    Put it under the source that says what is right.
    """

    max_penalty: float
    """What it comes near to for an answer of no tokens and a small τ; above 0."""
    tau: float
    """How fast it gets there: at 1 - τ of the right answers' length 0.63 of it is taken off; above 0."""
    right_from: float = 1.0
    """Rewards from here on are right answers."""

    def __post_init__(self):
        if not self.max_penalty > 0 or not self.tau > 0:
            raise ValueError(f"max_penalty and tau must be above 0, got {self.max_penalty} and {self.tau}")

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        lengths = rewards.new_tensor(samples.lengths)
        right = rewards >= self.right_from  # a row without a score is not
        penalty = short_answers(lengths, right, samples.group_size or 1, self.max_penalty, self.tau)
        return (rewards + penalty).to(rewards.dtype)
