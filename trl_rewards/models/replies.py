"""Reading what a judge wrote: the JSON object in a reply, however it is wrapped, quoted or cut off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

_NOT_SPACE = re.compile(r"\S")
_QUOTES = {'"': re.compile(r'[\\"]'), "'": re.compile(r"[\\']")}
_AFTER_STRING = re.compile(r"\s*(?:[,:}\]]|\Z)")
_BARE = re.compile(r"[^{}\[\],:\n]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "infinity": math.inf, "-inf": -math.inf, "-infinity": -math.inf}


def extract_json(text: str, keys: Iterable[str] = (), last: bool = False) -> dict[str, Any] | None:
    """The JSON object in a reply that has all `keys`, or None. Never raises, in time linear in the text.

    Of several that say the same of `keys` it is the last; where they do not, one may be quoted from what is judged,
    and it is None, unless `last` says to take the last. An object counts for what is inside of it.

    What comes before the last `</think>` is left out. Around the object there may be prose and code fences; in it,
    single quotes, bare keys and words, trailing commas, quotes that are not escaped, and Python's True, None and nan.
    Of an object that the text's end cuts off, the members that are complete are taken.
    """
    wanted = list(keys)
    candidates = [
        (start, found)
        for start, found in objects_in(text.rpartition("</think>")[2])
        if all(key in found for key in wanted)
    ]
    if not candidates:
        return None
    outer, chosen = candidates[-1]
    for start, found in reversed(candidates):
        if start > outer:  # inside of the one that ended after it
            continue
        outer = start
        if not last and any(not _same(found[key], chosen[key]) for key in wanted):
            return None
    return chosen


def as_number(value: Any) -> float | None:
    """A finite number, also one that is written as a string; None for anything else."""
    if isinstance(value, str):
        value = _word(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def _same(one: Any, other: Any) -> bool:
    """Whether two values say the same; of values nested too deep to be compared nobody knows."""
    try:
        return one is other or one == other
    except RecursionError:
        return False


def objects_in(text: str) -> list[tuple[int, dict[str, Any]]]:
    """All objects, nested ones too, with the places where they begin, in the order in which they end. One pass,
    without recursion."""
    found: list[tuple[int, dict[str, Any]]] = []
    starts: list[int] = []
    containers: list[dict | list] = []  # open ones, each in the one before
    names: list[str] = []  # the member of each that is being read
    expected, position = "", 0
    while True:
        if not containers:
            position = text.find("{", position) + 1
            if position == 0:
                return found
            containers.append({}), names.append(""), starts.append(position)
            expected = "key"
        mark = _NOT_SPACE.search(text, position)
        if mark is None:
            break
        container, character, position = containers[-1], mark.group(), mark.start()
        if character in "}]":
            emptied = "key" if character == "}" else "value"  # nothing in it, or a comma after the last
            fits = isinstance(container, dict) == (character == "}") and expected in ("comma", emptied)
            if fits:
                position += 1
                containers.pop(), names.pop()
                start = starts.pop()
                if isinstance(container, dict):
                    found.append((start, container))
                expected = "comma"
        elif expected in ("comma", "colon"):
            fits = character == {"comma": ",", "colon": ":"}[expected]
            position += fits
            expected = "key" if expected == "comma" and isinstance(container, dict) else "value"
        elif expected == "value" and character in "{[":
            fits = True
            opened: dict | list = {} if character == "{" else []
            _put(container, names[-1], opened)
            position += 1
            containers.append(opened), names.append(""), starts.append(position)
            expected = "key" if character == "{" else "value"
        else:
            value, end = _scalar(text, position)
            if end == len(text):  # it may go on beyond the cut: 1 of 10
                break
            fits = end > position
            if fits and expected == "key":
                names[-1], expected = str(value), "colon"
            elif fits:
                _put(container, names[-1], value)
                expected = "comma"
            position = end
        if not fits:  # it is broken, and all that it is in
            containers.clear(), names.clear(), starts.clear()
    cut_off = reversed(list(zip(starts, containers, strict=True)))
    return found + [(start, container) for start, container in cut_off if isinstance(container, dict) and container]


def _put(container: dict | list, name: str, value: Any) -> None:
    if isinstance(container, dict):
        container[name] = value
    else:
        container.append(value)


def _scalar(text: str, start: int) -> tuple[Any, int]:
    """The string, number or bare word at `start`, and where it ends; `start` itself where there is none."""
    quote = text[start]
    if quote in _QUOTES:
        return _string(text, start + 1, quote)
    bare = _BARE.match(text, start)
    return (_word(bare.group().strip()), bare.end()) if bare else (None, start)


def _string(text: str, start: int, quote: str) -> tuple[str, int]:
    """A string up to the quote that something structural follows: others are part of it. Unclosed: up to the end."""
    position = start
    while mark := _QUOTES[quote].search(text, position):
        position = mark.end()
        if mark.group() == "\\":
            position += 1
        elif _AFTER_STRING.match(text, position):
            return _unescape(text[start : position - 1], quote), position
    return "", len(text)


def _unescape(body: str, quote: str) -> str:
    if "\\" not in body:
        return body
    inner = body if quote == '"' else body.replace("\\'", "'").replace('"', '\\"')
    try:
        return json.loads(f'"{inner}"', strict=False)
    except ValueError:
        return body


def _word(word: str) -> Any:
    """A number, true, false, null, or the word itself."""
    if len(word) < 300 and _NUMBER.fullmatch(word):
        return float(word) if not word.lstrip("+-").isdigit() else int(word)
    lower = word.lower() if len(word) < 10 else ""
    if lower in _WORDS:
        return _WORDS[lower]
    return _NOT_FINITE.get(lower, word)
