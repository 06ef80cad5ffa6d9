"""Running tools: which one a model means, many calls at the same time, deadlines, and failures as words."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from trl_rewards.components import Context, Tool, ToolCall
from trl_rewards.errors import ToolError

logger = logging.getLogger(__name__)

NO_RESULT = "An error occurred during the tool invoke, so no result was returned."
"""What a model reads where a tool raised or took too long: Themis's sentence."""


class Observation(NamedTuple):
    """What came of a call."""

    text: str
    """What the model reads."""
    ok: bool
    """False where the tool failed."""
    seconds: float
    problem: str = ""
    """Why it failed, for people: the exception, or the deadline."""


class Toolbox:
    """Some tools, to be called by the names that a model writes."""

    def __init__(self, tools: Sequence[Tool], concurrency: int = 16):
        """At most `concurrency` calls run at a time. ValueError if two tools claim a name."""
        self._tools = list(tools)
        self._concurrency = concurrency
        for tool in self._tools:
            for name in (tool.display_name, *tool.answers_to):
                claimed = [other.display_name for other in self._tools if other.answers(name)]
                if len(claimed) > 1:
                    raise ValueError(f"tools {' and '.join(map(repr, claimed))} both answer to {name!r}")

    @property
    def tools(self) -> list[Tool]:
        return list(self._tools)

    def setup(self, context: Context) -> None:
        """Set up every tool. It raises what a tool raises, so that a missing index or key is heard of early."""
        for tool in self._tools:
            tool.setup(context)

    def close(self) -> None:
        """Close every tool."""
        for tool in self._tools:
            tool.close()

    def reads(self) -> tuple[str, ...]:
        """Dataset columns that the tools read."""
        return tuple(dict.fromkeys(column for tool in self._tools for column in tool.reads()))

    def find(self, name: str) -> Tool | None:
        """The tool that answers to this name; None if none does."""
        return next((tool for tool in self._tools if tool.answers(name)), None)

    def run(self, calls: Sequence[tuple[str, ToolCall]]) -> list[Observation | None]:
        """What came of each (input, call), in order; None where no tool answers to the call's name. Never raises.

        A call past its tool's deadline is given up: its thread is left behind.
        """
        found: list[Observation | None] = [None] * len(calls)
        tools = [self.find(call.name) for _, call in calls]
        todo = deque(index for index, tool in enumerate(tools) if tool)
        running: dict[int, tuple[Tool, float]] = {}  # index -> tool, start
        done: queue.SimpleQueue[tuple[int, Observation]] = queue.SimpleQueue()
        while todo or running:
            while todo and len(running) < self._concurrency:
                index = todo.popleft()
                tool = tools[index]
                assert tool is not None
                running[index] = tool, time.monotonic()
                name = f"tool-{tool.display_name}"
                # A daemon: the executors of concurrent.futures wait for their threads when the interpreter ends.
                threading.Thread(target=_work, args=(done, index, tool, *calls[index]), name=name, daemon=True).start()
            nearest = min(started + tool.timeout for tool, started in running.values())
            try:
                index, observation = done.get(timeout=max(nearest - time.monotonic(), 0.0))
            except queue.Empty:
                now = time.monotonic()
                for index, (tool, started) in list(running.items()):
                    if now >= started + tool.timeout:
                        del running[index]
                        problem = f"no result within {tool.timeout:g} s"
                        found[index] = Observation(NO_RESULT, False, now - started, problem)
            else:
                if running.pop(index, None):  # else it came after its deadline
                    found[index] = observation
        return found


def _work(
    done: queue.SimpleQueue[tuple[int, Observation]], index: int, tool: Tool, input: str, call: ToolCall
) -> None:
    started = time.monotonic()
    ok, problem = False, ""
    try:
        text = tool.call(input, call)
        if not isinstance(text, str):
            raise TypeError(f"it returned {type(text).__name__}, not str")
        text = text.encode(
            "utf-8", "replace"
        ).decode()  # half an emoji, as servers cut them, is no text to a tokenizer
        ok = True
    except ToolError as error:
        text = str(error)
        problem = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else text
    except BaseException as error:  # SystemExit too: the caller waits for every call's end
        text, problem = NO_RESULT, f"{type(error).__name__}: {error}"
        logger.info("tool %r failed", tool.display_name, exc_info=True)
    done.put((index, Observation(text, ok, time.monotonic() - started, problem)))
