"""DR-IRL's GRPO-S: group z-scores, scaled by how hard a prompt is and how the model does.  https://huggingface.co/papers/2503.18991"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Advantage, RewardBatch
from trl_rewards.maths import column_values, zscore

if TYPE_CHECKING:
    from torch import Tensor


def hardness_scale(hardness: Tensor, mean: Tensor) -> Tensor:
    """σ(δ) / σ(mean δ of the category): (N,), (N,) -> (N,); 1 at the mean."""
    return hardness.sigmoid() / mean.sigmoid()


def responsiveness_scale(gaps: Tensor, tau: float) -> Tensor:
    """σ(mean gap without outliers) / σ(mean gap): (N,) -> (); outliers have (gap - mean)² > τ, holes are left out.

    1 where all are outliers, or nothing is there.
    """
    import torch

    gaps = gaps[~gaps.isnan()].double()
    if not len(gaps):
        return torch.ones((), dtype=torch.float64, device=gaps.device)
    mean = gaps.mean()
    kept = gaps[(gaps - mean).square() <= tau]
    return (kept.mean() if len(kept) else mean).sigmoid() / mean.sigmoid()


class GRPOS(Advantage):
    """Group z-scores times σ-ratios of the prompt's hardness and of the batch's distance to demonstrations.

    https://huggingface.co/papers/2503.18991: A = α_D · α_M · (r - group mean) / (group deviation + eps). Scaled after
    normalising, since a z-score undoes what comes before. Scales are above 0, so signs and zeros stay.

    α_D = σ(δ) / σ(mean δ of its category), with δ = 1 - similarity of generated and demonstrated clauses, a column.
    The paper's mean is the dataset's; here it is a running mean over all rows seen, this batch included, and
    checkpoints keep it. α_M = σ(mean gap without outliers) / σ(mean gap) over the batch, with gap the demonstration's
    reward less the answer's. The paper says neither τ, eps nor which deviation, nor whether α_M is per category.
    """

    hardness: str | None = None
    """Dataset column with δ, a number per row; a row without one has α_D = 1. None: α_D is 1."""
    category: str | None = None
    """Dataset column with the prompt's category; None: all prompts are of one."""
    demo_reward: str | None = None
    """Dataset column with the reward of the row's demonstration, on the scale of the total. None: α_M is 1."""
    tau: float | None = None
    """τ, above 0: gaps with a squared distance above it from the mean gap are outliers. Goes with `demo_reward`."""
    eps: float = 1e-4
    """Added to the group's deviation; TRL's value."""
    ddof: Literal[0, 1] = 1
    """1: sample deviation, 0: population deviation."""

    def __post_init__(self):
        if (self.demo_reward is None) != (self.tau is None):
            raise ValueError("demo_reward and tau go together: set both or neither")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")
        if self.category is not None and self.hardness is None:
            raise ValueError("category says whose mean hardness counts; set hardness too")
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")
        self._seen: dict[str, list[float]] = {}  # category -> [rows, sum of their hardness]

    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.hardness, self.category, self.demo_reward) if name is not None)

    def undoes_affine(self) -> bool:
        return self.demo_reward is None

    def divides_by_group(self) -> bool:
        return True

    def __call__(self, batch: RewardBatch) -> Tensor:
        found = zscore(batch.rewards, batch.scores.group_size, self.eps, self.ddof)
        if self.hardness is not None:
            hardness = self._column(batch, self.hardness)
            names = list(map(str, batch.samples[self.category])) if self.category else [""] * len(hardness)
            self._see(names, hardness.tolist())
            means = [total / count if count else float("nan") for count, total in (self._seen[n] for n in names)]
            scale = hardness_scale(hardness, hardness.new_tensor(means))
            found = found * scale.nan_to_num(nan=1.0)
        if self.demo_reward is not None and self.tau is not None:
            gaps = self._column(batch, self.demo_reward) - batch.rewards.double()
            found = found * responsiveness_scale(gaps, self.tau)
        return found.nan_to_num(nan=0.0)

    def _column(self, batch: RewardBatch, name: str) -> Tensor:
        """(N,) float64 of a column of numbers, NaN where there is none."""
        values = column_values(batch.samples[name])
        if isinstance(values, list):
            raise TypeError(f"column {name!r} must hold numbers, got {values[0]!r}")
        return values.double().to(batch.rewards.device)

    def _see(self, names: list[str], hardness: list[float]) -> None:
        for name, value in zip(names, hardness, strict=True):
            count, total = self._seen.get(name, [0.0, 0.0])
            known = value == value  # NaN is not equal to itself
            self._seen[name] = [count + known, total + (value if known else 0.0)]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {name: list(pair) for name, pair in self._seen.items()}} if self._seen else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = {name: list(pair) for name, pair in state.get("seen", {}).items()}
