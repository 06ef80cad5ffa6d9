"""Logical AND of rewards: the sum of their log-probabilities of being good.  https://huggingface.co/papers/2402.00742"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trl_rewards import Samples, Scores, Unweighted
from trl_rewards.maths import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def log_and(log_probabilities: Tensor, used: Tensor, group_size: int) -> Tensor:
    """Σ_k log p_k of the sources in use: (N, K) at most 0, (K,) -> (N,) float64.

    Holes stand where the row's other sources put them.
    """
    return weighted_sum(log_probabilities.double(), used.double(), group_size)


class LogAnd(Unweighted):
    """Sum of the sources' log-probabilities of being good: log of "good in all of them", were they independent.

    https://huggingface.co/papers/2402.00742. The paper makes a probability of a reward by how far it is above a
    reference r_ref of its prompt, σ(r - r_ref). What is far below its reference in one source cannot be bought with
    another one. Scores are unbounded below; `shape: [{use: clip, …}]` under a source limits it.

    A row with a hole stands where its other sources put it, as in `weighted_sum`: leaving out a term would be a
    probability of 1.
    """

    one_thing: ClassVar[bool] = False

    of: Literal["log_probabilities", "probabilities", "margins"] = "log_probabilities"
    """What the sources give, after their own `shape:`. `log_probabilities`: log σ(r - r_ref), at most 0.
    `probabilities`: such as what `par` gives, from 0 (which counts as 1.2e-38) to 1. `margins`: r - r_ref, any
    number."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        import torch

        used = scores.weights != 0
        used = used if used.any() else ~used
        values = scores.values.double()
        if self.of == "log_probabilities":
            self._refuse((values > 0) & used, scores, "log-probabilities, at most 0; with raw rewards set of: margins")
        elif self.of == "probabilities":
            self._refuse(((values < 0) | (values > 1)) & used, scores, "probabilities, from 0 to 1")
            values = values.clamp(min=torch.finfo(torch.float32).tiny).log()  # a sigmoid in float32 may underflow
        else:
            from torch.nn.functional import logsigmoid

            values = logsigmoid(values)
        return log_and(values, used, scores.group_size).to(scores.values.dtype)

    def _refuse(self, outside: Tensor, scores: Scores, wanted: str) -> None:
        if outside.any():
            row, k = outside.nonzero()[0].tolist()
            raise ValueError(f"source {scores.names[k]!r} gives {scores.values[row, k]:g}, and log_and wants {wanted}")
