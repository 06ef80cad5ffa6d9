"""One reward model for several kinds of preference, each weighted so that all gain.  https://huggingface.co/papers/2312.07401"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trl_rewards import Context, Objective, Preferences, RewardError

if TYPE_CHECKING:
    from torch import Tensor

Normalise = Literal["none", "l2", "loss", "loss+"]
TINY = 1e-20
STEPS, CLOSE = 250, 1e-6
"""Steps to the shortest mean at most, and the difference between vectors at which they end."""


def head_gradients(difference: Tensor, hidden: Tensor) -> Tensor:
    """(B,) r_chosen - r_rejected, (2B, H) what a linear score head sees -> (B, H): the gradient of each pair's
    -log σ(difference) with respect to the head's weight."""
    chosen, rejected = hidden.chunk(2)
    return -(-difference).sigmoid()[:, None] * (chosen - rejected)


def normalised(gradients: Tensor, losses: Tensor, how: Normalise) -> Tensor:
    """(T, H) gradients of T tasks, (T,) their losses -> (T, H).

    `l2`: over their length; `loss+`: over length times loss; `loss`: over (loss + 1) / Σ(loss + 1).
    """
    if how == "none":
        return gradients
    if how == "loss":
        return gradients / ((losses + 1) / (losses + 1).sum())[:, None]
    length = gradients.norm(dim=1)
    scale = length.where(length > 0, 1.0)
    if how == "loss+":
        scale = (scale * losses).clamp(min=TINY)  # the loss of pairs far apart is 0 in float32
    return gradients / scale[:, None]


def min_norm_weights(vectors: Tensor) -> Tensor:
    """(T, H) -> (T,) weights, at least 0 and 1 in sum, with which the vectors' mean is shortest.

    The problem of multiple-gradient descent (https://huggingface.co/papers/1810.04650), by pairwise Frank-Wolfe steps:
    weight moves from the vector that lengthens the mean most to the one that shortens it most. Of two vectors where
    one is no help it leaves 0.001 to that one.
    """
    import torch

    products = vectors.double() @ vectors.double().T
    weights = torch.full_like(products[0], 1 / len(products))
    for _ in range(STEPS):
        along = products @ weights
        best = int(along.argmin())
        worst = int(along.masked_fill(weights == 0, -float("inf")).argmax())
        gap = along[worst] - along[best]
        if gap <= CLOSE * along.abs().max():
            break
        curvature = products[best, best] + products[worst, worst] - 2 * products[best, worst]
        step = torch.minimum(weights[worst], gap / curvature)
        weights[best] += step
        weights[worst] -= step
    return (weights.clamp(0.001, 0.999) if len(weights) == 2 else weights).to(vectors.dtype)


class Task(NamedTuple):
    """What a batch says of one kind of preference: sums over its pairs."""

    gradient: Tensor
    """(H,)"""
    loss: float
    pairs: int


class MORE(Objective):
    """Bradley-Terry on pairs of several kinds, each kind weighted so that the common step is against none of them.

    https://huggingface.co/papers/2312.07401. For each kind the gradient of its loss with respect to the score head is
    kept as a running mean; the weights λ make the shortest mean of these gradients, so that a kind which the others do
    not serve counts more. The loss is that of T kinds, λ-weighted. The head must be linear; λ are those of the batch,
    of all processes. Evaluations take the plain mean of all pairs.

    The released code starts running means at the head's random weights; here they start at the first gradient.
    """

    needs = frozenset({"hidden"})
    own_loss = True

    task: str = "task"
    """Dataset column with the kind: a word or a number. Batches should hold several kinds."""
    momentum: float = 0.99
    """Of a batch's gradient in the running mean, in (0, 1]; the authors'."""
    normalise: Normalise = "l2"
    """What gradients are divided by before λ are sought: nothing, their length, a share of the losses, or length and
    loss."""

    def __post_init__(self):
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {self.momentum}")
        self._context = Context()
        self._gradients: dict[str, Tensor] = {}

    def setup(self, context: Context) -> None:
        self._context = context

    def reads(self) -> tuple[str, ...]:
        return (self.task,)

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": dict(self._gradients)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gradients = dict(state["gradients"])

    def loss(self, batch: Preferences) -> Tensor:
        from torch.nn.functional import softplus

        difference = batch.chosen - batch.rejected
        losses = softplus(-difference)
        if not batch.training:
            return losses.mean()
        tasks = self._tasks(batch.columns[self.task])
        weights = self._weights(self._found(tasks, difference, losses, batch))
        for name, weight in weights.items():
            if self._context.log_metric:
                self._context.log_metric(f"more/{name}", weight)
        return (losses * len(weights) * losses.new_tensor([weights[name] for name in tasks])).mean()

    def _tasks(self, column: Any) -> list[str]:
        values = column if isinstance(column, list) else column.tolist()
        if any(value is None or value != value or value == "" for value in values):  # NaN is how tables say None
            raise RewardError(f"dataset column {self.task!r} must say of every pair what kind it is, got {values[:5]}")
        return [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) for value in values]

    def _found(self, tasks: list[str], difference: Tensor, losses: Tensor, batch: Preferences) -> dict[str, Task]:
        """What the batch of all processes says of each kind, kinds in the order of their names."""
        from trl_rewards import World

        assert batch.hidden is not None
        gradients = head_gradients(difference.detach(), batch.hidden.detach().float())
        mine = {}
        for name in dict.fromkeys(tasks):
            rows = [row for row, task in enumerate(tasks) if task == name]
            mine[name] = Task(gradients[rows].sum(dim=0).cpu(), losses[rows].sum().item(), len(rows))
        return added(World.current().gather_objects(mine))

    def _weights(self, found: dict[str, Task]) -> dict[str, float]:
        """λ of each kind in the batch; running means are carried on."""
        import torch

        for name, task in found.items():
            gradient, before = task.gradient / task.pairs, self._gradients.get(name)
            if before is not None:
                gradient = (1 - self.momentum) * before + self.momentum * gradient
            self._gradients[name] = gradient
        losses = torch.tensor([task.loss / task.pairs for task in found.values()])
        vectors = normalised(torch.stack([self._gradients[name] for name in found]), losses, self.normalise)
        return dict(zip(found, min_norm_weights(vectors).tolist(), strict=True))


def added(shares: Sequence[dict[str, Task]]) -> dict[str, Task]:
    """The sums of several processes, kinds in the order of their names."""
    found: dict[str, Task] = {}
    for name in sorted({name for share in shares for name in share}):
        there = [share[name] for share in shares if name in share]
        gradient = sum((task.gradient for task in there[1:]), start=there[0].gradient)
        found[name] = Task(gradient, sum(task.loss for task in there), sum(task.pairs for task in there))
    return found
