"""What Themis reads and writes: a question and an answer, then thoughts, tool calls, observations and a rationale.

https://huggingface.co/papers/2310.01045. The text is that of the released code, where the rationale is called "Work":

    ### USER:
    Question: What day of the week is 2015-03-24?
    Answer: 2015-03-24 is Tuesday
    ### ASSISTANT:
    <start_tool> Thought: I need to search what day of the week is 2015-03-24.
    Action: Calendar.week_day
    Action Input: 2015-03-24
    <start_observation> Observation: Tuesday
    <start_work> Work: The answer agrees with the tool.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

TOOL, OBSERVATION, WORK = "<start_tool>", "<start_observation>", "<start_work>"
MARKS = (TOOL, OBSERVATION, WORK)
NO_TOOL = "Thought: Do I need to use a tool? No\nFinished."

_MARK = re.compile("|".join(MARKS))
_STOP = re.compile(r"\n\t?Observation:")
_ACTION = re.compile(r"Action\s*\d*\s*:(.*?)Action\s*\d*\s*Input\s*\d*\s*:(.*)", re.DOTALL)
_THOUGHT = re.compile(r"Thought:[ \t]*(.*?)\s*(?=\bAction\s*\d*\s*:|\Z)", re.DOTALL)


class Action(NamedTuple):
    """A tool is to be called."""

    tool: str
    input: str


class Rationale(NamedTuple):
    """The end of a trajectory."""

    text: str


class Finished(NamedTuple):
    """No tool is needed; the rationale comes next."""

    text: str


def user_text(question: str, answer: str, context: str | None = None) -> str:
    """The part that is given. Marks in these texts, which would fake a trajectory, are taken out."""
    question, answer, context = without_marks(question), without_marks(answer), without_marks(context or "")
    before = f"Context: {context}\n" if context else ""
    return f"### USER:\n{before}Question: {question}\nAnswer: {answer}\n### ASSISTANT:\n"


def without_marks(text: str) -> str:
    """The text without the marks of Themis, also those that close up when others are taken out."""
    while _MARK.search(text):
        text = _MARK.sub("", text)
    return text


def cut(written: str) -> str:
    """What a model wrote, up to the observation, which is the tool's to say."""
    before, mark, _ = written.partition(OBSERVATION)
    return before if mark else _STOP.split(written, maxsplit=1)[0]


def parse(written: str) -> Action | Rationale | Finished | None:
    """What a cut text asks for: an action goes before a rationale, and that before the end of the tool calls.

    A rationale that follows an action belongs to its input.
    """
    if found := _ACTION.search(written):
        said = found[2].strip(" \t\n")
        return Action(found[1].strip(), said if said.startswith("SELECT ") else said.strip('"').strip())
    if "Work:" in written or WORK in written:
        return Rationale(written.replace(WORK, "").replace("Work:", "").strip())
    if "Finished" in written:
        return Finished(written.partition("Finished")[2].strip())
    return None


@dataclass
class Step:
    """One call of a tool."""

    thought: str
    tool: str
    input: str
    observation: str | None = None
    """None where no tool answers to the name: then the model goes on without."""
    seconds: float = 0.0


@dataclass
class Trajectory:
    """What a model and the tools have written about one answer.

    `take` and `observe` are called in turn, until `done` or until the caller has had enough: it is scored either way.
    """

    text: str
    """All of it, the given part first."""
    steps: list[Step] = field(default_factory=list)
    rationale: str | None = None
    finished: bool = False
    """Whether the model came to an end by itself."""
    done: bool = False

    @property
    def prompt(self) -> str:
        """What the model goes on from. A space at its end belongs to the next token."""
        return self.text.rstrip(" ")

    def take(self, written: str) -> Action | None:
        """Add what the model wrote; the call that it asks for, after which `observe` is due."""
        asked_why = self.text.endswith(f"{WORK} ")
        written = cut(written).lstrip(" ")
        said = parse(written)
        if isinstance(said, Action):
            thought = _THOUGHT.search(written)
            self.steps.append(Step(thought[1] if thought else "", said.tool, said.input))
            self.text += f"{written.rstrip()}\n{OBSERVATION} "
            return said
        if isinstance(said, Finished) and not asked_why:
            self.text += f"{written.rstrip()}\n{WORK} "
            return None
        self.text += written.rstrip()
        self.done = self.finished = True
        if isinstance(said, Rationale):
            self.rationale = said.text
        elif asked_why:
            self.rationale = written.strip()
        return None

    def observe(self, observation: str | None, seconds: float = 0.0) -> None:
        """Add what a tool said, None where there is no such tool. After a search of Wikipedia the rationale is due."""
        step = self.steps[-1]
        step.seconds = seconds
        if observation is None:
            return
        step.observation = without_marks(observation)
        self.text += f"Observation: {step.observation}\n"
        if "wiki" in step.tool.lower():
            self.text += f"{WORK} "


