"""Constrained RLHF: weights are learnt so that each reward stays near its proxy point.  https://huggingface.co/papers/2310.04373

Beyond its proxy point θ a reward model no longer says what people think. Each such reward is a constraint with a
Lagrange multiplier, which rises while the reward's mean is below θ and falls above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Combiner, Context, Samples, Scores
from trl_rewards.maths import centered, std, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["mu", "xi", "plain"]


def multiplier(raw: float, form: Form) -> float:
    """s(λ): σ(λ) in (0, 1) for `mu`, tanh λ in (-1, 1) for `xi`, max(λ, 0) for `plain`."""
    if form == "plain":
        return max(raw, 0.0)
    return math.tanh(raw) if form == "xi" else 0.5 * (1 + math.tanh(raw / 2))  # the same as σ, and never overflows


def slope(raw: float, form: Form) -> float:
    """ds/dλ; 1 for `plain`, whose λ is kept at 0 or above."""
    found = multiplier(raw, form)
    return {"mu": found * (1 - found), "xi": 1 - found**2, "plain": 1.0}[form]


def mixing_weights(weights: Tensor, held: Sequence[int], multipliers: Sequence[float]) -> Tensor:
    """(K,) float64: the multipliers for the sources in `held`, and for the others, the objective, what these leave,
    len(held) - Σ multipliers, times their own weights (K,)."""
    mixed = weights.double() * (len(held) - sum(multipliers))
    mixed[list(held)] = mixed.new_tensor(multipliers)
    return mixed


def descend(
    raw: Sequence[float],
    velocity: Sequence[float],
    excess: Sequence[float],
    form: Form,
    lr: float,
    momentum: float,
    max_norm: float,
) -> tuple[list[float], list[float]]:
    """One step of SGD on Σ_k s(λ_k) · excess_k: the next λ and velocities. `excess` is mean reward less θ.

    The gradient is first scaled down to a norm of `max_norm`.
    """
    gradient = [slope(value, form) * over for value, over in zip(raw, excess, strict=True)]
    scale = min(1.0, max_norm / (math.hypot(*gradient) + 1e-6))
    velocity = [momentum * old + scale * new for old, new in zip(velocity, gradient, strict=True)]
    raw = [value - lr * step for value, step in zip(raw, velocity, strict=True)]
    return [max(value, 0.0) for value in raw] if form == "plain" else raw, velocity


def stream(rewards: Tensor, group_size: int, eps: float) -> Tensor:
    """Reward less its group's mean, over the batch's sample deviation of that: (N,) -> (N,) float64, holes stay NaN.

    Where groups are of one row, the mean is the batch's. Exactly 0 where nothing differs.
    """
    deviations = centered(rewards, group_size if group_size > 1 else len(rewards))
    return deviations / (std(deviations) + eps)


class Lagrangian(Combiner):
    """Σ s(λ_k) A_k over constrained sources plus (K - Σ s(λ_k)) A_0: multipliers learn to hold rewards at thresholds.

    https://huggingface.co/papers/2310.04373. A_k is a source's score less its group's mean, in deviations over the
    batch. Sources without a threshold are the objective, A_0, by their weights; there need be none. After each batch λ
    takes a step of SGD on Σ s(λ_k) · (mean score - θ_k): it falls while the mean is above θ_k. Holes enter no mean. A
    constrained source's own weight does not matter, but 0 leaves it out; with all of them left out there is A_0 alone.
    A source's `shape:` comes before.

    Set `advantage: {use: center}`, since a group z-score undoes the scale of the mixture. Multipliers, and how far
    means are above their thresholds, are logged as `combine/multiplier/<source>` and `combine/excess/<source>`.

    Deviations: the paper learns a critic per reward and one for the KL penalty, which is its A_0; here groups are the
    baseline and the KL penalty stays where the trainer has it. λ starts at 0 and not near it at random. The authors'
    code (tedmoskovitz/ConstrainedRL4LMs@11ac8fe) leaves out the first multiplier in what is `plain` here.
    """

    thresholds: dict[str, float]
    """{source: θ}, the mean score beyond which it is no longer a good proxy. Of the scores after the source's
    `shape:`."""
    form: Form = "xi"
    """`xi`: tanh λ, the reward is held at θ and a multiplier may become negative, the paper's best. `mu`: σ(λ), the
    reward is to reach θ, and above it counts less and less. `plain`: max(λ, 0)."""
    lr: float = 0.1
    """Learning rate of the multipliers, above 0."""
    momentum: float = 0.1
    """In [0, 1)."""
    max_norm: float = 0.5
    """What the gradient's norm is scaled down to, above 0."""
    initial: float | None = None
    """λ at the start. None: 0, and 0.5 for `plain`."""
    eps: float = 1e-8
    """Added to the deviations, above 0."""

    def __post_init__(self):
        if not self.thresholds:
            raise ValueError("thresholds must name at least one source, such as {helpful: 0.5}")
        for name in ("lr", "max_norm", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        start = self.initial if self.initial is not None else 0.5 if self.form == "plain" else 0.0
        self.raw = dict.fromkeys(self.thresholds, start)
        self.velocity = dict.fromkeys(self.thresholds, 0.0)
        self._context = Context()

    def setup(self, context: Context) -> None:
        self._context = context

    def check_sources(self, names: Sequence[str]) -> None:
        if unknown := sorted(set(self.thresholds) - set(names)):
            raise ValueError(f"thresholds: no source {unknown[0]!r}; there is {', '.join(names)}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        import torch

        used = (scores.weights != 0).tolist()
        held = [k for k, name in enumerate(scores.names) if name in self.thresholds and used[k]]
        names = [scores.names[k] for k in held]
        found = [multiplier(self.raw[name], self.form) for name in names]
        weights = mixing_weights(scores.weights, held, found) if held else scores.weights.double()
        # A row that watched sources alone have scored has no total, though all multipliers be 0.
        values = scores.values.masked_fill(scores.weights == 0, float("nan")) if any(used) else scores.values
        streams = [stream(column, scores.group_size, self.eps) for column in values.unbind(dim=1)]
        total = weighted_sum(torch.stack(streams, dim=1), weights, scores.group_size)
        self._learn(names, scores.values[:, held].double().nanmean(dim=0).tolist())
        return total.to(scores.values.dtype)

    def _learn(self, names: list[str], means: list[float]) -> None:
        """Take a step with the mean scores of a batch, NaN for a source without any."""
        excess = [0.0 if mean != mean else mean - self.thresholds[n] for n, mean in zip(names, means, strict=True)]
        raw, velocity = descend(
            [self.raw[name] for name in names],
            [self.velocity[name] for name in names],
            excess,
            self.form,
            self.lr,
            self.momentum,
            self.max_norm,
        )
        if log_metric := self._context.log_metric:
            for name, over in zip(names, excess, strict=True):
                log_metric(f"combine/multiplier/{name}", multiplier(self.raw[name], self.form))
                log_metric(f"combine/excess/{name}", over)
        self.raw |= dict(zip(names, raw, strict=True))
        self.velocity |= dict(zip(names, velocity, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"raw": dict(self.raw), "velocity": dict(self.velocity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["raw"]) != set(self.thresholds):
            theirs, ours = ", ".join(state["raw"]), ", ".join(self.thresholds)
            raise ValueError(f"the checkpoint has multipliers of {theirs}, this recipe of {ours}")
        self.raw, self.velocity = dict(state["raw"]), dict(state["velocity"])
