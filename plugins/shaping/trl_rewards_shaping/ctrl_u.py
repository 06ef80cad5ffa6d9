"""Rewards that count less where two evaluations disagree.  https://huggingface.co/papers/2410.11236"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards import Context, Samples, Scores, Unweighted

if TYPE_CHECKING:
    from torch import Tensor


def disagreement(values: Tensor) -> Tensor:
    """Highest less lowest of each row's evaluations, |r_1 - r_2| of two: (N, K) -> (N,) float64; 0 with fewer."""
    holes, infinity = values.isnan(), float("inf")
    values = values.double()
    spread = values.masked_fill(holes, -infinity).amax(dim=1) - values.masked_fill(holes, infinity).amin(dim=1)
    return spread.clamp(min=0)


def label_disagreement(primary: Tensor, auxiliary: Tensor) -> Tensor:
    """KL(softmax(auxiliary) ‖ softmax(primary)) of two evaluations' logits over labels: (…, L), (…, L) -> (…,)."""
    other, first = auxiliary.double().log_softmax(dim=-1), primary.double().log_softmax(dim=-1)
    return (other.exp() * (other - first)).sum(dim=-1)


def confidence(disagreement: Tensor) -> Tensor:
    """e^-u, in (0, 1]: what a reward counts."""
    return (-disagreement).exp()


class UncertaintyWeight(Unweighted):
    """Mean of a row's evaluations times e^-u, u being how far they are apart: sources that disagree count less.

    https://huggingface.co/papers/2410.11236, whose authors (grenoble-zhang/Ctrl-U@704d51d2) weight the loss of images
    by the disagreement of two evaluations. For text the sources are evaluations of the same thing: two judges, two
    samples of one judge, or two reward models. This transfer is ours. A row with one evaluation alone keeps it.

    Below 0 a weight would raise the reward; `mode: penalize` has no such trouble, nor has it a scale of its own.
    A source of weight 0 is watched alone, any other weight counts as 1. Logs the mean u.
    """

    mode: Literal["weight", "penalize"] = "weight"
    """`weight`: mean · e^-u, for rewards from 0 on. `penalize`: mean - coefficient · u."""
    scale: float = 1.0
    """u is the distance of the evaluations times this."""
    coefficient: float = 1.0
    """Of `penalize`."""

    def __post_init__(self):
        if self.scale < 0 or self.coefficient < 0:
            raise ValueError(f"scale and coefficient must be at least 0, got {self.scale} and {self.coefficient}")
        self._context = Context()

    def setup(self, context: Context) -> None:
        self._context = context

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = self.members(scores)
        apart = self.scale * disagreement(values)
        mean = values.double().nanmean(dim=1)
        there = ~mean.isnan()
        if self._context.log_metric and there.any():
            self._context.log_metric(f"{self.display_name}/disagreement", apart[there].mean().item())
        total = mean * confidence(apart) if self.mode == "weight" else mean - self.coefficient * apart
        return total.to(scores.values.dtype)
