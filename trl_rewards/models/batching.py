"""Which rows go through a model together: micro-batches by a token budget, and rows that share a prefix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

LONGEST_RUN = 256
"""Rows that share one prefix. More save little, and the search would take longer than the scoring."""


class Shared(NamedTuple):
    """Rows that begin with the same `prefix` tokens; each has at least one token more."""

    rows: list[int]
    prefix: int

    def speed_up(self, ids: Sequence[Sequence[int]]) -> float:
        """Tokens of these rows over the tokens that are left when the prefix is computed once.

        G(P + C) / (P + GC) for G rows of equal length.
        """
        tokens = sum(len(ids[row]) for row in self.rows)
        return tokens / (tokens - self.prefix * (len(self.rows) - 1))


def batches(lengths: Sequence[int], budget: int, prefix: int = 0, switch: int | None = None) -> list[list[int]]:
    """Indices of `lengths` in batches of at most `budget` padded tokens, shortest rows first, ties in their order.

    A longer row goes alone. `prefix` tokens of each row are in a cache already: they count, since the cache takes
    memory, but are not in `lengths`. Rows of up to `switch` tokens are never in a batch with longer ones.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    found: list[list[int]] = []
    for index in order:
        length = prefix + lengths[index]  # the longest of the batch so far
        full = not found or (len(found[-1]) + 1) * length > budget
        if full or (switch is not None and prefix + lengths[found[-1][0]] <= switch < length):
            found.append([])
        found[-1].append(index)
    return found


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


def shared_prefixes(ids: Sequence[Sequence[int]], rows: Sequence[int], shortest: int = 1) -> list[Shared]:
    """Groups of rows with common prefixes of at least `shortest` tokens, chosen so that the fewest tokens are left.

    Rows are sorted by their tokens, so that those with a long common prefix are neighbours; the best cut into runs of
    neighbours is found by dynamic programming. Rows that share nothing are in no group.
    """
    order = sorted(rows, key=lambda row: (ids[row], row))
    room = [len(ids[row]) - 1 for row in order]  # one token of each row must be left to compute
    joint = [  # prefix of each row and the one before it
        min(common_prefix(ids[before], ids[row]), *room[index : index + 2])
        for index, (before, row) in enumerate(itertools.pairwise(order))
    ]
    best = [0] * (len(order) + 1)  # tokens saved in the first `end` rows
    cuts = [Shared([], 0)] * (len(order) + 1)  # the run that ends there
    for end in range(1, len(order) + 1):
        best[end], cuts[end] = best[end - 1], Shared(order[end - 1 : end], 0)
        prefix = room[end - 1]
        for start in range(end - 2, max(end - 1 - LONGEST_RUN, -1), -1):
            prefix = min(prefix, joint[start])
            if prefix < shortest:
                break
            saved = best[start] + prefix * (end - start - 1)
            if saved > best[end]:
                best[end], cuts[end] = saved, Shared(order[start:end], prefix)
    groups = []
    end = len(order)
    while end:
        groups.append(cuts[end])
        end -= len(cuts[end].rows)
    return [group for group in reversed(groups) if len(group.rows) > 1]
