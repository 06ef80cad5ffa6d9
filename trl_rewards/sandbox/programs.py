"""What goes into a sandbox and what comes out: one protocol for all backends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Status = Literal["ok", "error", "timeout", "memory", "output", "infra"]
"""`ok`: ended with exit code 0. `error`: with another, or by a signal. `timeout`, `memory`, `output`: it was stopped
at that limit. `infra`: the sandbox failed, and nothing is known of the program: a hole, never a zero."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Wall-clock time; also of CPU, rounded up."""
    memory_mb: int = 512
    """Address space, in MiB."""
    output_kb: int = 64
    """Of stdout and of stderr, in KiB: whoever writes more is stopped."""
    disk_mb: int = 32
    """Of the private folder, in MiB, and of any one file in it."""
    threads: bool = False
    """Whether it may start threads, whose number memory and time limit. Never processes, except under `unsafe`,
    `remote`."""

    def __post_init__(self):
        for name in ("seconds", "memory_mb", "output_kb", "disk_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Program:
    """Python source with what it is given."""

    source: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> text, put beside it."""
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    """For `infra`: what went wrong."""
    exit_code: int | None = None
    """Negative: ended by that signal. None: unknown."""
    seconds: float = 0.0


@dataclass(frozen=True)
class TestResult:
    """What came of one test."""

    __test__ = False  # pytest, this is none of yours

    status: Literal["passed", "failed", "timeout", "broken", "infra"]
    """`broken`: the test itself cannot be run, whatever the code is. `infra`: the sandbox failed. Both are holes."""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Code and the tests to hold it to."""

    code: str
    tests: list[str]
    setup: str = ""
    """Source that tests need: imports, helpers. It runs with them, not with the code."""
    entry_point: str | None = None
    """Name of what is tested; tests know it as `candidate` too."""
    timeout: float = 3.0
    """Seconds per test, and for the code to load."""
    limits: Limits = Limits()
    """Of either process; `seconds` is not used."""
    stop_early: bool = False
    """Whether the tests after one that did not pass may be left out of the results."""

    def job(self, tests: list[str]) -> dict[str, Any]:
        """What the process that runs these tests is told."""
        return {"tests": tests, "setup": self.setup, "entry_point": self.entry_point}


class Sandbox:
    """Runs programs that nobody trusts. Thread-safe. Use it in a `with`, or call `close`."""

    name: str
    processes: int

    def run(self, program: Program) -> Outcome:
        """Run one program and wait for it."""
        raise NotImplementedError

    def run_suite(self, suite: Suite) -> list[TestResult]:
        """One result per test, in order."""
        raise NotImplementedError

    def run_all(self, programs: Iterable[Program]) -> list[Outcome]:
        """Outcomes in order, of as many at a time as `processes` says."""
        return self.spread(self.run, programs)

    def spread(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of each item, in order, as many at a time as `processes` says."""
        with ThreadPoolExecutor(self.processes, thread_name_prefix="sandbox") as threads:
            return list(threads.map(function, items))

    def close(self) -> None:
        """Kill what is running and release what is held."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def usable_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def status_of(code: int, stderr: str) -> Status:
    """What an exit code says, and Python's last words. Some runners report a signal as 128 and its number."""
    if code == 0:
        return "ok"
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return "timeout"
    out_of_memory = stderr.rstrip().rpartition("\n")[2].startswith("MemoryError")
    return "memory" if out_of_memory or code in (-signal.SIGKILL, 128 + signal.SIGKILL) else "error"


def run_tests(
    sandbox: Sandbox,
    code: str,
    tests: list[str],
    timeout: float = 3.0,
    *,
    setup: str = "",
    entry_point: str | None = None,
    limits: Limits | None = None,
) -> list[TestResult]:
    """Hold code to tests (usually assert statements), one result each, in order.

    The code never sees the tests and cannot pronounce on them: they run in another process, which calls the code's
    functions and is handed plain values. `timeout` is in seconds, for each test and for the code to load.
    """
    suite = Suite(
        code=code,
        tests=list(tests),
        setup=setup,
        entry_point=entry_point,
        timeout=timeout,
        limits=limits or Limits(),
    )
    return sandbox.run_suite(suite) if tests else []
