"""A recipe's alarms: what a metric must do, for how many logs, before the run says so, marks it or stops."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_rewards.errors import did_you_mean

THEN = ("log", "mark", "stop")
BOUNDS = ("above", "below", "rises", "falls")
_KEYS = ("metric", *BOUNDS, "for", "then")
_OF_SOURCES = ("mean", "std", "missing", "failed", "saved", "weight", "seconds")
"""What is logged of every source, as `rewards/<source>/<one of these>`."""


@dataclass(frozen=True)
class Alarm:
    """One entry under `alarms:`."""

    metric: str
    """Its name in the logs, as in metrics.jsonl: `kl`, `completions/repetition`, `eval_reward`."""
    bound: str
    """`above` or `below` a number; or it `rises` or `falls` so far from the lowest or highest it has been."""
    value: float
    logs: int = 1
    """Logs in a row that must be so, from 1 (`for:` in a recipe). Logs without the metric do not count."""
    then: str = "log"
    """`log` warns, `mark` also writes it among the metrics, `stop` also ends the run."""

    def __str__(self) -> str:
        by = " by" if self.bound in ("rises", "falls") else ""
        return f"{self.metric} {self.bound}{by} {self.value:g}" + (f" for {self.logs} logs" if self.logs > 1 else "")


class Count:
    """How many logs in a row an alarm's metric has been where it should not be; a function of the values alone.

    `rises` and `falls` are from the lowest, or highest, mean of so many logs in a row as the alarm asks for.
    """

    def __init__(self, alarm: Alarm):
        self.alarm = alarm
        self.seen = False
        self._row = 0
        self._last: deque[float] = deque(maxlen=alarm.logs)
        self._best: float | None = None

    def look(self, value: float) -> str | None:
        """What there is to say of the next value: it has been out of bounds for so many logs. None: nothing, or it has
        been said of these in a row. After a `stop` the count begins anew, so that a resumed run gets as far again."""
        self.seen = True
        alarm = self.alarm
        out = self._is_out(value)
        if math.isfinite(value):  # an infinite one is out of bounds, and no level to compare others with
            self._last.append(value)
        if math.isfinite(value) and len(self._last) == alarm.logs:
            mean, best = sum(self._last) / alarm.logs, self._best
            self._best = mean if best is None else min(best, mean) if alarm.bound == "rises" else max(best, mean)
        self._row = self._row + 1 if out else 0
        if self._row != alarm.logs:
            return None
        if alarm.then == "stop":
            self._row = 0
        start = f", from {self._best:.4g}" if alarm.bound in ("rises", "falls") else ""
        return f"{alarm}: it is {value:.4g}{start}"

    def _is_out(self, value: float) -> bool:
        bound, limit = self.alarm.bound, self.alarm.value
        if bound in ("above", "below"):
            return value > limit if bound == "above" else value < limit
        if self._best is None:
            return False
        return value - self._best >= limit if bound == "rises" else self._best - value >= limit


def parse_alarms(entries: Any, sources: Sequence[str], problems: list[str]) -> list[Alarm]:
    """The alarms of a recipe; what is wrong with them is added to `problems`. `sources`: their names, if any."""
    if entries is None:
        return []
    if not isinstance(entries, list):
        problems.append(f"alarms: must be a list, such as [{{metric: kl, above: 0.5, then: stop}}], got {entries!r}")
        return []
    parsed = [_parse(entry, f"alarms[{index}]", sources, problems) for index, entry in enumerate(entries)]
    return [alarm for alarm in parsed if alarm]


def _parse(entry: Any, path: str, sources: Sequence[str], problems: list[str]) -> Alarm | None:
    if not isinstance(entry, dict):
        problems.append(f"{path}: must be a mapping, such as {{metric: kl, above: 0.5, then: mark}}, got {entry!r}")
        return None
    found = [
        f"{path}: unknown key {key!r}{did_you_mean(str(key), _KEYS)} (it takes {', '.join(_KEYS)})"
        for key in entry
        if key not in _KEYS
    ]
    metric, logs, then = entry.get("metric"), entry.get("for", 1), entry.get("then", "log")
    if not isinstance(metric, str) or not metric:
        found.append(f"{path}.metric: a metric's name is needed, as metrics.jsonl has it, got {metric!r}")
    elif unknown := _unknown_source(metric, sources):
        there = ", ".join(sources)
        found.append(f"{path}.metric: no source {unknown!r}{did_you_mean(unknown, sources)}; there is {there}")
    bounds = [key for key in BOUNDS if entry.get(key) is not None]
    if len(bounds) != 1:
        got = f"got {' and '.join(bounds)}" if bounds else "got none"
        found.append(f"{path}: one of {', '.join(BOUNDS)} is needed, {got}")
    for key in bounds:
        if not isinstance(entry[key], int | float) or isinstance(entry[key], bool) or entry[key] != entry[key]:
            found.append(f"{path}.{key}: must be a number, got {entry[key]!r}")
        elif key in ("rises", "falls") and not entry[key] > 0:
            found.append(f"{path}.{key}: by how much, above 0, got {entry[key]!r}")
    if not isinstance(logs, int) or isinstance(logs, bool) or logs < 1:
        found.append(f"{path}.for: must be a whole number of logs from 1, got {logs!r}")
    if then not in THEN:
        hint = did_you_mean(then, THEN) if isinstance(then, str) else ""
        found.append(f"{path}.then: must be {' or '.join(THEN)}, got {then!r}{hint}")
    problems += found
    return None if found else Alarm(str(metric), bounds[0], float(entry[bounds[0]]), logs, then)


def _unknown_source(metric: str, sources: Sequence[str]) -> str | None:
    """The source that a metric is of and that is not there."""
    name, slash, what = metric.removeprefix("eval_").removeprefix("rewards/").rpartition("/")
    of_source = metric.removeprefix("eval_").startswith("rewards/") and slash and what in _OF_SOURCES
    return name if sources and of_source and name not in (*sources, "total") else None
