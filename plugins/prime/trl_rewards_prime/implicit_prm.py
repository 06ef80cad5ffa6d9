"""Free process rewards: what tokens and steps are worth to a language model that was trained on outcomes alone.
https://huggingface.co/papers/2412.01981
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rewards import OutcomeObjective, Outcomes

if TYPE_CHECKING:
    from torch import Tensor


class ImplicitPRMCE(OutcomeObjective):
    """Cross-entropy of σ(β Σ log-ratios) and the label, over answers that are right or wrong.

    https://huggingface.co/papers/2412.01981. The paper trains for one epoch in batches of 64 with a learning rate of
    5e-7, all weights. A label between 0 and 1 is the share of graders, or of tries, that found the answer right.
    """

    def loss(self, batch: Outcomes) -> Tensor:
        from trl_rewards_prime.implicit import ce_loss

        return ce_loss(self.beta * batch.log_ratios, batch.labels).mean()
