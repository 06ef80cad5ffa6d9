"""A causal language model whose next-token probabilities are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_rewards import Context
    from trl_rewards.models import Loading, Scorer


def load_language_model(
    loading: Loading, context: Context, max_length: int | None = None, token_budget: int | None = None
) -> Scorer:
    """A scorer whose head reads the logits of the next token. RewardError if the model cannot be loaded."""
    from trl_rewards.models import Scorer, default_budget, load_config, load_next_token, load_tokenizer, longest_text

    config, tokenizer = load_config(loading), load_tokenizer(loading)
    return Scorer(
        head=load_next_token(loading),
        weights=[],
        loading=loading,
        tokenizer=tokenizer,
        max_length=longest_text(max_length, config, tokenizer),
        truncate="refuse",
        token_budget=token_budget or default_budget(loading),
        prefix_reuse="auto",
        # Where somebody runs it (a trainer, the command line) there is a bar already.
        progress=context.log_metric is None and context.device is None,
    )
