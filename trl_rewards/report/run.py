"""What a run leaves in its folder: lines of metrics and of samples, and their reading back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_rewards.console import source_names
from trl_rewards.recipe_files import load_yaml

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
ALARM = "alarm"
"""Key of a line of metrics that holds no metrics but the words of an alarm, with its `metric`."""


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON Lines file that have a step, and how many lines were not readable (a run was killed)."""
    lines, unreadable = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
            lines.append(line)
        except (ValueError, TypeError, KeyError):
            unreadable += bool(text.strip())
    return lines, unreadable


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]], mode: str = "w") -> None:
    with file.open(mode, encoding="utf-8") as out:
        out.writelines(json.dumps(_jsonable(line), allow_nan=False) + "\n" for line in lines)


def _jsonable(value: Any) -> Any:
    """What JSON can say: NaN and infinity become None, 0-d tensors and NumPy scalars numbers, other things text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


class Run(NamedTuple):
    """What a run left in its folder."""

    folder: Path
    history: list[dict[str, Any]]
    """One mapping per log, in order, each with its step."""
    samples: list[dict[str, Any]]
    sources: list[str]
    signature: str | None
    recipe: str | None
    notes: list[str]
    """What is absent or could not be read, in words for the page."""


class Curve(NamedTuple):
    """Values of one metric over optimiser steps; steps where it was not logged are left out."""

    steps: Sequence[float]
    """Of some curves another metric, such as KL."""
    values: list[float]


def read_run(folder: Path) -> Run:
    """The run in `folder`. ValueError if it holds no metrics."""
    notes: list[str] = []
    history: list[dict[str, Any]] = []
    metrics = folder / METRICS
    if metrics.exists():
        history, unreadable = read_lines(metrics)
        if unreadable:
            notes.append(f"{unreadable} line(s) of {METRICS} could not be read and were left out.")
    checkpoint = newest_checkpoint(folder)
    if not history and checkpoint:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        notes.append(f"There is no {METRICS}; the metrics are those of {checkpoint.name}/trainer_state.json.")
    if not history:
        raise ValueError(
            f"{folder} has neither {METRICS} nor a checkpoint-*/trainer_state.json with logs; give the output_dir of "
            "a run that logged at least once (add RunRecorder to the trainer, or lower logging_steps)"
        )
    samples: list[dict[str, Any]] = []
    if (folder / SAMPLES).exists():
        samples, unreadable = read_lines(folder / SAMPLES)
        if unreadable:
            notes.append(f"{unreadable} line(s) of {SAMPLES} could not be read and were left out.")
    else:
        notes.append(f"There is no {SAMPLES}, so no completions and no advantages are shown.")
    texts = {}
    for name in ("signature.txt", "recipe.yaml"):
        file = folder / name
        texts[name] = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else None
        if texts[name] is None:
            notes.append(f"There is no {name}.")
    keys = dict.fromkeys(key.removeprefix("eval_") for line in history for key in line)
    return Run(folder, history, samples, source_names(keys), texts["signature.txt"], texts["recipe.yaml"], notes)


def alarms(run: Run) -> list[tuple[int, str]]:
    """Steps at which the recipe's alarms marked the run, and what they said."""
    return [(line["step"], str(line[ALARM])) for line in run.history if ALARM in line]


def watched(run: Run) -> list[str]:
    """Sources whose weight was 0 in every log, and which the recipe names nowhere else: they scored, and took no part
    in the reward. One that is named, as the gate, the filter or the source of another, may have a part in it."""
    weights = {name: curve(run, f"rewards/{name}/weight").values for name in run.sources}
    named = _named(run)
    return [name for name, values in weights.items() if values and not any(values) and name not in named]


def trainer_of(run: Run) -> str | None:
    """The recipe's `trainer`; None without one."""
    return _raw(run).get("trainer")


def _raw(run: Run) -> dict[str, Any]:
    raw = load_yaml(run.recipe) if run.recipe else None
    return raw if isinstance(raw, dict) else {}


def _named(run: Run) -> set[str]:
    """Texts in those places of the recipe where one source may be named beside its own entry."""
    raw = _raw(run)
    entries = [entry for entry in raw.get("rewards") or [] if isinstance(entry, dict)]
    beside = [entry.get(key) for entry in entries for key in ("with", "shape", "only_if")]
    return set(_texts([*beside, *(raw.get(key) for key in ("combine", "shape", "advantage", "filter"))]))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


def newest_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-<step>` with the highest step that has a trainer_state.json."""
    found = [
        (int(file.parent.name.removeprefix("checkpoint-")), file.parent)
        for file in folder.glob("checkpoint-*/trainer_state.json")
        if file.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return max(found)[1] if found else None


def curve(run: Run, key: str) -> Curve:
    """A metric over the run; null and NaN are left out."""
    points = [(line["step"], number) for line in run.history if (number := finite(line.get(key))) is not None]
    return Curve([step for step, _ in points], [value for _, value in points])


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd); at the ends over those that are there."""
    half = window // 2
    means = []
    for index in range(len(values)):
        near = values[max(0, index - half) : index + half + 1]
        means.append(sum(near) / len(near))
    return means


def tenth(points: int) -> int:
    """About a tenth of so many points: odd, at least 3."""
    return max(points // 10 // 2 * 2 + 1, 3)


def finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
