"""What a reward is held against: scores of reference answers to the same prompt, and a level made of them.

PAR, https://huggingface.co/papers/2502.18770, and https://huggingface.co/papers/2402.00742
"""

from __future__ import annotations

from numbers import Real
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Samples, Shaper
from trl_rewards.maths import std

if TYPE_CHECKING:
    from torch import Tensor

COLUMN = "reference_rewards"
Level = Literal["mean", "quantile_empirical", "quantile_normal"]


class AgainstReferences(Shaper):
    """A shaper that holds a reward against the scores of reference answers, by the same reward model."""

    references: str | None = None
    """Dataset column with the references' scores: a number or a list of numbers per row. Missing ones are left out; a
    row without any is an error. None: `reference_rewards`, which `trl-rewards reference` writes."""
    constant: float | None = None
    """One reference score for all rows, instead of a column."""
    max_references: int | None = 10
    """Take the first so many of a row (10 in PAR's code); None takes all."""

    def __post_init__(self):
        if self.references is not None and self.constant is not None:
            raise ValueError("give references (a dataset column) or constant (a number), one of the two")
        if self.max_references is not None and self.max_references < 1:
            raise ValueError(f"max_references must be at least 1, got {self.max_references}")

    @property
    def column(self) -> str:
        """The column that is read where there is no `constant`."""
        return self.references or COLUMN

    def reads(self) -> tuple[str, ...]:
        return (self.column,) if self.constant is None else ()

    def referenced(self, rewards: Tensor, samples: Samples) -> Tensor:
        """(N, M) float64 reference scores, NaN where a row has fewer than M."""
        import torch

        if self.constant is not None:
            rows = [[self.constant]] * len(rewards)
        else:
            rows = [self._row(row, value) for row, value in enumerate(samples[self.column])]
        width = max(map(len, rows), default=0)
        padded = [[*scores, *[float("nan")] * (width - len(scores))] for scores in rows]
        return torch.tensor(padded, dtype=torch.float64, device=rewards.device).view(len(rewards), width)

    def _row(self, row: int, value: Any) -> list[float]:
        """The reference scores of a row, at least one."""
        scores = value if isinstance(value, (list, tuple)) else [value]
        scores = [score for score in scores if score is not None and score == score]  # NaN is not equal to itself
        where = f"column {self.column!r}, row {row}"
        if not all(isinstance(score, Real) for score in scores):
            raise TypeError(f"{where}: wanted a number or a list of numbers, got {value!r}")
        if not scores:
            raise ValueError(
                f"{where}: {self.display_name} needs at least one reference score, got {value!r}; drop the row or "
                "score it"
            )
        return scores[: self.max_references]


def reference_level(references: Tensor, level: Level, quantile: float = 0.85, eps: float = 1e-5) -> Tensor:
    """One level per row of reference scores, NaN ones left out: (N, M) -> (N,) float64.

    `quantile_empirical` interpolates between the scores; `quantile_normal` is that of a normal distribution with their
    mean and sample deviation plus `eps`, a single score's deviation being 0.
    """
    import torch

    references = references.double()
    if level == "quantile_empirical":
        return torch.nanquantile(references, quantile, dim=1)
    mean = references.nanmean(dim=1)
    return mean if level == "mean" else mean + NormalDist().inv_cdf(quantile) * (std(references) + eps)
