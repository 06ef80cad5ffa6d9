"""Which groups a policy is trained on: those whose prompt is neither too easy nor too hard for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GroupFilter:
    """PRIME's online accuracy filter.  https://huggingface.co/papers/2502.01456 (section 3.4)

    A group stays if its mean of one source's raw scores, before any shaping, is in [low, high]; rows without a score
    do not count, and a group of such rows alone goes. The rows of a group that goes are not trained on: they have no
    reward, no advantage and no place in the loss, and no shaper, baseline or learning reward sees them.

    With `oversample` or `refill` other prompts' groups take their places, as far as enough of them stay. What is
    generated beyond a batch is thrown away, where the authors' code keeps it for the next one.
    """

    source: str
    """The source whose scores are looked at, such as a verifier's 0 and 1."""
    low: float = 0.2
    """Least mean of a group that stays."""
    high: float = 0.8
    """Largest mean of a group that stays."""
    truncated: Literal["keep", "drop"] = "keep"
    """`drop`: a group with a completion of `max_completion_length` tokens goes too."""
    oversample: int = 1
    """Batches that are generated for one that is trained on, at the least."""
    refill: int = 0
    """Batches that may be generated beyond these while too few groups stay."""

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"low must be at most high, got {self.low} and {self.high}")
        if self.oversample < 1 or self.refill < 0:
            raise ValueError(
                f"oversample must be at least 1 and refill at least 0, got {self.oversample} and {self.refill}"
            )


def fill(staying: Sequence[bool], wanted: int) -> list[int]:
    """Indices of the `wanted` groups of a batch: those that stay, in their order, then others where these are too few.

    `staying`: of at least `wanted` groups.
    """
    return sorted(range(len(staying)), key=lambda group: not staying[group])[:wanted]
