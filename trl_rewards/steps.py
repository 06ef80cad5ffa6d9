"""A completion's steps, and the tokens that they end at: for rewards that give one value per step."""

from __future__ import annotations

import bisect
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from trl_rewards.components import Context, Score, TokenReward
from trl_rewards.errors import RewardError, did_you_mean
from trl_rewards.plugins import load_target
from trl_rewards.samples import Failed, Message, Samples, Text, content_text

Splitter = Callable[[str], Sequence[str]]
"""Makes steps of a text: its parts, in order and in the text's own words."""

_WAYS: dict[str, dict[str, str]] = {
    "blank_line": {"separator": r"\n[^\S\n]*\n"},
    "line": {"separator": r"\n"},
    "sentence": {"end": r"""[.!?…]+["'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*"""},
}


class StepReward(TokenReward):
    """A process reward of steps: `score_steps` gives one value per step, which stands at the step's last token.

    Steps are parts of the text. Which tokens they are is found with the policy's tokenizer, whichever it is. A token
    at which two steps end has the sum of both.
    """

    steps: str | dict[str, str] | Callable = "blank_line"
    """`blank_line`, `line`, `sentence`, `turn` (what the policy says between two tools' replies); `{separator: …}`,
    `{start: …}` or `{end: …}` with a regular expression of what stands between steps, begins or ends one; or a
    function `(text) -> list of parts`, as `./file.py:name` or `package.module:name`."""
    take: Literal["steps", "sum", "mean", "min", "product", "last"] = "steps"
    """`steps`: a process reward, a value at each step's last token; where nobody asks for tokens it counts as the sum.
    Else one number for the completion, made of its steps' values."""

    def __post_init__(self):
        self._split = splitter(self.steps)
        self._tokens_of: Context | None = None

    def setup(self, context: Context) -> None:
        self._tokens_of = context
        if isinstance(self.steps, str) and ":" in self.steps:
            self._split = _checked(load_target(self.steps, context.base_dir), self.steps)

    def check_running(self, running: Mapping[str, Any]) -> None:
        super().check_running(running)
        if running.get("isolate") and self.take == "steps":
            raise ValueError(
                "isolate: a process of its own does not have the policy's tokenizer; leave it, or set take"
            )

    def steps_of(self, samples: Samples) -> list[list[str]]:
        """Each row's steps."""
        if self.steps == "turn":
            return [[turn_text(turn) for turn in turns_in(completion)] for completion in samples.completions]
        return [steps_in(completion, self._split) for completion in samples.completions]

    def score_steps(self, samples: Samples, steps: list[list[str]]) -> list[list[float | None] | Score]:
        """One value per step, row by row, None for a step of which nothing is said; or a hole for the whole row."""
        raise NotImplementedError(f"{type(self).__name__} must define score_steps(self, samples, steps)")

    def score_tokens(self, samples: Samples) -> list[list[float | None] | Score]:
        steps = self.steps_of(samples)
        return self.on_tokens(samples, steps, self.score_steps(samples, steps))

    def on_tokens(
        self, samples: Samples, steps: list[list[str]], found: list[list[float | None] | Score]
    ) -> list[list[float | None] | Score]:
        """Values per token of values per step; or one number, where `take` says so or there are no tokens.

        For subclasses that have an `ascore` of their own. RewardError where there are not as many values as steps.
        """
        if len(found) != len(steps):
            raise RewardError(
                f"{self.display_name!r} returned {len(found)} rows of steps for {len(steps)} completions"
            )
        return [self._row(samples, row, steps[row], values) for row, values in enumerate(found)]

    def ends_in(
        self, tokenizer: Any, ids: Sequence[int], completion: Text, steps: Sequence[str]
    ) -> list[int] | Failed:
        """Index of each step's last token among a completion's token ids; Failed where a step is not found there."""
        if self.steps == "turn":
            return turn_ends(tokenizer, ids, completion)
        return step_ends(tokenizer, ids, steps)

    def score(self, samples: Samples) -> list[Score]:
        steps = self.steps_of(samples)
        found = self.score_steps(samples, steps)
        return [aggregate(values, self.take) if isinstance(values, list) else values for values in found]

    def _row(
        self, samples: Samples, row: int, steps: list[str], values: list[float | None] | Score
    ) -> list[float | None] | Score:
        if not isinstance(values, list):
            return values
        if len(values) != len(steps):
            raise RewardError(f"{self.display_name!r} returned {len(values)} values for a row of {len(steps)} steps")
        if all(value is None for value in values):
            return None
        tokenizer = self._tokens_of.tokenizer if self._tokens_of is not None else None
        if self.take != "steps" or tokenizer is None or not samples.completion_ids:
            return aggregate(values, self.take)
        ids = samples.completion_ids[row]
        ends = self.ends_in(tokenizer, ids, samples.completions[row], steps)
        if isinstance(ends, Failed):
            return ends
        tokens: list[float | None] = [None] * len(ids)
        for end, value in zip(ends, values, strict=True):
            if value is not None:
                tokens[end] = (tokens[end] or 0.0) + value
        return tokens


