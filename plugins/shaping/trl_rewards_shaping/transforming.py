"""Log-sigmoid centring: how surely an answer is good, as a log-probability.  https://huggingface.co/papers/2402.00742"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Samples
from trl_rewards_shaping.references import AgainstReferences, Level, reference_level

if TYPE_CHECKING:
    from torch import Tensor


def log_probability_good(rewards: Tensor, levels: Tensor) -> Tensor:
    """log σ(r - level), at most 0, without overflow: (N,), (N,) -> (N,) float64."""
    import torch

    return torch.nn.functional.logsigmoid(rewards.double() - levels)


class LogSigmoidCentered(AgainstReferences):
    """log σ(r - level of the references), at most 0: the log-probability that the answer is good.

    https://huggingface.co/papers/2402.00742. Good means better than the references' level, so the slope is 1 far below
    it and 0 far above: what is good enough earns nothing more. One per source, and the sum of the sources is the log
    of a logical AND. For helpfulness the paper takes the 85th percentile of the base policy's answers, for
    harmlessness the score of a canned refusal, which is `constant`.

    `level: quantile_normal` is LSC among PAR's baselines (https://huggingface.co/papers/2502.18770).
    """

    level: Level = "quantile_empirical"
    """What the references make: their quantile, interpolated or that of a normal distribution, or their mean."""
    quantile: float = 0.85
    max_references: int | None = None
    """Take the first so many of a row; None takes all."""
    low: float | None = None
    """Lower limit of the result, which has none by itself."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        if not len(rewards):
            return rewards
        references = self.referenced(rewards, samples)
        # A constant is the level itself, and not a sample that has a deviation.
        level = "mean" if self.constant is not None else self.level
        found = log_probability_good(rewards, reference_level(references, level, self.quantile))
        return (found if self.low is None else found.clamp(min=self.low)).to(rewards.dtype)
