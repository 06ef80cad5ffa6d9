"""What the policy produced: one row per completion, plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from trl_rewards.errors import did_you_mean

Message = dict[str, Any]  # {"role": …, "content": …}, as in chat datasets
Text = str | list[Message]


@dataclass(frozen=True)
class Failed:
    """A score that could not be found: a hole, never a number. `reason` is shown to the user."""

    reason: str
    status: Literal["failed", "timeout"] = "failed"
    trace: Any = field(default=None, repr=False, compare=False)
    """How far it came, as in `Traced`."""


class Traced(float):
    """A score that says how it came about: a number like any other, with a `trace` for people to read.

    `trace` is what JSON can say, such as the calls of tools before the score. Rewards that give such scores set
    `traces = True`; `trl-rewards score --trace` and the report of a run show them.
    """

    trace: Any

    def __new__(cls, score: float, trace: Any) -> Self:
        made = super().__new__(cls, score)
        made.trace = trace
        return made

    def __reduce__(self) -> tuple[type[Traced], tuple[float, Any]]:
        return Traced, (float(self), self.trace)


@dataclass(frozen=True)
class Samples:
    """The rows that a component reads. No tensors, so it pickles and tests in microseconds."""

    prompts: list[Text]
    """One per row, as the dataset has it: a string, or a list of chat messages."""
    completions: list[Text]
    """One per row: a string, or the list of messages that the policy added (tool calls included)."""
    completion_ids: list[list[int]] = field(default_factory=list)
    """Token ids of each completion; empty where nobody tokenised (offline scoring without a tokenizer)."""
    columns: Mapping[str, list] = field(default_factory=dict)
    """Dataset columns, one value per row."""
    group_size: int | None = None
    """G when rows gG … gG+G-1 share a prompt; None when rows of a group may be elsewhere: then do not look."""
    step: int = 0
    """Optimiser steps done."""
    max_steps: int = 0
    """Steps the run will make; 0 when unknown."""

    def __post_init__(self):
        n = len(self.prompts)
        sizes = {"completions": len(self.completions)} | {name: len(values) for name, values in self.columns.items()}
        if self.completion_ids:
            sizes["completion_ids"] = len(self.completion_ids)
        for name, size in sizes.items():
            if size != n:
                raise ValueError(f"{name} has {size} rows, but there are {n} prompts")
        if self.group_size and n % self.group_size:
            raise ValueError(f"{n} rows do not divide into groups of {self.group_size}")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, column: str) -> list:
        """The values of a dataset column, one per row; KeyError names the columns there are."""
        try:
            return self.columns[column]
        except KeyError:
            there = ", ".join(self.columns) or "none"
            hint = did_you_mean(column, self.columns)
            raise KeyError(f"no column {column!r}{hint} (columns: {there}; declare it in `columns`)") from None

    @property
    def texts(self) -> list[str]:
        """Each completion as text: the string itself, or what the last assistant message says."""
        return [completion_text(completion) for completion in self.completions]

    @property
    def prompt_texts(self) -> list[str]:
        """Each prompt as text: the string itself, or the contents of its messages, one per line."""
        return [
            prompt if isinstance(prompt, str) else "\n".join(content_text(message) for message in prompt)
            for prompt in self.prompts
        ]

    @property
    def lengths(self) -> list[int]:
        """Completion lengths in tokens; ValueError where there are no token ids."""
        if len(self.completion_ids) != len(self):
            raise ValueError("these samples have no token ids: give a tokenizer (model_name_or_path) to count tokens")
        return [len(ids) for ids in self.completion_ids]

    def take(self, rows: Iterable[int], group_size: int | None = None) -> Samples:
        """The chosen rows as Samples of their own; `group_size` says what is known of their grouping."""
        rows = list(rows)
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            completions=[self.completions[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows] if self.completion_ids else [],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            group_size=group_size,
        )

    def only(self, columns: Iterable[str]) -> Samples:
        """The same rows with the named columns alone (`*`: all): a component sees what it declares to read."""
        wanted = list(columns)
        if "*" in wanted:
            return self
        return replace(self, columns={name: self.columns[name] for name in wanted if name in self.columns})

    def missing(self, columns: Iterable[str]) -> list[str]:
        """Which of the named columns are not there."""
        return [name for name in columns if name != "*" and name not in self.columns]

    @classmethod
    def concatenate(cls, parts: list[Samples], group_size: int | None = None) -> Samples:
        """Rows of all parts in order, as after a gather; columns must be the same in each."""
        return replace(
            parts[0],
            prompts=[prompt for part in parts for prompt in part.prompts],
            completions=[completion for part in parts for completion in part.completions],
            completion_ids=[ids for part in parts for ids in part.completion_ids],
            columns={name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns},
            group_size=group_size,
        )


def content_text(message: Message) -> str:
    """The text of one message; image and other blocks are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content if block.get("type") == "text")


def completion_text(completion: Any) -> str:
    """A completion as text: the string, or the last assistant message's content (after tool turns, the answer).

    A missing one (None, or pandas' NaN) is empty.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list):
        return ""
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return content_text(message)
    return ""


def as_completion(value: Any, prompt: Text) -> Text:
    """A dataset's value as a completion of `prompt`: chat prompts have chat completions; None is empty."""
    if isinstance(value, list):
        return value
    text = "" if value is None else str(value)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
