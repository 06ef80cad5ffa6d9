"""Running the sources: concurrency, deadlines, retries, cache, holes, and agreement between ranks.

Every cell (row, source) ends as a number or as a hole with a status (`components.Status`); nothing here ever turns a
hole into a number. An error that must stop the run is found on one rank and raised on all, with the same words.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import pickle
import queue
import random
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from trl_rewards.components import OnMissing, Reward, Score, Shaper, Status, TokenReward, TrainableReward
from trl_rewards.errors import RewardError
from trl_rewards.events import run_async
from trl_rewards.maths import group_mean
from trl_rewards.models.kept import SharedFile
from trl_rewards.samples import Failed, Samples, Traced
from trl_rewards.schedules import Schedule
from trl_rewards.workers import WorkerPool


@dataclass(frozen=True)
class Gate:
    """`only_if:` a source is asked only about rows that another one scores high enough, or has no opinion on."""

    source: str
    at_least: float | None = None
    """The other's score, before its `shape:`, that lets a row pass. A hole does not."""
    missing: bool = False
    """Rows pass on which the other has no opinion, such as a rule without an answer to check by; failing is none."""
    otherwise: float | None = None
    """The score of rows that do not pass. None: a hole."""


@dataclass
class Source:
    """One entry under `rewards:`: a reward, and how it is run."""

    name: str
    reward: Reward
    weight: Schedule = field(default_factory=lambda: Schedule("constant", 1.0, 1.0))
    shape: list[Shaper] = field(default_factory=list)
    on_missing: OnMissing = "renormalize"
    timeout: float | None = None
    """Seconds for one call, retries included. A call is a row if `concurrency` or `isolate` is set, else a batch."""
    retries: int = 0
    """How often a call that raised is made again, after 0.5, 1, 2, … 8 seconds (jittered)."""
    max_failures: float = 0.5
    """Share of a batch (all ranks) that may fail or time out; above it the run stops."""
    concurrency: int | None = None
    """Rows (or groups) in flight at a time. None: the whole batch in one call, as TRL does."""
    isolate: bool = False
    """Score row by row in processes that can be killed at `timeout`."""
    cache: str | None = None
    """Path of an sqlite file that keeps scores."""
    only_if: Gate | None = None
    """Which rows it is asked about. None: all."""
    signature: str = ""
    """What makes a score of this source reproducible; part of the cache's key."""
    use: tuple[str, dict[str, Any], str] | None = None
    """(use, options, base_dir), from which a worker process builds its own copy."""
    pool: WorkerPool | None = field(default=None, init=False, repr=False)
    """The processes of an isolated source: as many as `concurrency` says, or two."""


class World:
    """The ranks of a run, and the two ways they talk. `World()` is a single process."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @classmethod
    def current(cls) -> World:
        """The process group that is initialised, or a single process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors along the first dimension, in rank order, on every rank."""
        if self.size == 1:
            return tensor
        from accelerate.utils import gather

        return gather(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """All ranks' values, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, put into `tensor`, on every rank."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def raise_together(self, problem: str | None, device: Any) -> None:
        """RewardError on every rank if any rank has a problem. Every rank must call this."""
        if not self.gather(torch.tensor([problem is not None], device=device)).any():
            return
        problems = self.gather_objects(problem)
        rank, first = next((rank, text) for rank, text in enumerate(problems) if text is not None)
        raise RewardError(first if self.size == 1 else f"{first} (on rank {rank} of {self.size})")

    @contextmanager
    def together(self, failure: str, device: Any) -> Generator[None]:
        """`with`: what fails inside on one rank, where the others would wait for it, is a RewardError on every rank.

        `failure` begins its message. Every rank must come here, and nothing inside may wait for another.
        """
        problem = None
        try:
            yield
        except Exception as error:
            problem = f"{failure}: {type(error).__name__}: {error}"
        self.raise_together(problem, device)


class Scored(NamedTuple):
    """What `score_sources` found, for the rows of this rank."""

    values: torch.Tensor  # (n, K) float32, NaN = hole
    status: torch.Tensor  # (n, K) uint8
    reasons: list[list[str]]  # per source, what failed cells said
    seconds: list[float]  # per source
    tokens: dict[int, list[list[float]]]  # per source that scores tokens: each row's values, NaN where nothing is said
    traces: dict[int, list[Any]]  # per source that says how its scores came about


