"""Weights that change over a run: `0.5`, `{constant: 0.5}`, `{linear: [1.0, 0.1]}`, `{cosine: [1.0, 0.1]}`.

The weight is applied outside the raw score, so that what is logged for a source stays comparable over the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A weight from `start` to `end` over the run."""

    kind: Literal["constant", "linear", "cosine"]
    start: float
    end: float

    def at(self, progress: float) -> float:
        """The weight when `progress` (0 to 1) of the run is done."""
        progress = min(max(progress, 0.0), 1.0)
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def __str__(self) -> str:
        return f"{self.start:g}" if self.kind == "constant" else f"{self.kind}({self.start:g}->{self.end:g})"

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """A number, or one of the mappings above. ValueError says what is wrong.

        A constant may be negative (a penalty); a schedule may not, since it would turn a reward into its opposite.
        """
        if _is_number(value):
            return cls("constant", float(value), float(value))
        if not isinstance(value, dict) or len(value) != 1 or (kind := next(iter(value))) not in KINDS:
            raise ValueError(
                f"must be a number or one of {{linear: [a, b]}}, {{cosine: [a, b]}}, {{constant: a}}, got {value!r}"
            )
        ends = value[kind]
        if kind == "constant":
            if not _is_number(ends):
                raise ValueError(f"constant takes one number, got {ends!r}")
            return cls("constant", float(ends), float(ends))
        if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))):
            raise ValueError(f"{kind} takes two numbers [start, end], got {ends!r}")
        if min(ends) < 0:
            raise ValueError(
                f"a schedule must not go below 0, got {kind} {list(ends)}: the source would turn into its opposite "
                "on the way (a constant negative weight makes a penalty)"
            )
        return cls(kind, float(ends[0]), float(ends[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
