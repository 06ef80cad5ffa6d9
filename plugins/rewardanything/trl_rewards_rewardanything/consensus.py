"""What several judges agree on: the rankings that RewardAnything is trained on.  https://huggingface.co/papers/2506.03637"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence


def consensus(rankings: Sequence[Sequence[str]], scores: Sequence[Mapping[str, float]], support: int) -> list[str]:
    """The longest part of any judge's ranking whose every pair has the support of at least `support` judges' scores.

    `rankings` and `scores` have one entry per judge, best first and {name: score}. A judge supports "a before b" with
    a higher score for a. Of equally long parts the first judge's counts, and of one judge's the one that keeps the
    better ranked names. The paper has four judges and a support of three. With no pair supported, the first judge's
    best name remains.

    Support is not transitive (three of four may support a over b, three others b over c, and only two a over c), so it
    is not enough to look at neighbours: the part is a largest clique of the supported pairs, found by dynamic
    programming over the names that may still follow. Meant for groups of up to some twenty names.
    """
    if len(rankings) != len(scores):
        raise ValueError(
            f"one ranking and one mapping of scores per judge are wanted, got {len(rankings)} and {len(scores)}"
        )
    if not 1 <= support <= len(scores):
        raise ValueError(f"support must be from 1 to the number of judges ({len(scores)}), got {support}")
    best: list[str] = []
    for ranking in rankings:
        found = _longest(list(dict.fromkeys(ranking)), scores, support)
        if len(found) > len(best):
            best = found
    return best


def _longest(names: list[str], scores: Sequence[Mapping[str, float]], support: int) -> list[str]:
    """The longest subsequence of `names` in which every earlier one is supported over every later one."""
    after = [  # for each place, the later places that may stand in one subsequence with it, as bits
        sum(1 << j for j in range(i + 1, len(names)) if supporters(scores, names[i], names[j]) >= support)
        for i in range(len(names))
    ]

    @functools.cache
    def longest(allowed: int) -> tuple[int, ...]:
        """The longest chain within the allowed places."""
        if not allowed:
            return ()
        first = (allowed & -allowed).bit_length() - 1
        with_first = (first, *longest(allowed & after[first]))
        rest = allowed & ~(1 << first)
        if rest.bit_count() < len(with_first):
            return with_first
        return max(with_first, longest(rest), key=len)  # of equally long ones, max takes the first

    return [names[place] for place in longest((1 << len(names)) - 1)]


def supporters(scores: Sequence[Mapping[str, float]], better: str, worse: str) -> int:
    """How many judges score one name above the other; a judge without a score for both does not."""
    return sum(judge[better] > judge[worse] for judge in scores if better in judge and worse in judge)
