"""How process reward models read steps: the text each was trained on, and the token at which a step's score stands.
https://huggingface.co/papers/2312.08935

Formats are those of the released models' cards and code. A text is put together first and tokenised as a whole, as the
releases do it; a score's token is then found by the character at which its step's tag ends, and not by looking for the
tag's id: a step that contains the tag shifts no other step's score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from trl_rewards import Failed

Format = Literal["qwen", "reasonflux", "shepherd", "rlhflow", "trl", "yes_no"]


class Layout(NamedTuple):
    """Where steps stand in what a model reads, and what its scores are read from."""

    kind: Literal["answer", "turns", "text", "pieces"]
    """`answer`: a chat whose answer is all steps, each followed by the tag. `turns`: a chat in which each step is the
    user's, and the tag the assistant's. `text`: plain text. `pieces`: question, steps and tags are tokenised one by
    one."""
    tag: str
    """What follows a step. The score is read at its last token, in `turns` at the token before it."""
    words: tuple[str, str] | None = None
    """The next tokens that mean right and wrong, of a causal language model; None: a classifier of tokens."""
    system: str | None = None
    """System prompt of a chat."""
    after_question: str = " "
    """Between question and first step, except in `answer`."""
    numbered: bool = False
    """Steps begin with "Step 1: "; those that do not are given it."""

    @property
    def is_chat(self) -> bool:
        return self.kind in ("answer", "turns")


LAYOUTS: dict[str, Layout] = {
    # https://huggingface.co/Qwen/Qwen2.5-Math-PRM-7B
    "qwen": Layout(
        "answer", "<extra_0>", system="Please reason step by step, and put your final answer within \\boxed{}."
    ),
    # https://huggingface.co/Gen-Verse/ReasonFlux-PRM-7B; the chat template puts in a system prompt of its own
    "reasonflux": Layout("answer", "<extra_0>"),
    # https://huggingface.co/peiyi9979/math-shepherd-mistral-7b-prm
    "shepherd": Layout("text", " ки", ("+", "-"), numbered=True),
    # https://huggingface.co/RLHFlow/Llama3.1-8B-PRM-Deepseek-Data
    "rlhflow": Layout("turns", "+", ("+", "-")),
    # PRMTrainer of TRL up to 1.13, with its default separator
    "trl": Layout("pieces", "\n", after_question=""),
    "yes_no": Layout("text", "", ("Yes", "No"), after_question="\n"),
}


class Encoded(NamedTuple):
    """What a model reads of a row."""

    ids: list[int]
    places: list[int]
    """Of each step, the index of the token at which its score is read."""


def encode_steps(tokenizer: Any, layout: Layout, question: str, steps: Sequence[str]) -> Encoded | Failed:
    """Question and steps as a model reads them. Failed where they cannot be told apart in the tokens.

    Special tokens in question and steps are taken out: a policy that writes them would leave its place in the text.
    """
    control = control_tokens(tokenizer, layout.tag)
    question, *steps = (control.sub(" ", text) for text in (question, *steps))
    if layout.numbered:
        steps = [
            step if re.match(r"Step \d+", step) else f"Step {number}: {step}"
            for number, step in enumerate(steps, start=1)
        ]
    if layout.kind == "pieces":
        return _pieces(tokenizer, layout, question, steps)
    found = {"answer": _answer, "turns": _turns, "text": _text}[layout.kind](tokenizer, layout, question, steps)
    if isinstance(found, Failed):
        return found
    return _tokens(tokenizer, *found, add_special_tokens=not layout.is_chat)


def control_tokens(tokenizer: Any, tag: str) -> re.Pattern[str]:
    """What is taken out of texts: the tokenizer's special tokens, and the tag where it is a token of its own kind."""
    added = tokenizer.added_tokens_decoder.values()
    named = {token.content for token in added if token.special or token.content == tag}
    return re.compile("|".join(sorted(map(re.escape, named), key=len, reverse=True)) or r"(?!)")


def _answer(tokenizer: Any, layout: Layout, question: str, steps: list[str]) -> tuple[str, list[int]] | Failed:
    """The text, and for each step the number of characters up to where its score is read."""
    system = [{"role": "system", "content": layout.system}] if layout.system is not None else []
    answer, ends = _tagged("", steps, layout.tag, "")
    messages = [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    start = text.rfind(answer)
    if start < 0:
        return Failed("the model's chat template changes what steps say")
    return text, [start + end for end in ends]


def _turns(tokenizer: Any, layout: Layout, question: str, steps: list[str]) -> tuple[str, list[int]] | Failed:
    messages: list[dict[str, str]] = []
    before = []
    for number, step in enumerate(steps):
        said = step if number else question + layout.after_question + step
        messages.append({"role": "user", "content": said})
        before.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": layout.tag})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if not all(text.startswith(part + layout.tag) for part in before):
        return Failed("the model's chat template does not write a turn as it announces it")
    return text, [len(part) for part in before]


def _text(tokenizer: Any, layout: Layout, question: str, steps: list[str]) -> tuple[str, list[int]]:
    return _tagged(question + layout.after_question, steps, layout.tag, "\n")


def _tagged(text: str, steps: list[str], tag: str, between: str) -> tuple[str, list[int]]:
    """A text and its steps, each with its tag; and how many characters there are up to the end of each tag."""
    ends = []
    for number, step in enumerate(steps):
        text += (between if number else "") + step + tag
        ends.append(len(text))
    return text, ends


def _pieces(tokenizer: Any, layout: Layout, question: str, steps: list[str]) -> Encoded:
    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    tag = ids_of(layout.tag)
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids += ids_of(question + layout.after_question)
    places = []
    for step in steps:
        ids += ids_of(step) + tag
        places.append(len(ids) - 1)
    return Encoded(ids, places)


def _tokens(tokenizer: Any, text: str, ends: list[int], add_special_tokens: bool) -> Encoded | Failed:
    """A text's tokens, and the index of the one that ends at each of the `ends`, counted in characters."""

    def tokenized(text: str, **options: bool) -> Any:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False, **options)

    if tokenizer.is_fast:
        encoded = tokenized(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        # Of a character's several tokens it is the last. A tokenizer may give white space a span without width.
        at = {end: index for index, (_, end) in enumerate(spans)}
        at |= {end: index for index, (start, end) in enumerate(spans) if start < end}
        places = [at.get(end) for end in ends]
    else:
        ids = tokenized(text)["input_ids"]
        before = [tokenized(text[:end])["input_ids"] for end in ends]
        places = [len(part) - 1 if ids[: len(part)] == part else None for part in before]
    found = [place for place in places if place is not None]
    if len(found) < len(ends):
        return Failed(f"no token ends where step {places.index(None) + 1} does: one goes on beyond it")
    return Encoded(ids, found)
