"""Choosing training rows by the base model's own score.  https://huggingface.co/papers/2505.11080

The orders, of equal scores too, are those of the authors' code (lilakk/BLEUBERI@e0d15639): rows with equal scores stay
in the order of the dataset, and where there are no more rows than are asked for, all are kept, best first.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_rewards import Selector


class Ranked(Selector):
    """What the four selectors share."""

    holes: bool = False
    """Whether rows without a score fill up where those with one are fewer than asked for; they come last."""

    def select(self, scores: Sequence[float | None], count: int, seed: int = 0) -> list[int]:
        there = {row: score for row, score in enumerate(scores) if score is not None}
        chosen = descending(there) if len(there) <= count else self.choose(there, count, seed)
        holes = [row for row, score in enumerate(scores) if score is None] if self.holes else []
        return chosen + holes[: count - len(chosen)]

    def choose(self, scores: dict[int, float], count: int, seed: int) -> list[int]:
        """`count` of more rows, each with its score."""
        raise NotImplementedError


class Hard(Ranked):
    """The rows with the lowest scores, best first: what BLEUBERI trains on.  https://huggingface.co/papers/2505.11080"""

    def choose(self, scores: dict[int, float], count: int, seed: int) -> list[int]:
        return descending({row: scores[row] for row in ascending(scores)[:count]})


class Easy(Ranked):
    """The rows with the highest scores, best first.  https://huggingface.co/papers/2505.11080"""

    def choose(self, scores: dict[int, float], count: int, seed: int) -> list[int]:
        return descending(scores)[:count]


class Medium(Ranked):
    """The rows in the middle of the scores, best first.  https://huggingface.co/papers/2505.11080"""

    def choose(self, scores: dict[int, float], count: int, seed: int) -> list[int]:
        start = (len(scores) - count) // 2
        return descending({row: scores[row] for row in ascending(scores)[start : start + count]})


class Random(Ranked):
    """Rows drawn evenly, whatever their scores, in the order drawn.  https://huggingface.co/papers/2505.11080"""

    def choose(self, scores: dict[int, float], count: int, seed: int) -> list[int]:
        import numpy as np

        # The legacy generator, which is what `np.random.seed` and `np.random.choice` of the authors' code draw from.
        drawn = np.random.RandomState(seed).choice(len(scores), count, replace=False)
        rows = list(scores)
        return [rows[place] for place in drawn]


def ascending(scores: dict[int, float]) -> list[int]:
    """Rows by score, lowest first, equal ones in the order given."""
    return sorted(scores, key=scores.__getitem__)


def descending(scores: dict[int, float]) -> list[int]:
    """Rows by score, highest first, equal ones in the order given."""
    return sorted(scores, key=scores.__getitem__, reverse=True)
