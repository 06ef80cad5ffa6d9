"""The code interpreter of Themis, which runs an answer's tests.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from trl_rewards import Context, Tool, ToolCall
from trl_rewards.sandbox import Sandbox, TestResult, check_choice, open_sandbox, run_tests

_opening = threading.Lock()


class Code(Tool):
    """Runs the answer, a program, against each of the row's tests, and tells how many pass and why the others fail.

    What the model writes as input is not used. The program runs in a sandbox (`docs/sandbox.md`). As in the released
    code, the reasons are what the exceptions say; here they come in the order of the tests.
    """

    description = "Runs the answer's code against test cases. Input: Same as the answer"
    answers_to = ("code_run",)

    timeout: float = 120.0
    """Seconds that a call may take, the wait for other programs included."""
    tests_column: str = "test_list"
    """Dataset column with the tests of a row: a list of statements, such as `assert add(1, 2) == 3`."""
    seconds: float = 3.0
    """For each test, and for the program to load."""
    sandbox: str = "auto"
    """`auto`, `bwrap`, `landlock`, `remote`, or `unsafe`."""
    endpoint: str | None = None
    """Address of a sandbox service, with `remote`."""
    allow_unsafe: bool = False
    """Must be true for `unsafe`."""

    def __post_init__(self):
        super().__post_init__()
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")
        check_choice(self.sandbox, endpoint=self.endpoint, allow_unsafe=self.allow_unsafe)
        self._opened: tuple[Sandbox, threading.BoundedSemaphore] | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.tests_column,)

    def setup(self, context: Context) -> None:
        self._open()

    def _open(self) -> tuple[Sandbox, threading.BoundedSemaphore]:
        with _opening:  # a copy that was pickled opens its own at the first call
            if self._opened is None:
                sandbox = open_sandbox(self.sandbox, endpoint=self.endpoint, allow_unsafe=self.allow_unsafe)
                # More at a time would run against each other's clocks.
                self._opened = sandbox, threading.BoundedSemaphore(sandbox.processes)
            return self._opened

    def close(self) -> None:
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None}

    def call(self, input: str, call: ToolCall) -> str:
        sandbox, turns = self._open()
        tests = list(call.row[self.tests_column] or [])
        if not tests:
            raise ValueError(f"the row's {self.tests_column} holds no tests")
        with turns:
            results = run_tests(sandbox, call.answer, tests, self.seconds)
        broken = [result.message for result in results if result.status == "infra"]
        if broken:
            raise RuntimeError(f"the sandbox failed: {broken[0]}")
        return told(tests, results)


def told(tests: Sequence[str], results: Sequence[TestResult]) -> str:
    """Results of tests in the released code's words."""
    passed = sum(result.status == "passed" for result in results)
    reasons = dict.fromkeys(reason(test, result) for test, result in zip(tests, results, strict=True))
    why = "; ".join(filter(None, reasons))
    said = f"The pass rate is {passed / len(results)}. "
    if passed == len(results):
        return said + "All test cases passed."
    failed = f"{passed} test cases passed, and {len(results) - passed} test cases failed."
    return said + (failed if passed else "All test cases failed.") + (f" Failed reason: {why}" if why else "")


def reason(test: str, result: TestResult) -> str:
    """What an exception says, without its type and the line of the test; empty for a plain failed assert."""
    if result.status == "passed":
        return ""
    if result.status == "timeout":
        return "timed out"
    message = result.message.removeprefix("the code does not load: ")
    kind, _, words = message.partition(": ") if re.match(r"\w+(: |$)", message) else ("", "", message)
    for line in filter(None, (line.strip()[:200] for line in test.splitlines())):
        if kind and words == line:
            return ""
        words = words.removesuffix(f": {line}")
    return words.replace("(solution.py, line", "(<string>, line").strip()
