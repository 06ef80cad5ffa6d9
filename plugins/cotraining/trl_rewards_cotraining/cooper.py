"""Cooper: a verifier that is trained on the rollouts of the policy it rewards.  https://huggingface.co/papers/2508.05613"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trl_rewards import Context, Failed, Reward, RewardBatch, RewardError, Samples, Score
from trl_rewards_cotraining.losses import policy_reward, preference_loss
from trl_rewards_cotraining.trained import TrainedModel

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards import World
    from trl_rewards_cotraining.assistant import Assistant

_HEAD = "<question>{}</question>\n<reference_answer>{}</reference_answer>\n<completion>"
_TAIL = "</completion>"


def verify_text(question: str, reference: str, completion: str, limit: int | None = None) -> str:
    """What VerifyRM reads. A text of more than `limit` characters loses the beginning of the completion, whose end
    holds the answer."""
    head = _HEAD.format(question, reference)
    if limit is not None and (excess := len(head) + len(completion) + len(_TAIL) - limit) > 0:
        completion = completion[excess:]
    return head + completion + _TAIL


class Pair(NamedTuple):
    """A right rollout and a wrong answer to the same question."""

    row: int
    wrong: str


class Cooper(TrainedModel):
    """σ(logit) of a model that reads question, reference answer and completion (VerifyRM), in [0, 1], and learns.

    https://huggingface.co/papers/2508.05613. After each batch it learns, from each group with a right and a wrong
    answer, to score the right one higher: -log σ(right - wrong). Right is a rollout that another source, the rule,
    finds right (above 0.5); wrong is what an assistant, a language model, made of it, once the rule finds that wrong.
    With `weight: 0.0` the rule is asked and logged, and is no reward.

    Groups without a pair teach nothing. An assistant that fails costs its pairs, which `rewards/<name>/pairs` counts
    as a share of the groups. A row without a reference answer has no reward. The paper warms the learning rate up
    over the first hundredth of the run; here it is constant. The release divides its loss by the count of pairs plus
    1e-6, and cuts long texts at their end; here the completion's beginning goes.
    """

    answer: str = "answer"
    """Dataset column with the reference answer; of a worked solution that ends with `#### answer`, what follows."""
    outcome: str | None = None
    """Name of the source that is the rule, with scores in [0, 1]. None: the only other one."""
    threshold: float | None = None
    """Make the reward 1 where σ(logit) is above it, else 0; the paper names 0.5. None: σ(logit) itself."""
    negatives: Literal["assistant", "group"] = "assistant"
    """Where wrong answers come from. `group`, which is ours and needs no second model: rollouts of the same group that
    the rule finds wrong."""
    assistant: dict[str, Any] | None = None
    """Who rewrites right answers: options of a judge such as `model`, `endpoint`, `temperature` (0.7), `max_tokens`,
    `cassette`, budgets, and `tries` (3)."""
    compat: Literal["paper", "release"] = "paper"
    """Which right rollout of a group is taken: a random one, or with `release` the first."""
    update_mode: Literal["after", "none"] = "after"
    """`after`: learn from each batch once it is scored. `none`: the model stays as it is."""
    max_characters: int | None = 8000
    """Characters that the model reads, at most."""

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"max_characters must be at least 1, got {self.max_characters}")
        if self.assistant is not None and self.negatives == "group":
            raise ValueError("negatives: group asks no assistant; leave one of the two out")
        self._context = Context()
        self._sources: dict[str, Reward] = {}
        self._rule_reads: tuple[str, ...] = ()
        self._assistant: Assistant | None = None
        if self.update_mode == "none" or self.negatives == "group":
            return
        if self.assistant is None:
            raise ValueError(
                "assistant is required: who rewrites right answers, such as {model: …, endpoint: …}; or "
                "negatives: group"
            )
        self._assistant = _assistant(self.assistant)

    def reads(self) -> tuple[str, ...]:
        return (self.answer, *self._rule_reads)

    def setup(self, context: Context) -> None:
        super().setup(context)
        self._context = context
        self._sources = {name: source for name, source in context.sources.items() if source is not self}
        if self._assistant is not None:
            # The rule will be asked about answers that are in no dataset, with the columns of the rows they come from.
            self._rule_reads = tuple(column for source in self._sources.values() for column in source.reads())
            self._assistant.setup(context)

    def close(self) -> None:
        super().close()
        if self._assistant is not None:
            self._assistant.close()

    def score(self, samples: Samples) -> list[Score]:
        references = samples[self.answer]
        rows = [row for row, reference in enumerate(references) if _is_there(reference)]
        texts = samples.texts
        logits = self._scores(*self._shown(samples, [(row, texts[row]) for row in rows]))
        found: list[Score] = [None] * len(samples)
        for row, logit in zip(rows, logits, strict=True):
            found[row] = logit if isinstance(logit, Failed) else policy_reward(logit, self.threshold)
        return found

    def update(self, batch: RewardBatch) -> dict[str, float]:
        """Make pairs, each process those of its share of the groups, and learn from all of them."""
        if self.update_mode == "none":
            return {}
        import torch

        from trl_rewards import World
        from trl_rewards.models import outcomes_of

        world, size = World.current(), batch.scores.group_size
        outcomes = outcomes_of(batch, self.display_name, self.outcome)
        outcomes = outcomes.masked_fill(batch.rewards.isnan(), float("nan"))  # rows that the training leaves out
        pairs, metrics = self._pairs(batch, outcomes.tolist(), world)
        metrics["pairs"] = len(pairs) / (len(batch.samples) // size)
        mine = batch.scores.values[:, batch.scores.names.index(self.display_name)]
        known = ~(outcomes.isnan() | mine.isnan())
        if known.any():
            metrics["accuracy"] = ((mine > 0.5) == (outcomes > 0.5))[known].float().mean().item()
        _, learner = self._ready()
        margins = torch.zeros(len(pairs), device=learner.device)

        def losses(chosen: list[int]) -> Tensor:
            samples, few = batch.samples, [pairs[index] for index in chosen]
            texts = samples.texts
            shown = [(pair.row, texts[pair.row]) for pair in few] + [(pair.row, pair.wrong) for pair in few]
            right, wrong = self._trainable_scores(*self._shown(samples, shown)).chunk(2)
            margins[chosen] = (right - wrong).detach()
            return preference_loss(right, wrong)

        learnt = learner.learn(range(len(pairs)), losses, world, self.mini_batch, self.micro_batch)
        if pairs:
            metrics["margin"] = world.total(margins).mean().item()
        return metrics | learnt

    def _shown(self, samples: Samples, chosen: list[tuple[int, str]]) -> tuple[list[str], bool, Any]:
        """What the model reads of some completions to the prompts of these rows, and where the completions start."""
        references = samples[self.answer]
        about = [(_question(samples.prompts[row]), _reference(references[row])) for row, _ in chosen]
        texts = [
            verify_text(*each, completion, self.max_characters)
            for each, (_, completion) in zip(about, chosen, strict=True)
        ]
        return texts, True, lambda index: len(_HEAD.format(*about[index]))

    def _pairs(self, batch: RewardBatch, outcomes: list[float], world: World) -> tuple[list[Pair], dict[str, float]]:
        """The same on every process: at most one pair per group."""
        samples, size = batch.samples, batch.scores.group_size
        references, texts = samples[self.answer], samples.texts
        chosen: list[Pair] = []  # `wrong` is empty where the assistant will be asked
        for first in range(0, len(samples), size):
            rows = [row for row in range(first, first + size) if _is_there(references[row])]
            right = [row for row in rows if outcomes[row] > 0.5]
            wrong = [row for row in rows if outcomes[row] <= 0.5]
            row = (right[0] if self.compat == "release" else random.choice(right)) if right else None
            other = random.choice(wrong) if wrong and self.negatives == "group" else None
            if row is not None and (self.negatives == "assistant" or other is not None):
                chosen.append(Pair(row, texts[other] if other is not None else ""))
        if self._assistant is None:
            return chosen, {}
        mine: tuple[list[Pair], dict[str, int]] = [], {}
        with world.together(f"{self.display_name!r} could not make pairs", self._ready()[1].device):
            mine = self._rewritten(self._assistant, samples, chosen[world.rank :: world.size])
        shares = world.gather_objects(mine)
        made = sorted(pair for pairs, _ in shares for pair in pairs)
        names = ("no_reply", "cut", "not_wrong")
        return made, {f"rewrites_{name}": float(sum(share.get(name, 0) for _, share in shares)) for name in names}

    def _rewritten(
        self, assistant: Assistant, samples: Samples, pairs: list[Pair]
    ) -> tuple[list[Pair], dict[str, int]]:
        """The pairs whose wrong answer the assistant could make, and what was in the way of the others."""
        from trl_rewards_cotraining.assistant import Right

        rule = self._rule()
        texts = samples.texts
        rights = [Right(_question(samples.prompts[pair.row]), texts[pair.row]) for pair in pairs]

        def are_wrong(rewrites: dict[int, str]) -> set[int]:
            asked = samples.take([pairs[index].row for index in rewrites]).only(rule.reads())
            completions = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(asked.prompts, rewrites.values(), strict=True)
            ]
            with _unlogged(self._context):
                scores = rule(prompts=asked.prompts, completions=completions, **asked.columns)
            return {index for index, score in zip(rewrites, scores, strict=True) if score is not None and score <= 0.5}

        found, counts = assistant.rewrites(rights, are_wrong)
        made = [Pair(pair.row, text) for pair, text in zip(pairs, found, strict=True) if text is not None]
        return made, dict(counts)

    def _rule(self) -> Reward:
        name = self.outcome or next(iter(self._sources), None)
        if name not in self._sources:
            raise RewardError("the rule is not among the recipe's sources: an assistant needs a pipeline")
        return self._sources[name]


@contextmanager
def _unlogged(context: Context) -> Generator[None]:
    """Sources share the context: what they log is of the policy's answers, not of rewritten ones."""
    kept = context.log_metric, context.log_extra
    context.log_metric = context.log_extra = None
    try:
        yield
    finally:
        context.log_metric, context.log_extra = kept


def _assistant(options: dict[str, Any]) -> Assistant:
    from trl_rewards.models import nested_options
    from trl_rewards_cotraining.assistant import Assistant

    return nested_options(Assistant, "assistant", options)


def _question(prompt: Any) -> str:
    """The prompt without what the system says."""
    from trl_rewards.models import as_text

    return as_text(prompt if isinstance(prompt, str) else [said for said in prompt if said.get("role") != "system"])


def _reference(reference: Any) -> str:
    return str(reference).rpartition("####")[2].strip()


def _is_there(reference: Any) -> bool:
    """NaN is how tables say None."""
    return reference is not None and reference == reference and bool(str(reference).strip())
