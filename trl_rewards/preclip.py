"""StableReinforce's Pre-CLIP: log-ratios are limited before the exponential.  https://huggingface.co/papers/2505.02835"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "sapo")
"""TRL's losses that have a gradient through the ratio, token by token."""


@dataclass(frozen=True, kw_only=True)
class PreClip:
    """Limits of the ratio π / π_old of a token, put on its logarithm.

    PPO's clip comes after the exponential: a log-ratio of 100 is infinite by then in float32, and the gradient NaN. A
    negative advantage has no upper limit on its ratio besides. A token outside has no gradient.
    """

    low: float = 1e-3
    """Least ratio, above 0 and below 1; the paper's."""
    high: float = 1e3
    """Largest ratio, above 1; the paper's."""

    def __post_init__(self):
        if not 0 < self.low < 1 < self.high < float("inf"):
            raise ValueError(f"low must be between 0 and 1 and high above 1, got low {self.low} and high {self.high}")

    def problems(self, args: Any) -> list[str]:
        """What keeps a trainer with these arguments (TRL's GRPOConfig) from it."""
        found = []
        if args.loss_type not in LOSSES:
            found.append(
                f"pre_clip: goes with a loss_type of {', '.join(LOSSES)}, got {args.loss_type!r}, which has no "
                "gradient through a token's ratio"
            )
        elif args.importance_sampling_level != "token":
            found.append(
                f"pre_clip: limits each token's ratio; set importance_sampling_level: token, got "
                f"{args.importance_sampling_level!r}"
            )
        if args.use_liger_kernel:
            found.append("pre_clip: Liger's loss makes its own ratios; set use_liger_kernel: false")
        if args.off_policy_mask_threshold is not None:
            found.append(
                "pre_clip: off_policy_mask_threshold judges rows by the same log-ratios, and would see them limited; "
                "leave one of the two out"
            )
        return found

    def idle(self, args: Any) -> bool:
        """Whether every batch is used for one update by the policy that wrote it, so that all ratios are 1."""
        again = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations)
        return not again and not args.use_vllm
