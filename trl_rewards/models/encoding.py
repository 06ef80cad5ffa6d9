"""From texts to token ids: one beginning-of-sequence token, and truncation that keeps the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from trl_rewards.models.batching import common_prefix
from trl_rewards.samples import Failed

Truncate = Literal["prompt_head", "prompt_tail", "refuse"]


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text, whatever their number; a text that brings its own BOS gets no second one."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return [ids[_second_bos(tokenizer, ids) :] for ids in found]


def completion_token(tokenizer: Any, text: str, start: int, add_special_tokens: bool) -> int:
    """Index of the first token of `encode` that holds something of the completion, whose first character is `start`.

    Without offsets (slow tokenizers): the first token that the text and its beginning alone do not share, which may
    come a little earlier, never later.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        ends = (end for _, end in encoded["offset_mapping"])
        index = next((index for index, end in enumerate(ends) if end > start), len(ids))
    else:
        whole, prompt = (
            tokenizer(part, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
            for part in (text, text[:start])
        )
        ids, index = whole, common_prefix(whole, prompt)
    return max(index - _second_bos(tokenizer, ids), 0)


def _second_bos(tokenizer: Any, ids: list[int]) -> int:
    bos = tokenizer.bos_token_id
    return int(bos is not None and ids[:2] == [bos, bos])


def truncated(ids: list[int], completion: int, limit: int, policy: Truncate, kept: int = 0) -> list[int] | Failed:
    """At most `limit` of the tokens: those of the prompt, which ends at index `completion`, are cut first.

    `prompt_head` cuts from the prompt's beginning, after its first `kept` tokens (BOS or CLS); `prompt_tail` from its
    end; `refuse` gives Failed. Where the prompt is used up, the completion's beginning goes: its end holds the answer
    and the token that the score is read at.
    """
    excess = len(ids) - limit
    if excess <= 0:
        return ids
    if policy == "refuse":
        return Failed(f"the text has {len(ids)} tokens, limit {limit}")
    if excess > completion - kept:
        return ids[:kept] + ids[len(ids) - limit + kept :]
    if policy == "prompt_head":
        return ids[:kept] + ids[kept + excess :]
    return ids[: completion - excess] + ids[completion:]
