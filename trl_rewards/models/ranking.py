"""From verdicts on some completions at a time to scores of a whole group. Plain functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean


def windows(rows: Sequence[int], size: int, overlap: int) -> list[list[int]]:
    """Chunks of at most `size` rows that cover all; each begins with the last `overlap` rows of the one before."""
    starts = range(0, max(len(rows) - overlap, 1), size - overlap)
    return [list(rows[start : start + size]) for start in starts]


def merge_windows(verdicts: Iterable[dict[int, float]]) -> dict[int, float]:
    """Scores of rows from chunks that were scored apart, on one scale.

    A judge may be stricter in one chunk than in another. Chunk k is moved by o_k, the mean over the rows it shares
    with chunks already placed of (their mean score there - their score in k), the first by 0. A row's score is the
    mean over its chunks of (score + o_k), less the mean of all o_k, so that no chunk sets the scale. For chunks that
    agree on shared rows every o_k is 0; for chunks that all hold the same rows the score is the plain mean. Scores may
    leave the judge's scale. Rows of a chunk that shares none with the others, and is not the first, are left out.
    """
    waiting = [scores for scores in verdicts if scores]
    placed: dict[int, list[float]] = {}
    moves: list[float] = []
    while waiting:
        index = next((i for i, scores in enumerate(waiting) if not placed or placed.keys() & scores.keys()), None)
        if index is None:
            break
        scores = waiting.pop(index)
        shared = [fmean(placed[row]) - scores[row] for row in scores if row in placed]
        moves.append(fmean(shared) if shared else 0.0)
        for row, score in scores.items():
            placed.setdefault(row, []).append(score + moves[-1])
    return {row: fmean(scores) - fmean(moves) for row, scores in placed.items()}


def pairs(rows: Sequence[int], ring: bool) -> list[tuple[int, int]]:
    """All pairs of rows, or each row with its neighbours on a ring. (n,) -> n(n-1)/2 or n pairs."""
    if not ring or len(rows) < 3:
        return list(combinations(rows, 2))
    return [(rows[index - 1], rows[index]) for index in range(len(rows))]


def settle(points: Sequence[float], strict: bool) -> float:
    """One pair's points for its first row, from its verdicts in either order: their mean, or 0.5 where a strict reader
    finds them to differ."""
    return 0.5 if strict and len(set(points)) > 1 else fmean(points)
