"""Mathematical equality with a reference answer, by math-verify in processes that can be killed."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

from trl_rewards.components import Context, Reward, Score
from trl_rewards.samples import Samples
from trl_rewards.workers import WorkerPool


class Accuracy(Reward):
    """1.0 where the answer equals the reference mathematically (`0.5` and `\\frac{1}{2}` are equal), else 0.0.

    None where the reference answer cannot be parsed. A row that takes longer than `seconds` is a hole, not a wrong
    answer. math-verify (https://github.com/huggingface/Math-Verify) parses LaTeX and plain expressions; it runs in
    worker processes, because its own time-outs need the main thread and a hang of sympy's stops every thread.
    """

    answer: str = "answer"
    """Dataset column with the reference: an expression, LaTeX, or a worked solution that ends with `#### answer`."""
    seconds: float = 5.0
    """Time for one row."""
    processes: int = 2
    """Worker processes."""

    def __post_init__(self):
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError('accuracy needs math-verify: pip install "trl-rewards[math]"')
        if self.seconds <= 0 or self.processes < 1:
            raise ValueError(f"seconds and processes must be above 0, got {self.seconds} and {self.processes}")
        self._pool: WorkerPool | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.answer,)

    def setup(self, context: Context) -> None:
        if self._pool is None:
            processes = min(self.processes, os.cpu_count() or 1)
            self._pool = WorkerPool("trl_rewards.defaults.accuracy:verifier", size=processes)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def score(self, samples: Samples) -> list[Score]:
        self.setup(Context())
        assert self._pool is not None
        pairs = [
            (None if reference is None else str(reference), text)
            for reference, text in zip(samples[self.answer], samples.texts, strict=True)
        ]
        return self._pool.map(pairs, timeout=self.seconds)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}


def final_answer(reference: str) -> str:
    """What follows the last `####` of a GSM8K-style solution, or all of it."""
    return reference.rpartition("####")[2].strip()


def inner_answer(text: str) -> str:
    """What stands in the last pair of answer tags, or the text."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[-1] if found else text


def verifier() -> Callable[[tuple[str | None, str]], float | None]:
    """Built in a worker: (reference, completion) -> 1.0, 0.0, or None if the reference says nothing."""
    import logging

    import math_verify
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]

    # math-verify's own time-outs are off (None): this process is killed from outside instead.
    no_limit: Any = None

    def parse(text: str) -> list:
        return math_verify.parse(text, configs, parsing_timeout=no_limit)

    @functools.lru_cache(maxsize=4096)
    def parsed(reference: str) -> tuple:
        # A bare `\frac{1}{2}` is only seen as LaTeX inside dollar signs.
        answer = final_answer(reference)
        return tuple(parse(answer) or parse(f"${answer}$"))

    def check(pair: tuple[str | None, str]) -> float | None:
        reference, text = pair
        gold = parsed(reference) if reference else ()
        if not gold:
            return None
        return float(math_verify.verify(list(gold), parse(inner_answer(text)), timeout_seconds=no_limit))

    return check
