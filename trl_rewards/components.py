"""The kinds of component. Subclass one, annotate its options, register it: that is a plugin.

Every subclass becomes a keyword-only dataclass by itself, so its annotated fields are its YAML options. A string
literal under a field documents it (`trl-rewards show` prints it). Raise plain ValueError or TypeError from
`__post_init__` when an option is wrong; the recipe's path is added for you.

Shapes: N rows after gather, K sources, T completion tokens, G group size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, dataclass_transform, get_args

from trl_rewards.errors import RewardError
from trl_rewards.events import run_async
from trl_rewards.samples import Failed, Samples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

logger = logging.getLogger(__name__)

Score = float | None | Failed
"""One row's score: a number, None for "no opinion", Failed for "could not say". The last two are holes."""


@dataclass
class Context:
    """What a component may want to know when a run starts."""

    device: Any = None
    """torch.device of this rank; None where nobody said: a component then takes the best there is."""
    seed: int = 0
    base_dir: str = "."
    """Folder that relative paths of a recipe are relative to."""
    trainer_state: Any = None
    """transformers.TrainerState, or None offline."""
    tokenizer: Any = None
    """The policy's, which made the completions' token ids; None until the trainer has it, and without a policy."""
    shared_base: Any = None
    """trl_rewards.models.SharedBase: where sources that run on the policy's base add themselves; None without one."""
    sources: Mapping[str, Reward] = field(default_factory=dict)
    """The recipe's reward sources by name, for a source that asks another one. Not all may be set up yet."""
    rollout_logps: Callable[[str, Sequence[Sequence[int]], Sequence[Sequence[int]]], list[Tensor]] | None = None
    """(which, prompts' ids, completions' ids) -> per row the (T,) float32 log-probabilities of the completion's tokens
    in this process's batch, by "policy", which wrote them, or by the trainer's "reference". Only where a source's
    `asks_logps` says so."""
    log_metric: Callable[[str, float], None] | None = None
    log_extra: Callable[[str, list], None] | None = None

    def path(self, path: str) -> str:
        """A path that an option holds: absolute, relative to the recipe's folder, or to the working directory."""
        return resolve_path(path, self.base_dir)

    @property
    def looked_in(self) -> str:
        """The folders in which `path` looks, for messages."""
        return looked_in(self.base_dir)


@dataclass_transform(kw_only_default=True)
class Component:
    """What all components share: options as dataclass fields, columns, and a state that checkpoints keep."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Dataset columns that it reads (`("*",)`: all). Checked before any model is loaded; override `reads` if an option
    names one."""
    used_alone = False
    """Whether `load_reward` has set it up: a pipeline that takes it closes it before it sets it up again."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(kw_only=True, eq=False)(cls)

    def reads(self) -> tuple[str, ...]:
        """Dataset columns that this instance reads."""
        return self.columns

    @property
    def display_name(self) -> str:
        """The name it has in the recipe, for metrics and messages; its class's where it has none."""
        return getattr(self, "__name__", type(self).__name__.lower())

    def check_sources(self, names: Sequence[str]) -> None:
        """ValueError if an option names a source that is not among these, all of the recipe's. Called early."""

    def setup(self, context: Context) -> None:
        """Load what is heavy. Called before the policy is loaded; again, after `close`, if it is in a pipeline that is
        set up after it was used alone."""

    def close(self) -> None:
        """Release what `setup` took."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep (tensors, numbers, strings, lists, dicts). Empty for a stateless component."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint has {', '.join(state)}")


class Reward(Component):
    """A reward source: says how good each completion is. An instance is also a TRL reward function."""

    scope: ClassVar[Literal["sample", "group"]] = "sample"
    """`group`: `score` is given whole groups (`samples.group_size` is set), also when ranks hold parts of them."""
    deterministic: ClassVar[bool] = True
    """Same row, same score: identical rows of a batch are scored once, and scores may be cached."""
    sees_every_row: ClassVar[bool] = False
    """It is asked about identical rows too, though their scores are the same: for what it logs of a batch."""
    traces: ClassVar[bool] = False
    """Its scores may be `Traced`, and say how they came about. A cache keeps the numbers alone."""

    def shares_base(self) -> bool:
        """Whether it runs on the policy's base model, and adds itself to `context.shared_base` in `setup`."""
        return False

    def proper(self) -> bool:
        """Whether it pays best for an honest report, as a proper scoring rule does: divided by a deviation that
        depends on the reports it does not, and a warning says so."""
        return False

    def asks_logps(self) -> tuple[str, ...]:
        """Of "policy" and "reference": whose log-probabilities of a rollout it asks `context.rollout_logps` for."""
        return ()

    def score(self, samples: Samples) -> list[Score]:
        """One score per row: a float, None for "no opinion", or Failed(reason)."""
        raise NotImplementedError(f"{type(self).__name__} must define score(self, samples)")

    async def ascore(self, samples: Samples) -> list[Score]:
        """`score` for sources that wait for a network. If a subclass defines it, it is used instead of `score`."""
        raise NotImplementedError

    def check_running(self, running: Mapping[str, Any]) -> None:
        """ValueError, beginning with the key, if it cannot be run as a recipe says: `timeout`, `isolate`, ….

        `running` holds the keys that the recipe sets.
        """

    def is_async(self) -> bool:
        """Whether `ascore` is the method to call."""
        return type(self).ascore is not Reward.ascore

    def __call__(self, prompts, completions, completion_ids=None, **columns) -> list[float | None]:
        """TRL's reward function: works in an unmodified `trl.GRPOTrainer(reward_funcs=[…])`. Holes become None."""
        if self.scope == "group":
            raise RewardError(
                f"reward {type(self).__name__!r} compares whole groups, which TRL does not hand to reward functions; "
                "use trl_rewards.GRPOTrainer(pipeline=…), which gathers them"
            )
        state = columns.get("trainer_state")
        samples = Samples(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids or [],
            columns={
                name: list(values)
                for name, values in columns.items()
                if isinstance(values, Sequence) and not isinstance(values, str) and name not in _TRL_EXTRAS
            },
            step=state.global_step if state else 0,
            max_steps=state.max_steps if state else 0,
        )
        missing = samples.missing(self.reads())
        if missing:
            there = ", ".join(samples.columns) or "no other columns"
            raise RewardError(
                f"reward {type(self).__name__!r} needs dataset column {', '.join(map(repr, missing))}; "
                f"the dataset has {there}"
            )
        scores = run_async(self.ascore(samples)) if self.is_async() else self.score(samples)
        return [None if isinstance(score, Failed) else score for score in scores]


