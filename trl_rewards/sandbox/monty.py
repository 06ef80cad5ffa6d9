"""The `monty` sandbox: an interpreter of its own for a part of Python, which grants nothing.

https://github.com/pydantic/monty. Many times quicker than a process, for the snippets that tools run. It has neither
`yield`, nor most of the standard library, nor stdin and files. Tests share the code's session: code may redefine what
they use, so its verdicts are no reward.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from trl_rewards.errors import RewardError
from trl_rewards.sandbox.programs import (
    Limits,
    Outcome,
    Program,
    Sandbox,
    Status,
    Suite,
    TestResult,
    usable_processors,
)


class Monty(Sandbox):
    """Programs in sessions of Monty's worker processes."""

    name = "monty"

    def __init__(self, *, processes: int | None = None):
        if importlib.util.find_spec("pydantic_monty") is None:
            raise ValueError('the monty sandbox needs pydantic-monty: pip install "trl-rewards[sandbox]"')
        self._monty: Any = importlib.import_module("pydantic_monty")
        self.processes = processes or usable_processors()
        try:
            self._workers = self._monty.Monty(min_processes=1, max_processes=self.processes)
            self._workers.__enter__()
        except OSError as error:
            raise RewardError(f"the monty sandbox does not start: {error}") from None

    def run(self, program: Program) -> Outcome:
        if program.stdin or program.files:
            raise ValueError("monty has neither stdin nor files; choose bwrap, landlock or remote")
        started = time.monotonic()
        status, message, printed = self._feed([program.source], program.limits)
        stdout, stderr = ("".join(text for name, text in printed if name == wanted) for wanted in ("stdout", "stderr"))
        return Outcome(
            status=status,
            stdout=stdout,
            stderr=message if status == "infra" else stderr + message,
            exit_code={"ok": 0, "error": 1}.get(status),
            seconds=time.monotonic() - started,
        )

    def run_suite(self, suite: Suite) -> list[TestResult]:
        limits = Limits(seconds=suite.timeout, memory_mb=suite.limits.memory_mb, output_kb=suite.limits.output_kb)
        name = [f"candidate = {suite.entry_point}"] if suite.entry_point else []
        return [self._test([suite.setup, suite.code, *name, test], limits) for test in suite.tests]

    def _test(self, snippets: list[str], limits: Limits) -> TestResult:
        status, message, _ = self._feed(snippets, limits)
        if status == "ok":
            return TestResult("passed")
        if status in ("timeout", "infra"):
            return TestResult(status, message)
        return TestResult("failed", message)

    def _feed(self, snippets: list[str], limits: Limits) -> tuple[Status, str, list[tuple[str, str]]]:
        """Run snippets in one session: what became of it, the error in words, and what was printed."""
        most = limits.output_kb * 1024
        printed = self._monty.CollectStreams(max_bytes=most)
        most_memory = limits.memory_mb * 2**20
        bounds: Any = {"max_feed_duration_secs": limits.seconds, "max_memory": most_memory}
        try:
            with self._workers.checkout(limits=bounds) as session:
                for snippet in snippets:
                    session.feed_run(snippet, print_callback=printed)
        except self._monty.MontyCrashedError as error:  # by what the worker was fed
            return "error", str(error), printed.output
        except self._monty.MontyError as error:
            message = str(error)
            status: Status = "error"
            if message.startswith("TimeoutError: feed time limit exceeded"):
                status = "timeout"
            elif message.startswith("MemoryError"):
                status = "output" if message.endswith(f"> {most} bytes") and most != most_memory else "memory"
            return status, message, printed.output
        except (OSError, RuntimeError) as error:
            return "infra", f"{type(error).__name__}: {error}", []
        return "ok", "", printed.output

    def close(self) -> None:
        self._workers.__exit__(None, None, None)
