"""After HARMO: a rule or a reward model by row, and a length term.  https://huggingface.co/papers/2510.05283"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rewards import Combiner, RewardError, Samples, Scores, Shaper, Status
from trl_rewards.maths import weighted_sum

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


class HybridRouter(Combiner):
    """A rule's score where the rule applies, else a reward model's, and the other sources on top. A reconstruction.

    After https://huggingface.co/papers/2510.05283: R = R_hybrid + R_length + R_format, with R_hybrid a rule's score
    of a row that can be verified and a reward model's of any other. A row can be verified unless the rule has no
    opinion on it, as `accuracy` has none without a reference answer, or as a column says. Where the one that is to
    score it failed, a row has no total: the other's score would measure something else. All scores count by their
    sources' weights. The paper's threshold on similarities to a reference is not known to us.

    With `only_if: {source: <rule>, missing: true}` the model is not run on rows that a rule scores. HARMO divides by
    no deviation: `advantage: {use: center}`. Bring the model's scores to the rule's scale by its own `shape:`.
    """

    rule: str
    """Name of the source of the rule or the verifier."""
    model: str
    """Name of the source that scores what cannot be verified."""
    verifiable: str | None = None
    """Dataset column with true or false: whether a row can be verified. None: where the rule has an opinion."""

    def __post_init__(self):
        if self.rule == self.model:
            raise ValueError(f"rule and model are two sources, got {self.rule!r} for both")

    def reads(self) -> tuple[str, ...]:
        return (self.verifiable,) if self.verifiable else ()

    def check_sources(self, names: Sequence[str]) -> None:
        if unknown := [name for name in (self.rule, self.model) if name not in names]:
            raise ValueError(f"no source {unknown[0]!r}; there is {', '.join(names)}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        import torch

        self.check_sources(scores.names)
        rule, model = scores.names.index(self.rule), scores.names.index(self.model)
        by_rule = self._by_rule(scores, samples, rule)
        weighted = scores.values * scores.weights
        hybrid = torch.where(by_rule, weighted[:, rule], weighted[:, model])
        terms = [k for k in range(len(scores.names)) if k not in (rule, model)]
        values = torch.cat([hybrid[:, None], scores.values[:, terms]], dim=1)
        weights = torch.cat([scores.weights.new_ones(1), scores.weights[terms]])
        return weighted_sum(values, weights, scores.group_size).masked_fill(hybrid.isnan(), torch.nan)

    def _by_rule(self, scores: Scores, samples: Samples, rule: int) -> Tensor:
        """(N,) whether a row's score is the rule's."""
        if self.verifiable is None:
            return scores.status[:, rule] != Status.ABSTAINED
        for row, value in enumerate(samples[self.verifiable]):
            if not isinstance(value, bool):
                raise RewardError(f"column {self.verifiable!r}, row {row}: wanted true or false, got {value!r}")
        return scores.values.new_tensor(samples[self.verifiable]) > 0