def score_sources(
    sources: Sequence[Source], samples: Samples, group_size: int, world: World, device: Any = "cpu", seed: int = 0
) -> Scored:
    """Score this rank's rows with every source. All ranks must call it; a broken source raises RewardError on all.

    Sources with `scope="group"` see whole groups: where a rank's rows do not divide into groups, rows are gathered,
    each group is scored on one rank, and the scores go back to the rows' ranks. Sources with an `only_if` come last.
    """
    local = samples.take(range(len(samples)))
    split = world.size > 1 and len(samples) % group_size != 0
    grouped, owned = local.take(range(len(local)), group_size if not split else None), range(len(local))
    group_rewards = [source.reward for source in sources if source.reward.scope == "group"]
    if group_rewards and split:
        needed = local.only({column for reward in group_rewards for column in reward.reads()})
        everyone = Samples.concatenate(world.gather_objects(needed))
        owned = [row for row in range(len(everyone)) if row // group_size % world.size == world.rank]
        grouped = everyone.take(owned, group_size)

    rows = {k: grouped if source.reward.scope == "group" else local for k, source in enumerate(sources)}
    gates = {k: source.only_if for k, source in enumerate(sources) if source.only_if is not None}
    results, problem = _run_all(sources, {k: rows[k] for k in rows if k not in gates}, seed + 7919 * world.rank)
    world.raise_together(problem, device)

    scores: list[list[Cell]] = [[] for _ in sources]
    for k, result in results.items():
        if sources[k].reward.scope == "group" and split:
            shares = world.gather_objects(dict(zip(owned, result.scores, strict=True)))
            by_row = {row: score for share in shares for row, score in share.items()}
            first = world.rank * len(local)
            scores[k] = [by_row[first + row] for row in range(len(local))]
        else:
            scores[k] = result.scores
    asked = {k: _passing(gate, sources, scores) for k, gate in gates.items()}
    if gates:
        more, problem = _run_all(sources, {k: local.take(asked[k]) for k in gates}, seed + 7919 * world.rank)
        world.raise_together(problem, device)
        results |= more
        for k, result in more.items():
            said = dict(zip(asked[k], result.scores, strict=True))
            scores[k] = [said.get(row, gates[k].otherwise) for row in range(len(local))]
    values = [[_number(score) for score in column] for column in scores]
    status = [[_status(score) for score in column] for column in scores]
    for k, passed in asked.items():
        for row in set(range(len(local))) - set(passed):
            status[k][row] = Status.SKIPPED
    return Scored(
        torch.tensor(values, dtype=torch.float32, device=device).T.reshape(len(samples), len(sources)),
        torch.tensor(status, dtype=torch.uint8, device=device).T.reshape(len(samples), len(sources)),
        [[score.reason for score in column if isinstance(score, Failed)] for column in scores],
        [results[k].seconds for k in range(len(sources))],
        {
            k: [cell if isinstance(cell, list) else [] for cell in scores[k]]
            for k, source in enumerate(sources)
            if isinstance(source.reward, TokenReward)
        },
        {
            k: [cell.trace if isinstance(cell, Traced | Failed) else None for cell in scores[k]]
            for k, source in enumerate(sources)
            if source.reward.traces
        },
    )


Cell = Score | list[float]
"""What a source says of one row: its score, or the values of its tokens, which count as their sum."""


class _Result(NamedTuple):
    scores: list[Cell]
    seconds: float


def _passing(gate: Gate, sources: Sequence[Source], scores: list[list[Cell]]) -> list[int]:
    """The rows that pass a gate; a score is needed to be at least something, and a hole is NaN."""
    column = scores[[source.name for source in sources].index(gate.source)]
    if gate.at_least is None:
        return [row for row, score in enumerate(column) if _status(score) == Status.ABSTAINED]
    return [row for row, score in enumerate(column) if _number(score) >= gate.at_least]


def _run_all(sources: Sequence[Source], rows: dict[int, Samples], seed: int) -> tuple[dict[int, _Result], str | None]:
    """Those sources of which `rows` has the samples, by their place. Waiting ones go side by side in threads; the
    others take their turn here, in the recipe's order."""
    results: dict[int, _Result] = {}
    problems: dict[int, str] = {}

    def run(index: int) -> None:
        source = sources[index]
        start = time.perf_counter()
        try:
            scores = run_source(source, rows[index])
            results[index] = _Result(scores, time.perf_counter() - start)
        except (Exception, SystemExit) as error:
            problems[index] = str(error) if isinstance(error, RewardError) else f"reward {source.name!r}: {error!r}"

    step = next((samples.step for samples in rows.values()), 0)
    with private_randomness(seed + 104729 * step):
        threads = [
            threading.Thread(target=run, args=(index,), name=f"reward-{source.name}", daemon=True)
            for index, source in enumerate(sources)
            if index in rows and not _runs_here(source)
        ]
        for thread in threads:
            thread.start()
        for index, source in enumerate(sources):
            if index in rows and _runs_here(source):
                run(index)
        for thread in threads:
            thread.join()
    return results, problems[min(problems)] if problems else None


def _runs_here(source: Source) -> bool:
    """In the main thread: a plain source without a deadline, such as a model on this rank's GPU."""
    return not (source.reward.is_async() or source.isolate or source.concurrency or source.timeout)


@contextmanager
def private_randomness(seed: int) -> Generator[None]:
    """Whatever a reward draws leaves the policy's random streams (torch, numpy, random) where they were."""
    import numpy

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


def learns_first(reward: Reward) -> bool:
    """Whether a reward learns from a batch before it scores it."""
    return isinstance(reward, TrainableReward) and reward.learns_first()


def check_gates(sources: Sequence[Source]) -> None:
    """ValueError where an `only_if` names no source, one with an `only_if` of its own, or stands at one of groups."""
    named = {source.name: source for source in sources}
    for source in sources:
        if source.only_if is None:
            continue
        where, gate = f"rewards.{source.name}.only_if", named.get(source.only_if.source)
        if gate is None:
            there = ", ".join(name for name in named if name != source.name)
            raise ValueError(f"{where}: no source {source.only_if.source!r}; there is {there or 'no other'}")
        if gate.only_if is not None:
            raise ValueError(f"{where}: {gate.name!r} has an only_if of its own; name one that scores all rows")
        if (source.only_if.at_least is None) != source.only_if.missing:
            raise ValueError(f"{where}: rows pass by at_least, or by missing: true; give one of the two")
        if learns_first(source.reward):
            raise ValueError(f"{where}: {source.name!r} is asked again once it has learned; it cannot have an only_if")
        if source.reward.asks_logps():
            raise ValueError(f"{where}: {source.name!r} learns from all rows, and asks for their log-probabilities")
        if source.reward.scope == "group":
            raise ValueError(f"{where}: {source.name!r} compares whole groups, and cannot be asked about single rows")


# --- one source ------------------------------------------------------------------------------------------------------


def run_source(source: Source, samples: Samples) -> list[Cell]:
    """One cell per row: identical rows once, known rows from the cache, the rest by calls with deadline and retries.

    Raises RewardError where the source broke its contract; a call that failed gives Failed cells instead.
    """
    samples = samples.only(source.reward.reads())
    if source.reward.scope == "group" or not source.reward.deterministic or source.reward.sees_every_row:
        return _call(source, samples)
    keys = [row_key(source.signature, samples, row) for row in range(len(samples))]
    known = ScoreCache(source.cache).get(keys) if source.cache else {}
    first_row = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
    rows = sorted(first_row.values())
    fresh = {keys[row]: score for row, score in zip(rows, _call(source, samples.take(rows)), strict=True)}
    if source.cache:
        ScoreCache(source.cache).put(fresh)
    return [known[key] if key in known else fresh[key] for key in keys]


def _call(source: Source, samples: Samples) -> list[Cell]:
    """Split the rows into calls, make them, and put the scores back in order."""
    if not len(samples):
        return []
    unit = samples.group_size or 1 if source.reward.scope == "group" else 1
    one_by_one = source.isolate or source.concurrency is not None
    size = unit if one_by_one else len(samples)
    parts = [samples.take(range(row, row + size), samples.group_size) for row in range(0, len(samples), size)]
    scores: list[Cell] = []
    for part, outcome in zip(parts, _make_calls(source, parts), strict=True):
        if not isinstance(outcome, Failed):
            scores += outcome
        elif len(part) == unit or outcome.status == "timeout":
            scores += [outcome] * len(part)
        else:
            scores += _one_by_one(source, part, unit, outcome)
    return scores


def _one_by_one(source: Source, part: Samples, unit: int, failed: Failed) -> list[Cell]:
    """The scores of a batch that raised, row by row, so that one bad row costs one cell.

    Without retries, within one more `timeout` for all rows, and only until too many rows have failed.
    """
    careful = replace(source, retries=0)
    started, failures = time.monotonic(), 0
    scores: list[Cell] = []
    for row in range(0, len(part), unit):
        if failures * unit > source.max_failures * len(part):
            outcome: Outcome = failed
        elif source.timeout and time.monotonic() - started > source.timeout:
            outcome = _too_long(source)
        else:
            (outcome,) = _make_calls(careful, [part.take(range(row, row + unit), part.group_size)])
        failures += isinstance(outcome, Failed)
        scores += [outcome] * unit if isinstance(outcome, Failed) else outcome
    return scores


Outcome = list[Cell] | Failed


def _make_calls(source: Source, parts: list[Samples]) -> list[Outcome]:
    if source.isolate:
        return _in_processes(source, parts)
    if source.reward.is_async():
        return _in_event_loop(source, parts)
    if source.concurrency or source.timeout:
        return _in_threads(source, parts)
    return [_attempt(source, part) for part in parts]


def _attempt(source: Source, part: Samples) -> Outcome:
    """One call with its retries. What it raises becomes Failed; a broken contract becomes RewardError."""
    for pause in _pauses(source.retries):
        try:
            return _checked_cells(source, score_or_tokens(source.reward, part), part)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # a reward that calls sys.exit() must not end the run in silence
            failed = _failed(error)
        if pause is not None:
            time.sleep(pause)
    return failed


def _in_event_loop(source: Source, parts: list[Samples]) -> list[Outcome]:
    """All calls on the event loop. One that blocks the loop instead of awaiting is given up too, with the others."""
    if source.timeout is None:
        return run_async(_gather_calls(source, parts))
    rounds = math.ceil(len(parts) / (source.concurrency or len(parts)))
    try:
        return run_async(_gather_calls(source, parts), timeout=(rounds + 1) * source.timeout + 1)
    except TimeoutError:
        return [_too_long(source)] * len(parts)


async def _gather_calls(source: Source, parts: list[Samples]) -> list[Outcome]:
    limit = asyncio.Semaphore(source.concurrency or len(parts))

    async def attempts(part: Samples) -> Outcome:
        for pause in _pauses(source.retries):
            try:
                return _checked_cells(source, await source.reward.ascore(part), part)
            except RewardError:
                raise
            except Exception as error:
                failed = _failed(error)
            if pause is not None:
                await asyncio.sleep(pause)
        return failed

    async def limited(part: Samples) -> Outcome:
        async with limit:
            try:
                async with asyncio.timeout(source.timeout) as deadline:
                    return await attempts(part)
            except TimeoutError:
                assert deadline.expired()  # a TimeoutError of the source's own is caught in attempts
                return _too_long(source)

    return await asyncio.gather(*(limited(part) for part in parts))


def _in_threads(source: Source, parts: list[Samples]) -> list[Outcome]:
    """At most `concurrency` calls at a time, each in a daemon thread that is left behind at its deadline.

    Daemon threads and not an executor: an executor joins its threads when the interpreter ends, a hung one for ever.
    """
    outcomes: list[Outcome | None] = [None] * len(parts)
    done: queue.Queue[tuple[int, Outcome | RewardError]] = queue.Queue()
    running: dict[int, float] = {}  # part -> deadline
    waiting = iter(range(len(parts)))

    def work(index: int) -> None:
        try:
            done.put((index, _attempt(source, parts[index])))
        except RewardError as error:
            done.put((index, error))

    def start_next() -> None:
        for index in waiting:
            running[index] = time.monotonic() + (source.timeout or math.inf)
            threading.Thread(target=work, args=(index,), daemon=True, name=f"reward-{source.name}-{index}").start()
            return

    for _ in range(source.concurrency or 1):
        start_next()
    while running:
        nearest = min(running.values())
        try:
            remaining = None if nearest == math.inf else max(nearest - time.monotonic(), 0)
            index, outcome = done.get(timeout=remaining)
        except queue.Empty:
            for index in [index for index, deadline in running.items() if deadline <= time.monotonic()]:
                outcomes[index] = _too_long(source)
                del running[index]
                start_next()
            continue
        if index not in running:  # it came after its deadline
            continue
        if isinstance(outcome, RewardError):
            raise outcome
        outcomes[index] = outcome
        del running[index]
        start_next()
    return [outcome for outcome in outcomes if outcome is not None]


def _in_processes(source: Source, parts: list[Samples]) -> list[Outcome]:
    outcomes: list[Outcome] = [Failed("not tried")] * len(parts)
    todo = list(range(len(parts)))
    for pause in _pauses(source.retries):
        for index, result in zip(
            todo, _pool(source).map([parts[index] for index in todo], source.timeout), strict=True
        ):
            outcomes[index] = result if isinstance(result, Failed) else _checked_cells(source, result, parts[index])
        todo = [index for index in todo if _is_failure(outcomes[index])]
        if not todo or pause is None:
            break
        time.sleep(pause)
    return outcomes


def _is_failure(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and outcome.status == "failed"


def _pool(source: Source) -> WorkerPool:
    if source.pool is None:
        if source.use is None:
            raise RewardError(
                f"reward {source.name!r}: isolate needs a reward that is named in a recipe, not an object"
            )
        source.pool = WorkerPool("trl_rewards.loading:reward_in_worker", source.use, source.concurrency or 2)
    return source.pool


def close_source(source: Source) -> None:
    """End the worker processes of a source and release what its reward holds."""
    if source.pool is not None:
        source.pool.close()
        source.pool = None
    source.reward.close()


def _pauses(retries: int) -> Iterator[float | None]:
    """The pause after each attempt, None after the last. Jittered, from a private stream."""
    jitter = random.Random()
    for attempt in range(retries):
        yield min(0.5 * 2**attempt, 8.0) * jitter.uniform(0.75, 1.25)
    yield None


def _failed(error: BaseException) -> Failed:
    return Failed(f"{type(error).__name__}: {error}")


def _too_long(source: Source) -> Failed:
    return Failed(f"took longer than {source.timeout:g} s", status="timeout")


def score_or_tokens(reward: Reward, samples: Samples) -> Any:
    """What a source that is not async says: its tokens' values where it gives them, else its scores."""
    return reward.score_tokens(samples) if isinstance(reward, TokenReward) else reward.score(samples)


def _checked_cells(source: Source, found: Any, part: Samples) -> list[Cell]:
    """What a source returned, one cell per row. Raises RewardError where it is not."""
    if not isinstance(source.reward, TokenReward):
        return [*checked(source.name, found, len(part))]
    if len(found) != len(part):
        raise RewardError(
            f"reward {source.name!r} returned {len(found)} rows of token values for {len(part)} completions"
        )
    lengths = part.lengths if part.completion_ids else [None] * len(part)
    return [_checked_tokens(source.name, values, length) for values, length in zip(found, lengths, strict=True)]


def _checked_tokens(name: str, values: Any, length: int | None) -> Cell:
    if values is None or isinstance(values, Failed | int | float):  # a hole, or a score of the row as a whole
        return _checked_score(name, values)
    if len(values) != length:
        tokens = "a completion without token ids" if length is None else f"a completion of {length} tokens"
        raise RewardError(
            f"reward {name!r} returned {len(values)} token values for {tokens}; return one per token, None where "
            "nothing is said of it, or None for no opinion on the row"
        )
    scores = [_checked_score(name, value) for value in values]
    if failed := next((score for score in scores if isinstance(score, Failed)), None):
        return failed
    if any(score is None and value is not None for score, value in zip(scores, values, strict=True)):
        return None  # a NaN among them makes the row a hole
    if values and all(value is None for value in values):
        return None
    return [score if isinstance(score, float) else float("nan") for score in scores]


def checked(name: str, scores: Any, rows: int) -> list[Score]:
    """What a source returned, as floats, None and Failed. Raises RewardError where it is not one score per row."""
    if isinstance(scores, torch.Tensor):
        scores = scores.tolist()
    try:
        scores = list(scores)
    except TypeError:
        raise RewardError(
            f"reward {name!r} returned {scores!r}; return a list with one score per completion"
        ) from None
    if len(scores) != rows:
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {rows} completions; return exactly one per "
            "completion, None where there is no opinion"
        )
    return [_checked_score(name, score) for score in scores]


def _checked_score(name: str, score: Any) -> Score:
    if score is None or isinstance(score, Failed):
        return score
    try:
        if isinstance(score, str | bytes):
            raise TypeError
        number = float(score)
    except (TypeError, ValueError):
        raise RewardError(
            f"reward {name!r} returned {score!r} ({type(score).__name__}) as a score; return a float, None for "
            "no opinion, or trl_rewards.Failed(reason)"
        ) from None
    if math.isnan(number):
        return None
    if abs(number) > 3.4e38:  # beyond float32, in which rewards are combined, it would be infinite there
        return Failed(f"returned {number}")
    return score if isinstance(score, Traced) else number


def _number(cell: Cell) -> float:
    if isinstance(cell, list):
        return math.fsum(value for value in cell if not math.isnan(value))
    return float("nan") if cell is None or isinstance(cell, Failed) else cell


def _status(score: Cell) -> int:
    if isinstance(score, Failed):
        return Status.TIMEOUT if score.status == "timeout" else Status.FAILED
    return Status.ABSTAINED if score is None else Status.OK


# --- holes -----------------------------------------------------------------------------------------------------------


def failures(status: torch.Tensor) -> torch.Tensor:
    """Which cells failed or timed out; abstentions are no failures. Same shape, boolean."""
    return (status == Status.FAILED) | (status == Status.TIMEOUT)


def check_failures(source: Source, status: torch.Tensor, reasons: list[str]) -> None:
    """RewardError if too many cells of a source failed, or if it has holes and may have none. `status`: (N,)."""
    failed = int(failures(status).sum())
    asked = int((status != Status.SKIPPED).sum())
    share = failed / max(asked, 1)
    said = "; ".join(f"{reason} ({count} times)" for reason, count in Counter(reasons).most_common(3))
    if share > source.max_failures:
        raise RewardError(
            f"reward {source.name!r} failed on {failed} of {asked} completions, more than max_failures "
            f"{source.max_failures:g} allows: {said}"
        )
    holes = int(((status != Status.OK) & (status != Status.SKIPPED)).sum())
    if holes and source.on_missing == "fail":
        raise RewardError(
            f"reward {source.name!r} has no score for {holes} of {asked} completions, and on_missing is 'fail'"
            + (f": {said}" if said else " (it abstained)")
        )


def drop_rows(values: torch.Tensor, policies: Sequence[str], group_size: int) -> torch.Tensor:
    """(N, K) with every score taken from the rows that `drop_row` and `drop_group` sources have holes on."""
    drop = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for k, policy in enumerate(policies):
        holes = values[:, k].isnan()
        if policy == "drop_row":
            drop |= holes
        elif policy == "drop_group":
            drop |= holes.view(-1, group_size).any(dim=1).repeat_interleave(group_size)
    return values.masked_fill(drop[:, None], float("nan"))


def fill_holes(values: torch.Tensor, policies: Sequence[str], group_size: int) -> torch.Tensor:
    """(N, K) where `group_mean` sources have their group's mean in their holes, on rows that some source scored.

    Other holes stay, and those of a group in which the source has no score: `renormalize` leaves them to the combiner.
    """
    scored = ~values.isnan().all(dim=1)
    columns = list(values.unbind(dim=1))
    for k, policy in enumerate(policies):
        if policy == "group_mean":
            means = group_mean(columns[k], group_size).to(values.dtype)
            columns[k] = torch.where(columns[k].isnan() & scored, means, columns[k])
    return torch.stack(columns, dim=1)


# --- cache -----------------------------------------------------------------------------------------------------------


def row_key(signature: str, samples: Samples, row: int) -> bytes:
    """What makes two rows the same for a source: its signature, prompt, completion, token ids and used columns."""
    ids = samples.completion_ids[row] if samples.completion_ids else None
    columns = {name: values[row] for name, values in samples.columns.items()}
    content = [signature, samples.prompts[row], samples.completions[row], ids, columns]
    try:
        text = json.dumps(content, sort_keys=True, default=_digest, ensure_ascii=False)
    except Exception:  # a value that neither JSON nor pickle can say is like no other
        return secrets.token_bytes(16)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _digest(value: Any) -> str:
    """Arrays, images and other objects by their whole content; their repr is abbreviated."""
    return hashlib.blake2b(pickle.dumps(value), digest_size=16).hexdigest()


class ScoreCache(SharedFile):
    """Scores by key, failures left out."""

    def __init__(self, path: str):
        super().__init__(path, "scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID", "cache")

    def get(self, keys: list[bytes]) -> dict[bytes, Score]:
        """The known ones among `keys`; a kept None is an opinion not had."""

        def find(connection: sqlite3.Connection) -> dict[bytes, Score]:
            found: dict[bytes, Score] = {}
            for start in range(0, len(keys), 500):  # sqlite limits the variables of one statement
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                found |= dict(connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", some))
            return found

        return self.use(find, {})

    def put(self, scores: dict[bytes, Cell]) -> None:
        """Keep scores; Failed ones are left out, so that they are tried again, and so are values of tokens."""
        rows = [(key, score) for key, score in scores.items() if not isinstance(score, Failed | list)]
        self.use(lambda kept: kept.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows), None)
