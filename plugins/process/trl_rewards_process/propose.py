"""Asks a language model for a function of latent factors, and writes it for review.  https://huggingface.co/papers/2412.11120

    python -m trl_rewards_process.propose --task "Word problems; the answer is a number." \\
        --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-32B --out factors.py

As the paper has it: several candidates at temperature 1, one call at 0.3 that makes one function of them, and up to
five more where it does not run. Code is run in the sandbox alone, never in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Sequence

from trl_rewards import RewardError
from trl_rewards.models import HttpClient, HttpFailure
from trl_rewards.sandbox import Sandbox, open_sandbox, run_tests
from trl_rewards_process.factors import CONFINED

CANDIDATES_TEMPERATURE, SUMMARY_TEMPERATURE = 1.0, 0.3
_SYSTEM = """\
You design features for credit assignment. An assistant answers questions in steps, and is told at the end how good \
its answer is. A small network shall learn from that what each step was worth, and it sees of a step only the numbers \
that your function gives: its latent factors.

Write one Python function, in one fenced code block, with the standard library only:

def factors(question: str, steps: list[str]) -> list[list[float]]:
    ...

`steps` are the steps of one answer, in order. It returns one list per step, always of the same length, with finite \
numbers of about -1 to 1: what tells a useful step from a useless or harmful one in this task, such as whether it is \
right, goes on from what was there, or repeats it. No text may make it raise. It must be quick and give the same \
numbers each time, and it may not read files or use a network. Say in a comment what each factor is."""
_SUMMARY = """\
Here are several proposals. Make one function of them that has all their good factors, each once, and any important \
one that they miss. Answer with one fenced code block.

{proposals}"""
_REPAIR = """\
Your function was run on examples and failed:

{problem}

Answer with the whole corrected function in one fenced code block."""
_FENCE = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)```", re.DOTALL)
_CHECK = """
import math

QUESTION = "Tom has 3 apples and buys 4 more. How many has he?"
ROWS = [
    ["Tom starts with 3 apples.", "3 + 4 = 7", "The answer is 7."],
    ["7"],
    ["x" * 3000, "", "Größe 山 🙂 {} %s \\\\ <step>", "1 / 0 = ?"],
    ["the same step"] * 40,
]

def check(factors):
    widths = set()
    for steps in ROWS:
        found = factors(QUESTION, list(steps))
        assert isinstance(found, list) and all(isinstance(row, (list, tuple)) for row in found), (
            "it must return a list of lists, got " + repr(found)[:200])
        assert len(found) == len(steps), f"{len(found)} lists of factors for {len(steps)} steps"
        numbers = [value for row in found for value in row]
        assert all(isinstance(value, (int, float)) for value in numbers), "a factor is no number: " + repr(found)[:200]
        assert all(math.isfinite(value) for value in numbers), "a factor is infinite or not a number"
        widths |= {len(row) for row in found}
        assert factors(QUESTION, list(steps)) == found, "it gives other numbers the second time"
    assert len(widths) == 1 and widths != {0}, f"lists of different lengths, or empty ones: {sorted(widths)}"
"""


def code_in(reply: str) -> str:
    """The last fenced block of a reply after its thinking; all of it where there is none."""
    said = reply.rpartition("</think>")[2]
    blocks = _FENCE.findall(said)
    return (blocks[-1] if blocks else said).strip() + "\n"


def problem_of(sandbox: Sandbox, code: str, seconds: float = 10.0) -> str | None:
    """Why a function of factors cannot be used, found by running it on examples in the sandbox; None if it can.
    RewardError where the sandbox itself fails."""
    (result,) = run_tests(sandbox, code, ["check(candidate)"], seconds, setup=_CHECK, entry_point="factors")
    if result.status == "infra":
        raise RewardError(f"the sandbox failed: {result.message}")
    return None if result.status == "passed" else f"{result.status}: {result.message}"


class Model:
    """A language model behind an OpenAI-compatible server."""

    def __init__(self, endpoint: str, name: str, api_key_env: str | None, max_tokens: int):
        self._client = HttpClient(endpoint, api_key_env=api_key_env, timeout=600.0)
        self._name, self._max_tokens = name, max_tokens

    async def replies(self, messages: list[dict[str, str]], temperature: float, count: int = 1) -> list[str]:
        """RewardError where the server gives none."""
        body = {
            "model": self._name,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": self._max_tokens,
        }
        try:
            answers = await asyncio.gather(*(self._client.post("/chat/completions", body) for _ in range(count)))
            return [answer["choices"][0]["message"]["content"] or "" for answer in answers]
        except HttpFailure as failure:
            raise RewardError(f"no reply: {failure}") from failure
        except (KeyError, IndexError, TypeError) as error:
            raise RewardError(f"the server's answer holds no reply: {error!r}") from error

    async def close(self) -> None:
        await self._client.aclose()


async def propose(model: Model, sandbox: Sandbox, task: str, candidates: int = 5, repairs: int = 5) -> str:
    """The source of a function of factors that has run on examples. RewardError if none did after `repairs`."""
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": f"The task: {task}"}]
    replies = await model.replies(messages, CANDIDATES_TEMPERATURE, candidates)
    reply = replies[0]
    if candidates > 1:
        proposals = "\n\n".join(f"```python\n{code_in(each)}```" for each in replies)
        messages.append({"role": "user", "content": _SUMMARY.format(proposals=proposals)})
        (reply,) = await model.replies(messages, SUMMARY_TEMPERATURE)
    problem = None
    for attempt in range(repairs + 1):
        code = code_in(reply)
        problem = problem_of(sandbox, code)
        if problem is None:
            return code
        if attempt < repairs:
            said = {"role": "assistant", "content": f"```python\n{code}```"}
            asked = [*messages, said, {"role": "user", "content": _REPAIR.format(problem=problem)}]
            (reply,) = await model.replies(asked, SUMMARY_TEMPERATURE)
    raise RewardError(f"no function that runs after {repairs} repairs; the last one: {problem}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trl_rewards_process.propose",
        description="Ask a language model for a function of latent factors, run it in a sandbox, write it for review.",
    )
    parser.add_argument("--task", required=True, help="what is asked and what a good answer is, in words")
    parser.add_argument("--endpoint", required=True, help="an OpenAI-compatible server, http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--out", required=True, help="Python file to write; one that is there is kept")
    parser.add_argument("--api-key-env", help="environment variable with the API key")
    parser.add_argument("--candidates", type=int, default=5, help="proposals of which one function is made")
    parser.add_argument("--repairs", type=int, default=5, help="calls to mend a function that does not run")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a reply")
    parser.add_argument("--sandbox", default="auto", choices=CONFINED)
    given = parser.parse_args(arguments)
    if given.candidates < 1 or given.repairs < 0 or given.max_tokens < 1:
        parser.error("candidates and max-tokens must be at least 1, and repairs at least 0")
    if os.path.exists(given.out):
        parser.error(f"--out: {given.out} is there already, and may be what you have reviewed; give another name")

    async def run() -> str:
        model = Model(given.endpoint, given.model, given.api_key_env, given.max_tokens)
        try:
            with open_sandbox(given.sandbox) as sandbox:
                return await propose(model, sandbox, given.task, given.candidates, given.repairs)
        finally:
            await model.close()

    try:
        code = asyncio.run(run())
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with open(given.out, "x", encoding="utf-8") as file:
        file.write(f"# Latent factors of steps, written by {given.model!a} and reviewed by nobody yet.\n")
        file.write(f"# Task: {given.task!a}\n\n{code}")
    print(f"{given.out}: read it, then name it in a recipe: factors: [{given.out}:factors]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
