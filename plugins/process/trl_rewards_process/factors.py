"""Latent factors of steps: functions from a question and its steps to numbers.  https://huggingface.co/papers/2412.11120

A function of factors takes a question and the list of steps of its answer, and gives one list of numbers per step, all
of the same length: `(question: str, steps: list[str]) -> list[list[float]]`. Numbers of about -1 to 1 are learned from
best.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from trl_rewards import Context, Failed, RewardError
from trl_rewards.sandbox import Limits, Program, Sandbox, open_sandbox

Factors = Callable[[str, list[str]], Sequence[Sequence[float]]]
Found = list[list[float]] | Failed
"""Factors of each step of a row; or why there are none."""

CONFINED = ("auto", "bwrap", "landlock")
"""Sandboxes that run code of models: those on this machine that keep it from all else."""
TRIAL = ("What is 2 + 3?", ["2 + 3 = 5, since 3 is 2 + 1.", "So the answer is 5."])
_NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
_EQUATION = re.compile(
    rf"(?<![\w.])(-?{_NUMBER}(?:\s*[-+*/×÷−]\s*{_NUMBER}){{1,20}})\s*=\s*(-?{_NUMBER})"
    r"(?!\s*[+*/×÷^%]|\s*[-−]\s*\d|[\w.]?\d)"
)
_OPERATORS = tuple("+-−*/×÷^")  # before a match: it is the end of something longer
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_RUNNER = """
import json
import sys
from {module} import {name} as factors

found = []
for question, steps in json.load(sys.stdin):
    try:
        found.append([[float(value) for value in row] for row in factors(question, steps)])
    except Exception as error:
        found.append(f"{{type(error).__name__}}: {{error}}"[:200])
print()
print(json.dumps(found))
"""


def length(question: str, steps: list[str]) -> list[list[float]]:
    """log(1 + words) / 5: 0.5 for eleven words, 1 for 147."""
    return [[math.log1p(len(step.split())) / 5] for step in steps]


def position(question: str, steps: list[str]) -> list[list[float]]:
    """Where the step stands: 0 for the first, 1 for the last."""
    return [[place / max(len(steps) - 1, 1)] for place in range(len(steps))]


def repetition(question: str, steps: list[str]) -> list[list[float]]:
    """Share of a step's runs of three words that were there before, in it or in earlier steps."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for step in steps:
        words = step.lower().split()
        runs = list(zip(words, words[1:], words[2:], strict=False))
        again = 0
        for run in runs:
            again += run in seen
            seen.add(run)
        found.append([again / max(len(runs), 1)])
    return found


def digits(question: str, steps: list[str]) -> list[list[float]]:
    """Share of characters that are digits."""
    return [[sum(map(str.isdigit, step)) / max(len(step), 1)] for step in steps]


def equations(question: str, steps: list[str]) -> list[list[float]]:
    """Of the sums and products written out with their result, such as 2 + 3 = 5: the share that is right less the
    share that is wrong, in [-1, 1]; 0 without any. Results that were rounded to their decimals are right."""
    found = []
    for step in steps:
        text = _THOUSANDS.sub("", step)
        whole = [each for each in _EQUATION.finditer(text) if text[: each.start()].rstrip()[-1:] not in _OPERATORS]
        held = [_holds(*each.groups()) for each in whole]
        found.append([(2 * sum(held) - len(held)) / max(len(held), 1)])
    return found


BUILT_IN: dict[str, Factors] = {
    function.__name__: function for function in (length, position, repetition, digits, equations)
}


def _holds(left: str, right: str) -> bool:
    decimals = len(right.partition(".")[2])
    try:
        return abs(_value(left) - Fraction(right)) <= Fraction(1, 2 * 10**decimals) * (decimals > 0)
    except ZeroDivisionError:
        return False


def _value(expression: str) -> Fraction:
    """What numbers joined by + - * / come to, products first."""
    total = Fraction(0)
    for sign, term in re.findall(rf"([-+−]?)\s*({_NUMBER}(?:\s*[*/×÷]\s*{_NUMBER})*)", expression):
        value = Fraction(1)
        for operator, number in re.findall(rf"([*/×÷]?)\s*({_NUMBER})", term):
            value = value / Fraction(number) if operator in ("/", "÷") else value * Fraction(number)
        total += -value if sign in ("-", "−") else value
    return total