def splitter(steps: str | Mapping[str, str] | Splitter) -> Splitter:
    """What an option `steps` means. ValueError for what it cannot mean; functions by name are imported later."""
    if callable(steps):
        return _checked(steps, "steps")
    if isinstance(steps, str):
        if ":" in steps:
            return _not_set_up
        if steps == "turn":
            return _whole
        if steps not in _WAYS:
            ways = (*_WAYS, "turn")
            raise ValueError(f"steps: unknown way {steps!r}{did_you_mean(steps, ways)}; there is {', '.join(ways)}")
        steps = _WAYS[steps]
    if len(steps) != 1 or not steps.keys() <= _CUTS.keys():
        raise ValueError(f"steps: one of {', '.join(_CUTS)} with a regular expression, got {dict(steps)}")
    way, pattern = next(iter(steps.items()))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"steps: {pattern!r} is no regular expression: {error}") from error
    if compiled.match(""):
        raise ValueError(f"steps: {pattern!r} matches the empty text, and would be everywhere")
    return functools.partial(_CUTS[way], compiled)  # no lambda: rewards are pickled


def steps_in(completion: Text, split: Splitter) -> list[str]:
    """The steps of a completion, without white space around them and without empty ones.

    Of chat messages, those of each assistant message in turn.
    """
    said = [completion] if isinstance(completion, str) else map(content_text, turns_in(completion))
    return [step for text in said for step in map(str.strip, split(text)) if step]


def turns_in(completion: Text) -> list[Message]:
    """The assistant messages of a completion that say something or call a tool; a text is one."""
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return [message for message in messages if message.get("role") == "assistant" and turn_text(message)]


def turn_text(message: Message) -> str:
    """What an assistant message says and calls, for readers."""
    calls = [f"{name}({json.dumps(arguments, ensure_ascii=False)})" for name, arguments in _calls(message)]
    return "\n".join(part for part in [content_text(message).strip(), *calls] if part)


def step_ends(tokenizer: Any, ids: Sequence[int], steps: Sequence[str]) -> list[int] | Failed:
    """Index of each step's last token among a completion's tokens; Failed where a step is not in their text.

    Steps stand in the tokens' text one after another. A character that several tokens make up belongs to the last of
    them.
    """
    text, ends = token_ends(tokenizer, ids)
    found, cursor = [], 0
    for step in steps:
        start = text.find(step, cursor)
        if start < 0:
            return Failed(f"a step is not in the completion's tokens as it is in its text: {step[:60]!r}")
        cursor = start + len(step)
        found.append(bisect.bisect_left(ends, cursor))
    return found


