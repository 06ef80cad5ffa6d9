"""The reward `code_tests`: whose code passes which tests."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pickle
import random
from pathlib import Path

import pytest

from trl_rewards import Failed, RewardError, load_reward
from trl_rewards.defaults.code import Pair, find_code, read_tests, same_output
from trl_rewards.sandbox import open_sandbox
from trl_rewards.testing import make_samples

DATA = Path(os.environ.get("TRL_REWARDS_TEST_DATA", "no data"))


@pytest.fixture(scope="module", autouse=True)
def _some_sandbox():
    try:
        open_sandbox().close()
    except RewardError as error:
        pytest.skip(str(error))


def score(completions, options=None, **columns):
    reward = load_reward("code_tests", **(options or {}))
    try:
        return reward.score(make_samples(completions=completions, **columns))
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("text", "prefix", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nor\n```py\nx = 2\n```\n```\noutput\n```", "", "x = 2\n"),
        ("```\nx = 1\n```", "", "x = 1\n"),
        ("```bash\nls\n```", "", None),
        ("  ```Python title\n  x = 1\n  ```", "", "  x = 1\n"),
        ("````python\ns = '''\n```\n'''\n````", "", "s = '''\n```\n'''\n"),
        ("```python\nx = 1\ny = ", "", "x = 1\ny = "),
        ("<think>```python\nx = 1\n```</think>The answer is 5.", "", None),
        ("def f(): return 1", "", "def f(): return 1"),
        ("I cannot do that.", "", None),
        ("hello", "", None),
        ("", "", None),
        ("    return 1\n\n    # done\nprint(f())\n", "def f():\n", "def f():\n    return 1\n\n    # done\n"),
        ("```python\ndef f(): return 1\n```", "import math\n", "import math\n\ndef f(): return 1\n"),
        ("", "def f():\n", None),
    ],
)
def test_where_the_code_is(text, prefix, code):
    assert find_code(text, prefix) == code


def test_tests_as_datasets_have_them():
    assert read_tests(["assert a", "assert b"]) == ["assert a", "assert b"]
    assert read_tests("assert a") == ["assert a"]
    assert read_tests('["assert a"]') == ["assert a"]
    assert read_tests("[f(x) for x in y]") == ["[f(x) for x in y]"]
    pairs = [Pair("1", "2"), Pair("a\nb", "c")]
    assert read_tests([{"input": "1", "output": "2"}, {"input": ["a", "b"], "output": "c"}]) == pairs
    assert read_tests('{"inputs": ["1", ["a", "b"]], "outputs": ["2", "c"]}') == pairs
    assert read_tests(None) == read_tests("") == read_tests([]) == []
    with pytest.raises(RewardError, match=r"'checks' must hold assert statements.*got '5'"):
        read_tests(5, "checks")
    with pytest.raises(RewardError, match="'checks' must hold as many outputs as inputs, got 1 for 2"):
        read_tests({"inputs": ["1", "2"], "outputs": ["1"]}, "checks")


def test_outputs_differ_in_more_than_trailing_space():
    assert same_output("1 2 \n3\n\n", "1 2\n3")
    assert not same_output("1  2\n", "1 2\n")
    assert not same_output("\n1", "1")


RIGHT = "```python\ndef square(x): return x * x\n```"
HALF = "```python\ndef square(x): return 4\n```"
TESTS = ["assert square(2) == 4", "assert square(3) == 9"]


def test_all_or_a_share_of_the_tests():
    completions = [RIGHT, HALF, "I do not know.", "```python\nimport os; os._exit(0)\n```", RIGHT, RIGHT]
    tests = [TESTS, TESTS, TESTS, TESTS, None, []]
    assert score(completions, tests=tests) == [1.0, 0.0, 0.0, 0.0, None, None]
    options = {"score_as": "share", "no_code": None}
    assert score(completions, options, tests=tests) == [1.0, 0.5, None, 0.0, None, None]


def test_programs_that_read_and_print():
    echo = "```python\nprint(int(input()) * 2)\n```"
    pairs = [{"input": "1\n", "output": "2\n"}, {"input": "4\n", "output": "8"}, {"input": "x", "output": ""}]
    assert score([echo, echo], tests=[pairs[:2], pairs]) == [1.0, 0.0]
    assert score([echo], {"score_as": "share"}, tests=[json.dumps(pairs)]) == [2 / 3]
    slow = "```python\nprint(2)\nwhile True: pass\n```"
    assert score([slow], {"seconds": 0.5}, tests=[pairs[:1]]) == [0.0]


def test_holes_are_no_zeros():
    broken, unfit = score([RIGHT] * 2, tests=[["assert ("], ["assert square(object()) == 4"]])
    assert isinstance(broken, Failed)
    assert broken.reason.startswith("test 1: SyntaxError")
    assert isinstance(unfit, Failed)
    assert "cannot travel" in unfit.reason


def test_options_are_checked_and_the_reward_travels():
    for options, message in (
        ({"sandbox": "unsafe"}, "allow_unsafe"),
        ({"sandbox": "monty"}, "a part of Python"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"processes": 0}, "processes must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward("code_tests", **options)
    reward = load_reward("code_tests")
    assert pickle.loads(pickle.dumps(reward)).score(make_samples([RIGHT], tests=[TESTS])) == [1.0]
    reward.close()
    assert load_reward("code_tests", entry_point="name", prefix="prompt_code").reads() == (
        "tests",
        "name",
        "prompt_code",
    )


def test_the_prompt_may_be_the_beginning_of_the_code():
    reward = load_reward("code_tests", prefix="prompt")
    assert reward.reads() == ("tests",)
    start = 'def add(a, b):\n    """Sum."""\n'
    prompts = [start, [{"role": "user", "content": start}]]
    samples = make_samples(
        ["    return a + b", "    return a - b"], prompts=prompts, tests=[["assert add(1, 2) == 3"]] * 2
    )
    assert reward.score(samples) == [1.0, 0.0]
    reward.close()


@pytest.fixture(scope="module")
def programs():
    """The script that makes what recipes/code-tests/cpu.yaml starts from."""
    file = Path(__file__).parents[1] / "recipes" / "code-tests" / "start.py"
    spec = importlib.util.spec_from_file_location("start", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_program_goes_from_left_to_right(programs):
    assert programs.expression([("+", 5), ("*", 2), ("-", 3)]) == "(x + 5) * 2 - 3"
    assert programs.expression([("+", 5), ("*", 2), ("-", 3)], parentheses=False) == "x + 5 * 2 - 3"
    assert programs.expression([("*", 2), ("*", 2)]) == "x * 2 * 2"


def test_programs_without_a_fault_pass_their_tests_in_the_sandbox(programs, monkeypatch):
    rng = random.Random(0)
    asked = [programs.operations(rng) for _ in range(4)] + [[("+", 3), ("*", 2)]]
    tests = [programs.tests(rng, todo) for todo in asked]
    for fault, wanted in ({"none": 1.0}, [1.0] * 5), ({"number": 1.0}, [0.0] * 5), ({"syntax": 1.0}, [0.0] * 5):
        monkeypatch.setattr(programs, "FAULTS", fault)
        assert score([programs.program(rng, todo) for todo in asked], tests=tests) == wanted


def wrapped_returns(code: str) -> str:
    """The code with every returned value in a list: wrong, but it runs."""

    class Wrap(ast.NodeTransformer):
        def visit_Return(self, node):
            return ast.Return(ast.List([node.value or ast.Constant(None)], ast.Load()))

    return ast.unparse(ast.fix_missing_locations(Wrap().visit(ast.parse(code))))


def rows_of(name: str, every: int) -> list[dict]:
    if not (DATA / name).is_file():
        pytest.skip(f"TRL_REWARDS_TEST_DATA has no {name}")
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()][::every]


@pytest.mark.slow
def test_humaneval_solutions_pass_and_wrong_ones_do_not():
    rows = rows_of("humaneval/HumanEval.jsonl", every=8)
    options = {"tests": "test", "entry_point": "name", "prefix": "start", "seconds": 20.0}
    columns = {name: [row[key] for row in rows] for name, key in (("test", "test"), ("name", "entry_point"))}
    columns["start"] = [row["prompt"] for row in rows]
    solutions = [row["canonical_solution"] for row in rows]
    assert score(solutions, options, **columns) == [1.0] * 21
    wrong = [wrapped_returns(row["prompt"] + row["canonical_solution"]) for row in rows]
    assert score([f"```python\n{code}\n```" for code in wrong], options, **columns) == [0.0] * 21


@pytest.mark.slow
def test_mbpp_solutions_pass_and_wrong_ones_do_not():
    rows = rows_of("mbpp_sanitized/mbpp.jsonl", every=20)
    options = {"test_setup": "imports", "seconds": 20.0}
    columns = {"tests": [row["test_list"] for row in rows], "imports": [row["test_imports"] for row in rows]}
    for change, wanted in ((str, 1.0), (wrapped_returns, 0.0)):
        completions = [f"```python\n{change(row['code'])}\n```" for row in rows]
        assert score(completions, options, **columns) == [wanted] * 20
