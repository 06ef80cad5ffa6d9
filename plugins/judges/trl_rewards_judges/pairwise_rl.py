"""Pairwise-RL: how sure a judge is that an answer beats an anchor answer.  https://huggingface.co/papers/2504.04950

A reconstruction: of the paper's body only the set-up could be had, a generative judge of pairs that is used in its own
format for the reward too, an anchor answer, and both orders against its position bias.
"""

from __future__ import annotations

import math
from typing import Literal

from trl_rewards import Failed, Samples, Score
from trl_rewards.models import Ask
from trl_rewards_judges.comparing import Comparing, both_ways, position_bias


class PairwiseRL(Comparing):
    """Probability that an answer is better than an anchor answer, such as the ground truth, asked in both orders.

    https://huggingface.co/papers/2504.04950, inspired by it: p = ½ [P(y ≻ a | y first) + 1 - P(a ≻ y | a first)], in
    [0, 1], or its logit. With `verdict: text` each P is 1, 0 or ½ for a tie. A comparison that fails in one order is a
    hole, since the other order alone has the judge's position bias in it. A row without an anchor has no opinion
    (None). An empty answer has the lowest reward, unasked.
    """

    anchor: str
    """Dataset column with the anchor answer of each row, in most cases the ground truth."""
    reward: Literal["probability", "logit"] = "probability"
    """p, or log p / (1 - p), which does not level off for answers that are much better than the anchor."""
    eps: float = 0.01
    """For the logit p is kept in [eps, 1 - eps]."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.eps < 0.5:
            raise ValueError(f"eps must be in (0, 0.5), got {self.eps}")

    def reads(self) -> tuple[str, ...]:
        return (self.anchor,)

    def floor(self) -> float | None:
        return self._reward(0.0)

    def gated(self, samples: Samples) -> dict[int, float]:
        return {row: low for row, low in super().gated(samples).items() if _there(samples[self.anchor][row])}

    def asks(self, samples: Samples) -> list[Ask]:
        gated, shown = self.gated(samples), self.shown(samples)
        found = []
        for row, anchor in enumerate(samples[self.anchor]):
            if _there(anchor) and row not in gated:
                text = self.made_safe(str(anchor))
                found.append(Ask(**self.comparison(samples, row, shown[row], text), rows=[row], names=["A"]))
                found.append(Ask(**self.comparison(samples, row, text, shown[row]), rows=[row], names=["B"]))
        return found

    def merge(self, samples: Samples, answers: list[tuple[Ask, list[Score]]]) -> list[Score]:
        said: list[dict[str, Score]] = [{} for _ in range(len(samples))]
        for ask, (score,) in answers:
            said[ask.rows[0]][ask.names[0]] = score
        return [self._of_both(**each) if each else None for each in said]

    def _of_both(self, A: Score, B: Score) -> Score:
        """The reward from an answer's points when it was shown as A and as B."""
        if isinstance(A, float) and isinstance(B, float):
            return self._reward(both_ways(A, 1 - B))
        return next(score for score in (A, B) if isinstance(score, Failed))

    def _reward(self, p: float) -> float:
        if self.reward == "probability":
            return p
        p = min(max(p, self.eps), 1 - self.eps)
        return math.log(p / (1 - p))

    def measures(self, samples: Samples, answers: list[tuple[Ask, list[Score]]]) -> dict[str, float]:
        return {"position_bias": position_bias(answers)}


def _there(anchor: object) -> bool:
    """Whether there is an anchor; NaN is how tables say None."""
    return anchor is not None and anchor == anchor and bool(str(anchor).strip())
