"""What a language model implies about the worth of tokens, and how it learns that from outcomes alone.
https://huggingface.co/papers/2502.01456 (section 2.2), https://huggingface.co/papers/2412.01981

q_t is the model's log-probability of token t less the reference's. N rows, T tokens, G group size; `mask` is 1 on a
row's tokens, which are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Compat = Literal["paper", "verl", "original"]


def token_scores(
    q: Tensor, mask: Tensor, beta: float, compat: Compat = "paper", whole: bool = False, lam: float = 0.0
) -> Tensor:
    """Process rewards (N, T) from log-ratios (N, T): β q_t; with `whole` their sum, at a row's last token.

    `original` (the authors' code) leaves β out. `verl` gives a row's last token 0, and with λ each token β q_t + λ
    times the next one's, the last one's β q_t included. verl's `whole` is broken; here it is as the paper's.
    """
    kept = mask.bool()
    scores = q.masked_fill(~kept, 0.0) * (1.0 if compat == "original" else beta)
    last = kept & (kept.flip(1).cumsum(dim=1).flip(1) == 1)
    if whole:
        return (scores.sum(dim=1, keepdim=True) * last).masked_fill(~last, 0.0)
    if compat == "verl":
        if lam:
            following = scores.new_zeros(len(scores))
            spread = scores.clone()
            for t in reversed(range(scores.shape[1])):
                following = scores[:, t] + lam * following
                spread[:, t] = following
            scores = spread
        return scores.masked_fill(last | ~kept, 0.0)
    return scores


def batch_normed(scores: Tensor, eps: float = 1e-6) -> Tensor:
    """Process rewards (N, T), 0 or NaN where there are none, over the largest |return-to-go| of the batch plus eps."""
    returns = scores.nan_to_num(nan=0.0).flip(1).cumsum(dim=1)
    return scores / (returns.abs().max() + eps)


def at_steps(q: Sequence[float], ends: Sequence[int], cumulative: bool = False) -> list[float]:
    """What steps are worth, from what their tokens are: the sum of `q` since the last step's end, or since the start.

    `ends` are the indices of steps' last tokens, in order.
    """
    so_far = [0.0, *accumulate(q)]
    sums = [so_far[end + 1] for end in ends]
    return sums if cumulative else [after - before for before, after in zip([0.0, *sums], sums, strict=False)]


def ce_loss(sums: Tensor, outcomes: Tensor) -> Tensor:
    """Cross-entropy of σ(β Σ q) and outcomes in [0, 1]: (N,), (N,) -> (N,). `sums` are β Σ q."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(sums, outcomes, reduction="none")


def others(sums: Tensor, outcomes: Tensor, group_size: int) -> Tensor:
    """Mean β Σ q of a row's opponents, 0 without any, without gradient: (N,), (N,) -> (N,).

    Opponents of a row with an outcome above 0 are those of its group with a lower one, else those with a higher one. A
    row without an outcome (NaN) has none, and is none.
    """
    q, acc = sums.detach().view(-1, group_size), outcomes.view(-1, group_size)
    mine, theirs = acc[:, :, None], acc[:, None, :]
    opponents = (theirs < mine).where(mine > 0, theirs > mine).to(q.dtype)
    return ((opponents * q[:, None, :]).sum(dim=2) / opponents.sum(dim=2).clamp(min=1)).view(-1)


def dpo_loss(sums: Tensor, outcomes: Tensor, against: Tensor) -> Tensor:
    """-log σ(±(β Σ q - `against`)), + where the outcome is above 0: (N,) -> (N,). `against` is what `others` gives."""
    from torch.nn.functional import logsigmoid

    sign = (outcomes > 0).to(sums.dtype) * 2 - 1
    return -logsigmoid((sums - against) * sign)


def best_of_n_weights(values: Tensor, group_size: int) -> Tensor:
    """n · (share of the group at or below the row)^(n-1): how likelier best-of-n draws a row.  (N,) -> (N,).

    verl's two best-of-n losses weigh `dpo_loss` by it, of outcomes (bon_acc) or of β Σ q (bon_rm), and add rows up. A
    row with NaN counts neither in n nor in the share.
    """
    groups = values.detach().view(-1, group_size)
    count = (~groups.isnan()).sum(dim=1, keepdim=True).clamp(min=1)
    share = (groups[:, None, :] <= groups[:, :, None]).sum(dim=2) / count
    return (count * share ** (count - 1)).view(-1)
