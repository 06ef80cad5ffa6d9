"""Whether a batch's moments are over sequences or over tokens.  https://huggingface.co/papers/2501.03262"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["sequence", "token"]


def counts(batch: RewardBatch, weighting: Weighting) -> Tensor | None:
    """(N,) how often each row counts: its tokens, or None where all count alike."""
    return batch.rewards.new_tensor(batch.samples.lengths) if weighting == "token" else None