_TRL_EXTRAS = ("trainer_state", "log_extra", "log_metric", "environments")


class TokenReward(Reward):
    """A process reward: one value per completion token. As a scalar source it counts as the sum of its values."""

    def score_tokens(self, samples: Samples) -> list[list[float | None] | Score]:
        """One value per completion token, row by row, as many as `samples.lengths` says; None or Failed for a row
        without. A token's None says nothing of it: a reward of steps gives one value per step, at its last token."""
        raise NotImplementedError(f"{type(self).__name__} must define score_tokens(self, samples)")

    def score(self, samples: Samples) -> list[Score]:
        """Sum of the token values of each row."""
        return [
            sum(value for value in values if value is not None) if isinstance(values, list) else values
            for values in self.score_tokens(samples)
        ]


class TrainableReward(Reward):
    """A reward that learns while the policy does. It owns its optimiser and keeps both in `state_dict`."""

    def learns_first(self) -> bool:
        """Whether it learns from a batch before the scores that the policy is trained on are made: it is asked for
        scores, told of the batch, and asked again."""
        return False

    def update(self, batch: RewardBatch) -> dict[str, float]:
        """Learn from a scored batch; the returned metrics are logged.

        Every process has the whole batch, with the columns that `reads` names, and calls it. A row whose reward is NaN
        takes no part in the training. One that learns first has no rewards yet: they are 0.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update(self, batch)")

    def holds_back(self, batch: RewardBatch) -> bool:
        """Whether the policy should not learn from this batch: its advantages are then 0. Asked before `update`, on
        every process, which must say the same. GRPO, RLOO and PPO ask; DPO does not."""
        return False

    def check_running(self, running: Mapping[str, Any]) -> None:
        if running.get("isolate"):
            raise ValueError("isolate: its processes would score with models of their own, which do not learn")


class Scores(NamedTuple):
    """All sources' scores of a gathered batch, holes included."""

    names: tuple[str, ...]
    values: Tensor
    """(N, K) float32; NaN is a hole."""
    status: Tensor
    """(N, K) uint8; see `Status`."""
    weights: Tensor
    """(K,) float32, schedules applied."""
    group_size: int


OnMissing = Literal["renormalize", "group_mean", "drop_row", "drop_group", "fail"]
"""What becomes of a row of which a source has no score."""
ON_MISSING: tuple[str, ...] = get_args(OnMissing)


class Status:
    """What a cell of `Scores.status` says."""

    OK, ABSTAINED, FAILED, TIMEOUT, SKIPPED = range(5)
    """SKIPPED: the source was not asked, since the row did not pass its `only_if`."""
    WORDS = ("ok", "abstained", "failed", "timeout", "not asked")
    """What files say for each."""


