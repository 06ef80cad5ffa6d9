"""Beta Normalization Policy Optimization: success rates as a Beta distribution.  https://huggingface.co/papers/2506.02864

Not TRL's `loss_type: bnpo`, which divides the loss by the tokens of a local batch. The two are independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import centered, group_mean

if TYPE_CHECKING:
    from torch import Tensor


def beta_parameters(p: Tensor) -> tuple[Tensor, Tensor]:
    """α and β of the normaliser, from the success rates of P prompts: (P,) float64 -> two scalars of at least 1.

    Beta(a, b) is fitted to p by its moments (mean and unbiased variance); α = max(1 + a/3, 1) and β = max(1 + b/3, 1)
    give the gradient estimate the least variance. 1 and 1, which normalise nothing, for fewer than two prompts and
    where all have the same rate.
    """
    import torch

    one = torch.ones((), dtype=p.dtype, device=p.device)
    if len(p) < 2:
        return one, one
    mean, variance = p.mean(), p.var()
    size = mean * (1 - mean) / variance - 1
    alpha, beta = (1 + size * mean / 3).clamp(min=1), (1 + size * (1 - mean) / 3).clamp(min=1)
    fitted = (variance >= 1e-12) & alpha.isfinite() & beta.isfinite()
    return torch.where(fitted, alpha, one), torch.where(fitted, beta, one)


def beta_density(p: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """f(p; α, β), the density of the Beta distribution, for p in [0, 1] and α, β of at least 1."""
    import torch

    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (torch.special.xlogy(alpha - 1, p) + torch.special.xlog1py(beta - 1, -p) - log_norm).exp()


def beta_normalized(rewards: Tensor, group_size: int) -> Tensor:
    """(R - p) / f(p; α, β) with p the group's mean reward: (N,) in [0, 1] -> (N,) float64.

    NaN rows stay NaN and enter nothing. A group with one scored row gives 0 and is no part of the fit.
    """
    p = group_mean(rewards, group_size).clamp(0, 1)
    scored = (~rewards.isnan()).view(-1, group_size).sum(dim=1)
    alpha, beta = beta_parameters(p[::group_size][scored > 1])
    weight = (1 / beta_density(p, alpha, beta)).clamp(max=1e6)
    return centered(rewards, group_size) * weight


class BNPO(Advantage):
    """Reward minus group mean p, divided by a Beta density at p that is fitted to the batch.  One number per sequence.

    https://huggingface.co/papers/2506.02864. With α = β = 1 it is REINFORCE with a group mean, with α = β = 1.5 it is
    GRPO times π/8; in between it follows the batch. The fit is noisy on few prompts: let a batch have 16 or more (our
    advice, not the paper's).

    Several sources: the paper computes the advantage of each reward alone and averages them, and so does this for all
    sources with a weight other than 0, as Σ w_k A_k / Σ |w_k|; equal weights are the paper's mean. A source that has
    no score on a row has no part in that row's mean. The scores are those after each source's own `shape:`; `combine:`
    and the `shape:` of the total are passed over. `decompose: false`, or a single source, uses the total.

    Deviations from the authors' code (changyi7231/BNPO@a9c51b98): where all prompts have the same success rate it
    fails, this uses α = β = 1; a prompt with one completion has baseline 0 there and advantage 0 here.
    """

    low: float = 0.0
    """Lowest possible reward; [low, high] is mapped to [0, 1]. A reward outside stops the run."""
    high: float = 1.0
    """Highest possible reward."""
    decompose: bool = True
    """With several sources: one advantage per source, averaged. False: one advantage of the total."""

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low} and high {self.high}")

    def passes_over(self) -> tuple[str, ...]:
        return ("combine", "shape") if self.decompose else ()

    def __call__(self, batch: RewardBatch) -> Tensor:
        import torch

        scores = batch.scores
        used = [k for k, weight in enumerate(scores.weights.tolist()) if weight != 0]
        if not self.decompose or len(used) < 2 or batch.shaped is None:
            return self._one(batch.rewards, "the total", scores.group_size).nan_to_num(nan=0.0)

        # A row without a total enters no baseline, whatever single sources say of it.
        shaped = batch.shaped.masked_fill(batch.rewards.isnan().unsqueeze(1), float("nan"))
        columns = [self._one(shaped[:, k], f"source {scores.names[k]!r}", scores.group_size) for k in used]
        advantages, weights = torch.stack(columns, dim=1), scores.weights[used].double()  # (N, K'), (K',)
        size = ((~advantages.isnan()) * weights.abs()).sum(dim=1)
        return (advantages.nan_to_num(nan=0.0) * weights).sum(dim=1) / size.masked_fill(size == 0, 1.0)

    def _one(self, rewards: Tensor, what: str, group_size: int) -> Tensor:
        """The advantage of one reward, mapped to [0, 1] and checked."""
        unit = (rewards.double() - self.low) / (self.high - self.low)
        outside = (unit < -1e-6) | (unit > 1 + 1e-6)  # float32 sums may be off by a little
        if outside.any():
            found = rewards[outside][0].item()
            raise ValueError(
                f"bnpo needs rewards in [{self.low:g}, {self.high:g}], but {what} has {found:g}; set its low and high "
                "to their range, or bring them into it with `shape: [{use: scale, …}]` or `[{use: clip, …}]`"
            )
        return beta_normalized(unit.clamp(0, 1), group_size)
