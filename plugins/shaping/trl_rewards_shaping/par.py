"""Preference As Reward: how likely an answer beats reference answers.  https://huggingface.co/papers/2502.18770"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from trl_rewards import Samples, Shaper

if TYPE_CHECKING:
    from torch import Tensor


def preference(rewards: Tensor, references: Tensor, k: float = 1.0) -> Tensor:
    """Mean over references of σ(k · (r - reference)), NaN references left out: (N,), (N, M) -> (N,) float64."""
    margins = rewards.double().unsqueeze(1) - references
    return (k * margins).sigmoid().nanmean(dim=1)


class PAR(Shaper):
    """Mean probability that the answer beats its references, σ(k · (r - reference)), in (0, 1).

    https://huggingface.co/papers/2502.18770. r and the references are scores of the same reward model; for the
    references the paper scores 10 samples of the SFT model per prompt before training, and finds one to be enough.
    It averages sigmoids, which is not the sigmoid of the mean margin. The gradient is gone about 10 / k away from the
    references.

    Deviation from the authors' code (PorUna-byte/PAR@b8caf406): it takes 0.01 off the reward for each token after the
    300th before any shaping; here length is a reward of its own.
    """

    k: float = 1.0
    """Steepness, above 0."""
    references: str | None = None
    """Dataset column with the references' scores: a number or a list of numbers per row. Missing ones are left out; a
    row without any is an error."""
    constant: float | None = None
    """One reference score for all rows, where there is no such column. Set this or `references`."""
    max_references: int | None = 10
    """Take the first so many of a row (10 in the authors' code); None takes all."""

    def __post_init__(self):
        if not self.k > 0:
            raise ValueError(f"k must be above 0, got {self.k}")
        if (self.references is None) == (self.constant is None):
            raise ValueError("par needs references (a dataset column) or constant (a number), one of the two")
        if self.max_references is not None and self.max_references < 1:
            raise ValueError(f"max_references must be at least 1, got {self.max_references}")

    def reads(self) -> tuple[str, ...]:
        return () if self.references is None else (self.references,)

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        import torch

        if self.references is None:
            rows = [[self.constant]] * len(rewards)
        else:
            rows = [self._row(row, value) for row, value in enumerate(samples[self.references])]
        width = max(map(len, rows), default=0)
        padded = [[*scores, *[float("nan")] * (width - len(scores))] for scores in rows]
        references = torch.tensor(padded, dtype=torch.float64, device=rewards.device).view(len(rewards), width)
        return preference(rewards, references, self.k).to(rewards.dtype)

    def _row(self, row: int, value: Any) -> list[float]:
        """The reference scores of a row, at least one."""
        scores = value if isinstance(value, (list, tuple)) else [value]
        scores = [score for score in scores if score is not None and score == score]  # NaN is not equal to itself
        where = f"column {self.references!r}, row {row}"
        if not all(isinstance(score, Real) for score in scores):
            raise TypeError(f"{where}: wanted a number or a list of numbers, got {value!r}")
        if not scores:
            raise ValueError(
                f"{where}: par needs at least one reference score, got {value!r}; drop the row or score it"
            )
        return scores[: self.max_references]
