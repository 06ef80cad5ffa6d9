"""Sources run side by side, within their time, and a hole never becomes a number."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

from trl_rewards import Failed, Pipeline, Reward, RewardError, Traced, load_reward
from trl_rewards.components import Status
from trl_rewards.events import run_async
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Gate, ScoreCache, Source, drop_rows, fill_holes, run_source
from trl_rewards.testing import make_samples

NAN = float("nan")


class Fixed(Reward):
    """Hands out the scores it was made with, row by row."""

    deterministic = False
    scores: list = ()  # type: ignore[assignment]

    def score(self, samples):
        return list(self.scores)


class Counting(Reward):
    columns = ("tag",)

    def __post_init__(self):
        self.calls: list[list[str]] = []

    def score(self, samples):
        self.calls.append(list(samples.texts))
        return [float(len(text)) for text in samples.texts]


def source(reward: Reward, name: str = "r", **options) -> Source:
    weight = Schedule.parse(options.pop("weight", 1.0))
    return Source(name, reward, weight, signature=name, **options)


def score(*sources: Source, rows: int = 4, group_size: int = 4, **options):
    pipeline = Pipeline(list(sources), **options)
    return pipeline.score(make_samples(["text"] * rows, tag=["t"] * rows), group_size)


def stock_trl_advantages(matrix: list[list[float]], weights: list[float]) -> list[float]:
    """TRL 1.16, sum_then_normalize over one group: nansum, then (r - mean) / (std + 1e-4)."""
    rewards = (torch.tensor(matrix) * torch.tensor(weights)).nansum(dim=1)
    return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()


# --- only_if ---------------------------------------------------------------------------------------------------------


class Lengths(Reward):
    """A judge that counts whom it was asked about."""

    deterministic = False

    def __post_init__(self):
        self.asked: list[str] = []

    def score(self, samples):
        self.asked += samples.texts
        return [Failed("down") if text == "ddd" else float(len(text)) for text in samples.texts]


def gated(otherwise=None, concurrency=None, **options):
    judge = source(
        Lengths(),
        "judge",
        only_if=Gate("format", 1.0, otherwise=otherwise),
        concurrency=concurrency,
        max_failures=0.5,
        **options,
    )
    gate = source(Fixed(scores=[1.0, 0.5, None, 1.0]), "format")
    pipeline = Pipeline([judge, gate])  # the gate need not come first
    samples = make_samples(["a", "bb", "ccc", "dddd"])
    return judge.reward, pipeline, pipeline.score(samples, group_size=4)


@pytest.mark.parametrize("concurrency", [None, 2])
def test_a_source_is_asked_only_about_rows_that_pass_and_the_saved_ones_are_counted(concurrency):
    judge, pipeline, batch = gated(concurrency=concurrency)
    assert sorted(judge.asked) == ["a", "dddd"]
    assert batch.scores.values[:, 0].tolist() == pytest.approx([1.0, NAN, NAN, 4.0], nan_ok=True)
    assert batch.scores.status[:, 0].tolist() == [Status.OK, Status.SKIPPED, Status.SKIPPED, Status.OK]
    assert pipeline.metrics["rewards/judge/saved"] == 0.5
    assert pipeline.metrics["rewards/judge/missing"] == 0.5
    assert "rewards/format/saved" not in pipeline.metrics
    # Means 2.5 and 5/6: where it stands by its format alone, for both weights.
    assert batch.rewards[1].item() == pytest.approx(2.5 + 5 / 6 + 2 * (0.5 - 5 / 6))
    assert batch.rewards[2].isnan()  # nobody scored it


def test_rows_that_do_not_pass_may_have_a_score_of_their_own():
    judge, pipeline, batch = gated(otherwise=-1.0)
    assert sorted(judge.asked) == ["a", "dddd"]
    assert batch.scores.values[:, 0].tolist() == [1.0, -1.0, -1.0, 4.0]
    assert pipeline.metrics["rewards/judge/missing"] == 0.0
    assert pipeline.metrics["rewards/judge/saved"] == 0.5


def test_rows_that_are_not_asked_about_are_no_holes_to_fail_on_and_no_part_of_the_failures():
    gated(on_missing="fail")
    judge = source(Lengths(), "judge", only_if=Gate("format", 1.0))
    pipeline = Pipeline([judge, source(Fixed(scores=[1.0, 0.0, 0.0, 0.0]), "format")])
    with pytest.raises(RewardError, match="'judge' failed on 1 of 1 completions"):
        pipeline.score(make_samples(["ddd", "a", "a", "a"]), group_size=4)


def test_a_source_may_be_asked_about_what_another_has_no_opinion_on():
    judge = source(Lengths(), "judge", only_if=Gate("rule", missing=True))
    rule = source(Fixed(scores=[1.0, None, Failed("down"), 0.0]), "rule")
    pipeline = Pipeline([judge, rule])
    batch = pipeline.score(make_samples(["a", "bb", "ccc", "dddd"]), group_size=4)
    assert judge.reward.asked == ["bb"]
    assert batch.scores.status[:, 0].tolist() == [Status.SKIPPED, Status.OK, Status.SKIPPED, Status.SKIPPED]
    assert pipeline.metrics["rewards/judge/saved"] == 0.75


def test_nobody_is_asked_where_no_row_passes():
    judge = source(Lengths(), "judge", only_if=Gate("format", 1.0))
    batch = Pipeline([source(Fixed(scores=[0.0] * 4), "format"), judge]).score(make_samples(["a"] * 4), 4)
    assert judge.reward.asked == []
    assert batch.rewards.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate("fromat", 1.0), "rewards.judge.only_if: no source 'fromat'; there is format, other"),
        (Gate("other", 1.0), "'other' has an only_if of its own"),
        (Gate("judge", 1.0), "'judge' has an only_if of its own"),
        (Gate("format"), "give one of the two"),
        (Gate("format", 1.0, missing=True), "give one of the two"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(gate, message):
    other = source(Lengths(), "other", only_if=Gate("format", 1.0))
    with pytest.raises(ValueError, match=message):
        Pipeline([source(Lengths(), "judge", only_if=gate), source(Fixed(), "format"), other])


def test_a_source_of_groups_cannot_be_asked_about_rows():
    class Groups(Lengths):
        scope = "group"

    with pytest.raises(ValueError, match="'judge' compares whole groups"):
        Pipeline([source(Groups(), "judge", only_if=Gate("format", 1.0)), source(Fixed(), "format")])


# --- holes -----------------------------------------------------------------------------------------------------------


def test_a_failed_judge_call_is_a_zero_in_stock_trl_and_not_here():
    """Four correct answers, the judge fails on the last one: stock TRL punishes it with -1.47."""
    judge = [0.8, 0.7, 0.9, None]
    stock = stock_trl_advantages([[1.0, NAN if s is None else s] for s in judge], [1.0, 1.0])
    assert stock == pytest.approx([0.49, 0.24, 0.73, -1.47], abs=0.01)

    def advantages(on_missing: str) -> list[float]:
        from trl_rewards import load_advantage

        correct = source(Fixed(scores=[1.0] * 4), "correct")
        judged = source(Fixed(scores=[0.8, 0.7, 0.9, Failed("no answer")]), "judge", on_missing=on_missing)
        pipeline = Pipeline([correct, judged], advantage=load_advantage("group_norm"))
        batch = pipeline.score(make_samples(["text"] * 4), 4)
        assert batch.scores.status[:, 1].tolist() == [Status.OK] * 3 + [Status.FAILED]
        assert batch.scores.values[3, 1].isnan()
        return pipeline.advantages(batch).tolist()

    # The mean of the group's other judgements, 0.8: the unjudged answer is neither better nor worse than they are.
    assert advantages("group_mean") == pytest.approx([0.0, -1.22, 1.22, 0.0], abs=0.01)
    # Weights over what is there: it is as right as the others, so it stands where they do on average.
    assert advantages("renormalize") == pytest.approx([0.0, -1.22, 1.22, 0.0], abs=0.01)
    # Out of the baseline, without advantage of its own.
    assert advantages("drop_row") == pytest.approx([0.0, -1.0, 1.0, 0.0], abs=0.01)
    assert advantages("drop_group") == [0.0] * 4
    with pytest.raises(RewardError, match="on_missing is 'fail': no answer"):
        advantages("fail")


def test_renormalize_scales_distances_from_the_group_to_the_weights_that_are_there():
    a = source(Fixed(scores=[1.0, 3.0, None]), "a", weight=3.0)
    b = source(Fixed(scores=[2.0, 2.0, 5.0]), "b", weight=1.0)
    # Means 2 and 3; the last row is 2 above b's mean, and b alone speaks for all 4 weights: 3·2 + 1·3 + 4/1 · 2.
    assert score(a, b, rows=3, group_size=3).rewards.tolist() == pytest.approx([5.0, 11.0, 17.0])


@pytest.mark.parametrize(("penalty", "weight"), [(0.2, -0.5), (-0.2, 0.5)])
def test_failing_on_a_penalty_is_no_bonus(penalty, weight):
    a = source(Fixed(scores=[1.0] * 4), "a")
    b = source(Fixed(scores=[penalty] * 3 + [Failed("down")]), "b", weight=weight)
    assert score(a, b).rewards.tolist() == pytest.approx([0.9] * 4)


def test_a_source_without_any_score_in_a_group_is_left_out_there():
    a, b = source(Fixed(scores=[1.0, 2.0, 1.0, 2.0]), "a"), source(Fixed(scores=[None, None, 3.0, 3.0]), "b")
    assert score(a, b, group_size=2).rewards.tolist() == [2.0, 4.0, 4.0, 5.0]


def test_rows_that_are_dropped_enter_no_statistic():
    from trl_rewards import load_combiner

    a = source(Fixed(scores=[1.0, 2.0, 3.0, 100.0]), "a")
    b = source(Fixed(scores=[0.0, 0.0, 0.0, None]), "b", on_missing="drop_row")
    total = score(a, b, combine=load_combiner("normalize_then_sum")).rewards
    assert total[:3].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)
    assert total[3].isnan()


def test_a_row_scored_only_by_a_watched_source_has_no_total():
    a, b = source(Fixed(scores=[1.0, None]), "a"), source(Fixed(scores=[0.5, 0.5]), "b", weight=0.0)
    total = score(a, b, rows=2, group_size=2).rewards
    assert total[0] == 1.0
    assert total[1].isnan()


def test_group_mean_leaves_a_group_without_any_score_to_the_combiner():
    values = torch.tensor([[1.0, NAN], [2.0, NAN], [3.0, 4.0], [5.0, NAN]])
    policies = ["renormalize", "group_mean"]
    assert drop_rows(values, policies, group_size=2).nan_to_num(-1).equal(values.nan_to_num(-1))
    filled = fill_holes(values, policies, group_size=2)
    assert filled.nan_to_num(-1).tolist() == [[1.0, -1.0], [2.0, -1.0], [3.0, 4.0], [5.0, 4.0]]


def test_abstention_and_failure_have_their_own_status():
    reward = Fixed(
        scores=[1.0, None, NAN, Failed("x"), Failed("y", status="timeout"), float("inf"), True, numpy.float32(2)]
    )
    batch = score(source(reward, max_failures=1.0), rows=8, group_size=8)
    assert batch.scores.status[:, 0].tolist() == [0, 1, 1, 2, 3, 2, 0, 0]
    assert batch.scores.values[:, 0].nan_to_num(-9).tolist() == [1.0, -9, -9, -9, -9, -9, 1.0, 2.0]


def test_metrics_say_what_happened():
    pipeline = Pipeline([source(Fixed(scores=[1.0, None, Failed("x"), 2.0]), "judge", weight=0.5)])
    pipeline.score(make_samples(["text"] * 4), 4)
    assert pipeline.metrics["rewards/judge/missing"] == 0.5
    assert pipeline.metrics["rewards/judge/failed"] == 0.25
    assert pipeline.metrics["rewards/judge/weight"] == 0.5
    assert pipeline.metrics["rewards/total/missing"] == 0.5


# --- broken sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0, 2.0], "returned 2 scores for 4 completions"),
        (["good"] * 4, "returned 'good'"),
        ([[1.0]] * 4, "returned \\[1.0\\]"),
    ],
)
def test_a_broken_contract_stops_the_run_and_says_what_is_wanted(scores, words):
    with pytest.raises(RewardError, match=f"reward 'judge' {words}.*return"):
        score(source(Fixed(scores=scores), "judge"))


def test_a_source_that_returns_no_list_is_named():
    class Nothing(Reward):
        def score(self, samples):
            return None

    with pytest.raises(RewardError, match="reward 'nothing' returned None; return a list with one score"):
        score(source(Nothing(), "nothing"))


class Picky(Reward):
    def score(self, samples):
        if any(text == "bad" for text in samples.texts):
            raise ValueError("cannot read it")
        return [1.0] * len(samples)


def test_one_row_that_raises_costs_one_cell():
    samples = make_samples(["good", "fine", "bad", "nice"])
    scores = run_source(source(Picky()), samples)
    assert scores == [1.0, 1.0, Failed("ValueError: cannot read it"), 1.0]


def test_too_many_failures_stop_the_run_with_the_reason():
    with pytest.raises(
        RewardError, match=r"failed on 2 of 3 completions, more than max_failures 0.5.*cannot read it \(2 t"
    ):
        Pipeline([source(Picky(), "picky")]).score(make_samples(["bad", "bad", "good"]), 3)


def test_a_failing_shaper_is_named_by_its_place():
    from trl_rewards import Shaper

    class Broken(Shaper):
        def __call__(self, rewards, samples):
            raise ZeroDivisionError("no")

    with pytest.raises(RewardError, match=r"rewards.r.shape.0 failed: ZeroDivisionError: no"):
        score(source(Fixed(scores=[1.0] * 4), shape=[Broken()]))


def test_an_infinite_total_stops_the_run():
    from trl_rewards import load_shaper

    huge = source(Fixed(scores=[3e38] * 4), shape=[load_shaper("scale", factor=10.0)])
    with pytest.raises(RewardError, match="infinite"):
        score(huge)


def test_a_shaper_may_neither_make_nor_fill_a_hole():
    from trl_rewards import Shaper

    class Log(Shaper):
        def __call__(self, rewards, samples):
            return rewards.log()

    class Zero(Shaper):
        def __call__(self, rewards, samples):
            return rewards.nan_to_num(0.0)

    with pytest.raises(RewardError, match=r"shape.0 gave NaN for a row that has a reward"):
        score(source(Fixed(scores=[1.0, -1.0, 1.0, 1.0])), shape=[Log()])
    assert score(source(Fixed(scores=[1.0, None, 1.0, 1.0])), shape=[Zero()]).rewards[1].isnan()


def test_a_source_of_weight_0_cannot_make_a_row_vanish():
    huge = source(Fixed(scores=[1e39] + [1.0] * 3), "huge", weight=0.0)
    batch = score(source(Fixed(scores=[1.0] * 4), "a"), huge)
    assert batch.rewards.tolist() == [1.0] * 4
    assert batch.scores.status[0].tolist() == [Status.OK, Status.FAILED]


# --- deadlines, retries, concurrency ---------------------------------------------------------------------------------


class Sleepy(Reward):
    def score(self, samples):
        for text in samples.texts:
            if text == "hang":
                time.sleep(30)
        return [1.0] * len(samples)


class AsyncSleepy(Reward):
    async def ascore(self, samples):
        if "hang" in samples.texts:
            await asyncio.sleep(30)
        return [1.0] * len(samples)


@pytest.mark.parametrize("reward", [Sleepy(), AsyncSleepy()])
def test_a_row_past_its_deadline_is_a_hole_and_the_others_are_scored(reward):
    samples = make_samples(["a", "hang", "b"])
    scores = run_source(source(reward, timeout=1, concurrency=2), samples)
    assert scores == [1.0, Failed("took longer than 1 s", status="timeout"), 1.0]


def test_a_whole_batch_past_its_deadline_is_all_holes():
    scores = run_source(source(Sleepy(), timeout=0.2), make_samples(["a", "hang"]))
    assert [score.status for score in scores] == ["timeout", "timeout"]


def test_concurrency_bounds_the_calls_in_flight():
    class Watching(Reward):
        def __post_init__(self):
            self.now = self.most = 0
            self.lock = threading.Lock()

        def score(self, samples):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.02)
            with self.lock:
                self.now -= 1
            return [1.0] * len(samples)

    reward = Watching()
    run_source(source(reward, concurrency=3), make_samples([f"text {row}" for row in range(12)]))
    assert reward.most == 3


def test_a_coroutine_that_blocks_instead_of_awaiting_is_given_up_and_the_next_one_runs():
    class Blocks(Reward):
        async def ascore(self, samples):
            time.sleep(8)
            return [1.0]

    scores = run_source(source(Blocks(), timeout=0.2), make_samples(["a"]))
    assert scores == [Failed("took longer than 0.2 s", status="timeout")]
    assert run_source(source(AsyncSleepy(), timeout=5), make_samples(["a"])) == [1.0]


def test_a_blocked_loop_is_left_behind_once_however_many_time_out_on_it():
    started, go_on = threading.Event(), threading.Event()

    async def blocks():
        started.set()
        go_on.wait()

    async def loop():
        return asyncio.get_running_loop()

    def late():
        with pytest.raises(TimeoutError):
            run_async(blocks(), timeout=0.5)

    with ThreadPoolExecutor() as pool:
        second = pool.submit(late)
        started.wait()
        with pytest.raises(TimeoutError):
            run_async(loop(), timeout=0.05)
        fresh = run_async(loop())
        second.result()
        assert run_async(loop()) is fresh
        go_on.set()


@pytest.mark.parametrize("base", [Sleepy, AsyncSleepy])
def test_a_batch_that_raises_is_tried_row_by_row_within_one_more_time_out(base):
    class Raises(base):
        def fails(self, samples):
            if len(samples) > 1:
                raise ValueError("too many")

        async def ascore(self, samples):
            self.fails(samples)
            return await super().ascore(samples)

        def score(self, samples):
            self.fails(samples)
            return super().score(samples)

        def is_async(self):
            return base is AsyncSleepy

    scores = run_source(source(Raises(), timeout=0.5, max_failures=1.0), make_samples(["a", "hang", "b", "c"]))
    assert scores[0] == 1.0
    assert [score.status for score in scores[1:]] == ["timeout"] * 3  # the hang took what time there was


def test_a_dead_endpoint_is_not_asked_row_by_row_to_the_end():
    class Dead(Counting):
        def score(self, samples):
            self.calls.append(list(samples.texts))
            raise ConnectionError("down")

    reward = Dead()
    scores = run_source(source(reward), make_samples([f"t{row}" for row in range(20)], tag=["x"] * 20))
    assert scores == [Failed("ConnectionError: down")] * 20
    assert len(reward.calls) == 1 + 11  # the batch, then rows until more than half have failed


def test_async_rows_are_in_flight_together_up_to_the_limit():
    class Watching(Reward):
        def __post_init__(self):
            self.now = self.most = 0

        async def ascore(self, samples):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.02)
            self.now -= 1
            return [1.0] * len(samples)

    reward = Watching()
    run_source(source(reward, concurrency=4), make_samples([f"text {row}" for row in range(12)]))
    assert reward.most == 4


def test_waiting_sources_run_side_by_side():
    meeting = threading.Barrier(2, timeout=10)

    class Meets(Reward):
        def score(self, samples):
            meeting.wait()  # raises unless the other source runs at the same time
            return [1.0] * len(samples)

    batch = score(source(Meets(), "a", timeout=20), source(Meets(), "b", timeout=20))
    assert batch.rewards.tolist() == [2.0] * 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_raises_is_made_again(asynchronous, monkeypatch):
    monkeypatch.setattr("trl_rewards.scoring._pauses", lambda retries: iter([0.0] * retries + [None]))

    class Flaky(Reward):
        def __post_init__(self):
            self.calls = 0

        def flake(self, samples):
            self.calls += 1
            if self.calls < 3:
                raise ConnectionError("try again")
            return [1.0] * len(samples)

    if asynchronous:

        class Tested(Flaky):
            async def ascore(self, samples):
                return self.flake(samples)
    else:

        class Tested(Flaky):
            def score(self, samples):
                return self.flake(samples)

    assert run_source(source(Tested(), retries=2), make_samples(["a"])) == [1.0]
    failed = run_source(source(Tested(), retries=1), make_samples(["a"]))
    assert failed == [Failed("ConnectionError: try again")]


@pytest.mark.slow
def test_an_isolated_hang_is_killed_and_its_pool_lives_on(write):
    path = write(
        "hanging.py",
        "def hanging(completions, **kwargs):\n"
        "    for text in completions:\n"
        "        if text == 'hang':\n"
        "            9 ** 9 ** 9 ** 9\n"  # holds the interpreter's lock: no thread could stop it
        "        if text == 'raise':\n"
        "            raise ValueError('no')\n"
        "    return [float(len(text)) for text in completions]\n",
    )
    from trl_rewards import load_reward
    from trl_rewards.scoring import close_source

    use = f"{path}:hanging"
    isolated = source(load_reward(use), isolate=True, timeout=1.0, concurrency=2, use=(use, {}, "."))
    try:
        scores = run_source(isolated, make_samples(["ab", "hang", "abc", "raise", "a"]))
        assert scores[0] == 2.0
        assert scores[1] == Failed("took longer than 1 s", status="timeout")
        assert scores[2] == 3.0
        assert isinstance(scores[3], Failed)
        assert scores[3].reason.startswith("ValueError: no")
        assert scores[4] == 1.0
        assert run_source(isolated, make_samples(["abcd"])) == [4.0]
    finally:
        close_source(isolated)


# --- duplicates and cache --------------------------------------------------------------------------------------------


def test_identical_rows_are_scored_once():
    reward = Counting()
    samples = make_samples(["aa", "b", "aa", "aa"], prompts=["p"] * 4, tag=["x", "x", "x", "y"])
    assert run_source(source(reward), samples) == [2.0, 1.0, 2.0, 2.0]
    assert reward.calls == [["aa", "b", "aa"]]  # the last "aa" has another column value


def test_a_reward_that_logs_shares_of_a_batch_sees_identical_rows_too():
    class Logging(Counting):
        sees_every_row = True

    reward = Logging()
    samples = make_samples(["aa", "b", "aa"], prompts=["p"] * 3, tag=["x"] * 3)
    assert run_source(source(reward), samples) == [2.0, 1.0, 2.0]
    assert reward.calls == [["aa", "b", "aa"]]


def test_rows_that_differ_inside_a_long_array_are_different():
    first, second = numpy.zeros(5000), numpy.zeros(5000)
    second[2500] = 7.0

    class Total(Reward):
        columns = ("data",)

        def score(self, samples):
            return [float(values.sum()) for values in samples["data"]]

    for convert in (numpy.asarray, torch.tensor):
        samples = make_samples(["a", "a"], prompts=["p", "p"], data=[convert(first), convert(second)])
        assert run_source(source(Total()), samples) == [0.0, 7.0]


def test_rows_that_no_key_can_be_made_of_are_all_scored():
    reward = Counting()
    tags = [{1: "a", "b": threading.Lock()}] * 2
    assert run_source(source(reward), make_samples(["aa", "aa"], prompts=["p", "p"], tag=tags)) == [2.0, 2.0]
    assert reward.calls == [["aa", "aa"]]


def test_a_reward_that_is_not_deterministic_sees_every_row():
    class Noisy(Counting):
        deterministic = False

    reward = Noisy()
    run_source(source(reward), make_samples(["aa", "aa"], prompts=["p", "p"], tag=["x", "x"]))
    assert reward.calls == [["aa", "aa"]]


def test_a_column_that_was_not_declared_is_not_there():
    class Sneaky(Reward):
        def score(self, samples):
            return samples["tag"]

    scores = run_source(source(Sneaky(), "sneaky"), make_samples(["a"], tag=[1.0]))
    assert "declare it in `columns`" in scores[0].reason


def test_the_cache_keeps_scores_between_processes_and_sources_apart(tmp_path):
    path = str(tmp_path / "deep" / "scores.sqlite")
    samples = make_samples(["aa", "b"], tag=["x", "x"])
    first, again, other = Counting(), Counting(), Counting()
    assert run_source(source(first, cache=path), samples) == [2.0, 1.0]
    assert run_source(source(again, cache=path), samples) == [2.0, 1.0]
    assert again.calls == []
    run_source(source(other, "another", cache=path), samples)
    assert other.calls == [["aa", "b"]]
    changed = Counting()
    run_source(source(changed, cache=path), make_samples(["aa", "b"], tag=["x", "y"]))
    assert changed.calls == [["b"]]


def test_the_cache_keeps_no_opinion_but_not_a_failure(tmp_path):
    class Mixed(Counting):
        def score(self, samples):
            self.calls.append(list(samples.texts))
            return [None if text == "none" else Failed("down") for text in samples.texts]

    path = str(tmp_path / "scores.sqlite")
    samples = make_samples(["none", "fails"], tag=["x", "x"])
    first, again = Mixed(), Mixed()
    run_source(source(first, cache=path), samples)
    assert run_source(source(again, cache=path), samples) == [None, Failed("down")]
    assert again.calls == [["fails"]]


def test_a_cache_that_is_broken_costs_its_savings_and_not_the_scores(tmp_path, caplog):
    path = tmp_path / "scores.sqlite"
    path.write_text("no database, but a text of some length")
    samples = make_samples(["aa", "b"], tag=["x", "x"])
    for _ in range(2):
        assert run_source(source(Counting(), cache=str(path)), samples) == [2.0, 1.0]
    assert "cannot be used: DatabaseError('file is not a database')" in caplog.text


def test_the_cache_takes_more_keys_than_one_statement_may_hold(tmp_path):
    cache = ScoreCache(str(tmp_path / "scores.sqlite"))
    scores = {bytes([row // 256, row % 256]): float(row) for row in range(2000)}
    cache.put(scores)
    assert cache.get(list(scores)) == scores


# --- randomness and groups -------------------------------------------------------------------------------------------


def test_scoring_leaves_the_policys_random_streams_alone():
    import random

    class Noisy(Reward):
        deterministic = False

        def score(self, samples):
            torch.manual_seed(1)
            return [torch.rand(()).item() + random.random() + numpy.random.rand() for _ in range(len(samples))]

    def draws() -> tuple:
        return torch.rand(2).tolist(), random.random(), numpy.random.rand()

    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    expected = draws()
    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    score(source(Noisy()))
    assert draws() == expected


def test_a_group_source_sees_whole_groups():
    class Ranks(Reward):
        scope = "group"

        def score(self, samples):
            assert samples.group_size == 2
            assert len(samples) == 6
            return [float(row % 2) for row in range(len(samples))]

    assert score(source(Ranks()), rows=6, group_size=2).rewards.tolist() == [0.0, 1.0] * 3


def test_a_group_source_with_concurrency_gets_one_group_per_call():
    class Sizes(Reward):
        scope = "group"

        def score(self, samples):
            return [float(len(samples))] * len(samples)

    assert score(source(Sizes(), concurrency=2), rows=6, group_size=3).rewards.tolist() == [3.0] * 6


def test_a_weight_follows_its_schedule_outside_the_raw_score():
    pipeline = Pipeline([source(Fixed(scores=[1.0, 1.0]), weight={"linear": [1.0, 0.0]})])
    for step, expected in [(0, 1.0), (5, 0.5), (10, 0.0)]:
        batch = pipeline.score(make_samples(["a", "b"], step=step, max_steps=10), 2)
        assert batch.rewards.tolist() == [expected, expected]
        assert batch.scores.values[:, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{}, {"timeout": 30}, {"concurrency": 2}])
def test_a_reward_that_calls_exit_is_a_failure_like_any_other(options):
    class Quits(Reward):
        def score(self, samples):
            raise SystemExit("bye")

    scores = run_source(source(Quits(), **options), make_samples(["a", "b"]))
    assert scores == [Failed("SystemExit: bye")] * 2


@pytest.mark.skipif(
    not (Path(os.environ.get("TRL_REWARDS_TEST_DATA", "no data")) / "pandalm_human").is_dir(),
    reason="TRL_REWARDS_TEST_DATA has no pandalm_human",
)
def test_bleu_agrees_with_people_more_often_than_not_on_999_real_pairs(monkeypatch):
    """71.4 % with one reference and 74.6 % with five when measured; BLEUBERI's authors have 72 to 74 % on theirs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import agreement

    five = {"references": "references_5", "extract_answer": False}
    found = agreement.measure(
        Path(os.environ["TRL_REWARDS_TEST_DATA"]), "pandalm", [{"use": "bleuberi", "with": five}]
    )
    (total,) = found["results"]
    assert found["left_out"]["recorded ties"] == 105
    assert 0.715 <= total["share"] <= 0.775
    assert total["low"] < total["share"] < total["high"]


