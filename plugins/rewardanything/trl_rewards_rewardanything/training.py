"""Rewards for training a RewardAnything judge by GRPO: its reply's format, and its agreement with true scores.
https://huggingface.co/papers/2506.03637

The paper's total is 0.15 · format + 0.85 · accuracy: weights of two sources in a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

from trl_rewards import Context, Reward, Samples, Score
from trl_rewards.models import as_number
from trl_rewards_rewardanything.agreement import distribution_match, nearness, ranking_agreement, weighted_pairs
from trl_rewards_rewardanything.verdict import (
    RANKING_KEYS,
    SCORES,
    Verdict,
    first_thought,
    read_verdict,
    released_json,
)


class RewardAnythingFormat(Reward):
    """Format credit for a judge's reply that thinks, then gives scores and a ranking, in [0, 1].
    https://huggingface.co/papers/2506.03637

    0.15 for both think tags (0.05 for one), 0.05 for a thought of more than 50 characters, 0.2 for JSON (0.15 where
    prose has to be cut away), 0.1 each for the keys `scores` and `best-to-worst`, 0.2 times the share of true names
    that are scored, and 0.2 times the share of ranked pairs that the scores do not contradict.

    The released function fails where both keys are there, because its measure of the last part is missing; the one
    here is ours. A row without true scores has no opinion (None).
    """

    scores: str = "scores"
    """Dataset column with the true scores: {name: 1 to 5}, or such JSON, also below a key `scores`."""

    def reads(self) -> tuple[str, ...]:
        return (self.scores,)

    def score(self, samples: Samples) -> list[Score]:
        truths = [read_truth(value) for value in samples[self.scores]]
        return [
            format_credit(text, list(truth.scores)) if truth else None
            for text, truth in zip(samples.texts, truths, strict=True)
        ]


class RewardAnythingAccuracy(Reward):
    """How well a judge's reply agrees with true scores, in [0, 1].  https://huggingface.co/papers/2506.03637

    Share of true names that are scored · weighted mean of four measures: the released penalty for reversed pairs, and
    three of which only the purpose is known and the formulas (`agreement.py`) and weights are ours: match of mean and
    deviation, nearness of scores, agreement of rankings. A reply that cannot be read scores 0.0: here the judge is
    what is trained. A row without true scores has no opinion (None).

    The factor in front is ours too: the released pair measure gives 1.0 to a reply that scores one candidate only.
    """

    scores: str = "scores"
    """Dataset column with the true scores: {name: 1 to 5}, or such JSON, also below a key `scores`."""
    ranking: str | None = None
    """Dataset column with the true names from best to worst, which breaks ties of true scores. None: a `best-to-worst`
    beside the scores, where there is one."""
    pair_weight: float = 0.25
    """Weight of the reversed-pair penalty."""
    distribution_weight: float = 0.25
    """Weight of the match of mean and standard deviation."""
    nearness_weight: float = 0.25
    """Weight of the partial credit for near scores."""
    ranking_weight: float = 0.25
    """Weight of Kendall's tau and the best candidate."""

    def __post_init__(self):
        self.weights = (self.pair_weight, self.distribution_weight, self.nearness_weight, self.ranking_weight)
        if min(self.weights) < 0 or sum(self.weights) == 0:
            raise ValueError(f"weights must not be negative, and one must be positive, got {self.weights}")
        self.log_metric: Callable[[str, float], None] | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.scores, self.ranking) if self.ranking else (self.scores,)

    def setup(self, context: Context) -> None:
        self.log_metric = context.log_metric

    def score(self, samples: Samples) -> list[Score]:
        rankings = samples[self.ranking] if self.ranking else [None] * len(samples)
        rows = []
        for text, scores, ranking in zip(samples.texts, samples[self.scores], rankings, strict=True):
            truth = read_truth(scores, ranking)
            rows.append(measures(read_verdict(text), truth) if truth else None)
        self._log([row for row in rows if row is not None])
        return [None if row is None else self._mean(row) for row in rows]

    def _mean(self, row: Measures) -> float:
        means = (row.pairs, row.distribution, row.nearness, row.ranking)
        weighted = sum(weight * value for weight, value in zip(self.weights, means, strict=True))
        return row.coverage * weighted / sum(self.weights)

    def _log(self, rows: list[Measures]) -> None:
        if self.log_metric and rows:
            for name in Measures._fields:
                self.log_metric(f"{self.display_name}/{name}", fmean(row._asdict()[name] for row in rows))


class Truth(NamedTuple):
    """What a judge should have said."""

    scores: dict[str, float]
    ranking: list[str]


class Measures(NamedTuple):
    """How well one reply agrees with the truth, each in [0, 1]."""

    coverage: float
    pairs: float
    distribution: float
    nearness: float
    ranking: float


def read_truth(value: Any, ranking: Any = None) -> Truth | None:
    """The true scores of a dataset row: a mapping or its JSON, by itself or below `scores`; None without a number.

    Names without a value are left out: `datasets` gives every row of a column all names that any row has.
    """
    value = _from_json(value)
    if not isinstance(value, Mapping):
        return None
    inner = _from_json(value.get(SCORES))
    given = inner if isinstance(inner, Mapping) else value
    scores = {name: number for name, score in given.items() if (number := as_number(score)) is not None}
    listed = _from_json(ranking) if ranking is not None else next((value[k] for k in RANKING_KEYS if k in value), None)
    return Truth(scores, list(listed) if isinstance(listed, list | tuple) else []) if scores else None


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def measures(verdict: Verdict, truth: Truth) -> Measures:
    """The four measures and the share of true names that have a score; all 0 for a reply without scores."""
    common = verdict.scores.keys() & truth.scores.keys()
    if not common:
        return Measures(0.0, 0.0, 0.0, 0.0, 0.0)
    return Measures(
        coverage=len(common) / len(truth.scores),
        pairs=weighted_pairs(verdict.scores, truth.scores),
        distribution=distribution_match(verdict.scores, truth.scores),
        nearness=nearness(verdict.scores, truth.scores),
        ranking=ranking_agreement(verdict.scores, truth.scores, verdict.stated, truth.ranking),
    )


def format_credit(text: str, true_names: Sequence[str]) -> float:
    """The format reward of one reply, in [0, 1]; the parts are listed at `RewardAnythingFormat`."""
    tags = ("<think>" in text) + ("</think>" in text)
    credit = (0.0, 0.05, 0.15)[tags] + 0.05 * (len(first_thought(text)) > 50)
    found, cut_out = released_json(text)
    if not isinstance(found, dict) or not found:
        return credit
    credit += 0.15 if cut_out else 0.20
    scores = found.get(SCORES)
    ranking = next((found[key] for key in RANKING_KEYS if key in found), None)
    credit += 0.10 * (SCORES in found) + 0.10 * any(key in found for key in RANKING_KEYS)
    if isinstance(scores, dict):
        credit += 0.20 * len(scores.keys() & set(true_names)) / max(len(set(true_names)), 1)
        if isinstance(ranking, list):
            credit += 0.20 * consistency(scores, ranking)
    return min(credit, 1.0)


def consistency(scores: Mapping[str, Any], ranking: Sequence[Any]) -> float:
    """Share of ranked pairs whose better one has no lower score, over names with both; without a pair 1.0 for one such
    name and 0.0 for none."""
    numbers = {name: number for name, value in scores.items() if (number := as_number(value)) is not None}
    listed = [name for name in dict.fromkeys(filter(_is_name, ranking)) if name in numbers]
    if len(listed) < 2:
        return float(len(listed))
    return fmean(numbers[better] >= numbers[worse] for better, worse in combinations(listed, 2))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)
