"""Themis: a reward model that asks tools before it scores.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Context, Failed, Samples, Score
from trl_rewards.models import Held, InProcess, without_thinking
from trl_rewards_themis.calling import Row, ToolEntries, ask_tools, measures, rows_of, toolbox_of, traced
from trl_rewards_themis.trajectory import Action, Trajectory, begin

if TYPE_CHECKING:
    from trl_rewards.models import Scorer
    from trl_rewards_themis.writing import Writer


class Themis(InProcess):
    """How good an answer is, after calling tools: the model writes thoughts and tool calls, tools answer, it says why,
    and a scalar head reads the end. Unbounded; the paper's examples are between -25 and 39.

    The model is one causal language model with a scalar head, as its authors released it (`ernie-research/Themis-7b`)
    or as objective `themis` leaves it. All rows take their steps together: the model writes the next piece of each, a
    row stops where it asks for an observation, and the tools of all rows run at the same time. `trl-rewards score
    --trace` and a run's report show the trajectories.

    https://huggingface.co/papers/2310.01045
    """

    traces = True

    path: str
    """Folder or Hub name of the reward model."""
    tools: ToolEntries = field(default_factory=list)
    """Names, or mappings such as `{use: wiki_search, with: {index: wiki.sqlite}}`; `trl-rewards list tool` has all.
    Where the model calls one that is not there it gets no observation, and goes on by itself."""
    max_iterations: int = 3
    """Pieces that the model writes: calls of tools, and the rationale. What is unfinished then is scored as it is."""
    max_new_tokens: int = 1024
    """Tokens of one piece."""
    temperature: float = 0.0
    """0 writes what is likeliest."""
    pooling: Literal["last", "mean"] = "last"
    """What the head reads: the last hidden state, or the mean of all."""
    question: str | None = None
    """Dataset column with the question; None: the prompt."""
    context: str | None = None
    """Dataset column with a text that the question is about, such as one in another language."""
    drop_thinking: bool = False
    """Leave out what an answer says up to `</think>`."""
    max_length: int = 2048
    """Tokens of question, answer and trajectory together; a longer one fails."""
    token_budget: int | None = None
    """Padded tokens of a batch. None: what fits the device; halved when memory runs out."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_iterations", "max_new_tokens", "max_length", "token_budget"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        self._toolbox = toolbox_of(self.tools)
        self._context = Context()
        self._running: tuple[Writer, Scorer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_running": None, "_context": Context()}  # a copy loads its own model

    def reads(self) -> tuple[str, ...]:
        own = (name for name in (self.question, self.context) if name)
        return tuple(dict.fromkeys([*own, *self._toolbox.reads()]))

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        from trl_rewards_themis.writing import load

        self._context = context
        self._toolbox.setup(context)
        self._running = load(
            self.loading(self.path, context),
            pooling=self.pooling,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            token_budget=self.token_budget,
        )

    def close(self) -> None:
        self._toolbox.close()
        self._running = None

    def score(self, samples: Samples) -> list[Score]:
        if self._running is None:
            self.setup(Context())
        assert self._running is not None
        writer, scorer = self._running
        answers = [without_thinking(text) if self.drop_thinking else text for text in samples.texts]
        given = rows_of(samples, answers, self.question, self.context, self._toolbox)
        trajectories = [begin(row.question, row.answer, row.context) for row in given]
        failed = self._write(writer, given, trajectories)
        rows = [row for row in range(len(samples)) if row not in failed]
        scores: dict[int, float | Failed] = dict(failed)
        ends = scorer.tokenizer.eos_token
        texts = [trajectories[row].prompt + ends for row in rows]
        scores |= zip(rows, scorer.score_texts(texts, add_special_tokens=True), strict=True)
        if log_metric := self._context.log_metric:
            for name, value in measures(trajectories).items():
                log_metric(f"{self.display_name}/{name}", value)
        return [traced(trajectory, scores[row]) for row, trajectory in enumerate(trajectories)]

    def _write(self, writer: Writer, given: list[Row], trajectories: list[Trajectory]) -> dict[int, Failed]:
        """Let all rows take their steps; rows that cannot go on, and why."""
        failed: dict[int, Failed] = {}
        for _ in range(self.max_iterations):
            rows = [row for row, each in enumerate(trajectories) if not each.done and row not in failed]
            asked: list[tuple[Row, Trajectory, Action]] = []
            for row, text in zip(rows, writer.write([trajectories[row].prompt for row in rows]), strict=True):
                if isinstance(text, Failed):
                    failed[row] = text
                elif action := trajectories[row].take(text):
                    asked.append((given[row], trajectories[row], action))
            ask_tools(self._toolbox, asked)
        return failed
