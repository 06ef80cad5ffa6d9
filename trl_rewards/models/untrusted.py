"""Showing a judge text that it must not obey.

A policy that is paid by a judge learns to talk to it. What is defended here: a completion cannot leave its place in
the message (it is one JSON string between tags with a number that it cannot know), cannot end the judge's turn or
fake another's (chat-control tokens are taken out), cannot fill in the template (values are put in in one pass), and
neither its thinking nor its emptiness reaches the judge. Order and names tell nothing of who wrote what.

What is not defended: a judge that believes what it reads. Flattery, false claims of having checked, confident
nonsense, and openers such as a lone ":" or "Thought process:", which large judges too have scored as right answers
(One Token to Fool LLM-as-a-Judge, https://huggingface.co/papers/2507.08794), are inside the text to be judged.
`addresses_judge` finds the plain attempts by a list of patterns, which a policy can learn to get around: watch the
share it flags, read what scores highest, and score with a second source.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trl_rewards.samples import Text, content_text

_CONTROL = (
    r"<[|｜][^<>|｜\n]{1,64}[|｜]>"  # ChatML, Llama 3, DeepSeek, …
    r"|</?s>|\[/?INST\]|<</?SYS>>"  # Llama 2, Mistral
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"  # Gemma
    r"|</?think(?:ing)?>"
)
_CONTROL_TOKEN = re.compile(_CONTROL)
_ADDRESSES = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}\b(?:instructions?|prompt|rubric|criteria|guidelines|above)\b"
    r"|\b(?:give|award|assign|grant)\b[^.\n]{0,40}\b(?:score|rating|grade|marks|points)\b"
    r"|\b(?:score|rate|grade)\s+(?:this|it|me|my)\b[^.\n]{0,40}(?:\b[0-9]+\b|\b(?:highest|maximum|perfect|full)\b)"
    r"|\b(?:as|dear|attention|hey|hello|note to)\b,?\s+(?:the\s+|an?\s+)?(?:evaluator|judge|grader|rater|assessor)\b"
    r"|\b(?:deserves?|should (?:get|receive|be given))\b[^.\n]{0,40}\b(?:score|rating|grade|marks)\b"
    r"|[{,]\s*[\"']?(?:scores?|rating|winner|verdict|best-to-worst)[\"']?\s*:"  # a verdict in the judge's own form
    r"|" + _CONTROL,
    re.IGNORECASE,
)
_OPENER = re.compile(
    r"[\W_]*|(?:thought process|solution|answer|explanation)\W*"
    r"|let(?:'|’)?s (?:solve|think|work|break)[^.\n]{0,60}\W*",
    re.IGNORECASE,
)


def as_text(prompt: Text) -> str:
    """A prompt as one text: a string or a single message as it is, several messages with their roles as labels."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return content_text(prompt[0])
    return "\n\n".join(f"{message.get('role', 'user')}: {content_text(message)}" for message in prompt)


def without_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing where a `<think>` is never closed, since there is no answer then."""
    answer = text.rpartition("</think>")[2]
    return "" if answer.lstrip().startswith("<think>") else answer.strip()


def without_control_tokens(text: str, more: Iterable[str] = ()) -> str:
    """The text with chat-control tokens, and `more` tokens of a judge's tokenizer, replaced by spaces."""
    text = _control_pattern(tuple(more)).sub(" ", text)
    # What was nested may have closed up to a token again; going round until none is left would take quadratic time.
    return re.sub(r"<(?=[|｜])", "< ", text) if _CONTROL_TOKEN.search(text) else text


def control_tokens_of(tokenizer: Any) -> tuple[str, ...]:
    """A tokenizer's special tokens: they mean something to its model, and must not come from a completion."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(sorted({*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}))


@functools.lru_cache(maxsize=16)
def _control_pattern(more: tuple[str, ...]) -> re.Pattern[str]:
    named = sorted((re.escape(token) for token in more if token.strip()), key=len, reverse=True)
    return re.compile("|".join([*named, _CONTROL]))


def fenced(name: str, text: str, nonce: str) -> str:
    """`text` as a JSON string between tags of its own, which nothing inside can close without knowing the nonce."""
    return f"<{name}-{nonce}>\n{json.dumps(text, ensure_ascii=False)}\n</{name}-{nonce}>"


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each `{name}` replaced, in one pass: braces in values, and other ones, are plain text."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def placeholders(template: str) -> set[str]:
    """The names that a template has in braces."""
    return set(re.findall(r"\{(\w+)\}", template))


def addresses_judge(text: str) -> bool:
    """Whether a completion speaks to its judge, imitates a verdict, or is nothing but an opener such as "Solution:".

    A list of patterns: it misses what it does not know, and may flag a text about grading or an honest JSON answer.
    """
    return bool(_ADDRESSES.search(text) or _OPENER.fullmatch(text.strip()))
