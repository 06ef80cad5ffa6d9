"""Fitting sources to labelled answers: what `trl-rewards calibrate` runs."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trl_rewards.calibration import Calibration, Method, calibration, write_calibrations
from trl_rewards.commands.reference import unshaped
from trl_rewards.commands.score import is_group, score_dataset, split_of
from trl_rewards.data import load_splits, map_columns
from trl_rewards.errors import RecipeError, did_you_mean
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe
from trl_rewards.report.reliability import draw_reliability


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Where labelled answers are, and what is fitted to them."""

    data: str
    split: str = "train"
    completion: str = "completion"
    """Column of the answer, or of a list of answers, which are then a group."""
    label: str = "label"
    """Column of its label in [0, 1], or of a list of them. Rows without one are left out."""
    method: Method = "platt"
    sources: tuple[str, ...] = ()
    """Those to calibrate; none: all."""


class Found(NamedTuple):
    """What came of it."""

    calibrations: dict[str, Calibration]
    refused: dict[str, str]
    """{source: why it has no curve, and what to do}"""
    holes: dict[str, int]
    """{source: labelled answers without a score}"""


def calibrate(recipe: Recipe, labelled: Labelled, out: Path, batch_size: int = 64) -> Found:
    """Score the labelled answers, fit a curve to each source, and write them with a diagram beside them.

    The file's curves of other sources stay. RecipeError if the data do not fit, or if no source can be calibrated.
    """
    bare = unshaped(recipe)
    names = [source.name for source in bare.rewards]
    problems = [
        f"--source: no source {name!r}{did_you_mean(name, names)}; there is {', '.join(names)}"
        for name in labelled.sources
        if name not in names
    ]
    whole = split_of(load_splits(labelled.data, option="LABELLED"), labelled.split, labelled.data, recipe.source)
    dataset = map_columns(whole, recipe.dataset, recipe.source)
    for option, column in (("completion", labelled.completion), ("label", labelled.label)):
        if column not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            problems.append(f"--{option}: no column {column!r} in {labelled.data} (it has {there})")
    if problems:
        raise RecipeError(problems, recipe.source)
    labels = _labels(dataset, labelled, recipe.source)
    chosen = [name for name in names if name in (labelled.sources or names)]
    rewards = {source.name: source.reward for source in Pipeline.from_recipe(bare).sources}
    answers = dataset[labelled.completion]
    for name in chosen:
        if rewards[name].scope == "group" and not all(map(is_group, answers)):
            problems.append(
                f"{name!r} compares the answers of a group: give lists of completions and labels, or leave it out "
                "with --source and the names of the others"
            )
    if problems:
        raise RecipeError(problems, recipe.source)
    scored = dataset.remove_columns([labelled.label])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scores.jsonl")
        score_dataset(bare, scored, file, labelled.completion, batch_size)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    found = Found({}, {}, {})
    for name in chosen:
        pairs = [
            (line["scores"][name], label)
            for line in lines
            if (label := labels[line["row"]][line["completion"]]) is not None
        ]
        there = [(score, label) for score, label in pairs if score is not None]
        found.holes[name] = len(pairs) - len(there)
        scores, right = [score for score, _ in there], [label for _, label in there]
        try:
            found.calibrations[name] = calibration(rewards[name], labelled.method, scores, right)
        except ValueError as error:
            found.refused[name] = str(error)
    if not found.calibrations or any(name in found.refused for name in labelled.sources):
        raise RecipeError([f"{name}: {why}" for name, why in found.refused.items()], recipe.source)
    write_calibrations(out, found.calibrations)
    from trl_rewards.report.drawing import theme

    out.with_suffix(".png").write_bytes(draw_reliability(found.calibrations, theme()))
    return found


def _labels(dataset: Any, labelled: Labelled, source: str) -> list[list[float | None]]:
    """Each row's labels, one per completion; None where there is none. RecipeError on any that is no label."""
    rows: list[list[float | None]] = []
    problems: list[str] = []
    for index, (answers, value) in enumerate(zip(dataset[labelled.completion], dataset[labelled.label], strict=True)):
        values = value if isinstance(value, list) else [value]
        wanted = len(answers) if is_group(answers) else 1
        if len(values) != wanted:
            problems.append(f"row {index} has {len(values)} labels for {wanted} completions")
        elif bad := [each for each in values if not _is_label(each)]:
            problems.append(f"row {index} has label {bad[0]!r}; a label is 0 or 1, or a grade between them")
        rows.append([None if each is None or each != each else float(each) for each in values] if not problems else [])
    if problems:
        more = [f"… and {len(problems) - 5} rows more"] if len(problems) > 5 else []
        raise RecipeError([f"--label: {problem}" for problem in [*problems[:5], *more]], source)
    return rows


def _is_label(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and (math.isnan(value) or 0 <= value <= 1))


def default_file(config: str) -> Path:
    """`<recipe>.calibration.json` beside a recipe's file, or here for a bundled one."""
    file = Path(config)
    return file.with_name(f"{file.stem}.calibration.json") if file.is_file() else Path(f"{file.name}.calibration.json")


def describe(found: Found, out: Path, base_dir: str) -> str:
    """Measures before and after in lines, and the YAML that uses the curves."""
    wide = max(map(len, [*found.calibrations, *found.refused])) + 2
    lines = [f"{'':{wide}} method           n  ECE             Brier           log loss"]
    for name, kept in found.calibrations.items():
        measures = "  ".join(f"{kept.before[key]:.3f} → {kept.after[key]:.3f}" for key in kept.before)
        lines.append(f"{name:{wide}} {kept.curve.method:12} {kept.n:5}  {measures}")
    lines += [
        f"{name}: {count} labelled answers without a score left out" for name, count in found.holes.items() if count
    ]
    lines += [f"{name}: not calibrated: {why}" for name, why in found.refused.items()]
    lines.append(
        "before: the score if all are in [0, 1], else its sigmoid; after: on rows that the curve has not seen"
    )
    beside = out.resolve().is_relative_to(Path(base_dir).resolve())
    path = out.resolve().relative_to(Path(base_dir).resolve()) if beside else out
    lines.append(f"{out} and {out.with_suffix('.png').name}; under each of these sources:")
    lines.append(f"    shape: [{{use: calibrated, with: {{path: {path}}}}}]")
    return "\n".join(lines)
