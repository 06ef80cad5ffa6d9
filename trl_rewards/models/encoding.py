"""From texts to token ids: one beginning-of-sequence token, and truncation that keeps the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from trl_rewards.errors import RewardError
from trl_rewards.models.batching import common_prefix
from trl_rewards.samples import Failed, Message, Samples, Text, completion_text

Truncate = Literal["prompt_head", "prompt_tail", "refuse"]


def shown_text(tokenizer: Any, prompt: Text, completion: Text, path: str, question: str | None = None) -> str:
    """What a reward model reads: plain prompts joined to the completion, chat through the model's own template.

    `question` is asked after the completion. RewardError for chat where the model, at `path`, has no template.
    """
    if isinstance(prompt, str):
        return prompt + completion_text(completion) + (f"\n{question}\n" if question is not None else "")
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if question is not None:
        said = [*said, {"role": "user", "content": question}]
    return _chat(tokenizer, [*prompt, *said], path, add_generation_prompt=question is not None)


class Shown(NamedTuple):
    """What `Scorer.score_texts` is called with for some samples."""

    texts: list[str]
    add_special_tokens: bool
    completion_start: Callable[[int], int]


def shown_samples(tokenizer: Any, samples: Samples, path: str, question: str | None = None) -> Shown:
    """The samples' rows as a reward model reads them. RewardError as `shown_text`."""
    texts = [
        shown_text(tokenizer, prompt, completion, path, question)
        for prompt, completion in zip(samples.prompts, samples.completions, strict=True)
    ]
    plain = all(isinstance(prompt, str) for prompt in samples.prompts)
    return Shown(texts, plain, lambda row: completion_start(tokenizer, samples.prompts[row], texts[row], path))


def completion_start(tokenizer: Any, prompt: Text, text: str, path: str) -> int:
    """The character of `shown_text` at which the completion starts: where the prompt's own rendering ends, or where
    the template begins to render it differently for having a completion."""
    rendered = prompt if isinstance(prompt, str) else _chat(tokenizer, prompt, path, add_generation_prompt=True)
    pairs = enumerate(zip(rendered, text, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), min(len(rendered), len(text)))


def _chat(tokenizer: Any, messages: list[Message], path: str, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise RewardError(
            f"{path!r} has no chat template, and the prompts are chat messages: save its "
            "tokenizer with one (tokenizer.chat_template = …; tokenizer.save_pretrained(…)), or give plain prompts"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


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
