"""GRPO with a pipeline: group-relative rewards, sequence- or token-level advantages, and a limit on log-ratios."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import trl

from trl_rewards.pipeline import Pipeline
from trl_rewards.preclip import PreClip
from trl_rewards.trainers.mixin import PipelineMixin
from trl_rewards.trainers.seam import LOGPS, check_seam, default_folder

logger = logging.getLogger(__name__)


class GRPOTrainer(PipelineMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with the arguments `pipeline=` and `pre_clip=`; without them, TRL's own to the last bit."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *more: Any,
        pre_clip: PreClip | None = None,
        **options: Any,
    ):
        self.pre_clip = pre_clip
        self._loss_inputs: dict[str, Any] = {}
        if pre_clip is not None:
            check_seam(type(self), {"_compute_loss": ["self", "model", "inputs"], **LOGPS})
            args = args or self._default_arguments(model)
            _check_pre_clip(pre_clip, args)
        super().__init__(model, reward_funcs, args, *more, **options)

    @staticmethod
    def _default_arguments(model: Any) -> Any:
        return trl.GRPOConfig(default_folder(model, "GRPO"))

    @classmethod
    def _check_arguments(cls, args: Any, pipeline: Pipeline) -> None:
        super()._check_arguments(args, pipeline)
        if pipeline.advantage is None and args.scale_rewards == "group":
            pipeline.warn_of_undone_shapers()
            pipeline.warn_of_lost_properness()
        if args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={args.multi_objective_aggregation!r} would see one column, the total; "
                f"use combine={args.multi_objective_aggregation!r} in the pipeline"
            )

    def _compute_loss(self, model, inputs):
        if self.pre_clip is None:
            return super()._compute_loss(model, inputs)
        self._loss_inputs = dict(inputs)
        try:
            return super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = {}

    def _get_per_token_logps_and_entropies(self, model, *inputs, **options):
        found = super()._get_per_token_logps_and_entropies(model, *inputs, **options)
        old = self._loss_inputs.get("old_per_token_logps")
        if self.pre_clip is not None and old is not None:
            # TRL's loss looks at the old ones after this, and makes its log-ratios of the two.
            self._loss_inputs["old_per_token_logps"] = nearer(old, found[0], self.pre_clip)
        return found


def _check_pre_clip(pre_clip: PreClip, args: Any) -> None:
    """ValueError for arguments that it cannot go with; a warning where it changes nothing."""
    if problems := pre_clip.problems(args):
        raise ValueError("\n".join(problems))
    if pre_clip.idle(args):
        logger.warning(
            "pre_clip changes nothing: each batch is used for one update, by the policy that wrote it, and all its "
            "ratios are 1. Raise num_iterations or steps_per_generation, or leave it out"
        )


def nearer(old: torch.Tensor, logps: torch.Tensor, limits: PreClip) -> torch.Tensor:
    """Old log-probabilities, moved where they must be for `logps` less them to be within log(low) and log(high).

    Same shape. Where they are moved they have the gradient of `logps`, so that the difference has none.
    """
    ratio = logps - old
    return old + (ratio - ratio.clamp(math.log(limits.low), math.log(limits.high)))