class RewardBatch(NamedTuple):
    """A scored batch, the same on every rank."""

    rewards: Tensor
    """(N,) float32 totals; NaN marks a row without a score, which gets advantage 0 and enters no baseline."""
    scores: Scores
    """Raw source scores, before shaping."""
    samples: Samples
    mask: Tensor | None = None
    """(N, T) 1 where a token is the policy's own and trained on."""
    process_rewards: Tensor | None = None
    """(N, T) the sources' process rewards, weighted and added up, where a source has any. 0 where it has none."""
    token_rewards: Tensor | None = None
    """(N, T) what each token earned: process rewards, the rest of the total at the row's last token, and in PPO the
    KL penalty. 0 on rows without a score. T is the longest row's."""
    values: Tensor | None = None
    """(N, T) the critic's value of the text before each token, in PPO."""
    logps: Tensor | None = None
    """(N, T) log-probabilities of the policy that wrote the tokens, in PPO."""
    ref_logps: Tensor | None = None
    """(N, T) those of the reference, in PPO where it has one."""
    shaped: Tensor | None = None
    """(N, K) source scores as they entered the combiner: shaped, holes resolved where the recipe says so."""
    left_out: Tensor | None = None
    """(N,) whether the recipe's filter leaves a row's group out of the training; None without a filter."""
    traces: list[dict[str, Any]] | None = None
    """N mappings from sources to what their scores say of how they came about; None where no source says any."""


class Combiner(Component):
    """Makes one number of many: (N, K) scores -> (N,). A row without any score stays NaN."""

    def check_weights(self, weights: Sequence[float]) -> None:
        """ValueError if it can make nothing of these weights (K), the lowest of each schedule. Called early."""

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, scores, samples)")


class Unweighted(Combiner):
    """A combiner that takes its sources as members, all alike: a weight of 0 is watched, any other counts."""

    one_thing: ClassVar[bool] = True
    """Whether members are to score the same thing on one scale: how far they are apart is then logged."""

    def check_weights(self, weights: Sequence[float]) -> None:
        name = self.display_name
        if min(weights) < 0:
            raise ValueError(
                f"combine: {name!r} knows no negative weight (got {min(weights):g}); turn that source with "
                "`shape: [{use: scale, with: {factor: -1.0}}]`, or use weighted_sum"
            )
        if len({weight for weight in weights if weight}) > 1:
            logger.warning("combine: %s takes every weight above 0 for 1", name)

    def members(self, scores: Scores) -> Tensor:
        """The columns with a weight other than 0, (N, K'); all of them if every weight is 0."""
        used = scores.weights != 0
        return scores.values[:, used] if used.any() else scores.values


class Shaper(Component):
    """Bends a reward: (N,) -> (N,). NaN rows stay NaN and take no part in statistics."""

    def affine(self) -> bool:
        """Whether it makes a · r + b of r, with the same a > 0 and b for all rows of a prompt: a group z-score undoes
        that, and a warning says so."""
        return False

    def check_place(self, source: Reward | None, before: Sequence[Shaper], base_dir: str) -> None:
        """ValueError if it cannot stand behind these shapers of this source, or of the total (None). Called early."""

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, rewards, samples)")


class TokenShaper(Shaper):
    """Bends the process rewards of one source: (N, T) -> (N, T). What it makes of a row counts as its sum.

    Registered like any shaper, and named under `shape:` of a source that scores tokens.
    """

    def __call__(self, rewards: Tensor, samples: Samples) -> Tensor:
        raise TypeError(f"{type(self).__name__} shapes the tokens of a process reward, not rows: use shape_tokens")

    def shape_tokens(self, rewards: Tensor, scores: Scores, samples: Samples) -> Tensor:
        """`rewards`: NaN where the source says nothing of a token, which must stay so; rows without a score are all
        NaN. `scores`: of all sources, before shaping."""
        raise NotImplementedError(f"{type(self).__name__} must define shape_tokens(self, rewards, scores, samples)")


