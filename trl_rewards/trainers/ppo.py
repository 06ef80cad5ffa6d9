"""PPO with a pipeline, on GRPO's rollout: generation, vLLM, tools, environments, buffering and logs are TRL's.

What is PPO's own: a critic, token rewards with a KL penalty, advantages per token, and a value loss. The policy's loss
is TRL's clipped objective. TRL removed its PPO trainer after 1.12.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, get_scheduler

from trl_rewards.components import Reward, RewardBatch
from trl_rewards.loading import as_reward, load_advantage
from trl_rewards.maths import token_rewards, whiten_masked
from trl_rewards.models.pretrained import Loading, load_tokenizer, quantization_of
from trl_rewards.pipeline import Pipeline
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Source
from trl_rewards.testing import make_batch, make_scores
from trl_rewards.trainers.critic import ADAPTER, Critic, adapter_critic, model_critic, value_loss
from trl_rewards.trainers.grpo import GRPOTrainer
from trl_rewards.trainers.kl import KLController, kl_per_token
from trl_rewards.trainers.mixin import own_tokens, with_mask
from trl_rewards.trainers.ppo_config import PPOConfig
from trl_rewards.trainers.seam import default_folder
from trl_rewards.trainers.sharing import splits_weights
from trl_rewards.trainers.state import CommittedState, checkpoint_folder

logger = logging.getLogger(__name__)

RewardFunction = Reward | Callable[..., Any] | str
_CRITIC, _LEARNER = "critic.safetensors", "critic.pt"


class PPOTrainer(GRPOTrainer):
    """PPO (https://huggingface.co/papers/1707.06347) for language models, with rewards from anything.

    Arguments are those of `trl.GRPOTrainer`, with a `PPOConfig`, and either `reward_funcs` (TRL reward functions,
    rewards, or reward models by name; their sum is the reward) or a `pipeline`. The pipeline's advantage is `gae`
    unless it has one. An advantage that needs no values, such as `group_norm`, builds no critic.

    The critic is trained beside the policy with an optimiser of its own, so there is no weight between their losses;
    its gradients are averaged over processes here, not by DDP. Raises ValueError for arguments that do not go together
    before a model is loaded.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        args: PPOConfig | None = None,
        *more: Any,
        pipeline: Pipeline | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        **options: Any,
    ):
        args = args or self._default_arguments(model)
        if not isinstance(args, PPOConfig):
            raise ValueError(f"PPOTrainer takes a PPOConfig, got {type(args).__name__}")
        if pipeline is None:
            pipeline, reward_funcs = _pipeline_of(reward_funcs, args), None
            args = copy.copy(args)
            args.reward_weights = None  # the pipeline has them
        if pipeline.advantage is None:
            pipeline.advantage = load_advantage("gae")
        needs_critic = "values" in pipeline.advantage.needs
        if needs_critic:
            args.check_critic(lora=peft_config is not None or isinstance(model, PeftModel))
            _check_sharding(args)
        self.critic: Critic | None = None
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        super().__init__(
            model,
            reward_funcs,
            args,
            *more,
            pipeline=pipeline,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **options,
        )
        self._committed_kl = CommittedState(self.kl.state_dict)
        self.add_callback(self._committed_kl)
        if needs_critic:
            self.critic = self._make_critic(args, quantization_config)
            self.add_callback(_AfterPolicy(self._step_critic))

    @staticmethod
    def _default_arguments(model: Any) -> PPOConfig:
        return PPOConfig(default_folder(model, "PPO"))

    @classmethod
    def _check_arguments(cls, args: Any, pipeline: Pipeline) -> None:
        super()._check_arguments(args, pipeline)
        if pipeline.filter:
            raise ValueError("filter: PPO does not leave groups out; use GRPO or RLOO")
        advantage = pipeline.advantage
        if advantage and "ref_logps" in advantage.needs and args.kl_coef == 0:
            raise ValueError(
                f"advantage {advantage.display_name!r} needs ref_logps, which there are none of with kl_coef 0"
            )
        if args.num_generations == 1 and (blind := _blind_to_single_rows(pipeline)):
            raise ValueError(
                f"{blind} compares the completions of a prompt, and num_generations is 1: nothing would be learnt; "
                "set num_generations to 2 or more, or use another"
            )
        if advantage and "token_rewards" not in advantage.needs and args.kl_coef != 0 and args.kl_in == "reward":
            raise ValueError(
                f"advantage {advantage.display_name!r} does not look at token rewards, where the KL penalty is; set "
                f"kl_in='loss', or kl_coef=0 (got {args.kl_coef})"
            )

    def _make_critic(self, args: PPOConfig, quantization_config: Any) -> Critic:
        policy = self.accelerator.unwrap_model(self.model)
        lora = policy if isinstance(policy, PeftModel) else None
        if lora is not None and args.critic != "model":
            return adapter_critic(lora, args.seed)
        base = lora.get_base_model() if lora is not None else policy
        init = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        loading = Loading(
            path=args.critic_model_name_or_path or base.config.name_or_path,
            revision=None if args.critic_model_name_or_path else init.get("revision"),
            dtype=str(base.dtype).removeprefix("torch."),
            attn_implementation=base.config._attn_implementation,
            quantization=quantization_config
            and quantization_of(quantization_config.load_in_4bit, quantization_config.load_in_8bit),
            device=self.accelerator.device,
            trust_remote_code=args.trust_remote_code,
        )
        known = load_tokenizer(loading).get_vocab() if args.critic_model_name_or_path else self._tokenizer.get_vocab()
        if any(known.get(token) != index for token, index in self._tokenizer.get_vocab().items()):
            raise ValueError(
                f"critic_model_name_or_path: {loading.path!r} has another vocabulary than the policy, whose token ids "
                "it would read; take a model of the policy's family"
            )
        return model_critic(
            loading,
            lora.active_peft_config if lora is not None else None,
            args.seed,
            gradient_checkpointing=bool(args.gradient_checkpointing),
        )

    # --- rollout

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        ends = self._end_ids()
        self._unfinished = torch.tensor(
            [not ids or ids[-1] not in ends for ids in completion_ids_list], device=self.accelerator.device
        )
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _end_ids(self) -> set[int]:
        """Ids of tokens that end a completion, as TRL has them."""
        declared = self.accelerator.unwrap_model(self.model).generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}

    def _foreign_adapters(self) -> list[str]:
        in_policy = self.critic is not None and self.critic.in_policy
        return [*super()._foreign_adapters(), *([ADAPTER] if in_policy else [])]

    def _with_tokens(self, batch: RewardBatch, output: dict[str, Any]) -> RewardBatch:
        if "pixel_values" in output:
            raise ValueError("PPO reads text only here; train a policy that sees images with trainer grpo")
        assert self.pipeline is not None
        assert self.pipeline.advantage is not None
        metrics = self._metrics["train" if self.model.training else "eval"]
        if batch.scores.group_size == 1:
            metrics.pop("frac_reward_zero_std", None)  # groups of one have no variance
        unfinished = self.accelerator.gather(self._unfinished)
        metrics["missing_eos"].append(unfinished.float().mean().item())
        if self.args.missing_eos_penalty is not None:
            batch = batch._replace(rewards=batch.rewards - self.args.missing_eos_penalty * unfinished)
            metrics["reward/after_eos_penalty"].append(batch.rewards.nanmean().item())

        batch = with_mask(batch, mask := self._gathered(own_tokens(output)))
        scored = mask * ~batch.rewards.isnan()[:, None]
        tokens = token_rewards(batch.rewards, batch.process_rewards, mask)
        logps = ref_logps = values = None
        penalised = self.args.kl_coef != 0 and self.args.kl_in == "reward"
        if penalised or "logps" in self.pipeline.advantage.needs:
            logps = self._gathered(self._rollout_logps(output))
        if penalised or "ref_logps" in self.pipeline.advantage.needs:
            ref_logps = self._gathered(output["ref_per_token_logps"])
        if penalised and logps is not None and ref_logps is not None:
            kl = kl_per_token(logps, ref_logps, self.args.kl_estimator or "k1") * mask
            tokens = tokens - self.kl.coefficient * kl * scored
            self._adapt(kl, mask)
        if self.args.whiten_rewards:
            tokens = whiten_masked(tokens, scored, shift_mean=False).float()
        if self.critic is not None:
            output["old_values"] = self._rollout_values(self.critic, output)
            values = self._gathered(output["old_values"])
        return batch._replace(token_rewards=tokens, values=values, logps=logps, ref_logps=ref_logps)

    def _adapt(self, kl: torch.Tensor, mask: torch.Tensor) -> None:
        """Log the KL of a batch, and move its coefficient for the next one. `kl`: (N, T)."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        per_sequence = kl.sum(dim=1).mean().item()
        metrics["kl"].append(kl.sum().item() / max(mask.sum().item(), 1))
        metrics["kl/sequence"].append(per_sequence)
        metrics["kl/coefficient"].append(self.kl.coefficient)
        if self.model.training and not self._critic_warms_up():  # then the policy has not moved
            self.kl.update(per_sequence, len(kl))

    def _rollout_logps(self, output: dict[str, Any]) -> torch.Tensor:
        """(n, t) log-probabilities under the policy that wrote the completions; TRL's where it made them."""
        if "old_per_token_logps" in output:
            return output["old_per_token_logps"]
        ids, mask = _whole(output)
        with torch.no_grad():
            logps, *_ = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, output["completion_ids"].size(1), batch_size=self._micro_batch()
            )
        return logps

    def _rollout_values(self, critic: Critic, output: dict[str, Any]) -> torch.Tensor:
        """(n, t) what the critic says of the completions' tokens, 0 on padding and tools' words."""
        ids, mask = _whole(output)
        tokens, size = output["completion_ids"].size(1), self._micro_batch()
        with torch.no_grad(), critic.working(False), self.accelerator.autocast():
            parts = [
                critic.values(ids[row : row + size], mask[row : row + size], tokens)
                for row in range(0, len(ids), size)
            ]
        return torch.cat(parts) * own_tokens(output)

    def _micro_batch(self) -> int:
        training = self.model.training
        return self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size

    def _finished(self, advantages: torch.Tensor, batch: RewardBatch, output: dict[str, Any]) -> torch.Tensor:
        assert batch.mask is not None
        assert self.pipeline is not None
        assert self.pipeline.advantage is not None
        scored = batch.mask * ~batch.rewards.isnan()[:, None]
        if batch.values is not None:
            targets = self.pipeline.advantage.value_targets(batch, advantages)
            output["value_targets"] = self._local(targets, output)
            output["value_mask"] = self._local(scored, output)
            self._log_values(batch.values[scored.bool()], targets[scored.bool()])
        if self.args.whiten_advantages and advantages.dim() == 2:
            return whiten_masked(advantages, scored).float()
        return advantages

    def _log_values(self, values: torch.Tensor, targets: torch.Tensor) -> None:
        """`values`, `targets`: of every token that is trained on, before the critic learns from them."""
        if len(values) < 2:
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["value/mean"].append(values.mean().item())
        unexplained = (targets - values).var() / targets.var().clamp(min=1e-8)
        metrics["value/explained_variance"].append(1 - unexplained.item())

    # --- training

    def _compute_loss(self, model, inputs):
        beta = self.beta
        # TRL adds its KL term where beta is not 0; a penalty in the reward has been paid already.
        self.beta = self.kl.coefficient if self.args.kl_in == "loss" else 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        self._batch = inputs
        return loss

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.critic is not None:
            if self._critic_warms_up():
                kept = {id(parameter) for parameter in self.critic.trained.values()}
                for parameter in model.parameters():
                    if id(parameter) not in kept:
                        parameter.grad = None  # without gradients the optimiser passes the policy over
            self._train_critic(self.critic, self._batch)
        return loss

    def _critic_warms_up(self) -> bool:
        return self.critic is not None and self.state.global_step < self.args.critic_warmup_steps

    def _train_critic(self, critic: Critic, inputs: dict[str, Any]) -> None:
        """One micro-batch of the value loss; where the policy makes an optimiser step, the gradients of one."""
        ids, attention = _whole(inputs)
        mask = inputs["value_mask"]
        # As TRL's token mean: over the tokens of all processes in one optimiser step.
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) * share / self.accelerator.num_processes
        with critic.working(True):
            with self.accelerator.autocast():
                values = critic.values(ids, attention, inputs["completion_ids"].size(1))
            per_token = value_loss(values, inputs["old_values"], inputs["value_targets"], self.args.cliprange_value)
            loss = (per_token * mask).sum() / tokens
            loss.backward()
        metrics = self._metrics["train"]
        metrics["value/loss"].append(self._mean_over_tokens(per_token.detach(), mask))
        if self.args.cliprange_value is not None:
            moved = (values.detach() - inputs["old_values"]).abs() > self.args.cliprange_value
            metrics["value/clip_ratio"].append(self._mean_over_tokens(moved.float(), mask))
        if self.accelerator.sync_gradients:
            metrics["value/grad_norm"].append(self._set_gradients_aside(critic))

    def _set_gradients_aside(self, critic: Critic) -> float:
        """Average the gradients over processes, clip, and keep them for `_step_critic`; their norm before clipping."""
        trained = list(critic.trained.values())
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes
        norm = torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm or float("inf"))
        self._critic_gradients = [parameter.grad for parameter in trained]
        self.critic_optimizer.zero_grad(set_to_none=True)  # before TRL clips the policy's, which share a module
        return norm.item()

    def _step_critic(self) -> None:
        """Step by the gradients that were set aside."""
        assert self.critic is not None
        for parameter, gradient in zip(self.critic.trained.values(), self._critic_gradients, strict=True):
            parameter.grad = gradient
        self.critic_optimizer.step()
        self.critic_scheduler.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        self._critic_gradients = []

    def _mean_over_tokens(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        totals = self.accelerator.reduce(torch.stack([(values * mask).sum(), mask.sum().float()]), reduction="sum")
        return (totals[0] / totals[1].clamp(min=1.0)).item()

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.critic is not None:
            make, settings = self.get_optimizer_cls_and_kwargs(self.args)
            rate = self.args.critic_learning_rate
            settings = settings | ({"lr": rate} if rate is not None else {})
            groups = [
                {
                    "params": [p for p in self.critic.trained.values() if p.dim() > 1],
                    "weight_decay": self.args.weight_decay,
                },
                {"params": [p for p in self.critic.trained.values() if p.dim() <= 1], "weight_decay": 0.0},
            ]
            self.critic_optimizer = make(groups, **settings)
            self.critic_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=self.critic_optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
        return scheduler

    # --- checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        folder = checkpoint_folder(self, trial)
        state: dict[str, Any] = {"kl": self._committed_kl.value}
        if self.critic is not None:
            weights = {name: weight.contiguous().cpu() for name, weight in self.critic.state_dict().items()}
            save_file(weights, os.path.join(folder, _CRITIC))
            state |= {"optimizer": self.critic_optimizer.state_dict(), "scheduler": self.critic_scheduler.state_dict()}
        torch.save(state, os.path.join(folder, _LEARNER))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = os.path.join(checkpoint, _LEARNER)
        if not os.path.isfile(file):
            raise ValueError(f"{checkpoint!r} is no checkpoint of PPO: it has no {_LEARNER}")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.kl.load_state_dict(state["kl"])
        self._committed_kl.value = state["kl"]
        if self.critic is not None:
            self.critic.load_state_dict(load_file(os.path.join(checkpoint, _CRITIC)))
            self.critic_optimizer.load_state_dict(state["optimizer"])
            self.critic_scheduler.load_state_dict(state["scheduler"])


class _AfterPolicy(TrainerCallback):
    """Calls when the policy's optimiser has stepped. A checkpoint on SIGTERM may come right before that."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._call()


def _whole(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of prompts and completions, (n, P + t) each."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def _pipeline_of(reward_funcs: RewardFunction | Sequence[RewardFunction] | None, args: PPOConfig) -> Pipeline:
    """What TRL takes as `reward_funcs` and `reward_weights`, as a pipeline. ValueError if they do not fit."""
    if not reward_funcs:
        raise ValueError("PPO needs rewards: give reward_funcs or pipeline")
    one = isinstance(reward_funcs, str | Reward) or callable(reward_funcs)
    rewards = [as_reward(reward) for reward in ([reward_funcs] if one else reward_funcs)]
    names = [reward.display_name for reward in rewards]
    weights = args.reward_weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise ValueError(f"{len(weights)} reward_weights for {len(rewards)} reward_funcs")
    return Pipeline(
        [
            Source(name if names.count(name) == 1 else f"{name}_{index}", reward, Schedule("constant", weight, weight))
            for index, (name, reward, weight) in enumerate(zip(names, rewards, weights, strict=True))
        ]
    )


def _blind_to_single_rows(pipeline: Pipeline) -> str | None:
    """The combiner or advantage that makes nothing of different rewards if each is of another prompt, tried out."""
    rows = [0.0, 1.0, 2.0, 4.0]
    batch = make_batch(rows, group_size=1)
    scores = make_scores([[row] * len(pipeline.sources) for row in rows], group_size=1)
    if not copy.deepcopy(pipeline.combine)(scores, batch.samples).any():
        return f"combine {pipeline.combine.display_name!r}"
    advantage = pipeline.advantage
    if advantage is not None and not copy.deepcopy(advantage)(batch).any():
        return f"advantage {advantage.display_name!r}"
    return None


def _check_sharding(args: PPOConfig) -> None:
    """ValueError where the critic's weights would be in pieces, or the policy could not be held still."""
    if splitter := splits_weights(args):
        raise ValueError(
            f"PPO's critic cannot be trained under {splitter}, which splits weights; use DDP, with LoRA on a 4-bit "
            "base where memory is short, or an advantage without a critic"
        )
    if args.deepspeed_plugin is not None:
        if args.critic_warmup_steps:
            raise ValueError(
                "critic_warmup_steps: DeepSpeed moves the policy with every gradient; set it to 0, or use DDP"
            )
        logger.warning("PPO's critic under DeepSpeed has not been tried")
