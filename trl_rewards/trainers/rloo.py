"""RLOO with a pipeline: sequence-level advantages; a replaced one needs beta = 0."""

from __future__ import annotations

from typing import Any

import trl

from trl_rewards.pipeline import Pipeline
from trl_rewards.trainers.mixin import PipelineMixin
from trl_rewards.trainers.seam import default_folder


class RLOOTrainer(PipelineMixin, trl.RLOOTrainer):
    """`trl.RLOOTrainer` with one more argument, `pipeline=`; without it, TRL's own to the last bit."""

    @staticmethod
    def _default_arguments(model: Any) -> Any:
        return trl.RLOOConfig(default_folder(model, "RLOO"))

    @classmethod
    def _check_arguments(cls, args: Any, pipeline: Pipeline) -> None:
        super()._check_arguments(args, pipeline)
        if pipeline.advantage is None:
            return
        if pipeline.advantage.level == "token":
            raise ValueError(
                "RLOO's loss takes one advantage per sequence; use GRPOTrainer for a token-level advantage"
            )
        if args.beta != 0.0:
            raise ValueError(
                f"RLOO puts its KL penalty into the advantage, so a replaced advantage loses it in silence; set "
                f"beta=0.0 (got {args.beta}) or leave the advantage to TRL"
            )
