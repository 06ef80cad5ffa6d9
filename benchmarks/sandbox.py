"""What a sandbox costs: seconds per trivial program and per tested answer, and 64 at once against one after another.

    python benchmarks/sandbox.py

Every backend that works here; figures of one backend come from one run, in turn with those of the others.
"""

from __future__ import annotations

import statistics
import time

from trl_rewards import RewardError
from trl_rewards.sandbox import Limits, Program, Sandbox, open_sandbox, run_tests
from trl_rewards.sandbox.programs import usable_processors

TRIVIAL = Program(source="print(1)")
BUSY = Program(source="x = 0\nfor i in range(10**6):\n    x += i\nprint(x)", limits=Limits(seconds=60))
CODE = "def f(x):\n    return x + 1\n"
TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]
ROUNDS, AT_ONCE = 30, 64


def seconds_of(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def available() -> list[Sandbox]:
    """The backends that work here, with the reason why another does not."""
    found = []
    for name in ("bwrap", "landlock", "monty", "unsafe"):
        try:
            found.append(open_sandbox(name, allow_unsafe=name == "unsafe"))
        except (RewardError, ValueError) as error:
            print(f"{name}: {error}\n")
    return found


def main() -> None:
    sandboxes = available()
    trivial: dict[str, list[float]] = {sandbox.name: [] for sandbox in sandboxes}
    tested: dict[str, list[float]] = {sandbox.name: [] for sandbox in sandboxes}
    for _ in range(ROUNDS):
        for sandbox in sandboxes:
            trivial[sandbox.name].append(seconds_of(lambda sandbox=sandbox: sandbox.run(TRIVIAL)))
            tested[sandbox.name].append(seconds_of(lambda sandbox=sandbox: run_tests(sandbox, CODE, TESTS)))
    print(f"{usable_processors()} processors; median and minimum of {ROUNDS}, in ms; {AT_ONCE} programs in s\n")
    print(f"| backend | trivial program | three tests | {AT_ONCE} in turn | {AT_ONCE} at once | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for sandbox in sandboxes:
        in_turn = seconds_of(lambda sandbox=sandbox: [sandbox.run(BUSY) for _ in range(AT_ONCE)])
        at_once = seconds_of(lambda sandbox=sandbox: sandbox.run_all([BUSY] * AT_ONCE))
        one, three = (
            f"{1000 * statistics.median(times):.1f} ({1000 * min(times):.1f})"
            for times in (trivial[sandbox.name], tested[sandbox.name])
        )
        print(f"| {sandbox.name} | {one} | {three} | {in_turn:.1f} | {at_once:.1f} | {in_turn / at_once:.2f} |")
        sandbox.close()


if __name__ == "__main__":
    main()
