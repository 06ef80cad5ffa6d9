"""PRIME: a process reward model that learns from outcomes while the policy does.  https://huggingface.co/papers/2502.01456"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trl_rewards import Context, RewardBatch, RewardError, Samples, Score, TokenReward, TokenShaper, TrainableReward
from trl_rewards.models import Held, InProcess
from trl_rewards_prime.logps import CompletionModel

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards import Scores, World

ADAPTER = "prime"
_Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its completion."""


class Prime(InProcess, TokenReward, TrainableReward):
    """β (log π_φ - log π_ref) of each token, where π_φ is trained on outcomes while the policy learns.

    https://huggingface.co/papers/2502.01456. π_φ is a LoRA adapter that starts at nothing, so that all rewards start
    at 0, and π_ref is the same model with the adapter off: one model in memory, which may be quantised. Without `path`
    it is the policy's own base (`share_base: true`). It must have the policy's tokenizer.

    Rewards of a batch are made before the model learns from it (the paper's single forward pass). With several
    optimiser steps per batch the releases score later mini-batches with a model that has learned from earlier ones;
    this does not. The paper trains all weights (1e-6, 7B); a full copy is not offered.

    Use it with an advantage that reads process rewards (`prime_rloo`), beside a source of outcomes in [0, 1]. An
    evaluation scores, and does not learn.
    """

    deterministic: ClassVar[bool] = False  # it learns

    path: str | None = None
    """Folder or Hub name of the model that π_φ and π_ref start from. None: the policy's base."""
    outcome: str | None = None
    """Name of the source with outcomes in [0, 1] to learn from. None: the only other one."""
    beta: float = 0.05
    """β of the reward and of the loss."""
    loss: Literal["ce", "dpo", "bon_acc", "bon_rm"] = "ce"
    """`ce` is the paper's; the others are of verl's recipe and compare rows of a group."""
    update_mode: Literal["after", "before", "none"] = "after"
    """`after`: learn from each batch once it is scored. `before`: learn from it and score it again, so that the policy
    is trained on what was learned (the paper's double forward pass). `none`: π_φ stays as it is."""
    reference: Literal["frozen", "old_policy", "trainer"] = "frozen"
    """π_ref: `frozen`, the model without its adapter; `old_policy`, the policy that wrote the completions, the
    authors' other choice; `trainer`, the trainer's own reference, where `beta` is above 0. The last two in GRPO and
    RLOO at temperature 1; what TRL has computed of them is used again."""
    compat: Literal["paper", "verl", "original"] = "paper"
    """`verl`: a row's last token gets 0. `original`, the authors' code: rewards without β."""
    granularity: Literal["token", "whole"] = "token"
    """`whole`: the sum of a row at its last token."""
    lam: float = 0.0
    """verl's λ, in [0, 1): each token gets λ times the next one's reward too. For compat verl."""
    learning_rate: float = 1.0e-4
    """Of AdamW, constant. The paper's 1e-6 is for all weights of a model; LoRA needs more."""
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    """Gradients are clipped to this norm."""
    mini_batch: int | None = None
    """Rows per optimiser step, over all processes; None: the whole batch."""
    micro_batch: int = 8
    """Rows that go through the model together, on each process."""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: str | list[str] = "all-linear"

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "learning_rate", "max_grad_norm", "micro_batch", "lora_r", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.mini_batch is not None and self.mini_batch < 1:
            raise ValueError(f"mini_batch must be at least 1, got {self.mini_batch}")
        if not 0 <= self.lam < 1:
            raise ValueError(f"lam must be at least 0 and below 1, got {self.lam}")
        if self.lam and (self.compat != "verl" or self.granularity == "whole"):
            raise ValueError("lam is verl's, for single tokens: set compat: verl and granularity: token, or lam: 0")
        if self.adapter is not None:
            raise ValueError("adapter: the model trains an adapter of its own; merge yours into the model of `path`")
        self.check_trained()
        self._model: _AdapterModel | None = None
        self._base: Any = None
        self._context: Context | None = None
        self._references: dict[_Row, Tensor] = {}  # log π_ref of the rows scored last, for `update`
        self._step = 0

    def asks_logps(self) -> tuple[str, ...]:
        return {"frozen": (), "old_policy": ("policy",), "trainer": ("reference",)}[self.reference]

    def shares_base(self) -> bool:
        return self.path is None

    def held(self) -> list[Held]:
        return [
            Held(
                self.path,
                trains="lora",
                lora_r=self.lora_r,
                lora_target_modules=self.lora_target_modules,
                micro_batch=self.micro_batch,
                logits=True,
            )
        ]

    def setup(self, context: Context) -> None:
        self._context = context
        if self.path is None:
            self._base = context.shared_base
            if self._base is not None:
                self._base.add_trained(ADAPTER, self._lora(), context.seed)
            return
        from transformers import AutoModelForCausalLM

        from trl_rewards.models import load_pretrained, load_tokenizer, with_adapter

        loading = self.loading(self.path, context)
        model, _ = load_pretrained(AutoModelForCausalLM, loading)
        self._use(with_adapter(model, ADAPTER, self._lora(), seed=context.seed), load_tokenizer(loading))

    def close(self) -> None:
        self._model = self._base = None
        self._references.clear()

    def _lora(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, target_modules=self.lora_target_modules)

    def _use(self, model: Any, tokenizer: Any) -> _AdapterModel:
        self._model = _AdapterModel(self, model, tokenizer)
        return self._model

    def _ready(self) -> _AdapterModel:
        if self._model is not None:
            return self._model
        if self._base is not None and self._base.model is not None:
            from trl_rewards.models import load_tokenizer

            return self._use(self._base.model, load_tokenizer(self._base.loading))
        raise RewardError(
            f"{self.display_name!r} has no path: it runs on the policy's base, in a trainer of trl_rewards with "
            "`share_base: true`; elsewhere give path"
            if self.path is None
            else f"{self.display_name!r} has not been set up"
        )

    def learns_first(self) -> bool:
        return self.update_mode == "before"

    def score_tokens(self, samples: Samples) -> list[list[float | None] | Score]:
        import torch

        from trl_rewards.models import parts
        from trl_rewards_prime.implicit import token_scores

        model = self._ready()
        lengths = samples.lengths
        offline = self._context is None or self._context.trainer_state is None
        if offline or samples.step != self._step:
            self._references.clear()
            self._step = samples.step
        rows = [model.encode(prompt) for prompt in samples.prompts]
        found: list[list[float | None] | Score] = []
        for part in parts(range(len(rows)), self.micro_batch):
            with torch.no_grad():
                prompts, completions = [rows[row] for row in part], [samples.completion_ids[row] for row in part]
                q, mask = self._log_ratios(model, prompts, completions)
            scores = token_scores(q, mask, self.beta, self.compat, self.granularity == "whole", self.lam)
            found += [
                row[:length].tolist() for row, length in zip(scores, (lengths[row] for row in part), strict=True)
            ]
        return found

    def update(self, batch: RewardBatch) -> dict[str, float]:
        """Learn from a batch: each process takes its share of every mini-batch, and gradients are added up."""
        if self.update_mode == "none":
            return {}
        from trl_rewards import World
        from trl_rewards.models import outcomes_of

        model, world, size = self._ready(), World.current(), batch.scores.group_size
        outcomes = outcomes_of(batch, self.display_name, self.outcome)
        for share in world.gather_objects({row: logps.cpu() for row, logps in self._references.items()}):
            self._references |= share
        sums = self._all_sums(batch, world) if self.loss != "ce" else None
        samples, taking_part = batch.samples, ~(outcomes.isnan() | batch.rewards.isnan())
        rows = [row for row in range(len(samples)) if taking_part[row] and samples.completion_ids[row]]
        if not rows:
            return {}
        learnt = model.learner.learn(
            rows,
            lambda part: self._losses(self._sums(model, samples, part), outcomes, sums, part, size),
            world,
            self.mini_batch,
            self.micro_batch,
            mean=self.loss in ("ce", "dpo"),
        )
        right = (batch.scores.values[:, batch.scores.names.index(self.display_name)] > 0) == (outcomes > 0.5)
        known = ~outcomes.isnan()
        return learnt | {"accuracy": right[known].float().mean().item()}

    def _sums(self, model: _AdapterModel, samples: Samples, rows: list[int]) -> Tensor:
        """β Σ q of these rows, with gradient where the model is being trained."""
        prompts = [model.encode(samples.prompts[row]) for row in rows]
        q, _ = self._log_ratios(model, prompts, [samples.completion_ids[row] for row in rows])
        return self.beta * q.sum(dim=1)

    def _log_ratios(
        self, model: _AdapterModel, prompts: list[list[int]], completions: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """(B, T) log π_φ - log π_ref, with gradient where the model is being trained, and its mask."""
        rows = [(tuple(prompt), tuple(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
        missing = [index for index, row in enumerate(rows) if row not in self._references]
        if missing:
            given = [prompts[index] for index in missing], [completions[index] for index in missing]
            found = self._rollout_logps(*given) if self.asks_logps() else model.reference_logps(*given)
            self._references |= {rows[index]: logps for index, logps in zip(missing, found, strict=True)}
        return model.log_ratios(prompts, completions, [self._references[row] for row in rows])

    def _rollout_logps(self, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
        if self._context is None or self._context.rollout_logps is None:
            raise RewardError(
                f"{self.display_name!r}: reference {self.reference!r} is known to trl_rewards' GRPO and RLOO trainers "
                "alone; set reference: frozen"
            )
        return self._context.rollout_logps(self.asks_logps()[0], prompts, completions)

    def _all_sums(self, batch: RewardBatch, world: World) -> Tensor:
        """(N,) β Σ q of every row as it is before learning, each process its share."""
        import torch

        from trl_rewards.models import parts

        model, count = self._ready(), len(batch.samples)
        sums = torch.zeros(count, device=model.device)
        with world.together(f"{self.display_name!r} could not learn", model.device), torch.no_grad():
            for part in parts(range(world.rank, count, world.size), self.micro_batch):
                sums[part] = self._sums(model, batch.samples, part)
        return world.total(sums)

    def _losses(self, sums: Tensor, outcomes: Tensor, every: Tensor | None, rows: list[int], size: int) -> Tensor:
        """The loss of each of these rows, from its β Σ q; `every`: (N,) those of the batch, before it is learned."""
        from trl_rewards_prime.implicit import best_of_n_weights, ce_loss, dpo_loss, others

        outcomes = outcomes.to(sums.device)
        outcome = outcomes[rows]
        if every is None:
            return ce_loss(sums, outcome)
        loss = dpo_loss(sums, outcome, others(every, outcomes, size)[rows])
        if self.loss == "dpo":
            return loss
        values = outcomes if self.loss == "bon_acc" else every.masked_fill(outcomes.isnan(), float("nan"))
        weights = best_of_n_weights(values, size)
        return loss * weights[rows]

    def state_dict(self) -> dict[str, Any]:
        if self._model is None and (self._base is None or self._base.model is None):
            return {}
        return self._ready().learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._ready().learner.load_state_dict(state)


class _AdapterModel(CompletionModel):
    """A causal LM with an adapter that is trained, and without it the reference."""

    def __init__(self, reward: Prime, model: Any, tokenizer: Any):
        from trl_rewards.models import Learner, adapter_parameters, using

        super().__init__(model, tokenizer, "prime")
        self.learner = Learner(
            reward.display_name,
            adapter_parameters(model, ADAPTER),
            lambda: using(model, ADAPTER, training=True),
            reward.learning_rate,
            reward.weight_decay,
            reward.max_grad_norm,
        )

    def reference_logps(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Tensor]:
        """Per row the (T,) log-probabilities of the completion's tokens without the adapter."""
        from trl_rewards.models import using

        with using(self.model, None):
            logps = self.logps(*self.padded(prompts, completions))
        return [row[: len(completion)] for row, completion in zip(logps, completions, strict=True)]

    def log_ratios(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], references: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(B, T) log π_φ - log π_ref of the completions' tokens, float32, 0 on the padding at the right; its mask."""
        import torch

        from trl_rewards.models import using

        ids, attention, width = self.padded(prompts, completions)
        with nullcontext() if torch.is_grad_enabled() else using(self.model, ADAPTER):
            logps = self.logps(ids, attention, width)
        reference = torch.zeros_like(logps)
        for row, known in enumerate(references):
            reference[row, : len(known)] = known
        mask = attention[:, -width:].to(logps.device)
        return (logps - reference).masked_fill(mask == 0, 0.0), mask


class PrimeNorm(TokenShaper):
    """Process rewards over the largest |return-to-go| of the batch: the releases' batch norm.

    https://huggingface.co/papers/2502.01456. There the batch is one process's, here all processes'.
    """

    eps: float = 1.0e-6

    def shape_tokens(self, rewards: Tensor, scores: Scores, samples: Samples) -> Tensor:
        from trl_rewards_prime.implicit import batch_normed

        return batch_normed(rewards, self.eps)