def begin(question: str, answer: str, context: str | None = None) -> Trajectory:
    """A trajectory of which nothing is written yet."""
    return Trajectory(f"{user_text(question, answer, context)}{TOOL} ")


def written_by(steps: list[Step], rationale: str | None = None, thought: str | None = None) -> str:
    """The part of the assistant, as models are trained on it, without the token that ends texts.

    `thought` comes after the last step, where there is one that ends in no action.
    """
    parts = [
        f"{TOOL} Thought: {step.thought}\nAction: {step.tool}\nAction Input: {step.input}\n"
        f"{OBSERVATION} Observation: {step.observation or ''}\n"
        for step in steps
    ]
    if thought is not None or not steps:
        parts.append(f"{TOOL} {thought or NO_TOOL}\n")
    if rationale is not None:
        parts.append(f"{WORK} Work: {rationale}")
    return "".join(parts)


def marked(trace: str) -> str:
    """A trace as TARA has it where it is one text, with its marks.

    Only a word at the beginning of a line opens a segment; the released code takes every one.
    """
    text = re.sub(r"\n{2,}", "\n", without_marks(trace)).replace("Thought: \n", "Thought: ").strip()
    text = re.sub(r"^Observation:", f"{OBSERVATION} Observation:", text, flags=re.MULTILINE)
    return re.sub(r"^Thought:", f"{TOOL} Thought:", text, flags=re.MULTILINE) + "\n"


Compat = Literal["paper", "release"]
Kind = Literal[0, 1, 2, 3]
IGNORED, ACTION, SEEN, REASON = 0, 1, 2, 3
"""Kinds of token: not learned, written to call a tool, an observation, the rationale."""


class Segment(NamedTuple):
    """A piece of a training text and what its tokens are."""

    text: str
    kind: int


def segments(
    question: str,
    answer: str,
    trace: str,
    eos: str,
    context: str | None = None,
    *,
    chosen: bool = False,
    compat: Compat = "paper",
) -> list[Segment]:
    """A training text in pieces; joined they are the text.

    `paper`: what is given is not learned, and all that follows the first mark is. `release`: as in the released
    training script, the header of the assistant is learned too, of a chosen row the answer as well, and where there
    is a context the end of it and the question, since the mask was measured without the context.
    """
    given = user_text(question, answer, context)
    header = "### ASSISTANT:\n"
    if compat == "paper":
        pieces = [Segment(given + TOOL, IGNORED)]
    else:
        learned = len(f"### USER:\nQuestion: {without_marks(question)}\n") if chosen else len(given) - len(header)
        pieces = [Segment(given[:learned], IGNORED), Segment(given[learned:] + TOOL, ACTION)]
    kind, rest = ACTION, trace.removeprefix(TOOL)
    while rest:
        mark = _MARK.search(rest)
        if mark is None:
            pieces.append(Segment(rest, kind))
            break
        pieces.append(Segment(rest[: mark.start()], kind))
        rest = rest[mark.end() :]
        # The model writes the mark that asks for an observation, and the one that begins the rationale.
        pieces.append(Segment(mark[0], REASON if mark[0] == WORK else ACTION))
        kind = {TOOL: ACTION, OBSERVATION: SEEN, WORK: REASON}[mark[0]]
    if eos:
        pieces.append(Segment(eos, REASON if kind == REASON else ACTION))
    return [piece for piece in pieces if piece.text]
