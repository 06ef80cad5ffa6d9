"""Running tools: names, order, deadlines, and failures that a model can read."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from trl_rewards import Tool, ToolCall, ToolError
from trl_rewards.testing import check_tool
from trl_rewards.toolbox import NO_RESULT, Observation, Toolbox


class Upper(Tool):
    """Capital letters."""

    description = "Writes text in capitals."
    answers_to = ("Text.upper",)

    def call(self, input, call):
        return f"{input.upper()}{call.row.get('mark', '')}"


class Odd(Tool):
    """Fails in the way that its input names."""

    description = "Fails."

    def call(self, input, call):
        match input:
            case "words":
                raise ToolError("there is no such city")
            case "silent":
                raise ToolError("")
            case "bug":
                raise KeyError("secret")
            case "exit":
                sys.exit(3)
            case "number":
                return 7
            case "half":
                return "so \ud83d"
            case "hang":
                threading.Event().wait(60)
        return "fine"


def test_results_come_in_the_order_of_calls_and_unknown_names_have_none():
    calls = [("a", "upper"), ("b", "Text.upper"), ("c", "Upper"), ("d", ""), ("e", "odd")]
    row = {"mark": "!"}
    found = Toolbox([Upper(), Odd()]).run([(text, ToolCall(name, row=row)) for text, name in calls])
    assert [each and each.text for each in found] == ["A!", "B!", None, None, "fine"]
    assert all(each.ok and each.seconds >= 0 and not each.problem for each in found if each)
    assert Toolbox([]).run([]) == []


@pytest.mark.parametrize(
    ("input", "text", "problem"),
    [
        ("words", "there is no such city", "there is no such city"),
        ("silent", "", ""),
        ("bug", NO_RESULT, "KeyError: 'secret'"),
        ("exit", NO_RESULT, "SystemExit: 3"),
        ("number", NO_RESULT, "TypeError: it returned int, not str"),
    ],
)
def test_failures_are_observations(input, text, problem):
    (found,) = Toolbox([Odd()]).run([(input, ToolCall("odd"))])
    assert found == Observation(text, False, found.seconds, problem)


def test_what_a_tool_says_can_be_tokenised():
    (found,) = Toolbox([Odd()]).run([("half", ToolCall("odd"))])
    assert found is not None
    assert (found.text, found.ok) == ("so ?", True)


def test_a_hanging_call_is_given_up_at_its_deadline_and_costs_no_other():
    odd = Odd(timeout=0.1)
    calls = [(text, ToolCall("odd")) for text in ("hang", "x", "hang", "x", "x")]
    found = Toolbox([odd], concurrency=2).run(calls)
    assert [each.text for each in found] == [NO_RESULT, "fine", NO_RESULT, "fine", "fine"]
    assert found[0].problem == "no result within 0.1 s"


def test_no_more_calls_run_at_a_time_than_allowed():
    busy, most, lock = 0, 0, threading.Lock()

    class Busy(Tool):
        def call(self, input, call):
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.01)
            with lock:
                busy -= 1
            return input

    found = Toolbox([Busy()], concurrency=3).run([(str(n), ToolCall("busy")) for n in range(12)])
    assert [each.text for each in found] == [str(n) for n in range(12)]
    assert 1 < most <= 3


def test_two_tools_that_answer_to_one_name_are_refused():
    class Other(Tool):
        answers_to = ("Text.upper",)

    with pytest.raises(ValueError, match=r"'upper' and 'other' both answer to 'Text\.upper'"):
        Toolbox([Upper(), Other()])


def test_a_time_limit_must_be_above_zero():
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0"):
        Upper(timeout=0)


def test_the_check_of_a_tool_lets_a_good_one_pass_and_finds_each_fault():
    check_tool(Upper(), "a", "b", name="Text.upper", row={"mark": "?"})

    class Silent(Upper):
        description = ""

    class Deaf(Upper):
        def answers(self, name):
            return False

    class Reader(Upper):
        columns = ("id",)

    class Counting(Upper):
        def call(self, input, call):
            vars(self)["count"] = vars(self).get("count", 0) + 1
            return str(vars(self)["count"])

    class Slow(Upper):
        def call(self, input, call):
            threading.Event().wait(60 if len(input) > 1000 else 0)
            return input

    for tool, complaint in [
        (Silent(), "no description"),
        (Deaf(), "does not answer to its own name"),
        (Reader(), r"reads columns \['id'\]"),
        (Counting(), "several calls at a time"),
        (Slow(timeout=0.1), "takes longer than 0.1 s"),
        (Odd(), "no result for 'bug': KeyError"),
    ]:
        with pytest.raises(AssertionError, match=complaint):
            check_tool(tool, "bug")
    with pytest.raises(AssertionError, match="give one or more inputs"):
        check_tool(Upper())