def checked(found: Any, steps: int, width: int | None = None) -> list[list[float]]:
    """What a function of factors gave, as lists of floats; ValueError where it is not one list of numbers per step,
    all of the same length (`width`, where it is known) and finite."""
    rows = [[float(value) for value in row] for row in found]
    if len(rows) != steps:
        raise ValueError(f"{len(rows)} lists of factors for {steps} steps")
    widths = {len(row) for row in rows} | ({width} if width is not None else set())
    if len(widths) > 1 or widths == {0}:
        raise ValueError(f"lists of {' and '.join(map(str, sorted(widths)))} factors; one length, above 0, is wanted")
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError("a factor is infinite or no number")
    return rows


class FactorSet:
    """Several functions of factors, side by side."""

    def __init__(self, names: Sequence[str], context: Context, sandbox: str | None, seconds: float):
        """RewardError for a function that cannot be had or fails on two steps of an example."""
        self._functions: list[Callable[[list[tuple[str, list[str]]]], list[Found]]] = []
        self._sandbox: Sandbox | None = None
        for name in names:
            if name in BUILT_IN:
                self._functions.append(_here(BUILT_IN[name]))
            elif sandbox is None:
                self._functions.append(_here(_imported(name, context)))
            else:
                self._sandbox = self._sandbox or open_sandbox(sandbox)
                self._functions.append(_confined(name, context, self._sandbox, seconds))
        self.width: int | None = None
        """Factors of a step."""
        (tried,) = self([TRIAL])
        if isinstance(tried, Failed):
            raise RewardError(f"factors: {tried.reason} (tried on {TRIAL[1]})")
        self.width = len(tried[0])

    def __call__(self, rows: list[tuple[str, list[str]]]) -> list[Found]:
        """Factors of the steps of each row, (question, steps). It does not raise."""
        every = [function(rows) for function in self._functions]
        return [self._joined(len(row[1]), parts) for row, *parts in zip(rows, *every, strict=True)]

    def _joined(self, steps: int, parts: list[Found]) -> Found:
        if failed := next((part for part in parts if isinstance(part, Failed)), None):
            return failed
        whole = [part for part in parts if isinstance(part, list)]
        try:
            return checked(map(itertools.chain.from_iterable, zip(*whole, strict=True)), steps, self.width)
        except (TypeError, ValueError) as error:
            return Failed(f"a function of factors gave {error}")

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()


def _imported(name: str, context: Context) -> Factors:
    from trl_rewards import load_target

    function = load_target(name, context.base_dir)
    if not callable(function):
        raise RewardError(f"factors: {name!r} is no function but {function!r}")
    return function


def _here(function: Factors) -> Callable[[list[tuple[str, list[str]]]], list[Found]]:
    """A function of this process, row by row."""

    def run(rows: list[tuple[str, list[str]]]) -> list[Found]:
        found: list[Found] = []
        for question, steps in rows:
            try:
                found.append(checked(function(question, list(steps)), len(steps)) if steps else [])
            except (Exception, SystemExit) as error:  # one odd text costs its row
                found.append(Failed(f"a function of factors failed: {type(error).__name__}: {error}"))
        return found

    return run


def _confined(
    name: str, context: Context, sandbox: Sandbox, seconds: float
) -> Callable[[list[tuple[str, list[str]]]], list[Found]]:
    """A function of a file, all rows in one program in the sandbox. The file is never run in this process."""
    place, _, function = name.rpartition(":")
    path = context.path(place)
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except OSError as error:
        raise RewardError(f"factors: {error} (looked in {context.looked_in})") from error
    runner = _RUNNER.format(module="factors_of_steps", name=function)
    limits = Limits(seconds=seconds, output_kb=1 << 16)

    def run(rows: list[tuple[str, list[str]]]) -> list[Found]:
        program = Program(source=runner, stdin=json.dumps(rows), files={"factors_of_steps.py": source}, limits=limits)
        outcome = sandbox.run(program)
        said = outcome.stderr.strip().rpartition("\n")[2]
        if outcome.status != "ok":
            return [Failed(f"the sandbox says {outcome.status} of {name}: {said}")] * len(rows)
        try:
            found = json.loads(outcome.stdout.rstrip().rpartition("\n")[2])
            if len(found) != len(rows):
                raise ValueError(f"{len(found)} rows for {len(rows)}")
        except (ValueError, TypeError, RecursionError) as error:
            return [Failed(f"{name} wrote what is no list of factors: {error}")] * len(rows)
        return [_read(each, len(steps)) for each, (_, steps) in zip(found, rows, strict=True)]

    return run


def _read(found: Any, steps: int) -> Found:
    if isinstance(found, str):
        return Failed(f"a function of factors failed: {found}")
    try:
        return checked(found, steps) if steps else []
    except (TypeError, ValueError) as error:
        return Failed(f"a function of factors gave {error}")
