"""Papers' claims as files: what a paper says, the arms that are compared, what is measured and what is expected.

`recipes/claims/*.yaml` come with the project; `trl-rewards reproduce` runs them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl_rewards.errors import RecipeError, did_you_mean
from trl_rewards.recipe import parse_options
from trl_rewards.recipe_files import read_yaml, recipe_folders

FOLDER = "claims"
RESERVED = ("seed", "out", "claims")
"""What words in braces mean whatever the stages are called."""


@dataclass
class Stage:
    """Something that runs once per seed: a recipe, or a command of this Python's."""

    recipe: str | None = None
    """Bundled name, or a path from the claim's folder or the working directory."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the recipe. `{seed}`, `{out}` and the names of stages in braces are filled in, with those stages' folders."""
    command: list[str] = field(default_factory=list)
    """Words after `python`, with the same in braces, and `{claims}`: the folder of the claim's file."""
    before: list[str] = field(default_factory=list)
    """Stages whose folders it uses."""
    once: bool = False
    """A stage that runs with seed 0 for all seeds."""

    def __post_init__(self):
        if (self.recipe is None) == (not self.command):
            raise ValueError("give recipe or command, one of them")
        if self.command and self.overrides:
            raise ValueError("overrides are a recipe's; put them into the command")


@dataclass
class Measure:
    """A number of each run, from the lines that it logs or from a JSON file that it writes."""

    key: str
    """A metric's name, or a key of the file."""
    file: str = "metrics.jsonl"
    """In the run's folder; JSON lines, or one JSON object."""
    take: Literal["last", "first", "gain", "mean", "variation", "steps_to"] = "last"
    """Of the lines with the key: the mean of the last `window`, the first, the difference of the two, the mean of all,
    their standard deviation over that mean, or the step at which the mean of `window` reaches `level`; a step more
    than the last, where it never does."""
    window: int = 1
    level: float | None = None
    unit: str = ""
    arms: list[str] = field(default_factory=list)
    """The arms that have it, or stages that run for each seed; all arms, if none is named."""

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if (self.take == "steps_to") != (self.level is not None):
            raise ValueError("level goes with take: steps_to, and steps_to with a level")


@dataclass
class Expectation:
    """What the claim says of a measure of two arms, or of one arm and a number."""

    measure: str
    arm: str
    than: str | float
    """Another arm, compared seed by seed, or a number."""
    direction: Literal["higher", "lower", "not_higher", "not_lower"] = "higher"
    by: float = 0.0
    """For higher and lower: by at least so much. For the others: so much does not count."""

    def __post_init__(self):
        if self.by < 0:
            raise ValueError(f"by must not be negative, got {self.by}")

    @property
    def sign(self) -> int:
        """1 where the difference is expected above `line`, -1 where below it."""
        return 1 if self.direction in ("higher", "not_lower") else -1

    @property
    def margin(self) -> float:
        """How far on that side the difference must be; negative where so much on the other side does not count."""
        return self.by if self.direction in ("higher", "lower") else -self.by

    @property
    def line(self) -> float:
        """The difference from which on it is as expected."""
        return self.sign * self.margin

    def __str__(self) -> str:
        margin = f" by {self.by:g}" if self.by else ""
        allowed = f", give or take {self.by:g}" if self.by else ""
        more = margin if self.direction in ("higher", "lower") else allowed
        return f"{self.measure}: {self.arm} {self.direction.replace('_', ' ')} than {self.than}{more}"


