"""The answer in a completion, and the reference answers of its row.  https://huggingface.co/papers/2505.11080"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from trl_rewards import Reward, Samples


class AgainstReferences(Reward):
    """A reward that compares the answer with the reference answers of its row."""

    references: str = "references"
    """Dataset column with a list of reference answers per row; a string counts as a list of one. Empty ones are left
    out."""
    extract_answer: bool = True
    """Score what follows the first `<answer>` tag, where there is one; False scores the whole completion."""
    turn: Literal["first", "last"] = "first"
    """Which assistant message of a chat completion is read: the first, as the authors do, or the last, which is the
    answer where the policy calls tools."""

    def reads(self) -> tuple[str, ...]:
        return (self.references,)

    def pairs(self, samples: Samples) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each row's answer, and its references without missing ones; some may still be empty."""
        read = samples
        if self.turn == "first":
            read = replace(samples, completions=[first_turn(completion) for completion in samples.completions])
        for row, (text, value) in enumerate(zip(read.texts, samples[self.references], strict=True)):
            yield answer_in(text) if self.extract_answer else text, self._row(row, value)

    def _row(self, row: int, value: Any) -> tuple[str, ...]:
        found = value if isinstance(value, (list, tuple)) else [value]
        found = [text for text in found if text is not None and text == text]  # NaN is not equal to itself
        if not all(isinstance(text, str) for text in found):
            raise TypeError(f"column {self.references!r}, row {row}: wanted text or a list of texts, got {value!r}")
        return tuple(found)


def first_turn(completion: Any) -> Any:
    """A chat completion up to its first assistant message; a plain one as it is."""
    if not isinstance(completion, list):
        return completion
    first = next((index for index, message in enumerate(completion) if message.get("role") == "assistant"), 0)
    return completion[: first + 1]


def answer_in(text: str) -> str:
    """What follows the first `<answer>`, up to the next answer tag of either kind; the text where there is none."""
    _, tag, rest = text.partition("<answer>")
    return rest.partition("<answer>")[0].partition("</answer>")[0].strip() if tag else text.strip()
