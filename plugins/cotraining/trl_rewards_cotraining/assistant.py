"""Cooper's assistant: a language model that rewrites a right answer into a wrong one.

https://huggingface.co/papers/2508.05613
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from trl_rewards import Context, Failed
from trl_rewards.models import Asker, ChatOptions, Request, without_thinking

SYSTEM = (
    "You write wrong solutions that a checker of solutions is trained to see through. The user gives a problem and a "
    "right solution. Write another solution of about the same length and in the same form, tags included, which looks "
    "plausible, goes wrong on the way, and ends with a wrong answer. Never mention that it is wrong. Write the "
    "solution alone."
)


class Right(NamedTuple):
    """What is to be rewritten."""

    question: str
    answer: str


class Assistant(ChatOptions):
    """The language model that rewrites right answers into wrong ones; with `endpoint` on a server, else in this
    process."""

    temperature: float = 0.7
    on_budget: Literal["stop", "abstain"] = "abstain"
    """When a budget is spent: go on without pairs, or stop the run."""
    tries: int = 3
    """How often a rewrite is asked for until it is wrong."""

    def __post_init__(self):
        super().__post_init__()
        if self.tries < 1:
            raise ValueError(f"tries must be at least 1, got {self.tries}")
        self._asker: Asker | None = None

    def setup(self, context: Context) -> None:
        self._asker = Asker(self, context)

    def close(self) -> None:
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    def rewrites(
        self, rights: Sequence[Right], are_wrong: Callable[[dict[int, str]], set[int]]
    ) -> tuple[list[str | None], Counter[str]]:
        """A wrong answer for each right one; None where there was none after `tries`.

        `are_wrong` says which of some rewrites, by their index, the rule finds wrong. Counts `no_reply` (of a server
        that failed, which has been asked often enough), `cut` (or refused) and `not_wrong`, once for each try.
        """
        asker = self._asker
        assert asker is not None
        found: list[str | None] = [None] * len(rights)
        counts: Counter[str] = Counter()
        waiting = list(range(len(rights)))
        for attempt in range(self.tries):
            if not waiting:
                break
            replies = asker.replies([self._request(rights[index], attempt) for index in waiting])
            there: dict[int, str] = {}
            again = []
            for index, reply in zip(waiting, replies, strict=True):
                if isinstance(reply, Failed):
                    counts["no_reply"] += 1
                elif reply.finish != "stop" or not (text := without_thinking(reply.text)):
                    counts["cut"] += 1
                    again.append(index)
                else:
                    there[index] = text
            wrong = are_wrong(there) if there else set()
            for index, text in there.items():
                if index in wrong:
                    found[index] = text
                else:
                    counts["not_wrong"] += 1
                    again.append(index)
            waiting = sorted(again)
        asker.finish()
        return found, counts

    def _request(self, right: Right, attempt: int) -> Request:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Problem:\n{right.question}\n\nRight solution:\n{right.answer}"},
        ]
        return Request(
            model=self.model,
            messages=messages,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            seed=None if self.seed is None else self.seed + attempt,
            extra=dict[str, Any](self.extra_body),
            schema=None,
            attempt=attempt,
        )
