"""Rule rewards: length, format, exact answers."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from trl_rewards.components import Reward, Score
from trl_rewards.samples import Samples


def soft_overlong_punishment(length: int, soft_limit: int, hard_limit: int) -> float:
    """0 up to soft_limit tokens, then linear to -1 at hard_limit.

    DAPO eq. 13, https://huggingface.co/papers/2503.14476: L_max is hard_limit, L_cache is hard_limit - soft_limit.
    """
    if length <= soft_limit:
        return 0.0
    if length > hard_limit:
        return -1.0
    return (soft_limit - length) / (hard_limit - soft_limit)


class Length(Reward):
    """Soft overlong punishment: 0 up to `soft_limit` tokens, falling linearly to -1 at `hard_limit`. In [-1, 0].

    DAPO, eq. 13: https://huggingface.co/papers/2503.14476
    """

    soft_limit: int
    """Tokens that cost nothing; the paper's L_max - L_cache (16,384)."""
    hard_limit: int
    """Tokens from which on the reward is -1; the paper's L_max (20,480), usually `max_completion_length`."""

    def __post_init__(self):
        if not 0 <= self.soft_limit < self.hard_limit:
            raise ValueError(f"soft_limit must be in [0, hard_limit), got {self.soft_limit} and {self.hard_limit}")

    def score(self, samples: Samples) -> list[Score]:
        return [soft_overlong_punishment(length, self.soft_limit, self.hard_limit) for length in samples.lengths]


class RegexFormat(Reward):
    """1.0 where the whole completion matches a pattern, else 0.0. By default `<think>…</think><answer>…</answer>`.

    DeepSeek-R1's format reward: https://huggingface.co/papers/2501.12948. White space around the completion and
    between the blocks is allowed, and `.` matches a newline.
    """

    pattern: str = r"<think>((?!</?think>|</?answer>).)*</think>\s*<answer>((?!</?think>|</?answer>).)*</answer>"
    """Python regular expression, matched against the stripped completion from its first to its last character. By
    default no tag may occur twice, so that a policy cannot give two answers."""
    prefix: str = ""
    """Put before the completion first: `"<think>"` for chat templates that begin the reply with it."""

    def __post_init__(self):
        try:
            self._compiled = re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None

    def score(self, samples: Samples) -> list[Score]:
        texts = [(self.prefix + text).strip() for text in samples.texts]
        return [1.0 if self._compiled.fullmatch(text) else 0.0 for text in texts]


class ExactMatch(Reward):
    """1.0 where the answer equals the reference answer, else 0.0; None where the row has no reference answer.

    The answer is what stands between the last `<answer>` and `</answer>`, or the whole completion without tags; of
    it `take` says which part. Case and surrounding punctuation do not count.
    """

    answer: str = "answer"
    """Dataset column with the exact answer."""
    take: Literal["all", "last_word", "last_number"] = "all"
    """Which part of the answer is compared."""

    _NUMBER: ClassVar[re.Pattern] = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

    def reads(self) -> tuple[str, ...]:
        return (self.answer,)

    def score(self, samples: Samples) -> list[Score]:
        pairs = zip(samples.texts, samples[self.answer], strict=True)
        same = [None if wanted is None else self._same(text, str(wanted)) for text, wanted in pairs]
        return [None if equal is None else float(equal) for equal in same]

    def _same(self, text: str, wanted: str) -> bool | None:
        if not wanted.strip():
            return None
        answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
        if self.take == "last_word":
            answer = (answer.split() or [""])[-1]
        elif self.take == "last_number":
            said, meant = (self._NUMBER.findall(text) for text in (answer, wanted))
            if not meant:
                return None
            return bool(said) and float(said[-1].replace(",", "")) == float(meant[-1].replace(",", ""))
        return _plain(answer) == _plain(wanted)


def _plain(text: str) -> str:
    return " ".join(text.strip(" \t\r\n.,;:!?\"'").casefold().split())
