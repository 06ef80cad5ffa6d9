"""A scalar reward model, by folder or Hub name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards.components import Context, Score, resolve_path
from trl_rewards.errors import RewardError
from trl_rewards.models.options import Held, InProcess
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from trl_rewards.models.scorer import Scorer
    from trl_rewards.models.shared_base import Member


class Model(InProcess):
    """The scalar score of a reward model for prompt and completion. Unbounded.

    Chat prompts go through the reward model's own chat template, plain ones are joined to the completion. What rows
    have in common, such as the prompt of a group, is computed once where that pays.
    """

    path: str | None = None
    """Folder or Hub name: a sequence classifier, a model with a value head, or (`head: yes`) a causal LM. Left out:
    `adapter`, trained on the policy's own base, runs on that base in memory (`share_base: true`)."""
    max_length: int | None = None
    """Tokens of prompt and completion together. None: what model and tokenizer allow."""
    truncate: Literal["prompt_head", "prompt_tail", "refuse"] = "prompt_head"
    """What goes of a longer text: the prompt's beginning, its end, or nothing (the row fails). Where the prompt is not
    enough the completion's beginning goes: its end holds the answer and the token that the score is read at."""
    token_budget: int | None = None
    """Tokens in one forward pass, padding included: what bounds memory. None: 16384, on a CPU 4096. Halved when memory
    runs out."""
    prefix_reuse: Literal["auto", "on", "off"] = "auto"
    """Compute a prefix that rows have in common (the prompt of a group) once. `auto`: where it saves enough and the
    model can do it; `on`: everywhere, and an error where it cannot."""
    head: Literal["auto", "classifier", "v_head", "yes"] = "auto"
    """`yes`: a causal LM is asked `question` after the completion, and its answer is the score.
    https://huggingface.co/papers/2408.15240"""
    output: int | str | dict[int | str, float] | None = None
    """For a model with several outputs: which is the score, by index or label, or the weight of each."""
    question: str = "Is the answer correct (Yes/No)?"
    """What `head: yes` asks, in a user's turn for chat prompts and on a line of its own for plain ones."""
    yes_token: str = "Yes"
    no_token: str = "No"
    yes_score: Literal["logit", "probability"] = "logit"
    """Logit of yes_token less that of no_token, or p(yes) / (p(yes) + p(no)), in [0, 1]."""

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("max_length", self.max_length), ("token_budget", self.token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.path is None and self.adapter is None:
            raise ValueError("path is required (folder or Hub name); or an adapter, on the policy's base")
        if self.path is None and self.head != "auto":
            raise ValueError(f"head: an adapter on the policy's base brings its head; {self.head!r} needs a path")
        if self.head == "yes" and self.output is not None:
            raise ValueError("output chooses among a classifier's outputs; head 'yes' has one")
        self._context = Context()
        self._scorer: Scorer | None = None
        self._member: Member | None = None

    def shares_base(self) -> bool:
        return self.path is None

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        from trl_rewards.models.scorer import load_scorer

        self._context = context
        # Where somebody runs it (a trainer, the command line) there is a bar already.
        progress = context.log_metric is None and context.device is None
        if self.path is None:
            if context.shared_base is not None:
                assert self.adapter is not None
                self._member = context.shared_base.add(
                    resolve_path(self.adapter, context.base_dir),
                    revision=self.revision,
                    output=self.output,
                    max_length=self.max_length,
                    truncate=self.truncate,
                    token_budget=self.token_budget,
                    prefix_reuse=self.prefix_reuse,
                    progress=progress,
                )
            return
        self._scorer = load_scorer(
            self.loading(self.path, context),
            head=self.head,
            output=self.output,
            yes_token=self.yes_token,
            no_token=self.no_token,
            yes_score=self.yes_score,
            token_budget=self.token_budget,
            max_length=self.max_length,
            truncate=self.truncate,
            prefix_reuse=self.prefix_reuse,
            progress=progress,
        )

    def close(self) -> None:
        self._scorer = self._member = None

    def score(self, samples: Samples) -> list[Score]:
        from trl_rewards.models.encoding import completion_start, shown_text

        scorer = self._ready_scorer()
        path, question = self.path or self.adapter or "", self.question if self.head == "yes" else None
        texts = [
            shown_text(scorer.tokenizer, prompt, completion, path, question)
            for prompt, completion in zip(samples.prompts, samples.completions, strict=True)
        ]

        def start(row: int) -> int:
            return completion_start(scorer.tokenizer, samples.prompts[row], texts[row], path)

        plain = all(isinstance(prompt, str) for prompt in samples.prompts)
        scores = scorer.score_texts(texts, plain, start)
        if self._context.log_metric:
            for name, value in scorer.metrics.items():
                self._context.log_metric(f"{self.display_name}/{name}", value)
        return list(scores)

    def _ready_scorer(self) -> Scorer:
        if self._member is not None and self._member.scorer is not None:
            return self._member.scorer
        if self.path is None:
            raise RewardError(
                f"{self.display_name!r} has an adapter and no path: it runs on the policy's base, in a trainer of "
                "trl_rewards or with `share_base: true`; elsewhere give the adapter's folder as `path`"
            )
        if self._scorer is None:
            self.setup(Context())
        assert self._scorer is not None
        return self._scorer
