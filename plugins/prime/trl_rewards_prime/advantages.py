"""PRIME's advantages: of process rewards and of outcomes, each with its own baseline, then added up.
https://huggingface.co/papers/2502.01456 (section 3.2, equations 5, 7 and 8)

What the process rewards of a row do not explain of its total is its outcome. Weights of sources are the coefficients:
`weight: 5.0` for both is verl's. Rows without a score and rows without a token of the policy's own are in no baseline
and get 0. Shapes: N rows, T tokens, G group size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import (
    centered,
    group_mean,
    group_std,
    less_others,
    on_tokens,
    to_go,
    token_rewards,
    whiten_masked,
)

if TYPE_CHECKING:
    from torch import Tensor


def row_means(rewards: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row's tokens: (N, T) -> (N,) float64; NaN for a row without any."""
    return (rewards.double() * mask).sum(dim=1) / mask.sum(dim=1)


def less_others_means(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Equation 5's process rewards: each token less the mean of the other rows' token means. (N, T) float64.

    0 for a row alone in its group.
    """
    means = row_means(rewards, mask)
    others = means - less_others(means, group_size)
    alone = (~means.isnan()).view(-1, group_size).sum(dim=1).repeat_interleave(group_size) < 2
    return (rewards.double() - others[:, None]).masked_fill(alone[:, None], 0.0).nan_to_num(nan=0.0) * mask


def less_others_as_released(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """The same as both releases have it: r_t · n / (n - 1) - (sum of all n rows' token means) / (n - 1).

    It is equation 5 plus (r_t - the row's own mean) / (n - 1), which sums to 0 over a row: the return at the first
    token is the same, those within differ.
    """
    means = row_means(rewards, mask).view(-1, group_size)
    count = (~means.isnan()).sum(dim=1, keepdim=True).expand_as(means).reshape(-1, 1)
    total = means.nansum(dim=1, keepdim=True).expand_as(means).reshape(-1, 1)
    centred = (rewards.double() * count - total) / (count - 1).clamp(min=1)
    return centred.masked_fill(count < 2, 0.0) * mask


class _Prime(Advantage):
    """What the three have in common: (N, T) from process rewards and outcomes."""

    level: ClassVar[Literal["sequence", "token"]] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"mask", "process_rewards", "token_rewards"})

    gamma: float = 1.0
    """Discount of process rewards per token, in (0, 1]. verl's is always 1."""
    outcome_gamma: float = 1.0
    """Discount of outcomes per token, in (0, 1], counted from a row's last token. The paper's is 1."""
    whiten: bool = True
    """Less the mean and over the deviation (sample, eps 1e-8 beside the variance) of all tokens of the batch, as both
    releases do. The paper's equations have none."""

    def __post_init__(self):
        for name in ("gamma", "outcome_gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    def process(self, rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
        """Process rewards (N, T) with their baseline, float64."""
        raise NotImplementedError

    def outcome(self, rewards: Tensor, group_size: int) -> Tensor:
        """Outcomes (N,), NaN for a row that takes no part, with their baseline, float64."""
        raise NotImplementedError

    def __call__(self, batch: RewardBatch) -> Tensor:
        assert batch.mask is not None
        assert batch.process_rewards is not None
        kept = batch.mask.bool() & ~batch.rewards.isnan()[:, None]
        mask, group_size = kept.double(), batch.scores.group_size
        process = on_tokens(batch.process_rewards, kept).double()
        outcome = (batch.rewards.double() - process.sum(dim=1)).masked_fill(~kept.any(dim=1), float("nan"))
        returns = to_go(self.process(process, mask, group_size), kept, self.gamma)
        # Of a total alone, token_rewards makes a reward at the last token.
        at_last = token_rewards(self.outcome(outcome, group_size), None, kept)
        returns = returns + to_go(at_last, kept, self.outcome_gamma)
        return whiten_masked(returns, kept) if self.whiten else returns


class PrimeRLOO(_Prime):
    """PRIME with leave-one-out baselines, one value per token (equation 5).  https://huggingface.co/papers/2502.01456

    A_t = sum over s >= t of γ^(s-t) [r_s - mean of the other rows' mean process reward] + outcome - mean of the other
    rows' outcomes. verl's recipe and the authors' own code have another process baseline, and differ from each other
    in their coefficients, which are the sources' weights here, and in what discounts there are.
    """

    variant: Literal["paper", "verl", "original"] = "paper"
    """Equation 5; or the process baseline of the releases, which differs from it inside a row. `verl` knows no
    discounts."""

    def __post_init__(self):
        super().__post_init__()
        if self.variant == "verl" and (self.gamma, self.outcome_gamma) != (1, 1):
            raise ValueError("variant verl has no discounts; leave gamma and outcome_gamma at 1, or take original")

    def process(self, rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
        if self.variant != "paper":
            return less_others_as_released(rewards, mask, group_size)
        return less_others_means(rewards, mask, group_size)

    def outcome(self, rewards: Tensor, group_size: int) -> Tensor:
        return less_others(rewards, group_size)


class PrimeGRPO(_Prime):
    """PRIME with GRPO's baselines, one value per token (equation 7).  https://huggingface.co/papers/2502.01456

    Process rewards less the mean and over the deviation of the group's token means, outcomes less their group's mean
    and over their deviation; deviations are the sample's, 0 where they are 0. The paper does not say which deviation.
    """

    def process(self, rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
        means = row_means(rewards, mask)
        return _over((rewards - group_mean(means, group_size)[:, None]) * mask, group_std(means, group_size)[:, None])

    def outcome(self, rewards: Tensor, group_size: int) -> Tensor:
        return _over(centered(rewards, group_size), group_std(rewards, group_size))


class PrimeReinforce(_Prime):
    """PRIME without baselines, one value per token (equation 8): process return-to-go plus outcome.

    https://huggingface.co/papers/2502.01456
    """

    compares_groups: ClassVar[bool] = False

    def process(self, rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
        return rewards

    def outcome(self, rewards: Tensor, group_size: int) -> Tensor:
        return rewards


def _over(values: Tensor, deviation: Tensor) -> Tensor:
    return (values / deviation).masked_fill(deviation == 0, 0.0)
