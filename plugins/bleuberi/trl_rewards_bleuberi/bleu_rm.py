"""BLEU and a reward model, standardised and averaged.  https://huggingface.co/papers/2505.11080"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards import Combiner, Samples, Scores
from trl_rewards.maths import zscore

if TYPE_CHECKING:
    from torch import Tensor


def mean_zscore(values: Tensor, weights: Tensor, size: int, eps: float) -> Tensor:
    """Weighted mean of the sources' z-scores within each run of `size` rows: (N, K), (K,) -> (N,) float64.

    Sample deviations. A row with holes has the mean of what is there, NaN where that is nothing of weight.
    """
    import torch

    scores = torch.stack([zscore(column, size, eps) for column in values.unbind(dim=1)], dim=1)
    there = ~scores.isnan() * weights.double()
    return (scores.nan_to_num() * there).sum(dim=1) / there.abs().sum(dim=1)  # 0 / 0 is NaN


class BleuRm(Combiner):
    """Mean of the sources' z-scores, (s - mean) / (std + eps): BLEU and a reward model count alike.

    https://huggingface.co/papers/2505.11080, reward `bleu_rm`: the sources are then `bleuberi` and `model`. With
    weights it is a weighted mean. Sample deviations; a source that is constant counts 0 everywhere. A row with a hole
    has the mean of its other z-scores.

    As in the authors' code (lilakk/BLEUBERI@e0d15639) by default z-scores are over the whole batch and not over a
    prompt's group. Deviations: the batch is that of all processes; the reward model reads what `model` reads, the
    whole completion, and they give it the extracted answer.
    """

    over: Literal["batch", "group"] = "batch"
    """`batch`: as released; easy and hard prompts share one scale. `group`: each prompt's own mean and deviation."""
    eps: float = 1e-6
    """Above 0."""

    def __post_init__(self):
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        size = len(scores.values) if self.over == "batch" else scores.group_size
        return mean_zscore(scores.values, scores.weights, size, self.eps).to(scores.values.dtype)
