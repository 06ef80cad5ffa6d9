"""A scalar reward model, by folder or Hub name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_rewards.components import Context, Score, resolve_path
from trl_rewards.errors import RewardError
from trl_rewards.models.options import FromHead, Held
from trl_rewards.samples import Samples

if TYPE_CHECKING:
    from trl_rewards.models.scorer import Scorer
    from trl_rewards.models.shared_base import Member


class Model(FromHead):
    """The scalar score of a reward model for prompt and completion. Unbounded.

    Chat prompts go through the reward model's own chat template, plain ones are joined to the completion. What rows
    have in common, such as the prompt of a group, is computed once where that pays.
    """

    path: str | None = None
    """Folder or Hub name: a sequence classifier, a model with a value head, or (`head: yes`) a causal LM. Left out:
    `adapter`, trained on the policy's own base, runs on that base in memory (`share_base: true`)."""
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
        if self.path is None and self.adapter is None:
            raise ValueError("path is required (folder or Hub name); or an adapter, on the policy's base")
        if self.path is None and self.head != "auto":
            raise ValueError(f"head: an adapter on the policy's base brings its head; {self.head!r} needs a path")
        if self.head == "yes" and self.output is not None:
            raise ValueError("output chooses among a classifier's outputs; head 'yes' has one")
        if self.output == {}:
            raise ValueError("output must name an output, or outputs with their weights, got {}")
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
        if self.path is None:
            if context.shared_base is not None:
                assert self.adapter is not None
                self._member = context.shared_base.add(
                    resolve_path(self.adapter, context.base_dir),
                    revision=self.revision,
                    output=self.output,
                    **self.scoring(context),
                )
            return
        self._scorer = load_scorer(
            self.loading(self.path, context),
            head=self.head,
            output=self.output,
            yes_token=self.yes_token,
            no_token=self.no_token,
            yes_score=self.yes_score,
            **self.scoring(context),
        )

    def close(self) -> None:
        self._scorer = self._member = None

    def score(self, samples: Samples) -> list[Score]:
        from trl_rewards.models.encoding import shown_samples

        scorer = self._ready_scorer()
        question = self.question if self.head == "yes" else None
        scores = scorer.score_texts(
            *shown_samples(scorer.tokenizer, samples, self.path or self.adapter or "", question)
        )
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