@dataclass
class Claim:
    """A checked claim. `load_claim` is the way to get one."""

    name: str
    paper: str
    claim: str
    """In a line, with its published number."""
    miniature: str
    """What is run here for it, in a line."""
    file: Path
    arms: dict[str, Stage]
    measures: dict[str, Measure]
    expect: list[Expectation]
    stages: dict[str, Stage] = field(default_factory=dict)
    """What arms have in common, such as a trained reward model. Run in this order."""
    full: str | None = None
    """The full-size recipe."""
    caveat: str = ""
    """What a reader must know."""
    tuned_on: list[int] = field(default_factory=list)
    """Seeds on which its settings were found, which are not among those that it is judged by."""

    @property
    def fingerprint(self) -> str:
        """The same for claims that run and compare the same, whatever their words."""
        parts = (self.stages, self.arms, self.measures, self.expect, *sorted(set(self.tuned_on)))
        said = json.dumps(parts, default=dataclasses.asdict, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def seeds(self, count: int) -> list[int]:
        """The first `count` of 0, 1, … but for those of `tuned_on`."""
        return list(itertools.islice((seed for seed in itertools.count() if seed not in self.tuned_on), count))


def claims() -> dict[str, Path]:
    """{name: file} of the claims that come with the project."""
    return {
        file.stem: file
        for folder in recipe_folders()
        if (folder / FOLDER).is_dir()
        for file in sorted((folder / FOLDER).glob("*.yaml"))
    }


def load_claim(source: str) -> Claim:
    """A claim by bundled name or path. RecipeError with every problem."""
    known = claims()
    file = Path(source) if os.path.isfile(source) else known.get(source)
    if file is None:
        hint = did_you_mean(source, known)
        raise RecipeError([f"no such file, nor a bundled claim{hint} ({', '.join(known)})"], source=source)
    return _parse(read_yaml(str(file), source, "a claim"), file, source)


def _parse(raw: dict[str, Any], file: Path, source: str) -> Claim:
    problems: list[str] = []

    def parts(key: str, cls: type, example: str) -> dict[str, Any]:
        entries = raw.get(key) or {}
        if not isinstance(entries, dict):
            problems.append(f"{key}: must be a mapping of names, got {entries!r}")
            return {}
        return {
            each: parse_options(cls, f"{key}.{each}", entry or {}, problems, example)
            for each, entry in entries.items()
        }

    stages, arms = (parts(key, Stage, "{recipe: quickstart}") for key in ("stages", "arms"))
    for stage in (*stages.values(), *arms.values()):
        if stage is not None and stage.recipe and (beside := file.parent / stage.recipe).is_file():
            stage.recipe = str(beside)
    measures = parts("measures", Measure, "{key: eval_reward}")
    expected = raw.get("expect") or []
    if not isinstance(expected, list):
        problems.append(f"expect: must be a list, got {expected!r}")
        expected = []
    expect = [
        parse_options(Expectation, f"expect[{at}]", entry or {}, problems, "{measure: right, arm: new, than: old}")
        for at, entry in enumerate(expected)
    ]
    for key in ("paper", "claim", "miniature"):
        if not isinstance(raw.get(key), str):
            problems.append(f"{key}: required, a text")
    for key, found in (("arms", arms), ("measures", measures), ("expect", expect)):
        if not found:
            problems.append(f"{key}: required")
    problems += [f"arms.{name}: a stage has that name" for name in arms if name in stages]
    problems += [
        f"{path}.{name}: a name is letters, digits and '_', and none of {', '.join(RESERVED)}"
        for path, found in (("stages", stages), ("arms", arms))
        for name in found
        if not re.fullmatch(r"[A-Za-z]\w*", str(name)) or name in RESERVED
    ]
    known = {"paper", "claim", "miniature", "arms", "measures", "expect", "stages", "full", "caveat", "tuned_on"}
    problems += [f"{key}: unknown key{did_you_mean(key, known)}" for key in raw.keys() - known]
    tuned_on = raw.get("tuned_on", [])
    if not isinstance(tuned_on, list) or not all(type(seed) is int and seed >= 0 for seed in tuned_on):
        problems.append(f"tuned_on: must be a list of seeds, such as [0], got {tuned_on!r}")
    for path, found in (("stages", stages), ("arms", arms)):
        for part, stage in found.items():
            above = list(stages) if path == "arms" else list(stages)[: list(stages).index(part)]
            problems += [
                f"{path}.{part}: before names {each!r}, which is no stage above it"
                for each in (stage.before if stage is not None else ())
                if each not in above
            ]
            if stage is not None and stage.once:
                if path == "arms":
                    problems.append(f"arms.{part}: an arm runs for each seed, not once")
                problems += [
                    f"{path}.{part}: it runs once, and {each} that it uses for each seed"
                    for each in stage.before
                    if stages.get(each) is not None and not stages[each].once
                ]
    measurable = {*arms, *(name for name, stage in stages.items() if stage is not None and not stage.once)}
    for name, measure in measures.items():
        problems += [
            f"measures.{name}.arms: {arm!r} is no arm, nor a stage that runs for each seed"
            for arm in (measure.arms if measure is not None else ())
            if arm not in measurable
        ]
    for index, each in enumerate(expect):
        if each is None:
            continue
        if each.measure not in measures:
            problems.append(f"expect[{index}].measure: {each.measure!r} is none of {', '.join(measures)}")
            continue
        having = (measures[each.measure] and measures[each.measure].arms) or list(arms)
        problems += [
            f"expect[{index}]: {arm!r} is no arm that has {each.measure} ({', '.join(having)})"
            for arm in (each.arm, each.than)
            if isinstance(arm, str) and arm not in having
        ]
    if problems:
        raise RecipeError(problems, source=source)
    texts = {key: raw[key] for key in ("paper", "claim", "miniature")}
    return Claim(
        file.stem,
        **texts,
        file=file,
        arms=arms,
        measures=measures,
        expect=[each for each in expect if each is not None],
        stages=stages,
        full=raw.get("full"),
        caveat=raw.get("caveat") or "",
        tuned_on=tuned_on,
    )
