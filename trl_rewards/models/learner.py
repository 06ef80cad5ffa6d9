"""Training a reward model while the policy learns: every process has the batch, takes its share, adds up gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from trl_rewards.components import RewardBatch
from trl_rewards.errors import RewardError
from trl_rewards.scoring import World


class Learner:
    """AdamW with a constant learning rate over a reward model's trained parameters, alike on every process.

    Gradients are clipped to `max_grad_norm` in norm, after those of all processes were added up. They are gone after
    each step, so that they are not clipped with the policy's, whose model the parameters may be part of.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, torch.nn.Parameter],
        training: Callable[[], AbstractContextManager[Any]],
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        self.name = name
        """Of the reward, for messages."""
        self.parameters = dict(parameters)
        self._training = training
        """`with training():` the model's outputs have gradients, and `backward()` may run."""
        self._max_grad_norm = max_grad_norm
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=weight_decay)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def learn(
        self,
        rows: Sequence[int],
        losses: Callable[[list[int]], Tensor],
        world: World,
        mini_batch: int | None = None,
        micro_batch: int = 8,
        mean: bool = True,
    ) -> dict[str, float]:
        """An optimiser step per `mini_batch` of the rows (None: all), `micro_batch` of them at a time.

        `losses(rows)` gives one loss per row, with gradient. The mean over a mini-batch is minimised, or the sum.
        Every process must call it with the same rows. Returns `loss` and `grad_norm`, means over the steps; nothing
        where there are no rows. RewardError on all processes if one of them could not.
        """
        found, norms = [], []
        step = mini_batch or max(1, len(rows))
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            total = torch.zeros((), device=self.device)
            with world.together(f"{self.name!r} could not learn", self.device), self._training():
                for part in parts(chosen[world.rank :: world.size], micro_batch):
                    loss = losses(part).sum() / (len(chosen) if mean else 1)
                    loss.backward()
                    total += loss.detach()
            found.append(world.total(total).item())
            norms.append(self._step(world))
        return {"loss": sum(found) / len(found), "grad_norm": sum(norms) / len(norms)} if found else {}

    def _step(self, world: World) -> float:
        """An optimiser step with all processes' gradients; their norm before clipping."""
        trained = list(self.parameters.values())
        for parameter in trained:
            if parameter.grad is None:  # this process had no row
                parameter.grad = torch.zeros_like(parameter)
            world.total(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(trained, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state_dict(self) -> dict[str, Any]:
        """The trained weights and the optimiser's state."""
        weights = {name: weight.detach().cpu() for name, weight in self.parameters.items()}
        return {"weights": weights, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. ValueError for another model's."""
        if state["weights"].keys() != self.parameters.keys():
            raise ValueError(f"the checkpoint's {self.name!r} has another adapter or another model")
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])


def source_of(batch: RewardBatch, learner: str, source: str | None) -> str:
    """The name of the source that a reward learns from: `source`, or None, the only one beside it.

    `learner`: the reward's own name. RewardError where there is no such source.
    """
    candidates = [name for name in batch.scores.names if name != learner]
    name = source or (candidates[0] if len(candidates) == 1 else None)
    if name not in candidates:
        raise RewardError(
            f"{learner!r} learns from another source's outcomes: set outcome to one of "
            f"{', '.join(candidates) or '(there is no other source)'}; got {source!r}"
        )
    return name


def outcomes_of(batch: RewardBatch, learner: str, source: str | None) -> Tensor:
    """(N,) the raw scores in [0, 1] of the source that a reward learns from, NaN for none.

    Names as in `source_of`. RewardError where there are none to be had.
    """
    name = source_of(batch, learner, source)
    outcomes = batch.scores.values[:, batch.scores.names.index(name)]
    if ((outcomes < 0) | (outcomes > 1)).any():
        raise RewardError(
            f"{learner!r}: outcomes of {name!r} must be in [0, 1], got "
            f"{outcomes.nan_to_num(nan=0.0).min():g} to {outcomes.nan_to_num(nan=0.0).max():g}"
        )
    return outcomes


def parts(rows: Sequence[int], size: int) -> list[list[int]]:
    """The rows in lists of at most `size`."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
