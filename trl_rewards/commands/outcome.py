"""What came out of a claim's runs: numbers of each run, differences with intervals, and verdicts."""

from __future__ import annotations

import json
import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_rewards.commands.claims import Claim, Expectation, Measure, claims
from trl_rewards.errors import RewardError

# Two-sided 95 % points of Student's t with 1, 2, … degrees of freedom; the last is a little wide beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
VERDICTS = ("reproduced", "direction only", "not reproduced")


class Interval(NamedTuple):
    """A mean and its 95 % interval over seeds (Student's t); without bounds where there is one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{_short(self.mean)} (one seed)"
        return f"{_short(self.mean)} ({_short(self.low)} to {_short(self.high)})"


def interval(values: Sequence[float]) -> Interval:
    """(S,) values of seeds -> mean and its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    freedom = len(values) - 1
    t = T95[min(freedom, len(T95)) - 1]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def judge(expectation: Expectation, difference: Interval, whole: bool = True) -> str:
    """One of VERDICTS: whether the whole interval of the difference is as expected, its mean alone, or neither.

    Not `whole`: some seeds have no number and are not in the difference, so it is no more than the direction."""
    sign, margin = expectation.sign, expectation.margin
    worst = sign * (difference.low if sign > 0 else difference.high)
    reaches = operator.gt if expectation.direction in ("higher", "lower") else operator.ge
    if whole and reaches(worst, margin):
        return VERDICTS[0]
    return VERDICTS[1] if reaches(sign * difference.mean, margin) else VERDICTS[2]


def summary(claim: Claim, folders: Mapping[tuple[str, int], Path], seeds: int) -> dict[str, Any]:
    """What was measured: values of each arm over seeds, the differences that were expected, and the verdict.

    `folders`: {(arm or stage, seed): the folder of its run}. RewardError if runs never log what is measured."""
    judged_by = claim.seeds(seeds)
    values = {
        arm: {
            name: [measured(measure, folders[arm, seed]) for seed in judged_by]
            for name, measure in claim.measures.items()
            if arm in (measure.arms or claim.arms)
        }
        for arm in (*claim.stages, *claim.arms)
    }
    values = {arm: found for arm, found in values.items() if found}
    expected = [_compared(each, values, seeds) for each in claim.expect]
    return {
        "claim": claim.name,
        "of": claim.fingerprint,
        "seeds": judged_by,
        "values": values,
        "expected": expected,
        "verdict": max((each["verdict"] for each in expected), key=VERDICTS.index),
    }


def _compared(each: Expectation, values: Mapping[str, Mapping[str, list]], seeds: int) -> dict[str, Any]:
    """An expected difference: its mean with the interval, over how many seeds, and its verdict."""
    than = values[each.than][each.measure] if isinstance(each.than, str) else [float(each.than)] * seeds
    mine = values[each.arm][each.measure]
    pairs = [(a, b) for a, b in zip(mine, than, strict=True) if a is not None and b is not None]
    found = {"what": str(each)}
    if not pairs:
        return found | {"difference": None, "seeds": 0, "verdict": VERDICTS[-1]}
    difference = interval([a - b for a, b in pairs])
    return found | {
        "difference": list(difference) if len(pairs) > 1 else [difference.mean],
        "seeds": len(pairs),
        "verdict": judge(each, difference, whole=len(pairs) == seeds),
    }


def measured(measure: Measure, folder: Path) -> float | None:
    """A run's number; None where what it logged there is null, which is written of what is no number.

    RewardError if the run does not log it at all."""
    file = folder / measure.file
    if not file.is_file():
        raise RewardError(f"{file} is not there: the run did not write it")
    text = file.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    found = [(line.get("step", 0), line[measure.key]) for line in lines if measure.key in line]
    if not found:
        known = ", ".join(sorted({key for line in lines for key in line}))
        raise RewardError(f"{file} has no {measure.key!r}; it has {known}")
    series = [value for _, value in found]
    if measure.take == "steps_to":
        for end in range(measure.window, len(series) + 1):
            mean = _mean(series[end - measure.window : end])
            if mean is not None and measure.level is not None and mean >= measure.level:
                return float(found[end - 1][0])
        return float(found[-1][0] + 1)
    first, last = _mean(series[:1]), _mean(series[-measure.window :])
    gain = last - first if first is not None and last is not None else None
    mean = _mean(series)
    variation = statistics.stdev(series) / mean if mean and len(series) > 1 else None
    return {"last": last, "first": first, "gain": gain, "mean": mean, "variation": variation}[measure.take]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if len(there) == len(values) else None


def table(claim: Claim, result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and rows: a measure of an arm, and its mean over seeds with its interval."""
    rows: list[tuple[str, ...]] = [
        (f"{name} ({measure.unit})" if measure.unit else name, arm, _cell(found[name]))
        for name, measure in claim.measures.items()
        for arm, found in result["values"].items()
        if name in found
    ]
    return ("measure", "arm", "mean over seeds"), rows


def _cell(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    missing = f", {len(there)} of {len(values)} seeds" if len(there) < len(values) else ""
    return f"{interval(there)}{missing}" if there else "no number"


def place_of(claim: Claim) -> Path:
    """Where a claim's result is kept. RewardError if it is no bundled claim."""
    if claim.name not in claims() or claim.file.resolve() != claims()[claim.name].resolve():
        raise RewardError(f"{claim.file}: only bundled claims have a place for their results (--save)")
    return claim.file.with_suffix(".json")


def keep(claim: Claim, result: Mapping[str, Any]) -> None:
    """Write a result beside its claim, where the table of claims finds it. RewardError if one has more seeds."""
    file, before = place_of(claim), kept(claim.name)
    if before and before["of"] == claim.fingerprint and len(before["seeds"]) > len(result["seeds"]):
        counts = f"{len(before['seeds'])} seeds, and this result {len(result['seeds'])}"
        raise RewardError(f"{file} has {counts}; it is left alone")
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def kept(name: str) -> dict[str, Any] | None:
    """The result that is kept beside a bundled claim."""
    file = claims()[name].with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def seeds_of(result: Mapping[str, Any]) -> str:
    """Such as "5 seeds (0, 1, 2, 3, 4)"."""
    count = len(result["seeds"])
    return f"{count} seed{'s' * (count > 1)} ({', '.join(map(str, result['seeds']))})"


def parts_reproduced(result: Mapping[str, Any]) -> str:
    """How many of the expectations are, in brackets; nothing where all are or none is."""
    verdicts = [each["verdict"] for each in result["expected"]]
    count = verdicts.count(VERDICTS[0])
    return f" ({count} of {len(verdicts)} parts reproduced)" if 0 < count < len(verdicts) else ""


def effects(result: Mapping[str, Any]) -> list[str]:
    """The expected differences, each in a line with its verdict."""
    lines = []
    for each in result["expected"]:
        seeds = len(result["seeds"])
        some = f" ({each['seeds']} of {seeds} seeds)" if each["seeds"] < seeds else ""
        lines.append(f"{each['what']}: {_difference(each['difference'])}{some}, {each['verdict']}")
    return lines


def _difference(found: Sequence[float] | None) -> str:
    if found is None:
        return "no seed has both"
    mean = f"{found[0]:+.3g}"
    return f"{mean} ({found[1]:+.3g} to {found[2]:+.3g})" if len(found) == 3 else f"{mean} (one seed)"


def _short(value: float) -> str:
    return f"{value:.3g}"
