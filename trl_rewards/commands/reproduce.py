"""A paper's claim in miniature: its arms run side by side over seeds. What `trl-rewards reproduce` runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from trl_rewards import __version__
from trl_rewards.commands.claim_page import write_claim
from trl_rewards.commands.claims import Claim, Stage
from trl_rewards.commands.outcome import summary
from trl_rewards.errors import RecipeError, RewardError
from trl_rewards.files import write_whole
from trl_rewards.recipe import Recipe
from trl_rewards.recipe_files import find_recipe

DONE, LOG, RESULT = "done", "log.txt", "result.json"
"""DONE has no suffix: a stage may leave a dataset in its folder, whose files are its splits."""
TRAIN = ("-m", "trl_rewards.train", "--config")


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
        [job(name, stage, seed) for seed in ([0] if stage.once else claim.seeds(seeds))]
        for name, stage in claim.stages.items()
    ]
    return [*found, [job(name, arm, seed) for seed in claim.seeds(seeds) for name, arm in claim.arms.items()]]


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
    """Run a claim's arms over seeds and say what came out; `out` holds it as JSON, as plots and as a page.

    Seeds are 0, 1, … but for those on which the claim's settings were found.

    Runs that are there already and were made by the same recipe, settings and version are not made again. `jobs` runs
    go on at a time; None: as many as there are cores, each on one. `tell` is called whenever a run begins or ends.
    RecipeError with all that is wrong with the claim's recipes, before anything runs; RewardError names the runs that
    failed.
    """
    out = Path(out)
    todo = jobs_of(claim, out, seeds)
    runs = list(itertools.chain.from_iterable(todo))
    _check_recipes(claim, [run for run in runs if run.stage.once or run.seed == runs[-1].seed])
    _Runs(jobs or _cores(), len(runs), tell).run(todo)
    result = summary(claim, {(run.name, run.seed): run.folder for run in runs}, seeds)
    seconds = sum(json.loads((run.folder / DONE).read_text())["cpu_seconds"] for run in runs)
    result |= {"cpu_minutes": seconds / 60, "version": __version__}
    (out / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_claim(claim, result, runs, out)
    return result


def _check_recipes(claim: Claim, jobs: Iterable[Job]) -> None:
    problems = []
    for job in jobs:
        if job.stage.recipe:
            try:
                Recipe.load(job.stage.recipe, _words(job)[len(TRAIN) + 1 :])
            except RecipeError as error:
                problems += [f"{job.name}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(problems, source=str(claim.file))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Runs:
    """Runs jobs, so many at a time, and tells how far they are."""

    def __init__(self, jobs: int, total: int, tell: Callable[[Told], None]):
        self.jobs, self.total, self.tell = jobs, total, tell
        self.lock = threading.Lock()
        self.running: dict[str, subprocess.Popen] = {}
        self.done = 0
        self.stopped = False

    def run(self, todo: Iterable[Sequence[Job]]) -> None:
        """One list of jobs after the other. RewardError names those that failed, when their list is done."""
        for jobs in todo:
            threads = max(1, _cores() // min(self.jobs, len(jobs)))
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    fine = list(pool.map(self._one, jobs, itertools.repeat(threads)))
                except BaseException:  # interrupted: no run goes on in a folder that the next call makes anew
                    self._stop()
                    raise
            failed = [f"{job} (see {job.folder / LOG})" for job, ok in zip(jobs, fine, strict=True) if not ok]
            if failed:
                raise RewardError("failed: " + "; ".join(failed))

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running.values():
                process.terminate()

    def _one(self, job: Job, threads: int) -> bool:
        words = _words(job)
        mark = _made_by(job, words)
        if _mark(job.folder) == mark:
            return self._ended(job, "there already")
        if job.folder.is_dir() and any(job.folder.iterdir()) and not (job.folder / LOG).is_file():
            raise RewardError(f"{job.folder} is in the way of {job}: it is no run's folder; give another --out")
        with self.lock:
            if self.stopped:
                return False
            shutil.rmtree(job.folder, ignore_errors=True)
            job.folder.mkdir(parents=True)
            with open(job.folder / LOG, "w", encoding="utf-8") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment)
            self.running[str(job)] = process
            self.tell(Told(None, tuple(self.running), self.done, self.total))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            return self.stopped or self._ended(job, "failed", fine=False)
        seconds = usage.ru_utime + usage.ru_stime
        write_whole(job.folder / DONE, json.dumps({"mark": mark, "cpu_seconds": seconds}))
        return self._ended(job, f"{seconds:.0f} CPU seconds")

    def _ended(self, job: Job, how: str, fine: bool = True) -> bool:
        with self.lock:
            self.running.pop(str(job), None)
            self.done += 1
            self.tell(Told(f"{job}: {how}", tuple(self.running), self.done, self.total))
        return fine


def _made_by(job: Job, words: Sequence[str]) -> str:
    """The same for runs that are made by the same."""
    said = {
        "words": words,
        "texts": [file.read_text(encoding="utf-8") for file in _files(job, words)],
        "versions": [__version__, *map(importlib.metadata.version, ("trl", "transformers", "torch"))],
        "before": [_mark(job.places[name]) for name in job.stage.before],  # made again, they have another mark
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _mark(folder: Path) -> str | None:
    """What the run in a folder was made by; None where it was not finished."""
    done = folder / DONE
    return json.loads(done.read_text())["mark"] if done.is_file() else None


def _files(job: Job, words: Sequence[str]) -> list[Path]:
    """What a run is made by: its recipe, the YAML files that its words name, and the scripts beside these and beside
    the scripts that they name."""
    scripts = [Path(path) for word in words for path in re.findall(r"[^\s\"'\[\]{},]+\.py\b", word)]
    folders = {script.parent for script in scripts if script.is_file()}
    recipes = [Path(find_recipe(job.stage.recipe))] if job.stage.recipe else []
    recipes += [file for word in words if word.endswith(".yaml") and (file := Path(word)).is_file()]
    folders |= {recipe.parent for recipe in recipes}
    return [*recipes, *sorted(file for folder in folders for file in folder.glob("*.py"))]


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
    words = [*TRAIN, job.stage.recipe]
    for key, value in settings.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words
