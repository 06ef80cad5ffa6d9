"""Running code that nobody trusts: programs in, outcomes out, whatever confines them.  See docs/sandbox.md."""

from __future__ import annotations

from trl_rewards.sandbox.opening import NAMES, check_choice, open_sandbox
from trl_rewards.sandbox.programs import Limits, Outcome, Program, Sandbox, Suite, TestResult, run_tests

__all__ = [
    "NAMES",
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "Suite",
    "TestResult",
    "check_choice",
    "open_sandbox",
    "run_tests",
]
