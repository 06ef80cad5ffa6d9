"""The advantages of GRPO, Dr. GRPO and RLOO, one number per sequence, and PPO's, one per token.

A row without a reward gets 0 and enters no baseline; a group with equal rewards, or with one scored row, gives 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trl_rewards.components import Advantage, RewardBatch
from trl_rewards.maths import centered, gae, less_others, std, zscore

if TYPE_CHECKING:
    from torch import Tensor


class GroupNorm(Advantage):
    """GRPO: (r - group mean) / (group std + eps), sample deviation.  https://huggingface.co/papers/2402.03300

    Equal to TRL's `scale_rewards: group`.
    """

    eps: float = 1e-4
    """TRL's value; the paper has none."""
    ddof: int = 1
    """1: sample deviation, as in TRL; 0: population deviation."""

    def undoes_affine(self) -> bool:
        return True

    def __call__(self, batch: RewardBatch) -> Tensor:
        return zscore(batch.rewards, batch.scores.group_size, self.eps, self.ddof).nan_to_num(nan=0.0)


class Center(Advantage):
    """Dr. GRPO: r - group mean, without division.  https://huggingface.co/papers/2503.20783

    Equal to TRL's `scale_rewards: none`.
    """

    def __call__(self, batch: RewardBatch) -> Tensor:
        return centered(batch.rewards, batch.scores.group_size).nan_to_num(nan=0.0)


class BatchNorm(Advantage):
    """(r - group mean) / (std of all rewards in the batch + eps), sample deviation.

    Equal to TRL's `scale_rewards: batch` ("Tricks or Traps?", https://huggingface.co/papers/2508.08221). The deviation
    is that of the raw rewards, not of the centred ones.
    """

    eps: float = 1e-4

    def __call__(self, batch: RewardBatch) -> Tensor:
        deviations = centered(batch.rewards, batch.scores.group_size)
        return (deviations / (std(batch.rewards) + self.eps)).nan_to_num(nan=0.0)


class LeaveOneOut(Advantage):
    """RLOO: r minus the mean reward of the other rows of its group.  https://huggingface.co/papers/2402.14740

    Equal to TRL's RLOO with `beta: 0`, whose KL term it does not have.
    """

    def __call__(self, batch: RewardBatch) -> Tensor:
        return less_others(batch.rewards, batch.scores.group_size).nan_to_num(nan=0.0)


class Gae(Advantage):
    """PPO: generalised advantage estimation over token rewards and a critic's values.
    https://huggingface.co/papers/1506.02438

    (N, T) from `token_rewards`, `values` and `mask`; with lam 1 and gamma 1, what is still to come of the reward less
    the critic's guess. Not normalised: `whiten_advantages` of the trainer does that.
    """

    level: ClassVar[Literal["sequence", "token"]] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"mask", "token_rewards", "values"})
    compares_groups: ClassVar[bool] = False  # but with a critic

    gamma: float = 1.0
    """Discount per token, in (0, 1]."""
    lam: float = 0.95
    """λ, in [0, 1]: 0 trusts the critic's next value, 1 only the rewards."""

    def __post_init__(self):
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam must be between 0 and 1, got {self.lam}")

    def __call__(self, batch: RewardBatch) -> Tensor:
        assert batch.mask is not None
        assert batch.token_rewards is not None
        assert batch.values is not None
        return gae(batch.token_rewards, batch.values, batch.mask, self.gamma, self.lam)
