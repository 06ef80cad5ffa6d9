"""GRPO with a pipeline: group-relative rewards, sequence- or token-level advantages."""

from __future__ import annotations

from typing import Any

import trl

from trl_rewards.pipeline import Pipeline
from trl_rewards.trainers.mixin import PipelineMixin


class GRPOTrainer(PipelineMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with one more argument, `pipeline=`; without it, TRL's own to the last bit."""

    @classmethod
    def _check_arguments(cls, args: Any, pipeline: Pipeline) -> None:
        super()._check_arguments(args, pipeline)
        if pipeline.advantage is None and args.scale_rewards == "group":
            pipeline.warn_of_undone_shapers()
        if args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={args.multi_objective_aggregation!r} would see one column, the total; "
                f"use combine={args.multi_objective_aggregation!r} in the pipeline"
            )
