"""Pref-GRPO: how often an answer wins against others of its group, as a pairwise judge says.  https://huggingface.co/papers/2508.20751"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from trl_rewards import Context, Failed, RewardError, Samples, Score, load_target
from trl_rewards.models import Ask, Held
from trl_rewards_judges.comparing import (
    Answers,
    Compared,
    Comparing,
    Pair,
    groups,
    next_round,
    points_of_pairs,
    position_bias,
    win_rates,
)

Scorer = Callable[[list[str], list[str], list[str]], Sequence[float | None]]


class PairwiseWinRate(Comparing):
    """Share of comparisons with other answers of its group that an answer wins, in [0, 1]; a tie is half a win.

    https://huggingface.co/papers/2508.20751. All G(G-1)/2 pairs of a group are compared once, by a language model or a
    `scorer`. Of each pair the one shown first is drawn from the run's seed and the two texts, not from their places.
    Equal texts are tied, and an empty or screened answer loses to every other one, unasked; its own score is 0.

    A comparison that fails drops out of the rate; an answer without any that succeeded is Failed, and one with nobody
    to be compared with has no opinion (None). Deviations from the authors' code (CodeGoat24/Pref-GRPO@3e787f6d):
    there the first answer of the group is always shown first, a reply that cannot be read is a tie (`failed: tie`),
    and rates are rounded to three decimals.
    """

    scope = "group"

    model: str = ""
    """The judge's name on the server; without `endpoint`, the folder or Hub name of a causal language model. Not with
    `scorer`."""
    scorer: str | None = None
    """`./file.py:function` or `package.module:function`, which compares in place of a judge: called with three lists
    of texts, prompts, answers and other answers, it returns for each the probability that the first is better, in
    [0, 1], or None."""
    swaps: bool = False
    """Ask about each pair in both orders, for twice the price."""
    disagreement: Literal["tie", "hole"] = "tie"
    """What two orders with different verdicts in text are: a tie, or a comparison that failed. Probabilities are
    averaged."""
    ties: float = 0.5
    """Points of either side in a tie. Below 0.5, being no better costs both."""
    failed: Literal["hole", "tie"] = "hole"
    """What a comparison is that nobody could make."""
    anchors: int | None = None
    """Compare with so many of a group's answers, drawn at random, and not with all: about G · anchors comparisons. The
    rate is then that against the anchors, with an anchor in a tie with itself."""
    tournament: int | None = None
    """Compare in so many rounds of G / 2 pairs each, in which answers meet that did equally well so far (a Swiss
    tournament). The rate is that against opponents of like strength, which orders the group and says little of how
    far its answers are apart."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.model) == bool(self.scorer):
            raise ValueError("either model, a judge, or scorer, a function that compares, must be set, and not both")
        if self.scorer and (self.endpoint or self.verdict != "text"):
            raise ValueError("endpoint and verdict are for a judge, and scorer compares in place of one")
        if self.anchors is not None and self.tournament is not None:
            raise ValueError("set anchors or tournament, not both")
        for name in ("anchors", "tournament"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.ties <= 0.5:
            raise ValueError(f"ties must be in [0, 0.5], got {self.ties}")

    def held(self) -> list[Held]:
        return [] if self.scorer else super().held()

    def setup(self, context: Context) -> None:
        if not self.scorer:
            super().setup(context)
            return
        self._run_context = context
        self._scorer: Scorer = load_target(self.scorer, context.base_dir)
        if not callable(self._scorer):
            raise RewardError(f"scorer: {self.scorer!r} is no function but {self._scorer!r}")

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name != "_scorer"}

    def shown(self, samples: Samples) -> list[str]:
        return self._answers(samples) if self.scorer else super().shown(samples)

    def asks(self, samples: Samples) -> list[Ask]:
        return self.more_asks(samples, [])

    def more_asks(self, samples: Samples, answers: Answers) -> list[Ask]:
        shown, points = self.shown(samples), points_of_pairs(answers, self._settled)
        found = []
        for group in groups(samples):
            for pair in self._played(samples, shown, group, points)[1]:
                for first, second in self._orders(samples, shown, pair):
                    asked: dict[str, Any] = {"messages": []}
                    if not self.scorer:
                        asked = self.comparison(samples, first, shown[first], shown[second])
                    found.append(Ask(**asked, rows=[first, second], names=["A", "B"]))
        return found

    def score(self, samples: Samples) -> list[Score]:
        if not self.scorer:
            return super().score(samples)
        answers: Answers = []
        while asks := self.more_asks(samples, answers):
            answers += zip(asks, self._scored(samples, asks), strict=True)
        return self._finish(samples, answers, Counter())

    def merge(self, samples: Samples, answers: Answers) -> list[Score]:
        shown, points, gated = self.shown(samples), points_of_pairs(answers, self._settled), self.gated(samples)
        compared: list[Compared] = []
        anchors: set[int] = set()
        for group in groups(samples):
            compared += self._played(samples, shown, group, points)[0]
            anchors |= self._anchors(samples, shown, group)
        holes: list[Score] = [None] * len(samples)
        for pair in compared:
            for row in pair[:2]:
                holes[row] = Failed("the two orders of its comparisons disagree")
        for ask, scores in answers:
            for row, score in zip(ask.rows, scores, strict=True):
                if isinstance(score, Failed):
                    holes[row] = score
        rates = win_rates(compared, len(samples), self.ties, anchors or None)
        merged = [hole if rate is None else rate for hole, rate in zip(holes, rates, strict=True)]
        return [gated.get(row, score) for row, score in enumerate(merged)]

    def measures(self, samples: Samples, answers: Answers) -> dict[str, float]:
        """`pairs` that were asked about, the share of `ties` among those that were decided, the judge's
        `position_bias`, and of pairs that were answered in both orders the share that is `inconsistent`."""
        decided = [won for won in points_of_pairs(answers, self._settled).values() if won is not None]
        said = points_of_pairs(answers, list)
        found = {
            "pairs": float(len(said)),
            "ties": decided.count(0.5) / max(len(decided), 1),
            "position_bias": position_bias(answers),
        }
        if self.swaps:
            winners = [[(won > 0.5) - (won < 0.5) for won in both] for both in said.values() if len(both) == 2]
            found["inconsistent"] = sum(one != other for one, other in winners) / max(len(winners), 1)
        return found

    def _played(
        self, samples: Samples, shown: list[str], group: range, points: Mapping[Pair, float | None]
    ) -> tuple[list[Compared], list[Pair]]:
        """A group's comparisons so far, and the pairs to be asked about next: none once all is over."""
        gated = self.gated(samples)
        compared: list[Compared] = []
        for played in range(self.tournament or 1):
            waiting = []
            for one, other in self._pairs(samples, shown, group, compared, played):
                if one in gated or other in gated:
                    won: float | None = (1 + (other in gated) - (one in gated)) / 2
                elif shown[one] == shown[other]:
                    won = 0.5
                elif (one, other) in points:
                    won = points[one, other]
                    won = 0.5 if won is None and self.failed == "tie" else won
                else:
                    waiting.append((one, other))
                    continue
                compared.append(Compared(one, other, won))
            if waiting:
                return compared, waiting
        return compared, []

    def _pairs(
        self, samples: Samples, shown: list[str], group: range, compared: list[Compared], played: int
    ) -> list[Pair]:
        """Who meets, of those who are to meet at the same time: pairs of rows, the lower one first."""
        if self.tournament:
            rows, chance = self._drawn(samples, shown, group, f"round {played}")
            return [(min(pair), max(pair)) for pair in next_round(compared, rows, chance)]
        anchors = self._anchors(samples, shown, group)
        return [pair for pair in combinations(group, 2) if not anchors or not anchors.isdisjoint(pair)]

    def _anchors(self, samples: Samples, shown: list[str], group: range) -> set[int]:
        """The rows that others are compared with; none where everything is compared with everything."""
        if self.anchors is None or self.anchors >= len(group):
            return set()
        rows, chance = self._drawn(samples, shown, group, "anchors")
        gated = self.gated(samples)
        return set(sorted(chance.sample(rows, len(rows)), key=lambda row: row in gated)[: self.anchors])

    def _orders(self, samples: Samples, shown: list[str], pair: Pair) -> list[Pair]:
        """The orders in which a pair is shown."""
        (one, other), chance = self._drawn(samples, shown, pair, "first")
        orders = [(one, other), (other, one)]
        return orders if self.swaps else [chance.choice(orders)]

    def _drawn(
        self, samples: Samples, shown: list[str], rows: Sequence[int], salt: str
    ) -> tuple[list[int], random.Random]:
        """Rows in an order that their places do not change, and a random stream for them."""
        rows = sorted(rows, key=lambda row: shown[row])
        return rows, self.private_random(samples, rows, salt)

    def _settled(self, said: list[float]) -> float | None:
        if not said:
            return None
        averaged = self.verdict == "probability" or self.scorer
        if averaged or len(set(said)) == 1:
            return sum(said) / len(said)
        return 0.5 if self.disagreement == "tie" else None

    def _scored(self, samples: Samples, asks: list[Ask]) -> list[list[Score]]:
        """What the scorer says of pairs. RewardError if that is no probability."""
        if "_scorer" not in vars(self):
            self.setup(self._context())
        shown, prompts = self.shown(samples), samples.prompt_texts
        sides = [[shown[ask.rows[place]] for ask in asks] for place in (0, 1)]
        found = list(self._scorer([prompts[ask.rows[0]] for ask in asks], *sides))
        if len(found) != len(asks):
            raise RewardError(f"scorer: {self.scorer!r} gave {len(found)} values for {len(asks)} pairs")
        scores: list[list[Score]] = []
        for value in found:
            if value is None:
                scores.append([Failed("the scorer could not compare")] * 2)
            elif 0 <= value <= 1:
                scores.append([float(value), 1 - float(value)])
            else:
                raise RewardError(f"scorer: {self.scorer!r} must give probabilities in [0, 1] or None, got {value!r}")
        return scores
