"""Processes that can be killed: one item's hang, crash or error costs that item and nothing else."""

from __future__ import annotations

import os
import signal

import pytest

from trl_rewards import Failed, RewardError
from trl_rewards.workers import WorkerPool

pytestmark = pytest.mark.slow

JOBS = """
import os, signal, sys, time

def make(factor):
    def work(item):
        if item == "hang":
            while True:
                pass
        if item == "sleep":
            time.sleep(1000)
        if item == "raise":
            raise ValueError("bad item")
        if item == "exit":
            sys.exit(3)
        if item == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == "pid":
            return os.getpid()
        if item == "unpicklable":
            return lambda: 0
        if item == "print":
            print("hello from the worker")
            return 0
        return factor * item
    return work

def broken():
    raise RuntimeError("no licence")
"""


@pytest.fixture
def pool(write):
    """A pool of one worker, of the functions above."""
    path = write("jobs.py", JOBS)
    made = []

    def make(name: str = "make", args: tuple = (10,), size: int = 1) -> WorkerPool:
        made.append(WorkerPool(f"{path}:{name}", args, size))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_results_come_in_order_from_several_workers(pool):
    assert pool(size=2).map(list(range(7))) == [0, 10, 20, 30, 40, 50, 60]


def test_no_items_start_no_worker(pool):
    assert pool().map([]) == []


def test_a_hang_costs_its_own_item_only(pool):
    first, hang, sleep, last = pool().map([1, "hang", "sleep", 2], timeout=0.5)
    assert (first, last) == (10, 20)
    assert hang == sleep == Failed("took longer than 0.5 s", status="timeout")


def test_an_error_says_what_and_where(pool):
    first, failed, last = pool().map([1, "raise", 2])
    assert (first, last) == (10, 20)
    assert failed.reason.startswith("ValueError: bad item (jobs.py:")
    assert failed.status == "failed"


@pytest.mark.parametrize("item", ["exit", "crash", "unpicklable"])
def test_a_worker_that_dies_is_replaced(item, pool):
    first, failed, last = pool().map([1, item, 2])
    assert (first, last) == (10, 20)
    assert failed.reason.startswith("its worker process ended (exit code")


def test_a_worker_is_used_again_and_one_that_died_meanwhile_is_replaced(pool):
    workers = pool()
    (pid,) = workers.map(["pid"])
    assert workers.map(["pid"]) == [pid]
    os.kill(pid, signal.SIGKILL)
    while workers._idle[0].process.poll() is None:
        pass
    assert workers.map([1, 2]) == [10, 20]


def test_close_ends_the_processes(pool):
    workers = pool()
    (pid,) = workers.map(["pid"])
    workers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_cannot_start_says_why(pool):
    with pytest.raises(RewardError, match="a scoring process could not start: RuntimeError: no licence"):
        pool("broken", ()).map([1])
    with pytest.raises(RewardError, match=r"could not start: PluginError: .* has no 'nothing'"):
        pool("nothing", ()).map([1])


def test_what_a_worker_prints_does_not_mix_with_our_output(pool, capfd):
    pool().map(["print"])
    out, err = capfd.readouterr()
    assert out == ""
    assert "hello from the worker" in err


def test_a_pool_does_not_pickle(pool):
    import pickle

    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(pool())
