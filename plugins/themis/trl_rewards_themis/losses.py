"""The losses of Themis.  https://huggingface.co/papers/2310.01045, section 3.2"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2048
"""Tokens whose logits are in memory at a time."""


def ranking_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,), (B,) -> (): mean of -log σ(chosen - rejected)."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(chosen - rejected).mean()


def language_loss(
    hidden: Tensor, ids: Tensor, kinds: Tensor, head: Callable[[Tensor], Tensor], weights: Mapping[int, float]
) -> Tensor:
    """(R, T, H), (R, T), (R, T) -> (): weighted mean of the next token's cross-entropy, over tokens of kinds above 0.

    `head` makes logits of hidden states. `weights` of kinds that it does not name are 1; tokens of weight 0 do not
    count. 0 where no token counts.
    """
    import torch
    from torch.nn.functional import cross_entropy

    targets, kinds = ids[:, 1:], kinds[:, 1:]
    weight = (kinds > 0).float()
    for kind, factor in weights.items():
        weight = torch.where(kinds == kind, factor, weight)
    counted = weight > 0
    states, targets, weight = hidden[:, :-1][counted], targets[counted], weight[counted]
    total = states.sum() * 0.0  # of the graph, also where nothing counts
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        logits = head(states[part]).float()
        total = total + (cross_entropy(logits, targets[part], reduction="none") * weight[part]).sum()
    return total / max(len(targets), 1)


def pair_accuracy(chosen: list[float | None], rejected: list[float | None]) -> float:
    """Share of pairs with the chosen answer above the rejected; a tie and a missing side count as wrong."""
    right = [
        better is not None and worse is not None and better > worse
        for better, worse in zip(chosen, rejected, strict=True)
    ]
    return sum(right) / max(len(right), 1)
