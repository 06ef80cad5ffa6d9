"""DLER's truncation penalty, with a target length by difficulty.  https://huggingface.co/papers/2510.15110"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Literal

from trl_rewards import Context, Samples, Shaper

if TYPE_CHECKING:
    from torch import Tensor


def target_length(ratio: float | None, tiers: Mapping[float, int], otherwise: int) -> int:
    """Tokens that an answer may have to a prompt whose share of right answers is `ratio`: those of the highest tier
    that it reaches."""
    reached = [bound for bound in tiers if ratio is not None and ratio >= bound]
    return tiers[max(reached)] if reached else otherwise


def truncated(ids: Sequence[int], target: int, ends: Sequence[int] = ()) -> bool:
    """Whether a completion did not finish within `target` tokens. One of just so many did if it ends in one of `ends`:
    of those that generation cuts there, all others were."""
    return len(ids) > target or (len(ids) == target and ids[-1] not in ends)


class TruncationPenalty(Shaper):
    """The reward of a completion that did not finish within the target length is 0, or a small part of it.

    https://huggingface.co/papers/2510.15110. For rewards from 0 on: a negative one would rise. The paper puts the
    batch-wise standardisation of DLER behind it, since penalties of only some prompts bias a deviation per group.

    With `difficulty` the target depends on the prompt (DA-DLER), as the policy's share of right answers on it says.
    """

    target_length: int = 4000
    """Tokens."""
    compat: Literal["paper", "release"] = "paper"
    """What is left of the reward: nothing in the paper, 0.1 of it in the authors' code (NVlabs/DLER@ea7d4f7b)."""
    factor: float | None = None
    """What is left of the reward, if it is to be neither."""
    end_tokens: list[int] = field(default_factory=list)
    """Token ids that end a completion; none: the policy's end of sequence. Where nobody knows it (scoring without a
    policy), a completion of exactly `target_length` tokens counts as cut."""
    difficulty: str | None = None
    """Dataset column with the share of right answers per prompt, such as `accuracy_score`, which
    `trl-rewards select --n 16` with reward `accuracy` writes."""
    tiers: dict[float, int] = field(default_factory=lambda: {0.5: 2000})
    """With `difficulty`: from this share of right answers on, the target length is so many tokens. Prompts below all
    of them, and those without a share, have `target_length`."""

    def __post_init__(self):
        if self.factor is not None and not 0 <= self.factor <= 1:
            raise ValueError(f"factor must be in [0, 1], got {self.factor}")
        if self.target_length < 1 or any(length < 1 for length in self.tiers.values()):
            raise ValueError(f"lengths must be at least 1, got {self.target_length} and {self.tiers}")

        self._context = Context()

    def setup(self, context: Context) -> None:
        self._context = context  # a trainer gives it the tokenizer later

    def reads(self) -> tuple[str, ...]:
        return (self.difficulty,) if self.difficulty else ()

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        factor = {"paper": 0.0, "release": 0.1}[self.compat] if self.factor is None else self.factor
        tokenizer = self._context.tokenizer
        ends = self.end_tokens or ([] if tokenizer is None else [tokenizer.eos_token_id])
        ratios = samples[self.difficulty] if self.difficulty else [None] * len(samples)
        if len(samples.completion_ids) != len(samples):
            raise ValueError("these samples have no token ids: give a tokenizer (model_name_or_path) to count tokens")
        cut = [
            truncated(ids, target_length(ratio, self.tiers, self.target_length), ends)
            for ids, ratio in zip(samples.completion_ids, ratios, strict=True)
        ]
        return rewards.where(~rewards.new_tensor(cut).bool(), rewards * factor)