class Advantage(Component):
    """Turns rewards into a learning signal: (N,) per sequence, or (N, T) per token. NaN rewards give exactly 0."""

    level: ClassVar[Literal["sequence", "token"]] = "sequence"
    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of RewardBatch that must be there, such as {"values"}: a trainer without them refuses it early."""
    compares_groups: ClassVar[bool] = True
    """Equal rewards of a group, and a group of one, give exactly 0."""

    def passes_over(self) -> tuple[str, ...]:
        """Parts of a recipe that it does not see, of "combine" and "shape": a warning says so where they are set."""
        return ()

    def undoes_affine(self) -> bool:
        """Whether a · r + b, with the same a > 0 and b for all rows of a prompt, gives the advantages of r."""
        return False

    def divides_by_group(self) -> bool:
        """Whether a row's advantage is divided by a deviation of its group, so that groups differ in scale."""
        return self.undoes_affine()

    def __call__(self, batch: RewardBatch) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, batch)")

    def value_targets(self, batch: RewardBatch, advantages: Tensor) -> Tensor:
        """(N, T) what PPO's critic is trained on; for one with "values" among its needs. Advantage plus value."""
        assert batch.values is not None
        return advantages + batch.values


def _alone(rows: Tensor) -> Tensor:
    """What one process gathers: its own rows."""
    return rows


class Preferences(NamedTuple):
    """B preference pairs as the reward model in training scored them, on this process.

    Where rows come as (2B, …), the chosen answers are the first B.
    """

    chosen: Tensor
    """(B,) float32 rewards, with gradient."""
    rejected: Tensor
    """(B,) float32 rewards, with gradient."""
    loss: Tensor
    """() TRL's own loss: Bradley-Terry, with `margin` and `center_rewards_coefficient` where they are set."""
    columns: Mapping[str, Any]
    """The columns that the objective reads, a margin too: (B,) float32 tensors of numbers, NaN where there is none;
    else lists of length B."""
    hidden: Tensor | None = None
    """(2B, H) what the score head sees at the scored position; for objectives that need it."""
    prompt_hidden: Tensor | None = None
    """(2B, H) the same at the last token that the two rows of a pair share, which has seen the prompt alone; for
    objectives that need it."""
    outputs: Tensor | None = None
    """(2B, K) float32, all outputs of the model, with gradient; K is 1 unless the objective names more."""
    ids: Tensor | None = None
    """(2B, T) token ids of prompt and answer, padded on the right."""
    mask: Tensor | None = None
    """(2B, T) 1 where a token is none of the padding; its sums are lengths in tokens, and `shared_prefix` of
    `trl_rewards.maths` tells where the answers begin to differ."""
    step: int = 0
    """Optimiser steps done, of `max_steps`."""
    max_steps: int = 0
    training: bool = True
    """False while evaluating, when the objective's state must stay as it is."""
    generator: Any = None
    """torch.Generator on the CPU of this process and run. Checkpoints keep it; an evaluation has one of its own."""
    gather: Callable[[Tensor], Tensor] = _alone
    """(B, …) -> (B · processes, …): all processes' rows, in their order and with gradient, for statistics over the
    batch. All of them must call it alike. Batches whose gradients are accumulated stay apart."""
    again: Callable[[], Preferences] | None = None
    """Runs the model on the same rows once more, such as with another dropout (`disable_dropout: false`)."""
    token_hidden: Tensor | None = None
    """(2B, T, H) what the score head would see at every token; for objectives that need it."""
    labels: Tensor | None = None
    """(2B, T) int64, what `Objective.tokenize` says of each token in `chosen_labels` and `rejected_labels`; -100 at
    the padding. None where it says nothing."""


class Objective(Component):
    """What a reward model learns from preference pairs, inside TRL's RewardTrainer.

    The model is run once per batch, by TRL; TRL logs accuracy and margin of the pairs whatever the objective is.
    `setup` gives it `context.log_metric`, whose values are averaged over the processes that logged any. Statistics
    over a batch are those of one process's micro-batch unless it calls `Preferences.gather`.
    """

    trainer: ClassVar[str] = "reward"
    """The trainer, as recipes name it, whose batches it is given."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of {"hidden", "prompt_hidden", "token_hidden"}: fields of Preferences that are only there on demand."""
    own_loss: ClassVar[bool] = False
    """It does not use `Preferences.loss`: `center_rewards_coefficient` and a column `margin` are refused with it."""

    def outputs(self) -> Sequence[str]:
        """Names of the model's outputs, K of them. A full model keeps the names for `use: model` with `output:`; with
        LoRA they go by their index there."""
        return ("reward",)

    def reward(self, outputs: Tensor, prompt_hidden: Tensor | None) -> Tensor:
        """(N, K), (N, H) -> (N,): the reward that TRL logs and compares. By default the first output.

        `prompt_hidden` is None unless it is in `needs`.
        """
        return outputs[:, 0]

    def attach(self, model: Any, tokenizer: Any, fresh: Sequence[str]) -> list[int]:
        """Make the model and its tokenizer ready, before LoRA is put on and the data are tokenised.

        `fresh`: names of weights that the checkpoint lacks, such as a new score head's. Returns ids of tokens that
        were added to the vocabulary; with LoRA their embeddings are trained too, and so are modules that it puts on
        the model (`model.gate = …`). LoRA has copies in their place: keep the model, and take them from it each time.
        """
        return []

    def tokenize(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]] | None:
        """`{"chosen_ids": …, "rejected_ids": …}` of a dataset row; None: as TRL does it. `chosen_labels` and
        `rejected_labels`, a number for each token, may be with them. Rows longer than TRL's `max_length` are then
        dropped."""
        return None

    def loss(self, batch: Preferences) -> Tensor:
        """() what is minimised; a mean over the pairs of the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, batch)")


class Outcomes(NamedTuple):
    """B answers with a label each, as the language model in training sees them, on this process."""

    log_ratios: Tensor
    """(B,) float32, with gradient: log-probability of the answer under the model less that under the reference, summed
    over its tokens."""
    labels: Tensor
    """(B,) float32 in [0, 1]: 1 is right."""
    columns: Mapping[str, Any]
    """The columns that the objective reads: (B,) float32 tensors of numbers, NaN where there is none; else lists."""
    step: int = 0
    """Optimiser steps done, of `max_steps`."""
    max_steps: int = 0
    training: bool = True
    """False while evaluating, when the objective's state must stay as it is."""


