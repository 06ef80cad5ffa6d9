"""Several heads on one trunk, trained together: a linear-layer ensemble.  https://huggingface.co/papers/2401.16635"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rewards import Context, Objective, Preferences, RewardError

if TYPE_CHECKING:
    from torch import Tensor


def heads_loss(outputs: Tensor, margin: Tensor | None = None, learning: Tensor | None = None) -> Tensor:
    """(2B, K) scores, the chosen answers' first -> () mean of -log σ(r_chosen - r_rejected - margin) over pairs and
    heads. `learning` (B, K): which head learns from which pair; pairs whose margin is NaN enter no mean."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = outputs.chunk(2)
    difference = chosen - rejected if margin is None else chosen - rejected - margin[:, None]
    known = ~difference.isnan() if learning is None else learning & ~difference.isnan()
    return (-logsigmoid(difference.nan_to_num())).where(known, 0.0).sum() / known.sum().clamp(min=1)


class BradleyTerryHeads(Objective):
    """Bradley-Terry for each of several heads on one trunk, which a source `ensemble` takes as its members.

    https://huggingface.co/papers/2401.16635 calls it a linear-layer ensemble. All heads and the trunk are trained at
    once; heads differ in what they begin as, and with `share` below 1 in the pairs that they learn from. TRL logs
    accuracy and margin of their mean, and `disagreement` is their population deviation, over all answers.
    """

    own_loss = True

    heads: int = 4
    """At least 2."""
    share: float = 1.0
    """Chance of each head to learn from a pair, drawn anew whenever the pair comes; in (0, 1]."""
    margin: str | None = None
    """Dataset column with how much better the chosen answer is. None: no margin."""
    center: float = 0.0
    """Weight of the mean of (r_chosen + r_rejected)², which keeps the heads' rewards around 0 and so comparable."""

    def __post_init__(self):
        if self.heads < 2 or not 0 < self.share <= 1 or self.center < 0:
            raise ValueError(
                f"heads must be at least 2, share in (0, 1] and center not negative, got {self.heads}, {self.share} "
                f"and {self.center}"
            )
        self._context = Context()

    def setup(self, context: Context) -> None:
        self._context = context

    def reads(self) -> tuple[str, ...]:
        return (self.margin,) if self.margin else ()

    def outputs(self) -> Sequence[str]:
        return [f"head{index}" for index in range(self.heads)]

    def reward(self, outputs: Tensor, prompt_hidden: Tensor | None) -> Tensor:
        return outputs.mean(dim=1)

    def loss(self, batch: Preferences) -> Tensor:
        import torch

        outputs = batch.outputs
        assert outputs is not None
        margin = batch.columns[self.margin] if self.margin else None
        if isinstance(margin, list):
            raise RewardError(f"dataset column {self.margin!r} must hold numbers or none, got {margin[:3]}")
        learning = None
        if batch.training and self.share < 1:
            drawn = torch.rand(len(batch.chosen), self.heads, generator=batch.generator)
            learning = (drawn < self.share).to(outputs.device)
        if self._context.log_metric:
            self._context.log_metric("disagreement", outputs.detach().std(dim=1, correction=0).mean().item())
        loss = heads_loss(outputs, margin, learning)
        if not self.center:
            return loss
        chosen, rejected = outputs.chunk(2)
        return loss + self.center * (chosen + rejected).square().mean()
