"""Preference As Reward, and the shapings that it is compared with.  https://huggingface.co/papers/2502.18770

The paper's others are in trl-rewards itself: `clip` (ceil), `sigmoid` and `tanh` (not centred), `whiten` (running mean
and deviation). Log-sigmoid centring is `logsigmoid_centered`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_rewards import Samples, Shaper
from trl_rewards.maths import RunningMoments
from trl_rewards_shaping.references import AgainstReferences

if TYPE_CHECKING:
    from torch import Tensor

POLYNOMIAL = (2.0266917e-4, 1e-8, -1.01309121e-2, -1.8e-7, 0.22878851, 0.50000083)
"""The authors' fit of degree 5 to the sigmoid on [-5, 5], highest power first."""


def preference(rewards: Tensor, references: Tensor, k: float = 1.0, shift: float = 0.0) -> Tensor:
    """Mean over references of σ(k · (r - shift - reference)), NaN ones left out: (N,), (N, M) -> (N,) float64."""
    return (k * (margins(rewards, references) - shift)).sigmoid().nanmean(dim=1)


def margins(rewards: Tensor, references: Tensor) -> Tensor:
    """How far each reward is above each of its references: (N,), (N, M) -> (N, M) float64."""
    return rewards.double().unsqueeze(1) - references


def fitted_sigmoid(margins: Tensor) -> Tensor:
    """The authors' polynomial in place of σ: 0 up to -5, 1 from 5 on; float64, of any shape."""
    value = margins.double() * 0
    for coefficient in POLYNOMIAL:
        value = value * margins + coefficient
    return value.masked_fill(margins <= -5, 0.0).masked_fill(margins >= 5, 1.0)


class PAR(AgainstReferences):
    """Mean probability that the answer beats its references, σ(k · (r - reference)), in (0, 1).

    https://huggingface.co/papers/2502.18770. r and the references are scores of the same reward model; for the
    references the paper scores 10 samples of the SFT model per prompt before training (`trl-rewards reference` does),
    and finds one to be enough. It averages sigmoids, which is not the sigmoid of the mean margin. The gradient is gone
    about 10 / k away from the references.

    Deviation from the authors' code (PorUna-byte/PAR@b8caf406): it takes 0.01 off the reward for each token after the
    300th before any shaping; here `linear_length_penalty` does that, where it is wanted.
    """

    k: float = 1.0
    """Steepness, above 0."""
    shift: float = 0.0
    """Taken off the margins: 3 is the paper's "slow growth, fast convergence" (sgfc)."""

    def __post_init__(self):
        super().__post_init__()
        if not self.k > 0:
            raise ValueError(f"k must be above 0, got {self.k}")

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return preference(rewards, self.referenced(rewards, samples), self.k, self.shift).to(rewards.dtype)


class Centered(AgainstReferences):
    """Reward less the mean of its references.

    A baseline of PAR: https://huggingface.co/papers/2502.18770. Unbounded, and the same for all rows of a prompt.
    """

    def affine(self) -> bool:
        return True

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return margins(rewards, self.referenced(rewards, samples)).nanmean(dim=1).to(rewards.dtype)


class TanhRef(AgainstReferences):
    """Mean over references of tanh(r - reference), in (-1, 1).

    A baseline of PAR: https://huggingface.co/papers/2502.18770.
    """

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        return margins(rewards, self.referenced(rewards, samples)).tanh().nanmean(dim=1).to(rewards.dtype)


class FittedPolynomial(AgainstReferences):
    """PAR with a polynomial of degree 5 in place of the sigmoid: 0 at margins up to -5, 1 from 5 on.

    A baseline of PAR: https://huggingface.co/papers/2502.18770, with the authors' coefficients, under which it passes
    1 by 0.011 just before 5, and 0 likewise. `constant: 0` is their form without references.
    """

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        found = fitted_sigmoid(margins(rewards, self.referenced(rewards, samples)))
        return found.nanmean(dim=1).to(rewards.dtype)


class RunningClip(Shaper):
    """Limits rewards to one deviation around the mean of all rewards of the run, this batch included.

    A baseline of PAR: https://huggingface.co/papers/2502.18770. Population deviation; while all rewards seen are equal
    it changes nothing.
    """

    def __post_init__(self):
        self._seen = RunningMoments()

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        self._seen.update(rewards)
        mean, std = self._seen.mean, self._seen.std()
        return rewards.double().clamp(mean - std, mean + std).to(rewards.dtype)

    def state_dict(self) -> dict[str, Any]:
        return self._seen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen.load_state_dict(state)


class RunningMinMax(Shaper):
    """(r - min) / (max - min) of all rewards of the run, this batch included: in [0, 1].

    A baseline of PAR: https://huggingface.co/papers/2502.18770. While all rewards seen are equal the result is 0.5,
    where the authors' code (PorUna-byte/PAR@b8caf406) divides 0 by 0.
    """

    def __post_init__(self):
        self.low = self.high = None

    def affine(self) -> bool:
        return True

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        there = rewards[~rewards.isnan()].double()
        if there.numel():
            low, high = there.min().item(), there.max().item()
            self.low = low if self.low is None else min(self.low, low)
            self.high = high if self.high is None else max(self.high, high)
        if self.low is None or self.high is None or self.low == self.high:
            return rewards * 0 + 0.5
        return ((rewards.double() - self.low) / (self.high - self.low)).to(rewards.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.low, self.high = state["low"], state["high"]


class LinearLengthPenalty(Shaper):
    """Takes `penalty` off the reward for each token of the completion after the first `free`.

    https://huggingface.co/papers/2502.18770: the authors' code (PorUna-byte/PAR@b8caf406) does so before every shaping
    that it compares, so put it first.
    """

    free: int = 300
    """Tokens that cost nothing."""
    penalty: float = 0.01
    """Per token, on the reward model's scale."""

    def __post_init__(self):
        if self.free < 0 or self.penalty < 0:
            raise ValueError(f"free and penalty must be at least 0, got {self.free} and {self.penalty}")

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        lengths = rewards.new_tensor(samples.lengths)
        return rewards - self.penalty * (lengths - self.free).clamp(min=0)