class Explains(Reward):
    traces = True

    def score(self, samples):
        words = {"hole": Failed("no", trace="so far"), "none": None}
        return [words.get(text, Traced(len(text), {"text": text})) for text in samples.texts]


def test_traces_follow_their_rows_through_repeats_calls_and_pickles(tmp_path):
    texts = ["one", "three", "one", "hole", "none"]
    samples = make_samples(texts, group_size=1)
    for running in ({}, {"concurrency": 2}, {"cache": str(tmp_path / "scores.sqlite")}):
        sources = [Source("explains", Explains(), max_failures=1.0, **running)]
        pipeline = Pipeline([*sources, Source("b", Explains(), max_failures=1.0)])
        batch = pipeline.score(samples)
        assert batch.scores.values[:3].tolist() == [[3, 3], [5, 5], [3, 3]]
        told = {"text": "one"}
        assert [trace.get("explains") for trace in batch.traces] == [told, {"text": "three"}, told, "so far", None]
    cached = Pipeline([Source("explains", Explains(), max_failures=1.0, cache=str(tmp_path / "scores.sqlite"))])
    assert cached.score(samples).traces == [{}, {}, {}, {"explains": "so far"}, {}]
    again = pickle.loads(pickle.dumps(Traced(0.5, {"a": 1})))
    assert (again, again.trace) == (0.5, {"a": 1})
    assert Pipeline([load_reward("length", soft_limit=1, hard_limit=2)]).score(make_samples(["a"])).traces is None
