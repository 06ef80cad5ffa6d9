"""A paper's claim in miniature: recipes run side by side over seeds, and what came out, with intervals.

A claim is a file in `recipes/claims/`: what the paper says, the arms that are compared, what is measured of each run
and what is expected of the difference. `trl-rewards reproduce NAME` runs it and says whether it holds here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from trl_rewards import __version__
from trl_rewards.errors import RecipeError, RewardError, did_you_mean
from trl_rewards.recipe import find_recipe, parse_options, recipe_folders

FOLDER, DONE, RESULT = "claims", "done", "result.json"
"""DONE has no suffix: a stage may leave a dataset in its folder, whose files are its splits."""
# Two-sided 95 % points of Student's t with 1, 2, … degrees of freedom; the last is a little wide beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
VERDICTS = ("reproduced", "direction only", "not reproduced")


@dataclass
class Stage:
    """Something that runs once per seed: a recipe, or a command of this Python's."""

    recipe: str | None = None
    """Bundled name or path."""
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
    take: Literal["last", "first", "gain", "mean", "steps_to"] = "last"
    """Of the lines with the key: the mean of the last `window`, the first, the difference of the two, the mean of all,
    or the step at which the mean of `window` reaches `level`."""
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
    """What a reader must know, such as on which seed settings were found."""


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

    Not `whole`: a level was not reached in some seeds, which are not in the difference; so it is no more than the
    direction."""
    sign = 1.0 if expectation.direction in ("higher", "not_lower") else -1.0
    margin = expectation.by if expectation.direction in ("higher", "lower") else -expectation.by
    worst = sign * (difference.low if sign > 0 else difference.high)
    reaches = operator.gt if expectation.direction in ("higher", "lower") else operator.ge
    if whole and reaches(worst, margin):
        return VERDICTS[0]
    return VERDICTS[1] if reaches(sign * difference.mean, margin) else VERDICTS[2]


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
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise RecipeError(["a claim is a mapping: paper, claim, miniature, arms, measures, expect"], source=source)
    return _parse(raw, file, source)


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
    measures = parts("measures", Measure, "{key: eval_reward}")
    expect = [
        parse_options(Expectation, f"expect[{at}]", entry or {}, problems, "{measure: right, arm: new, than: old}")
        for at, entry in enumerate(raw.get("expect") or [])
    ]
    for key in ("paper", "claim", "miniature"):
        if not isinstance(raw.get(key), str):
            problems.append(f"{key}: required, a text")
    for key, found in (("arms", arms), ("measures", measures), ("expect", expect)):
        if not found:
            problems.append(f"{key}: required")
    problems += [f"arms.{name}: a stage has that name" for name in arms if name in stages]
    known = {"paper", "claim", "miniature", "arms", "measures", "expect", "stages", "full", "caveat"}
    problems += [f"{key}: unknown key{did_you_mean(key, known)}" for key in raw.keys() - known]
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
        caveat=raw.get("caveat", ""),
    )


class Job(NamedTuple):
    """A stage or an arm, with a seed."""

    name: str
    seed: int
    stage: Stage
    folder: Path
    places: dict[str, Path]
    """What words in braces are filled in with, other than the seed."""

    def __str__(self) -> str:
        return self.name if self.stage.once else f"{self.name}, seed {self.seed}"


def jobs_of(claim: Claim, out: Path, seeds: int) -> list[list[Job]]:
    """What is to run: each stage for its seeds, one stage after the other, then the arms."""

    def folder(name: str, seed: int) -> Path:
        return (out / (name if name in claim.stages and claim.stages[name].once else f"{name}-{seed}")).resolve()

    def job(name: str, stage: Stage, seed: int) -> Job:
        here = folder(name, seed)
        places = {name: folder(name, seed) for name in stage.before}
        return Job(name, seed, stage, here, {**places, "out": here, "claims": claim.file.parent.resolve()})

    found = [
        [job(name, stage, seed) for seed in range(1 if stage.once else seeds)] for name, stage in claim.stages.items()
    ]
    return [*found, [job(name, arm, seed) for seed in range(seeds) for name, arm in claim.arms.items()]]


class Told(NamedTuple):
    """How far a claim is. `ended`: the run that just ended, in a line; None where one began."""

    ended: str | None
    running: tuple[str, ...]
    done: int
    total: int


def reproduce(
    claim: Claim,
    out: str | os.PathLike,
    seeds: int = 5,
    jobs: int | None = None,
    tell: Callable[[Told], None] = lambda told: None,
) -> dict[str, Any]:
    """Run a claim's arms for seeds 0, 1, … and say what came out; `out` holds it as JSON, as plots and as a page.

    Runs that are there already and were made by the same recipe, settings and version are not made again. `jobs` runs
    go on at a time; None: as many as there are cores, each on one. `tell` is called whenever a run begins or ends.
    RewardError names the runs that failed.
    """
    from trl_rewards.report.claim import write_claim

    out = Path(out)
    todo = jobs_of(claim, out, seeds)
    _Runs(jobs or os.cpu_count() or 1, sum(map(len, todo)), tell).run(todo)
    result = summary(claim, out, seeds)
    (out / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_claim(claim, result, itertools.chain.from_iterable(todo), out)
    return result


class _Runs:
    """Runs jobs, so many at a time, and tells how far they are."""

    def __init__(self, jobs: int, total: int, tell: Callable[[Told], None]):
        self.jobs, self.total, self.tell = jobs, total, tell
        self.lock = threading.Lock()
        self.running: list[str] = []
        self.done = 0

    def run(self, todo: Iterable[Sequence[Job]]) -> None:
        """One list of jobs after the other. RewardError names those that failed, when their list is done."""
        for jobs in todo:
            with ThreadPoolExecutor(self.jobs) as pool:
                fine = list(pool.map(self._one, jobs))
            failed = [f"{job} (see {job.folder / 'log.txt'})" for job, ok in zip(jobs, fine, strict=True) if not ok]
            if failed:
                raise RewardError("failed: " + "; ".join(failed))

    def _one(self, job: Job) -> bool:
        with self.lock:
            self.running.append(str(job))
            self.tell(Told(None, tuple(self.running), self.done, self.total))
        seconds = _run(job, self.jobs)
        with self.lock:
            self.running.remove(str(job))
            self.done += 1
            ended = f"{job}: {'failed' if seconds is None else f'{seconds:.0f} CPU seconds'}"
            self.tell(Told(ended, tuple(self.running), self.done, self.total))
        return seconds is not None


def _run(job: Job, jobs: int) -> float | None:
    """Run one unless it is there; CPU seconds that it took, None where it failed."""
    words = _words(job)
    made_by = {
        "words": words,
        "texts": [Path(word).read_text(encoding="utf-8") for word in words if word.endswith(".py")],
        "recipe": _recipe_text(job.stage),
        "version": __version__,
        "before": [_mark(job.places[name]) for name in job.stage.before],  # made again, they have another mark
    }
    mark = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    done = job.folder / DONE
    if done.is_file() and _mark(job.folder) == mark:
        return json.loads(done.read_text())["cpu_seconds"]
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with open(job.folder / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return None
    seconds = usage.ru_utime + usage.ru_stime
    done.write_text(json.dumps({"mark": mark, "cpu_seconds": seconds}), encoding="utf-8")
    return seconds


def _mark(folder: Path) -> str:
    """What the run in a folder was made by."""
    return json.loads((folder / DONE).read_text())["mark"]


def _words(job: Job) -> list[str]:
    """What Python is given to run a job."""
    places = {"seed": str(job.seed), **{name: str(folder) for name, folder in job.places.items()}}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [filled(each) for each in value]
        if isinstance(value, str):
            for name, text in places.items():
                value = value.replace("{" + name + "}", text)
        return value

    if job.stage.recipe is None:
        return filled(job.stage.command)
    settings = {"seed": job.seed, "output_dir": str(job.folder), **filled(job.stage.overrides)}
    words = ["-m", "trl_rewards.train", "--config", job.stage.recipe]
    for key, value in settings.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _recipe_text(stage: Stage) -> str:
    return Path(find_recipe(stage.recipe)).read_text(encoding="utf-8") if stage.recipe else ""


def summary(claim: Claim, out: Path, seeds: int) -> dict[str, Any]:
    """What was measured: values of each arm over seeds, the differences that were expected, and the verdict."""
    values = {
        arm: {
            name: [measured(measure, out / f"{arm}-{seed}") for seed in range(seeds)]
            for name, measure in claim.measures.items()
            if arm in (measure.arms or claim.arms)
        }
        for arm in (*claim.stages, *claim.arms)
    }
    values = {arm: found for arm, found in values.items() if found}
    expected = []
    for each in claim.expect:
        mine = values[each.arm][each.measure]
        than = each.than
        theirs = values[than][each.measure] if isinstance(than, str) else [float(than)] * seeds
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
        if not pairs:
            raise RewardError(f"{each.measure} of {each.arm} and {than}: no seed has both")
        difference = interval([a - b for a, b in pairs])
        expected.append(
            {
                "what": f"{each.measure}: {each.arm} {each.direction.replace('_', ' ')} than {than}",
                "difference": list(difference) if len(pairs) > 1 else [difference.mean],
                "seeds": len(pairs),
                "verdict": judge(each, difference, whole=len(pairs) == seeds),
            }
        )
    runs = [job.folder / DONE for jobs in jobs_of(claim, out, seeds) for job in jobs]
    return {
        "claim": claim.name,
        "seeds": seeds,
        "values": values,
        "expected": expected,
        "verdict": max((each["verdict"] for each in expected), key=VERDICTS.index),
        "cpu_minutes": sum(json.loads(run.read_text())["cpu_seconds"] for run in runs) / 60,
        "version": __version__,
    }


def measured(measure: Measure, folder: Path) -> float | None:
    """A run's number; None where a level was never reached. RewardError if the run has no such number."""
    file = folder / measure.file
    if not file.is_file():
        raise RewardError(f"{file} is not there: the run did not write it")
    text = file.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    found = [(line.get("step", 0), line[measure.key]) for line in lines if line.get(measure.key) is not None]
    if not found:  # null is written where a metric was no number
        if any(measure.key in line for line in lines):
            raise RewardError(f"{file}: {measure.key!r} is null in every line")
        known = ", ".join(sorted({key for line in lines for key in line}))
        raise RewardError(f"{file} has no {measure.key!r}; it has {known}")
    series = [float(value) for _, value in found]
    last = statistics.fmean(series[-measure.window :])
    if measure.take == "steps_to":
        assert measure.level is not None
        for end in range(measure.window, len(series) + 1):
            if statistics.fmean(series[end - measure.window : end]) >= measure.level:
                return float(found[end - 1][0])
        return None
    return {"last": last, "first": series[0], "gain": last - series[0], "mean": statistics.fmean(series)}[measure.take]


