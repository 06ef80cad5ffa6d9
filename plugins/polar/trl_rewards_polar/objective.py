"""POLAR's training: tell which of two trajectories comes from the reference's policy.

https://huggingface.co/papers/2507.05197
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Context, Objective, Preferences
from trl_rewards_polar.encoding import Layout, Wrapper, encode_training
from trl_rewards_polar.losses import focal_loss, ranking_loss

if TYPE_CHECKING:
    from torch import Tensor


class PolarObjective(Objective):
    """POLAR: the score of (prompt, reference, chosen) above that of (prompt, reference, rejected).

    Both stages of the paper (https://huggingface.co/papers/2507.05197, §3) are this loss, and differ in their data.
    Pre-training: reference and chosen are two samples of one policy, rejected is one of another, `wrapper: pretrain`.
    Fine-tuning: of three answers ranked by people the best is the reference, `wrapper: sft`.

    Loss: mean of -log σ(r_chosen - r_rejected). Rows are cut as in the released training code: of each trajectory the
    head is kept, of the prompt the tail. Any model that loads as a sequence classifier can be trained, InternLM2
    reward models without remote code. A tokenizer that lacks POLAR's two marks gets them, and a new score head starts
    at zero.
    """

    columns = ("prompt", "reference", "chosen", "rejected")
    own_loss = True

    wrapper: Wrapper = "sft"
    """What stands between prompt and trajectory: a line break (`sft`) or nothing (`pretrain`). A column `wrapper`
    says it row by row."""
    max_length: int = 16384
    """Tokens of a row, in which the prompt stands twice. TRL's own `max_length` must not be lower."""
    max_response_length: int = 4096
    """Tokens of reference, chosen and rejected each."""
    separator: str = "<|reward|>"
    reward_token: str = "[UNUSED_TOKEN_130]"
    loss_type: Literal["ranking", "focal"] = "ranking"
    """`focal` weighs down pairs that are told apart already; the released models were trained with `ranking`."""

    def __post_init__(self):
        self._layout = Layout(
            max_length=self.max_length,
            max_response_length=self.max_response_length,
            separator=self.separator,
            reward_token=self.reward_token,
        )

    def setup(self, context: Context) -> None:
        from trl_rewards_polar.internlm2 import register

        register()

    def attach(self, model: Any, tokenizer: Any, fresh: Sequence[str]) -> list[int]:
        known = len(tokenizer)
        tokenizer.add_tokens([self.separator, self.reward_token], special_tokens=True)
        added = list(range(known, len(tokenizer)))
        if added and max(added) >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        for name in fresh:  # the output layer alone: with zeros below it too, no gradient would pass
            parameter = model.get_parameter(name)
            if parameter.shape[0] == 1:
                parameter.data.zero_()
        self._separator_id, self._reward_token_id = tokenizer.convert_tokens_to_ids(
            [self.separator, self.reward_token]
        )
        model.config.reward_token_id = self._reward_token_id
        return added

    def tokenize(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        chosen, rejected = encode_training(
            tokenizer,
            row["prompt"],
            row["reference"],
            [row["chosen"], row["rejected"]],
            row.get("wrapper") or self.wrapper,
            self._layout,
            reward_token_id=self._reward_token_id,
            separator_id=self._separator_id,
        )
        return {"chosen_ids": chosen, "rejected_ids": rejected}

    def loss(self, batch: Preferences) -> Tensor:
        pairs = ranking_loss if self.loss_type == "ranking" else focal_loss
        return pairs(batch.chosen, batch.rejected).mean()
