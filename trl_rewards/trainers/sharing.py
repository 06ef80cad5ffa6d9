"""Rewards on the policy's own base: which base it is, and where that cannot be done."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel

from trl_rewards.models.pretrained import Loading
from trl_rewards.models.shared_base import SharedBase
from trl_rewards.pipeline import Pipeline


def splits_weights(args: Any) -> str | None:
    """What keeps a model's weights in pieces on the ranks under these training arguments: ZeRO-3 or FSDP."""
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        return "ZeRO-3"
    return "FSDP" if os.environ.get("ACCELERATE_USE_FSDP") == "true" or args.fsdp else None


def policy_base(pipeline: Pipeline, model: Any, args: Any) -> SharedBase | None:
    """The base of a policy that is not loaded yet, for the sources that run on it; None where none does.

    ValueError for what such a source cannot go with. DistributedDataParallel and DeepSpeed's ZeRO-1 and ZeRO-2 leave
    the base whole on each rank. ZeRO-3 and FSDP do not: only a forward pass of the whole policy gathers its weights.
    """
    sharing = [source for source in pipeline.sources if source.reward.shares_base()]
    if not sharing:
        return None
    for source in sharing:
        for name, value in (
            ("timeout", source.timeout),
            ("concurrency", source.concurrency),
            ("isolate", source.isolate),
        ):
            if value:
                raise ValueError(
                    f"{name}: {source.name!r} runs on the policy's base, which it must have left before training goes "
                    f"on; leave {name} out, or give the source a model of its own (`path:`)"
                )
    if splitter := splits_weights(args):
        raise ValueError(
            f"{', '.join(source.name for source in sharing)}: rewards on the policy's base need it whole on each "
            f"rank, and {splitter} splits it; use DDP or ZeRO-2 (a 4-bit base is small), or give "
            "each source a model of its own (`path:`)"
        )
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    options = args.model_init_kwargs or {}
    return SharedBase(
        Loading(
            path=whole if isinstance(whole, str) else whole.config.name_or_path,
            revision=options.get("revision"),
            device=args.device,
            trust_remote_code=bool(options.get("trust_remote_code")),
        )
    )
