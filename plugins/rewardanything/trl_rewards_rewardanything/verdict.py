"""Reading what the RewardAnything judge wrote: scores and a best-to-worst list.  https://huggingface.co/papers/2506.03637

The reader takes what the authors' parser takes, with the same result, and more: prose and wrong quotes at once, bare
words, a cut-off end, and several objects if those with scores say the same. No text makes it raise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trl_rewards.models import as_number, extract_json

SCORES = "scores"
RANKING = "best-to-worst"
RANKING_KEYS = (RANKING, "best-to-worse")  # the second is a slip that the judge makes

_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?")


class Verdict(NamedTuple):
    """What a reply says. Names are those the judge used, or what `read_verdict` was told they stand for."""

    reasoning: str
    """The first closed think block; empty without one."""
    scores: dict[str, float]
    """The usable scores: finite, and within 1 to 5."""
    stated: list[str]
    """The best-to-worst list as the judge wrote it; empty where it wrote none."""
    problem: str | None = None
    """Why there is no score at all; None where there is at least one."""

    @property
    def ranking(self) -> list[str]:
        """The names from best to worst: as stated, else by score (equal ones in the order of the reply)."""
        return self.stated or sorted(self.scores, key=lambda name: -self.scores[name])


def read_verdict(text: str, names: Mapping[str, str] | None = None, clamp: bool = False) -> Verdict:
    """The verdict in a judge's reply. Never raises.

    `names` says what each name stands for (of two that stand for one, the last score wins); others are kept. Scores
    outside of 1 to 5 are left out, or moved to the nearer end with `clamp`.
    """
    found = verdict_object(text)
    if found is None:
        return Verdict(reasoning(text), {}, [], "no JSON object")
    names = names or {}
    said = found.get(SCORES)
    said = said if isinstance(said, dict) else {}
    scores = {names.get(name, name): as_score(value, clamp) for name, value in said.items()}
    usable = {name: score for name, score in scores.items() if score is not None}
    stated = next((found[key] for key in RANKING_KEYS if key in found), None)
    listed = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    problem = None if usable else "no score that is a number from 1 to 5" if said else "no scores"
    return Verdict(reasoning(text), usable, [names.get(name, name) for name in listed], problem)


def as_score(value: Any, clamp: bool = False) -> float | None:
    """A number from 1 to 5, read from a number or a numeric string; None for anything else."""
    number = as_number(value)
    if number is not None and clamp:
        number = min(max(number, 1.0), 5.0)
    return number if number is not None and 1.0 <= number <= 5.0 else None


def reasoning(text: str) -> str:
    """What stands between the first `<think>` and the first `</think>`; empty unless both are there in this order."""
    start, end = text.find("<think>"), text.find("</think>")
    return text[start + len("<think>") : end].strip() if 0 <= start < end else ""


def first_thought(text: str) -> str:
    """The first think block that is closed; empty without one."""
    found = _THOUGHT.search(text)
    return found[1].strip() if found else ""


def answer_part(text: str) -> str:
    """The reply without closed think blocks and code fences."""
    return _FENCE.sub("", _THOUGHT.sub("", text)).strip()


def released_json(text: str) -> tuple[Any, bool]:
    """The JSON of a reply by the steps of the authors' parser, and whether prose had to be cut away; {} without any.

    Strictly; else repaired (quotes, bare keys, trailing commas); else from the first brace to the last, unrepaired.
    """
    part = answer_part(text)
    for attempt in (part, repaired(part)):
        value, is_json = _loads(attempt)
        if is_json:
            return value, False
    value, _ = _loads(part[part.find("{") : part.rfind("}") + 1])
    return (value, True) if isinstance(value, dict) else ({}, False)


def repaired(text: str) -> str:
    """The authors' repairs of almost-JSON. They break a value with an apostrophe in it."""
    text = re.sub(r"([{,]\s*)([\w-]+)(\s*:)", r'\1"\2"\3', text.replace("'", '"'), flags=re.ASCII)
    return re.sub(r",(\s*[}\]])", r"\1", text).replace('"best-to-worse"', f'"{RANKING}"')


def _loads(text: str) -> tuple[Any, bool]:
    try:
        return json.loads(text), True
    except (ValueError, RecursionError):
        return None, False


def verdict_object(text: str) -> dict[str, Any] | None:
    """The object with scores, else that with a ranking, else the last; None without any, {} where several disagree.

    Objects after the last thought come before others; what is in a closed thought never counts.
    """
    value, is_json = _loads(answer_part(text))
    if is_json and not isinstance(value, dict):
        return None  # an array or a number by itself is not the format, whatever is inside
    outside = _THOUGHT.sub(" ", text).replace("</think>", " ")
    parts = [text] if outside == text else [text, outside]
    for keys in ((SCORES,), *((key,) for key in RANKING_KEYS), ()):
        for part in parts:
            if extract_json(part, keys, last=True) is not None:
                return extract_json(part, keys) or {}
    return None
