"""ReasonFlux-PRM: steps of thinking and of the answer, and the whole trajectory.  https://huggingface.co/papers/2506.18896

The reward runs the released 7B model, or one of its shape. The functions are the paper's labels for training one:
what a step of the thinking is worth by the answer's step that it leads to, by a judge, and by how it follows from the
step before it. The authors have not released the code of that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Failed, RewardError, Samples, Score
from trl_rewards_process.formats import Format
from trl_rewards_process.prm import PRM

if TYPE_CHECKING:
    from torch import Tensor


PARTED = {"separator": r"\s*</?think>\s*|\n[^\S\n]*\n"}


class ReasonFluxPRM(PRM):
    """Mean of the steps of thinking and answer, plus α times what the model says of them as a single step.

    https://huggingface.co/papers/2506.18896: r̂ = mean r_step + α r_final, in [0, 1 + α]. For selecting data it stands
    alone; online the paper has (1 - β) r_outcome + β r̂, which are the `weight`s of two sources: the authors' code
    gives the process reward 0.75 and the rule 0.25. That code scores a response as a single step and nothing else,
    which is `prm` with `format: reasonflux` and `steps: turn`.

    The released 7B model has no output of its own for the trajectory; that it is read as one step is after that code.
    """

    format: Format = "reasonflux"
    steps: str | dict[str, str] | Callable = field(default_factory=lambda: dict(PARTED))
    """As of any reward of steps. Here blank lines and thinking tags part them."""
    take: Literal["steps", "sum", "mean", "min", "product", "last"] = "mean"
    """As of any reward of steps. With `steps` α times the trajectory's score stands at the last step."""
    alpha: float = 1.0
    """α, the weight of the trajectory's score (the best in the paper's ablation on MATH500); 0 does without."""

    def score(self, samples: Samples) -> list[Score]:
        return self._with_final(samples, super().score(samples))

    def score_tokens(self, samples: Samples) -> list[list[float | None] | Score]:
        return self._with_final(samples, super().score_tokens(samples))

    def _with_final(self, samples: Samples, found: list) -> list:
        if not self.alpha:
            return found
        whole = [["\n\n".join(parts)] if parts else [] for parts in self.steps_of(samples)]
        finals = self.score_steps(samples, whole)
        return [_plus(values, final, self.alpha) for values, final in zip(found, finals, strict=True)]


def _plus(found: Any, final: list[float | None] | Score, alpha: float) -> Any:
    """A row's number, or its tokens' values, with α times the trajectory's score; holes stay holes."""
    if found is None or isinstance(found, Failed):
        return found
    if not isinstance(final, list):
        return final
    value = alpha * sum(each for each in final if each is not None)  # of one step, or none
    if not isinstance(found, list):
        return found + value
    last = max((index for index, each in enumerate(found) if each is not None), default=None)
    return [each + value if index == last else each for index, each in enumerate(found)]


def step_rewards(logits: Tensor, mask: Tensor) -> list[list[float]]:
    """Probabilities of the second of two labels where `mask` is set, row by row: (B, T, 2), (B, T) -> in [0, 1].

    The released code drops exact zeros after masking, so that a probability that underflows there moves all that
    follow by one place; here none is dropped.
    """
    right = logits.float().softmax(dim=-1)[..., 1]
    return [row[kept].tolist() for row, kept in zip(right, mask.bool(), strict=True)]


def offline_score(steps: Sequence[float], final: float, alpha: float = 1.0) -> float:
    """r̂ = mean of the steps + α final, by which data are selected."""
    return fmean(steps) + alpha * final


def online_reward(outcome: float, process: float, beta: float = 0.75) -> float:
    """(1 - β) outcome + β process; 0.75 is the constant of the authors' code."""
    return (1 - beta) * outcome + beta * process


def alignment(thoughts: Tensor, answers: Tensor) -> Tensor:
    """Cosine of each thinking step with the answer's step that it leads to: embeddings (S, H), (S, H) -> (S,)."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(thoughts, answers, dim=-1)


def coherence(thoughts: Tensor, negatives: Tensor, tau: float) -> Tensor:
    """log of exp(cos(s_{t-1}, s_t) / τ) over the sum of exp(cos(s_{t-1}, n) / τ) of negatives n, steps of other
    trajectories: embeddings (S, H), (S, M, H) -> (S,), NaN for the first step, which follows none.

    The step itself is not among the negatives, so it may be above 0. τ is not known to us.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    before, here = thoughts[:-1], thoughts[1:]
    others = cosine_similarity(before[:, None], negatives[1:], dim=-1)  # (S - 1, M)
    found = cosine_similarity(before, here, dim=-1) / tau - (others / tau).logsumexp(dim=-1)
    return torch.cat([found.new_full((min(len(thoughts), 1),), math.nan), found])


def softmax_weighted(parts: Tensor) -> Tensor:
    """Σ softmax(parts)_i parts_i, in which the larger parts count more: (S, 3) -> (S,). NaN parts are left out.

    The parts of a step's reward are its alignment, its quality by a judge, and its coherence.
    """
    weights = parts.masked_fill(parts.isnan(), -math.inf).softmax(dim=-1)
    return (weights * parts.nan_to_num(nan=0.0)).sum(dim=-1)


def template_reward(outcomes: Sequence[float]) -> float:
    """r_final: the share of right answers among several that were written by the trajectory's template, in [0, 1].

    RewardError without any.
    """
    if not outcomes:
        raise RewardError("a trajectory's reward is the mean over answers by its template, and there is none")
    return fmean(outcomes)


def training_loss(
    steps: Tensor, step_labels: Tensor, final: Tensor, final_label: Tensor, step_weight: float, final_weight: float
) -> Tensor:
    """λ_step · mean squared error of the steps + λ_final · that of the trajectory: (S,), (S,), (), () -> ().

    The paper's λ are not known to us.
    """
    return step_weight * (steps - step_labels).square().mean() + final_weight * (final - final_label).square()
