"""Unit tests as a reward: code that a completion holds, run in a sandbox.

As HumanEval (https://huggingface.co/papers/2107.03374) and MBPP (https://huggingface.co/papers/2108.07732) do.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from trl_rewards.components import Context, Reward, Score
from trl_rewards.errors import RewardError
from trl_rewards.samples import Failed, Samples
from trl_rewards.sandbox import Limits, Program, Sandbox, Suite, TestResult, check_choice, open_sandbox

_FENCE = re.compile(r"^[ \t]*(`{3,})([^\n`]*)\n(.*?)(?:^[ \t]*\1`*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


class CodeTests(Reward):
    """Share of a row's unit tests that the completion's code passes, or 1.0 if it passes all, in [0, 1].

    The code is the last fenced Python block. Tests run in another process than the code, which sees none of them and
    hands over plain values: leaving early, printing a verdict or an object that equals everything earns nothing. A
    sandbox that fails, or a test that cannot be run, is a hole; a row without tests has no opinion. HumanEval:
    https://huggingface.co/papers/2107.03374.
    """

    tests: str = "tests"
    """Dataset column with the tests: a list of assert statements; source, which may define HumanEval's
    `check(candidate)`; or programs' stdin and stdout, `[{"input": …, "output": …}]` or `{"inputs": [], "outputs":
    []}`. Either may be JSON text."""
    entry_point: str | None = None
    """Dataset column with the name of the function that is tested; it is `candidate` too. None: the names that tests
    mention."""
    test_setup: str | None = None
    """Dataset column with source that tests need, such as imports: a text or a list of lines."""
    prefix: str | None = None
    """Dataset column with code that comes before the completion's, such as HumanEval's `prompt`; a completion without
    a block goes on where it ends. With `entry_point` tests have their own copy of it."""
    score_as: Literal["all", "share"] = "all"
    """`all`: 1.0 if every test passes, else 0.0, as pass@1 counts. `share`: the tests passed over all tests."""
    no_code: float | None = 0.0
    """For a completion without code; None: no opinion."""
    seconds: float = 3.0
    """For each test, and for the code to load. Wall-clock time: leave slack where the machine has other work."""
    memory_mb: int = 512
    """Address space of the code's process, in MiB."""
    threads: bool = False
    """Whether the code may start threads."""
    packages: bool = False
    """Whether the code may import what is installed here, such as numpy."""
    sandbox: str = "auto"
    """`auto` (the strongest that works here), `bwrap`, `landlock`, `remote`, or `unsafe`, which is none."""
    processes: int | None = None
    """Rows that are tested at a time; None: as many as there are processors, 32 for `remote`."""
    endpoint: str | None = None
    """Address of the service, for `remote`."""
    service: Literal["sandbox_fusion", "piston"] = "sandbox_fusion"
    """What answers there."""
    api_key_env: str | None = None
    """Environment variable with the service's key."""
    allow_unsafe: bool = False
    """Must be set for `sandbox: unsafe`."""

    def __post_init__(self):
        check_choice(self.sandbox, endpoint=self.endpoint, allow_unsafe=self.allow_unsafe)
        if self.sandbox == "monty":
            raise ValueError("sandbox: monty runs a part of Python, so that right code may fail; choose another")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        Limits(seconds=self.seconds, memory_mb=self.memory_mb)
        self._sandbox: Sandbox | None = None

    def reads(self) -> tuple[str, ...]:
        names = (self.tests, self.entry_point, self.test_setup, self.prefix)
        return tuple(name for name in names if name and name != "prompt")  # which is there anyway

    def setup(self, context: Context) -> None:
        """Opens the sandbox. RewardError where none works here."""
        if self._sandbox is None:
            self._sandbox = open_sandbox(
                self.sandbox,
                processes=self.processes,
                packages=self.packages,
                endpoint=self.endpoint,
                service=self.service,
                api_key_env=self.api_key_env,
                allow_unsafe=self.allow_unsafe,
            )

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def score(self, samples: Samples) -> list[Score]:
        self.setup(Context())
        assert self._sandbox is not None
        return self._sandbox.spread(self._score_row, self._rows(samples))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sandbox": None}

    def _rows(self, samples: Samples) -> list[_Row]:
        """What each row asks for. RewardError for a column that holds something else."""

        def column(name: str | None) -> list:
            if name == "prompt":
                return samples.prompt_texts
            return samples[name] if name else [None] * len(samples)

        rows = zip(
            samples.texts,
            samples[self.tests],
            column(self.entry_point),
            column(self.test_setup),
            column(self.prefix),
            strict=True,
        )
        return [
            _Row(text, read_tests(tests, self.tests), entry_point or None, _lines(setup), prefix or "")
            for text, tests, entry_point, setup, prefix in rows
        ]

    def _score_row(self, row: _Row) -> Score:
        if not row.tests:
            return None
        code = find_code(row.text, row.prefix)
        if code is None:
            return self.no_code
        results = self._run_pairs(code, row.tests) if isinstance(row.tests[0], Pair) else self._run_tests(code, row)
        for number, result in enumerate(results, start=1):
            if result.status in ("broken", "infra"):
                return Failed(f"test {number}: {result.message}")
        passed = sum(result.status == "passed" for result in results)
        if self.score_as == "share":
            return passed / len(row.tests)
        return float(passed == len(row.tests))

    def _run_tests(self, code: str, row: _Row) -> list[TestResult]:
        assert self._sandbox is not None
        limits = Limits(memory_mb=self.memory_mb, threads=self.threads)
        suite = Suite(
            code=code,
            tests=[_calling_check(str(test), row.entry_point) for test in row.tests],
            # Without an entry point the unfinished function of the prefix would be taken for the one to test.
            setup=f"{row.prefix}\n{row.setup}" if row.entry_point else row.setup,
            entry_point=row.entry_point,
            timeout=self.seconds,
            limits=limits,
            stop_early=self.score_as == "all",
        )
        return self._sandbox.run_suite(suite)

    def _run_pairs(self, code: str, pairs: Sequence[Any]) -> list[TestResult]:
        assert self._sandbox is not None
        limits = Limits(seconds=self.seconds, memory_mb=self.memory_mb, threads=self.threads)
        results: list[TestResult] = []
        for pair in pairs:
            outcome = self._sandbox.run(Program(source=code, stdin=pair.given, limits=limits))
            if outcome.status == "infra":
                results.append(TestResult("infra", outcome.stderr))
            else:
                right = outcome.status == "ok" and same_output(outcome.stdout, pair.wanted)
                results.append(TestResult("passed" if right else "failed"))
            if self.score_as == "all" and results[-1].status != "passed":
                break
        return results


class Pair(NamedTuple):
    """What a program is given on stdin, and what it should print."""

    given: str
    wanted: str


class _Row(NamedTuple):
    text: str
    tests: list[str] | list[Pair]
    entry_point: str | None
    setup: str
    prefix: str


def read_tests(value: Any, column: str = "tests") -> list[str] | list[Pair]:
    """Tests as a dataset has them: source, or pairs of stdin and stdout; empty for none. RewardError for others."""
    read = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # then it is source
            found = json.loads(value)
            read = found if isinstance(found, list | dict) else value
    if isinstance(read, Mapping) and {"inputs", "outputs"} <= set(read):
        given, wanted = read["inputs"], read["outputs"]
        if len(given) != len(wanted):
            raise RewardError(
                f"dataset column {column!r} must hold as many outputs as inputs, got {len(wanted)} for {len(given)}"
            )
        read = [{"input": one, "output": other} for one, other in zip(given, wanted, strict=True)]
    match read:
        case None | "":
            return []
        case str():
            return [read]
        case Sequence() if all(isinstance(test, str) for test in read):
            return [str(test) for test in read]
        case Sequence() if all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in read):
            return [Pair(_lines(test["input"]), _lines(test["output"])) for test in read]
    raise RewardError(
        f"dataset column {column!r} must hold assert statements, source, or pairs of input and output; "
        f"got {str(value)[:80]!r}"
    )


def find_code(text: str, prefix: str = "") -> str | None:
    """The code of a completion: its last fenced Python block, else its last unlabelled one; None without code.

    A text without blocks is code if `prefix` goes on in it, up to its first unindented line, or if it is Python that
    does something. `prefix` comes first in what is returned.
    """
    text = text.rpartition("</think>")[2]
    blocks = [
        (re.split(r"[^\w+-]", info.strip(), maxsplit=1)[0].lower(), code) for _, info, code in _FENCE.findall(text)
    ]
    python = [code for language, code in blocks if language in ("python", "py", "python3")]
    found = (python or [code for language, code in blocks if not language])[-1:]
    if found:
        return f"{prefix}\n{found[0]}" if prefix else found[0]
    if blocks or not text.strip():
        return None
    if prefix:
        return prefix + _body(text)
    return text if _is_code(text) else None


def _body(text: str) -> str:
    """A function's body: the lines before the first that stands at the margin."""
    lines = text.splitlines(keepends=True)
    ends = (number for number, line in enumerate(lines) if number and line.strip() and not line[0].isspace())
    return "".join(lines[: next(ends, len(lines))])


def _is_code(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.Call) for node in ast.walk(tree))


def _calling_check(test: str, entry_point: str | None) -> str:
    """HumanEval's tests only define `check`; the harness calls it."""
    if not entry_point or not re.search(r"^def check\(", test, re.MULTILINE):
        return test
    return f"{test}\ncheck({entry_point})"


def same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs are equal but for white space at the ends of lines and empty lines at the end."""
    ours, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (printed, wanted))
    return ours == theirs


def _lines(value: Any) -> str:
    """A text, or a list of lines as one."""
    if value is None:
        return ""
    return value if isinstance(value, str) else "\n".join(map(str, value))