class OutcomeObjective(Component):
    """What a language model learns from answers that are labelled right or wrong, inside TRL's KTOTrainer.

    β times the log-ratio of model and reference is an answer's implicit reward, whose mean over right and over wrong
    answers is logged. The model and the reference are run once each per batch. `setup` gives `context.log_metric`, as
    for an `Objective`.
    """

    trainer: ClassVar[str] = "kto"
    """The trainer, as recipes name it, whose batches it is given."""

    beta: float = 0.05
    """β of the implicit reward β · (log π - log π_ref)."""

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")

    def loss(self, batch: Outcomes) -> Tensor:
        """() what is minimised; a mean over the answers of the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, batch)")


class Selector(Component):
    """Chooses rows of a dataset by their scores, such as those that a model does worst on."""

    def select(self, scores: Sequence[float | None], count: int, seed: int = 0) -> list[int]:
        """Indices of at most `count` of the N rows, each once, in the order in which they are to be written.

        None is a row without a score. It is not chosen, unless an option of the selector asks for it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(self, scores, count, seed)")


class ToolCall(NamedTuple):
    """What a tool may look at beside its input."""

    name: str
    """What the model called it, such as "Calendar.week_day"."""
    text: str = ""
    """All that the model has read and written so far, question and answer included."""
    question: str = ""
    answer: str = ""
    row: Mapping[str, Any] = {}
    """The dataset's columns of this row, those of the tool's `reads`."""


class Tool(Component):
    """Something that a model may ask while it writes: text goes in, text comes out.

    `trl_rewards.toolbox.Toolbox` runs tools, each call on a thread of its own and many at the same time.
    """

    description: ClassVar[str] = ""
    """What a model is told of it: what it is for, and what its input looks like."""
    answers_to: ClassVar[tuple[str, ...]] = ()
    """Names that mean it in a model's text, beside the one it is registered by."""

    timeout: float = 10.0
    """Seconds that a call may take; after that the model reads that there is no result."""

    def __post_init__(self):
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}")

    def answers(self, name: str) -> bool:
        """Whether a model that writes this name means this tool. Override it where a list of names will not do."""
        return name == self.display_name or name in self.answers_to

    def call(self, input: str, call: ToolCall) -> str:
        """What the model reads as the result. Raise ToolError for a failure in words that the model should read.

        It reads one and the same sentence for any other exception.
        """
        raise NotImplementedError(f"{type(self).__name__} must define call(self, input, call)")


KINDS: dict[str, tuple[type[Component], ...]] = {
    "reward": (Reward,),
    "combiner": (Combiner,),
    "shaper": (Shaper,),
    "advantage": (Advantage,),
    "objective": (Objective, OutcomeObjective),
    "selector": (Selector,),
    "tool": (Tool,),
}
"""{kind: the classes one of which a component of that kind is made from}"""


def looked_in(base_dir: str) -> str:
    """The folders in which `resolve_path` looks for a relative path, for messages."""
    return " or ".join(dict.fromkeys([os.path.abspath(base_dir), os.getcwd()]))


def resolve_path(path: str, base_dir: str) -> str:
    """A path from a recipe: absolute, relative to the recipe's folder, or to the working directory."""
    expanded = os.path.expanduser(path)
    beside = os.path.join(base_dir, expanded)
    return beside if not os.path.isabs(expanded) and os.path.exists(beside) else expanded
