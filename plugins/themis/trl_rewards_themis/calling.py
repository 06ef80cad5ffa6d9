"""The tools of a reward: named in YAML, called for many trajectories at a time.
https://huggingface.co/papers/2310.01045
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_rewards import Failed, PluginError, RecipeError, Samples, Score, ToolCall, Traced, load_tool
from trl_rewards.toolbox import Toolbox
from trl_rewards_themis.trajectory import Action, Trajectory

ToolEntries = list[str | dict[str, Any]]


def toolbox_of(entries: ToolEntries) -> Toolbox:
    """The tools that `tools:` names: names, or mappings with `use` and options under `with`. ValueError has every
    problem."""
    tools, problems = [], []
    for index, entry in enumerate(entries):
        given = {"use": entry} if isinstance(entry, str) else entry
        if not {"use"} <= set(given) <= {"use", "with"} or not isinstance(given.get("with") or {}, dict):
            problems.append(f"tools[{index}]: wanted a name, or {{use: name, with: {{…}}}}, got {entry!r}")
            continue
        try:
            tools.append(load_tool(given["use"], **(given.get("with") or {})))
        except RecipeError as error:
            problems += [f"tools[{index}]: {problem}" for problem in error.problems]
        except (ValueError, PluginError) as error:
            problems.append(f"tools[{index}]: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return Toolbox(tools)


class Row(NamedTuple):
    """What is judged, and what tools may read of it."""

    question: str
    answer: str
    context: str | None
    columns: dict[str, Any]


def rows_of(
    samples: Samples, answers: Sequence[str], question: str | None, context: str | None, toolbox: Toolbox
) -> list[Row]:
    """`question` and `context` are columns; without the first the prompt is the question."""
    questions = [str(value) for value in samples[question]] if question else samples.prompt_texts
    contexts = samples[context] if context else [None] * len(samples)
    columns = {name: samples[name] for name in toolbox.reads()}
    return [
        Row(*given, {name: values[index] for name, values in columns.items()})
        for index, given in enumerate(zip(questions, answers, contexts, strict=True))
    ]


def ask_tools(toolbox: Toolbox, asked: Sequence[tuple[Row, Trajectory, Action]]) -> None:
    """Call a tool for each, all at the same time, and add what they say to the trajectories."""
    calls = [
        (action.input, ToolCall(action.tool, trajectory.text, row.question, row.answer, row.columns))
        for row, trajectory, action in asked
    ]
    for (_, trajectory, _), found in zip(asked, toolbox.run(calls), strict=True):
        trajectory.observe(found.text if found else None, found.seconds if found else 0.0)


def traced(trajectory: Trajectory, score: Score) -> Score:
    """A score with the trajectory that led to it; Failed for what is no number."""
    trace = {
        "steps": [vars(step) | {"seconds": round(step.seconds, 4)} for step in trajectory.steps],
        "rationale": trajectory.rationale,
        "finished": trajectory.finished,
    }
    if score is None or isinstance(score, Failed):
        return score and Failed(score.reason, score.status, trace)
    return Traced(score, trace) if math.isfinite(score) else Failed(f"the model's score is {score}", trace=trace)


def measures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Per row, as they are logged: tool calls, of them those that no tool answered to, and who came to an end."""
    count = max(len(trajectories), 1)
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    return {
        "tool_calls": len(steps) / count,
        "unknown_tools": sum(step.observation is None for step in steps) / count,
        "finished": sum(trajectory.finished for trajectory in trajectories) / count,
    }
