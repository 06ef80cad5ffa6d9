"""Averaging reward models, and whether their average is worth having: what `trl-rewards merge` runs.

https://huggingface.co/papers/2401.12187. Members are linearly connected where (1 - λ) · one + λ · other is at least as
accurate as (1 - λ) and λ of the two. Where they are not, their average is worse than they are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trl_rewards.commands.agree import Agreement, Compared, Recorded, agreement, pair_scores, read_pairs
from trl_rewards.models.averaging import average, shares_of
from trl_rewards.recipe import Recipe

Scored = list[list[float | None]]
"""Of each pair, the scores of its two answers."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Which pairs the average and its members are held against, and how they are run."""

    recorded: Recorded
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `model` beside its path, such as dtype or max_length."""
    points: int = 3
    """How many λ between 0 and 1, equally spaced, on the way from the first member to each other one."""
    batch_size: int = 64


class Point(NamedTuple):
    """How accurate a model is on the pairs."""

    name: str
    found: Agreement
    wanted: float | None = None
    """What linear connection asks for at least. None: nothing, as of a member."""


def merge(
    out: Path, members: Sequence[str], weights: Sequence[float] | None, check: Check | None = None
) -> list[Point]:
    """Write the average into `out`, and measure it where there are pairs to do so with.

    RewardError and RecipeError as `average` and `agree` raise them. Pairs are read before anything is written.
    """
    if check is None:
        average(out, members, weights)
        return []
    # Any recipe does to read pairs: none of their columns is a reward's.
    pairs = read_pairs(_recipe(members[0], check), check.recorded)[:2]
    average(out, members, weights)
    return list(_measured(out, members, shares_of(weights, len(members)), check, *pairs))


def _measured(
    out: Path, members: Sequence[str], shares: Sequence[float], check: Check, dataset: Any, labels: Sequence[int]
) -> Iterator[Point]:
    prompts = [json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]

    def scores_of(path: str) -> Scored:
        return pair_scores(_recipe(path, check), check.recorded, dataset, None, check.batch_size)["total"]

    def accuracy(scores: Scored) -> Agreement:
        compared = [Compared(*each) for each in zip(prompts, labels, *zip(*scores, strict=True), strict=True)]
        return agreement(compared, check.recorded.ties, check.recorded.seed)

    scores = [scores_of(member) for member in members]
    alone = [accuracy(each) for each in scores]
    known = [found.share or 0.0 for found in alone]
    for member, found in zip(members, alone, strict=True):
        yield Point(member, found)
    yield Point("mean of their scores", accuracy(_mean(scores, shares)))
    wanted = sum(share * accurate for share, accurate in zip(shares, known, strict=True))
    yield Point("average of their weights", accuracy(scores_of(str(out))), wanted)
    for other, accurate in zip(members[1:], known[1:], strict=True):
        for step in range(1, check.points + 1):
            part = step / (check.points + 1)
            with tempfile.TemporaryDirectory(dir=out.parent) as folder:
                between = average(Path(folder, "between"), [members[0], other], [1 - part, part])
                found = accuracy(scores_of(str(between)))
            yield Point(f"λ {part:.2f} to {other}", found, (1 - part) * known[0] + part * accurate)


def _recipe(path: str, check: Check) -> Recipe:
    """A recipe whose only source is the model."""
    rewards = [{"use": "model", "with": {"path": path} | check.options}]
    return Recipe.parse({"rewards": rewards}, (), "trl-rewards merge", check_trl=False)


def _mean(scores: Sequence[Scored], shares: Sequence[float]) -> Scored:
    """The members' mean scores of each answer; none where a member has none."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value * share for value, share in zip(values, shares, strict=True) if value is not None]
        return sum(known) if len(known) == len(values) else None

    return [[mean(answer) for answer in zip(*pair, strict=True)] for pair in zip(*scores, strict=True)]


def report(points: Sequence[Point]) -> str:
    """The figures as a table in lines, and what they say of the average."""
    wide = max(len(point.name) for point in points) + 2
    lines = [f"{'':{wide}} accuracy   95 % interval    wanted"]
    for point in points:
        share, low, high = (value or 0.0 for value in point.found[:3])
        wanted = "" if point.wanted is None else f"   {point.wanted:7.1%}  {_says(point)}"
        lines.append(f"{point.name:{wide}} {share:8.1%}  {low:6.1%} to {high:6.1%}{wanted}")
    count, missing = points[0].found.pairs, points[0].found.missing
    lines.append(f"{count} pairs" + (f", {missing} without a score" if missing else ""))
    asked = [point for point in points if point.wanted is not None]
    if any(_says(point) == "below" for point in asked):
        lines.append(
            "not linearly connected: there are averages that are less accurate than the members that they are made "
            "of. Members need one base and one head to start from (members: {head: probed}), and not too large a "
            "learning rate; these are better combined by their scores (use: ensemble)."
        )
    elif all(_says(point) == "connected" for point in asked):
        lines.append("linearly connected: every average is at least as accurate as what it is made of.")
    else:
        lines.append("no average is less accurate than what it is made of by more than these pairs can tell.")
    return "\n".join(lines)


def _says(point: Point) -> str:
    if (point.found.share or 0.0) >= (point.wanted or 0.0) - 1e-9:
        return "connected"
    return "within the noise" if (point.found.high or 0.0) >= (point.wanted or 0.0) else "below"
