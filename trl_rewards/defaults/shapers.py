"""Shapers that need no paper: (N,) -> (N,), NaN rows stay NaN.

`clip`, `scale`, `tanh` and `sigmoid` look at one row at a time. `whiten` keeps running moments over the whole run,
which are the same on every rank, since shapers see the gathered batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_rewards.components import Shaper
from trl_rewards.maths import RunningMoments
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor


class Clip(Shaper):
    """Limits rewards to [low, high]."""

    low: float | None = None
    """None: no lower limit."""
    high: float | None = None
    """None: no upper limit."""

    def __post_init__(self):
        if self.low is None and self.high is None:
            raise ValueError("clip needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low must not be above high, got low {self.low} and high {self.high}")

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return rewards.clamp(self.low, self.high)


class Scale(Shaper):
    """factor · r + offset. On the total, a group z-score (TRL's default) undoes it, but for the factor's sign."""

    factor: float = 1.0
    offset: float = 0.0

    def affine(self) -> bool:
        return self.factor > 0

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return rewards * self.factor + self.offset


class Tanh(Shaper):
    """tanh((r - center) / scale), in (-1, 1)."""

    center: float = 0.0
    scale: float = 1.0
    """Must be above 0."""

    def __post_init__(self):
        _require_positive(self.scale)

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return ((rewards - self.center) / self.scale).tanh()


class Sigmoid(Shaper):
    """σ((r - center) / scale), in (0, 1)."""

    center: float = 0.0
    scale: float = 1.0
    """Must be above 0."""

    def __post_init__(self):
        _require_positive(self.scale)

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return ((rewards - self.center) / self.scale).sigmoid()


class Whiten(Shaper):
    """(r - mean) / std with running moments over all rewards of the run, this batch included.

    Population variance, merged batch by batch (Chan et al.); while all rewards seen are equal the result is 0. This is
    the `meanstd` baseline of PAR (https://huggingface.co/papers/2502.18770, released code, which divides by 1 there).
    """

    center: bool = True
    """Subtract the running mean; False only scales."""
    eps: float = 0.0
    """Added to the deviation."""

    def __post_init__(self):
        self._seen = RunningMoments()

    def affine(self) -> bool:
        return True

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        self._seen.update(rewards)
        std = self._seen.std()
        centered = rewards.double() - (self._seen.mean if self.center else 0.0)
        return (centered / (std + self.eps if std > 0 else 1.0)).to(rewards.dtype)

    def state_dict(self) -> dict[str, Any]:
        return self._seen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen.load_state_dict(state)


def _require_positive(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
