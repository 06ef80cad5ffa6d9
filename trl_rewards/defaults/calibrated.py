"""Scores as probabilities, by a curve that was fitted to labels.  https://huggingface.co/papers/1706.04599"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trl_rewards.calibration import Curve, changes, read_calibrations
from trl_rewards.components import Reward, Shaper, resolve_path
from trl_rewards.errors import did_you_mean
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Calibrated(Shaper):
    """The probability that an answer is right, in [0, 1], by the curve that `trl-rewards calibrate` fitted.

    https://huggingface.co/papers/1706.04599 for temperature scaling, Platt's sigmoid and isotonic regression. Weights
    of sources that are calibrated mean the same. It is the first shaper of its source. Isotonic regression has level
    stretches, on which answers of a group are equal; Platt's sigmoid and a temperature keep their order.
    """

    path: str
    """The file with the curves."""
    source: str = ""
    """Whose curve of the file; empty: that of the source it stands under, or the only one."""
    changed: Literal["refuse", "warn"] = "refuse"
    """What to do where the source has other options than when it was calibrated."""

    def __post_init__(self):
        self._curve: Curve | None = None

    def check_place(self, source: Reward | None, before: Sequence[Shaper], base_dir: str) -> None:
        if source is None:
            raise ValueError("calibrated bends one source's scores: put it under `shape:` of that source")
        if before:
            raise ValueError(
                f"calibrated was fitted to the source's own scores, and stands behind {before[-1].display_name}: put "
                "it first"
            )
        self._curve = self._read(base_dir, source)

    def _read(self, base_dir: str, source: Reward | None) -> Curve:
        file = Path(resolve_path(self.path, base_dir))
        kept = read_calibrations(file)
        name = self.source or (source.display_name if source else next(iter(kept)) if len(kept) == 1 else "")
        if name not in kept:
            there = ", ".join(kept) or "none"
            raise ValueError(f"{file} holds no curve of {name!r}{did_you_mean(name, kept)}; there is {there}")
        if source is not None and (said := changes(kept[name], source)):
            todo = f"{file}, {name}: {said}; calibrate it again"
            if self.changed == "refuse":
                raise ValueError(f"{todo}, or set `changed: warn` if its scores mean the same")
            logger.warning("%s", todo)
        return kept[name].curve

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        if self._curve is None:  # in no pipeline, which says where it stands
            self._curve = self._read(".", None)
        return self._curve(rewards).to(rewards.dtype)