def table(claim: Claim, result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and rows: a measure of an arm, and its mean over seeds with its interval."""
    rows: list[tuple[str, ...]] = [
        (f"{name} ({measure.unit})" if measure.unit else name, arm, _cell(found[name]))
        for name, measure in claim.measures.items()
        for arm, found in result["values"].items()
        if name in found
    ]
    return ("measure", "arm", "mean over seeds"), rows


def _cell(values: Iterable[float | None]) -> str:
    there = [value for value in values if value is not None]
    return str(interval(there)) if there else "never"


def keep(claim: Claim, result: Mapping[str, Any]) -> Path:
    """Write a result beside its claim, where the table of claims finds it. RewardError if it is no bundled one."""
    if claim.name not in claims():
        raise RewardError(f"{claim.name}: only bundled claims have a place for their results")
    file = claims()[claim.name].with_suffix(".json")
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def kept(name: str) -> dict[str, Any] | None:
    """The result that is kept beside a bundled claim."""
    file = claims()[name].with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def effects(result: Mapping[str, Any]) -> list[str]:
    """The expected differences, each in a line with its verdict."""
    return [f"{each['what']}: {_difference(each['difference'])}, {each['verdict']}" for each in result["expected"]]


def _difference(found: Sequence[float]) -> str:
    mean = f"{found[0]:+.3g}"
    return f"{mean} ({found[1]:+.3g} to {found[2]:+.3g})" if len(found) == 3 else f"{mean} (one seed)"


def _short(value: float) -> str:
    return f"{value:.3g}"
