"""Weights that change over a run: `0.5`, `{linear: [1, 0.1]}`, `{cosine: [1, 0.1]}`, `{steps: {0: 1, 0.5: 0.1}}`.

The weight is applied outside the raw score, so that what is logged for a source stays comparable over the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("constant", "linear", "cosine", "steps")


@dataclass(frozen=True)
class Schedule:
    """A weight from `start` to `end` over the run."""

    kind: Literal["constant", "linear", "cosine", "steps"]
    start: float
    end: float
    steps: tuple[tuple[float, float], ...] = ()
    """Of `steps`: (share of the run, weight from there on), in their order and from 0."""

    @property
    def lowest(self) -> float:
        return min([self.start, self.end, *(weight for _, weight in self.steps)])

    def at(self, progress: float) -> float:
        """The weight when `progress` (0 to 1) of the run is done."""
        progress = min(max(progress, 0.0), 1.0)
        if self.kind == "steps":
            return [weight for share, weight in self.steps if share <= progress][-1]
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def __str__(self) -> str:
        if self.kind == "steps":
            return f"steps({','.join(f'{share:g}:{weight:g}' for share, weight in self.steps)})"
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
                "must be a number or one of {linear: [a, b]}, {cosine: [a, b]}, {steps: {0: a, 0.5: b}}, "
                f"{{constant: a}}, got {value!r}"
            )
        ends = value[kind]
        if kind == "steps":
            return cls._of_steps(ends)
        if kind == "constant":
            if not _is_number(ends):
                raise ValueError(f"constant takes one number, got {ends!r}")
            return cls("constant", float(ends), float(ends))
        if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))):
            raise ValueError(f"{kind} takes two numbers [start, end], got {ends!r}")
        _refuse_negative(kind, ends)
        return cls(kind, float(ends[0]), float(ends[1]))

    @classmethod
    def _of_steps(cls, given: Any) -> Schedule:
        numbers = isinstance(given, dict) and all(map(_is_number, [*given, *given.values()]))
        if not numbers or 0 not in given or not all(0 <= share < 1 for share in given):
            raise ValueError(
                "steps takes a mapping from shares of the run, from 0 and below 1, to the weight from there on, such "
                f"as {{0: 1.0, 0.5: 0.1}}, got {given!r}"
            )
        steps = tuple(sorted((float(share), float(weight)) for share, weight in given.items()))
        _refuse_negative("steps", [weight for _, weight in steps])
        return cls("steps", steps[0][1], steps[-1][1], steps)


def _refuse_negative(kind: str, weights: Any) -> None:
    if min(weights) < 0:
        raise ValueError(
            f"a schedule must not go below 0, got {kind} {list(weights)}: the source would turn into its opposite "
            "on the way (a constant negative weight makes a penalty)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
