"""What trl-rewards keeps in a checkpoint beside TRL's own files: one small file per rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def checkpoint_folder(trainer: Any, trial: Any = None) -> str:
    """The folder of the checkpoint of this step."""
    return os.path.join(trainer._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")


def save_state(folder: str, rank: int, signature: str, state: dict[str, Any]) -> None:
    """Write the state of a pipeline or an objective into a checkpoint's folder."""
    os.makedirs(folder, exist_ok=True)
    file = _file(folder, rank)
    torch.save({"signature": signature, "state": state}, file + ".tmp")
    os.replace(file + ".tmp", file)


def read_state(folder: str, rank: int, signature: str) -> dict[str, Any]:
    """The state in a checkpoint's folder, {} where TRL alone wrote it; a warning where another recipe did."""
    file = _file(folder, rank)
    if not os.path.exists(file):  # fewer ranks wrote it; what follows the gather is the same on every rank
        file = _file(folder, 0)
    if not os.path.exists(file):
        return {}
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if saved["signature"] != signature:
        logger.warning("the checkpoint was written by another recipe:\n  %s\n  %s", saved["signature"], signature)
    return saved["state"]


def _file(folder: str, rank: int) -> str:
    return os.path.join(folder, f"trl_rewards_rank{rank}.pt")


class CommittedState(TrainerCallback):
    """A state as of the last finished step: a checkpoint on SIGTERM may come within one.

    A step is finished once the optimiser has stepped. Its `on_step_end` would be too late: transformers' callback that
    saves on SIGTERM is the first that is told of it.
    """

    def __init__(self, current: Callable[[], dict[str, Any]]):
        self._current = current
        self.value = current()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.value = self._current()
