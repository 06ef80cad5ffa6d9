"""λ-harmonic reward: a weighted harmonic mean of rewards in [0, 1].  https://huggingface.co/papers/2407.12164"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rewards import Combiner, Samples, Scores

if TYPE_CHECKING:
    from torch import Tensor


def harmonic(values: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """Σ w / Σ_k w_k / (s_k + eps) of each row, holes left out: (N, K) in [0, 1], (K,) -> (N,) float64."""
    there = ~values.isnan() & (weights > 0)
    used = there * weights.double()
    inverses = (used / (values.double().nan_to_num(nan=1.0) + eps)).sum(dim=1)
    return used.sum(dim=1) / inverses  # 0 / 0 is NaN


class Harmonic(Combiner):
    """Weighted harmonic mean of rewards in [0, 1]: near 0 as soon as one of them is.

    https://huggingface.co/papers/2407.12164, where two sources have weights λ and 1 - λ; here any number of them, and
    weights are divided by their sum. The paper maps cosines to [0, 1]: `low: -1`. A row with holes has the mean of
    what is there. With λ = 1 the authors' code (andrew-miao/RPO@56b190a) gives the one score itself, and this the same
    but for eps.
    """

    low: float = 0.0
    """Lowest possible score of all sources; [low, high] is mapped to [0, 1]. A score outside stops the run."""
    high: float = 1.0
    """Highest possible score."""
    eps: float = 1e-8
    """Added to each score, above 0."""

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low} and high {self.high}")
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}")

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0:
            raise ValueError(f"combine: a harmonic mean has no negative weight, got {min(weights):g}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        weights = scores.weights
        if not (weights > 0).any():
            weights = weights + 1
        unit = (scores.values.double() - self.low) / (self.high - self.low)
        outside = ((unit < -1e-6) | (unit > 1 + 1e-6)) & (weights > 0)  # float32 sums may be off by a little
        if outside.any():
            row, k = outside.nonzero()[0].tolist()
            raise ValueError(
                f"a harmonic mean needs scores in [{self.low:g}, {self.high:g}], but {scores.names[k]!r} has "
                f"{scores.values[row, k]:g}; set low and high, or bring it there with `shape: [{{use: sigmoid}}]`"
            )
        return harmonic(unit.clamp(0, 1), weights, self.eps).to(scores.values.dtype)