def turn_ends(tokenizer: Any, ids: Sequence[int], completion: Text) -> list[int] | Failed:
    """Index of the last token of each assistant message: the end-of-sequence token after what it says and calls.

    Tokens of a call are found by the tool's name, since its arguments were parsed. A turn that has no such token
    before the next message ends at the last token that was found of it.
    """
    text, ends = token_ends(tokenizer, ids)

    def end_token(start: int) -> int | None:
        return next((at for at in range(start, len(ids)) if ids[at] == tokenizer.eos_token_id), None)

    places: list[tuple[bool, int, int]] = []  # each message's: the policy's own, first character, end of the last mark
    cursor = after_turn = 0
    for message in turns_in(completion) if isinstance(completion, str) else completion:
        own = message.get("role") == "assistant"
        begin = None
        for mark in _marks(message):
            # What a tool replies may be what it was called with, or what is said next.
            start = text.find(mark, cursor) if own else text.find(mark, max(cursor, after_turn))
            if start < 0 and own:
                return Failed(f"a turn is not in the completion's tokens as it is in its text: {mark[:60]!r}")
            start = start if start >= 0 else text.find(mark, cursor)
            if start >= 0:  # a template may show a reply in other words
                begin, cursor = start if begin is None else begin, start + len(mark)
        if begin is None:
            continue
        places.append((own, begin, cursor))
        if own and (end := end_token(bisect.bisect_left(ends, cursor))) is not None:
            after_turn = ends[end]

    found = []
    for number, (own, _, end) in enumerate(places):
        if own:
            last = bisect.bisect_left(ends, end)
            limit = places[number + 1][1] if number + 1 < len(places) else len(text)
            token = end_token(last)
            found.append(token if token is not None and ends[token] <= limit else last)
    return found


def token_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of tokens without special ones, and how many of its characters are there after each token.

    As TRL has it: `tokenizer.decode(ids, skip_special_tokens=True)`. A character is there once its last byte is.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in dict.fromkeys(ids)]
    alone = dict(zip(dict.fromkeys(ids), pieces, strict=True))
    if "".join(alone[token] for token in ids) == text and "\ufffd" not in text:  # no token depends on its neighbours
        ends, done = [], 0
        for token in ids:
            done += len(alone[token])
            ends.append(done)
        return text, ends
    return text, _ends_one_by_one(tokenizer, ids, text)


def _ends_one_by_one(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """`token_ends` for tokens that are parts of characters, or whose white space depends on what is before them."""
    ends: list[int] = []
    context, known, done = 0, 0, 0  # decoded from `context`, of which the tokens before `known` are done
    for index in range(len(ids)):
        before = tokenizer.decode(ids[context:known], skip_special_tokens=True)
        here = tokenizer.decode(ids[context : index + 1], skip_special_tokens=True)
        if len(here) > len(before) and not here.endswith("\ufffd"):
            if text.startswith(here[len(before) :], done):
                done += len(here) - len(before)
            else:  # a decoder that looks further back than this
                whole = tokenizer.decode(ids[: index + 1], skip_special_tokens=True)
                done = max(done, _shared(whole, text))
            context, known = known, index + 1
        ends.append(done)
    if ends:
        ends[-1] = len(text)
    return ends


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def aggregate(values: Sequence[float | None], take: str) -> float | None:
    """One number of steps' values: their sum, mean, least, product or last; None where no step has one."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    match take:
        case "mean":
            return sum(known) / len(known)
        case "min":
            return min(known)
        case "product":
            return math.prod(known)
        case "last":
            return known[-1]
    return sum(known)


def _marks(message: Message) -> list[str]:
    """What is to be found of a message in its tokens' text: its content, and the names of the tools it calls."""
    return [part for part in [content_text(message).strip(), *(name for name, _ in _calls(message))] if part]


def _calls(message: Message) -> list[tuple[str, Any]]:
    """Names and arguments of the tools that a message calls."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or []]
    return [(function["name"], function.get("arguments")) for function in functions if function.get("name")]


def _whole(text: str) -> list[str]:
    return [text]


def _between(separator: re.Pattern[str], text: str) -> list[str]:
    found = list(separator.finditer(text))
    starts, ends = [0, *(match.end() for match in found)], [*(match.start() for match in found), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _cut(places: list[int], text: str) -> list[str]:
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def _from(start: re.Pattern[str], text: str) -> list[str]:
    return _cut([match.start() for match in start.finditer(text)], text)


def _until(end: re.Pattern[str], text: str) -> list[str]:
    return _cut([match.end() for match in end.finditer(text)], text)


def _whole(text: str) -> list[str]:
    return [text]


_CUTS = {"separator": _between, "start": _from, "end": _until}


def _checked(function: Any, name: str) -> Splitter:
    if not callable(function):
        raise TypeError(f"steps: {name!r} is no function but {function!r}")
    return function


def _not_set_up(text: str) -> Sequence[str]:
    raise RewardError("steps: the function is imported by setup(context), which was not called")
