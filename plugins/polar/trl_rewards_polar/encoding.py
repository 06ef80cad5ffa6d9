"""How POLAR reads a prompt, a reference and a candidate: one text, no chat template.  https://huggingface.co/papers/2507.05197

With S a newline (wrapper `sft`) or nothing (`pretrain`):

    prompt S reference <|reward|> prompt S candidate [UNUSED_TOKEN_130]

Messages are their contents, one per line; roles are dropped. Cutting and the places of the marks are those of the
authors' client (InternLM/POLAR@80626f3) and, for training, of xtuner (InternLM/xtuner@b934f46). Two of the client's
slips are not repeated: the reward token's text inside a prompt or an answer, which it leaves in, and prompt budgets of
zero or less, which are refused here when a `Layout` is made.

A `tokenizer` is anything with `encode(text)`, which adds what begins a text, and `decode(ids, …)`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Messages = str | list[dict[str, Any]]
Wrapper = Literal["sft", "pretrain"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Lengths and marks. Defaults are the released models'."""

    max_length: int = 16384
    """Tokens of the whole text, in which the prompt stands twice."""
    max_response_length: int = 4096
    """Tokens of the reference and of the candidate, each with the token that begins a text."""
    cut_side: Literal["right", "left"] = "right"
    """Where a longer reference or candidate is cut. Training always cuts the right; xtuner's client the left."""
    separator: str = "<|reward|>"
    reward_token: str = "[UNUSED_TOKEN_130]"

    def __post_init__(self):
        if self.max_response_length < 1:
            raise ValueError(f"max_response_length must be at least 1, got {self.max_response_length}")
        least = 2 * self.max_response_length + _MARKS + 2
        if self.max_length < least:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a prompt, which stands in the text twice, beside "
                f"two answers of {self.max_response_length} tokens: it must be at least {least}, or "
                "max_response_length lower"
            )


_MARKS = 4  # the reward token, the separator and two newlines


def join_contents(value: Messages) -> str:
    """A text as it is; the contents of messages, one per line. KeyError or TypeError where one is no text."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def encode_text(
    tokenizer: Any,
    prompt: Messages,
    reference: Messages,
    output: Messages,
    wrapper: Wrapper = "sft",
    layout: Layout | None = None,
) -> str:
    """The text to score, reward token included, as a server takes it that tokenises by itself.

    An empty trajectory still has its newline, as in the client; in training it has none.
    """
    layout = layout or Layout()
    newline = _newline(wrapper)
    asked, reference, output = _pieces(tokenizer, prompt, reference, [output], layout, layout.cut_side)
    halves = asked + newline + reference, asked + newline + output
    return _whole(halves, layout) + layout.reward_token


def encode_ids(
    tokenizer: Any,
    prompt: Messages,
    reference: Messages,
    output: Messages,
    wrapper: Wrapper = "sft",
    layout: Layout | None = None,
    *,
    reward_token_id: int,
    separator_id: int,
) -> list[int]:
    """Token ids of `encode_text`, the last of them `reward_token_id`. ValueError where the marks are not in place.

    The reward token is put there by id: InternLM2's fast tokenizer splits its text, and the score would be that of a
    bracket.
    """
    layout = layout or Layout()
    text = encode_text(tokenizer, prompt, reference, output, wrapper, layout)
    ids = tokenizer.encode(text.removesuffix(layout.reward_token))
    return _with_reward(tokenizer, ids, reward_token_id, separator_id)


def encode_training(
    tokenizer: Any,
    prompt: Messages,
    reference: Messages,
    candidates: Sequence[Messages],
    wrapper: Wrapper = "sft",
    layout: Layout | None = None,
    *,
    reward_token_id: int,
    separator_id: int | None = None,
) -> list[list[int]]:
    """Token ids of each candidate, as in the released training recipe; a pair is `[chosen, rejected]`.

    The candidates share the prompt of the longest one's budget. Answers keep their heads whatever `cut_side` is, and
    an empty trajectory has no newline. ValueError as in `encode_ids`, if `separator_id` is given.
    """
    layout, newline = layout or Layout(), _newline(wrapper)
    asked, reference, *outputs = _pieces(tokenizer, prompt, reference, candidates, layout, "right")

    def half(trajectory: str) -> str:
        return asked + (newline if trajectory else "") + trajectory

    texts = [_whole((half(reference), half(output)), layout) for output in outputs]
    return [_with_reward(tokenizer, tokenizer.encode(text), reward_token_id, separator_id) for text in texts]


def _newline(wrapper: str) -> str:
    """What stands between prompt and trajectory; ValueError for a word that is no wrapper."""
    if wrapper not in get_args(Wrapper):
        raise ValueError(f"wrapper must be {' or '.join(get_args(Wrapper))}, got {wrapper!r}")
    return "\n" if wrapper == "sft" else ""


def _pieces(
    tokenizer: Any, prompt: Messages, reference: Messages, outputs: Sequence[Messages], layout: Layout, side: str
) -> list[str]:
    """Prompt, reference and outputs as texts, cut to their budgets on token boundaries."""
    ids = [_clean(tokenizer, join_contents(text), layout) for text in (prompt, reference, *outputs)]
    limit = layout.max_response_length
    answers = [piece[:limit] if side == "right" else piece[-limit:] for piece in ids[1:]]
    budget = (layout.max_length - _MARKS - len(answers[0]) - max(map(len, answers[1:]))) // 2
    return [_decode(tokenizer, piece) for piece in (ids[0][-budget:], *answers)]


# The completions of a group share prompt and reference and come one after the other.
@functools.lru_cache(maxsize=64)
def _clean(tokenizer: Any, text: str, layout: Layout) -> list[int]:
    """Token ids of a text without special tokens and marks, also none that come about when others are taken out."""
    while True:
        ids = tokenizer.encode(text)
        kept = _without_marks(_decode(tokenizer, ids), layout)
        if len(kept) >= len(text):
            return ids
        text = kept


def _without_marks(text: str, layout: Layout) -> str:
    before = None
    while text != before:
        before = text
        text = text.replace(layout.separator, "").replace(layout.reward_token, "")
    return text


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _whole(halves: tuple[str, str], layout: Layout) -> str:
    """Both halves around the separator. Where prompt and answer meet without a newline, they might form a mark."""
    return layout.separator.join(_without_marks(half, layout) for half in halves)


def _with_reward(tokenizer: Any, ids: list[int], reward_token_id: int, separator_id: int | None) -> list[int]:
    start = tokenizer.encode("")
    if ids[: len(start)] != start:
        raise ValueError(f"the tokenizer ends texts with a token of its own: expected {start} first, got {ids[:4]}")
    if reward_token_id in ids:
        raise ValueError(f"the reward token (id {reward_token_id}) stands inside the text")
    if separator_id is not None and ids.count(separator_id) != 1:
        raise ValueError(f"the separator (id {separator_id}) stands {ids.count(separator_id)} times in the text")
    return [*ids, reward_token_id]


def strip_thinking(text: str) -> str:
    """What follows the first closed `<think>` block, stripped; a text without one as it is, unstripped."""
    _, opened, thoughts = text.partition("<think>")
    _, closed, answer = thoughts.partition("</think>")
    return answer.strip() if opened and closed else text


_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_dialogue(text: str) -> list[dict[str, str]]:
    """The messages (`user`, `assistant`) of a dialogue as HH-RLHF writes it: turns after `Human:` and `Assistant:`."""
    _, *parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
