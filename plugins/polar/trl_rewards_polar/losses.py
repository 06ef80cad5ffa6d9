"""What POLAR is trained with: a ranking loss over pairs, and a focal variant.  https://huggingface.co/papers/2507.05197"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ranking_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,), (B,) scores -> (B,) -log σ(chosen - rejected), in float32."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(chosen.float() - rejected.float())


def focal_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,), (B,) -> (B,) the ranking loss times (1 - max(0, 2·(p - ½)))², p = σ(chosen - rejected).

    Pairs that are ordered with confidence count less; those ordered wrongly count whole. An option of xtuner's, which
    the released models were not trained with.
    """
    confidence = (2 * (chosen.float() - rejected.float()).sigmoid() - 1).clamp(min=0)
    return (1 - confidence) ** 2 * ranking_loss(chosen, rejected)
