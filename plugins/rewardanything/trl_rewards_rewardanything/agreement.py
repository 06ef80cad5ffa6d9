"""How well a judge agrees with true scores: for training judges, and for benchmarks such as the paper's RABench.
https://huggingface.co/papers/2506.03637

Scores are {name: number or numeric string}; what is no number counts as missing, and names that only one side has are
left out. Only `weighted_pairs` is released; the other formulas are ours, after what the paper is reported to measure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean, pstdev, pvariance
from typing import Any, TypeVar

from trl_rewards.models import as_number

Name = TypeVar("Name", bound=Hashable)


def places(scores: Mapping[Name, float], ranking: Sequence[Name] = ()) -> dict[Name, float]:
    """The place of each name from 0, the best: by score, equal ones by `ranking`.

    Equal ones that the ranking does not both name share their mean place.
    """
    listed = {name: place for place, name in reversed(list(enumerate(ranking)))}

    def before(a: Name, b: Name) -> float:
        """1 if `a` comes before `b`, 0 if after it, 0.5 if nothing tells."""
        if scores[a] != scores[b]:
            return float(scores[a] > scores[b])
        if a in listed and b in listed:
            return float(listed[a] < listed[b])
        return 0.5

    return {name: sum(before(other, name) for other in scores if other != name) for name in scores}


def weighted_pairs(predicted: Mapping[str, Any], true: Mapping[str, Any]) -> float:
    """1 minus the weighted share of pairs in the wrong order, in [0, 1], as in the authors' code.

    A pair weighs 1 + |difference of its true scores|. A reversed pair costs its weight, a predicted tie of two that
    differ half of it, a true tie nothing. 1.0 with fewer than two names in common, 0.0 where no pair has numbers.
    """
    if len(predicted.keys() & true.keys()) < 2:
        return 1.0
    total = penalty = 0.0
    for (_, got_a, true_a), (_, got_b, true_b) in combinations(_common(predicted, true), 2):
        got, wanted = got_a - got_b, true_a - true_b
        weight = 1 + abs(wanted)
        total += weight
        if got * wanted < 0:
            penalty += weight
        elif got == 0 and wanted != 0:
            penalty += 0.5 * weight
    return max(0.0, 1 - penalty / total) if total else 0.0


def distribution_match(predicted: Mapping[str, Any], true: Mapping[str, Any]) -> float:
    """1 - (|difference of means| / 4 + |difference of standard deviations| / 2) / 2, in [0, 1] for scores in 1 to 5.

    4 and 2 are the largest differences there can be; deviations are of the population. 0.0 without a common name.
    """
    rows = _common(predicted, true)
    if not rows:
        return 0.0
    got, wanted = [row[1] for row in rows], [row[2] for row in rows]
    return 1 - 0.5 * (abs(fmean(got) - fmean(wanted)) / 4 + abs(pstdev(got) - pstdev(wanted)) / 2)


def nearness(predicted: Mapping[str, Any], true: Mapping[str, Any]) -> float:
    """Mean of 1 - |difference| / 4, in [0, 1] for scores in 1 to 5. 0.0 without a common name."""
    rows = _common(predicted, true)
    return fmean(1 - abs(got - wanted) / 4 for _, got, wanted in rows) if rows else 0.0


def ranking_agreement(
    predicted: Mapping[str, Any],
    true: Mapping[str, Any],
    predicted_ranking: Sequence[str] = (),
    true_ranking: Sequence[str] = (),
) -> float:
    """Half Kendall's tau-b, moved to [0, 1], half whether the best is the best; in [0, 1].

    Rankings break ties of scores. Several that share the first place count by their share that is truly first. 0.0
    without a common name, 1.0 with one.
    """
    rows = _common(predicted, true)
    if len(rows) < 2:
        return float(len(rows))
    got = places({name: score for name, score, _ in rows}, predicted_ranking)
    wanted = places({name: score for name, _, score in rows}, true_ranking)
    best = [name for name in got if got[name] == min(got.values())]
    hits = fmean(wanted[name] == min(wanted.values()) for name in best)
    return 0.5 * (kendall_tau(list(got.values()), list(wanted.values())) + 1) / 2 + 0.5 * hits


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b of two lists, in [-1, 1]. Where one is constant: 1.0 if the other is too, else 0.0."""
    agreement = pairs_a = pairs_b = 0
    for i, j in combinations(range(len(a)), 2):
        sign_a, sign_b = _sign(a[i] - a[j]), _sign(b[i] - b[j])
        agreement += sign_a * sign_b
        pairs_a += abs(sign_a)
        pairs_b += abs(sign_b)
    if not pairs_a or not pairs_b:
        return float(pairs_a == pairs_b)
    return agreement / math.sqrt(pairs_a * pairs_b)


def pairwise_accuracy(
    predicted: Mapping[str, Any], true: Mapping[str, Any], ranking: Sequence[str] = ()
) -> float | None:
    """Share of pairs with different true scores that are in the right order, in [0, 1]; None without such a pair.

    `ranking` breaks ties of the predicted scores; one that remains counts half.
    """
    rows = _common(predicted, true)
    got = places({name: score for name, score, _ in rows}, ranking)
    right = [
        0.5 if got[a] == got[b] else float((got[a] < got[b]) == (true_a > true_b))
        for (a, _, true_a), (b, _, true_b) in combinations(rows, 2)
        if true_a != true_b
    ]
    return fmean(right) if right else None


def ndcg(predicted: Mapping[str, Any], true: Mapping[str, Any], ranking: Sequence[str] = ()) -> float | None:
    """Normalised discounted cumulative gain with true scores as gains and discount 1 / log2(place + 2), in [0, 1].

    `ranking` breaks ties; those that remain share their places' discounts. None without a positive gain.
    """
    rows = _common(predicted, true)
    got = places({name: score for name, score, _ in rows}, ranking)
    best = _gain((gain, place) for place, gain in enumerate(sorted((row[2] for row in rows), reverse=True)))
    tied = {place: sum(other == place for other in got.values()) for place in got.values()}
    found = 0.0
    for name, _, gain in rows:
        first = got[name] - (tied[got[name]] - 1) / 2
        found += _gain((gain, first + offset) for offset in range(tied[got[name]])) / tied[got[name]]
    return found / best if best > 0 else None


def score_variance(predicted: Mapping[str, Any]) -> float | None:
    """Population variance of the predicted scores: how much of the scale a judge uses. None without a number."""
    numbers = [number for value in predicted.values() if (number := as_number(value)) is not None]
    return pvariance(numbers) if numbers else None


def _gain(gains_and_places: Iterable[tuple[float, float]]) -> float:
    return sum(gain / math.log2(place + 2) for gain, place in gains_and_places)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _common(predicted: Mapping[str, Any], true: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, predicted, true) of the names that have numbers on both sides, in the order of `true`."""
    rows = []
    for name, value in true.items():
        got, wanted = as_number(predicted.get(name)), as_number(value)
        if got is not None and wanted is not None:
            rows.append((name, got, wanted))
    return rows
