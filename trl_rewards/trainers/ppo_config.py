"""PPO's training arguments: GRPOConfig's, which say how to roll out, and PPO's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_rewards.trainers.kl import ESTIMATORS
from trl_rewards.trl_keys import PPO_NAMES

LOSS_TYPES = ("dapo", "bnpo", "grpo", "dr_grpo")


@dataclass
class PPOConfig(GRPOConfig):
    """Arguments of `PPOTrainer`. Names are those of TRL's last PPO trainer (1.12) where their meaning is the same.

    A generation batch holds `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches` completions
    of each process; each of its mini-batches makes one optimiser step in each of `num_ppo_epochs` passes. γ and λ are
    options of the advantage `gae`.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of the policy."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt, from 1."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each generation batch."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps in each pass."})
    cliprange: float = field(default=0.2, metadata={"help": "ε of the clipped policy objective."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty; 0: no reference model."})
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Estimator of the KL: k1 (the default), k2 or k3 in the reward; in the loss always k3.",
            "choices": list(ESTIMATORS),
        },
    )
    kl_in: str = field(
        default="reward",
        metadata={
            "help": "'reward': a penalty per token, seen by critic and advantage. 'loss': GRPO's term (k3).",
            "choices": ["reward", "loss"],
        },
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "KL per sequence in nats that kl_coef is adapted to; None: kl_coef is fixed."}
    )
    kl_horizon: float = field(default=10_000.0, metadata={"help": "Sequences over which kl_coef adapts."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Divide token rewards by their deviation in the batch, their mean kept."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Mean 0 and deviation 1 for a batch's token advantages, over all processes."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken from the reward of a completion that does not end by itself; above 0."}
    )
    critic: str = field(
        default="auto",
        metadata={
            "help": "'adapter': a value head and a LoRA adapter of its own on the policy's base. 'model': a model of "
            "its own. 'auto': an adapter where the policy is trained with LoRA.",
            "choices": ["auto", "adapter", "model"],
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "What critic 'model' starts from, such as the reward model; None: the policy's model."},
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the critic; None: the policy's."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimiser steps at the start in which only the critic learns."}
    )
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "How far a value may move from the old one before its loss is clipped."}
    )

    def __post_init__(self):
        self._refuse()
        self.num_iterations = self.num_ppo_epochs
        self.beta, self.epsilon = self.kl_coef, self.cliprange
        if self.num_generations_eval is None:
            self.num_generations_eval = self.num_generations
        per_process = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        generations = self.num_generations
        if generations == 1:
            # GRPOConfig wants groups of two or more, and whole ones; PPO needs no group. A batch of one group passes.
            if per_process == 1:
                raise ValueError("PPO needs at least two completions per process and generation batch")
            self.num_generations = per_process
        super().__post_init__()
        self.num_generations = generations

    def _refuse(self) -> None:
        """ValueError with everything that PPO cannot do as asked."""
        problems = []
        own = {
            "num_iterations": (1, self.num_ppo_epochs),
            "beta": (0.0, self.kl_coef),
            "epsilon": (0.2, self.cliprange),
            "steps_per_generation": (None, self.gradient_accumulation_steps * self.num_mini_batches),
            "generation_batch_size": (None, None),
        }
        for name, allowed in own.items():
            if (given := getattr(self, name)) not in allowed:
                problems.append(f"{name}={given} has another name here: {PPO_NAMES[name]}")
        for name in ("num_generations", "num_ppo_epochs", "num_mini_batches"):
            value = getattr(self, name)
            if value is None or value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        for name in ("cliprange", "cliprange_value", "kl_target", "kl_horizon", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"{name} must be above 0, got {value}")
        if self.kl_coef < 0:
            problems.append(f"kl_coef must not be negative, got {self.kl_coef}")
        if self.kl_target is not None and self.kl_coef == 0:
            problems.append("kl_target adapts kl_coef, which is 0: give it a value to start from")
        if self.kl_target is not None and self.kl_in == "loss":
            problems.append("kl_target adapts the penalty of kl_in 'reward'")
        if self.scale_rewards not in ("group", True):
            problems.append("scale_rewards is GRPO's; PPO has whiten_advantages and whiten_rewards")
        if self.kl_estimator not in (None, *ESTIMATORS):
            problems.append(f"kl_estimator must be one of {', '.join(ESTIMATORS)}, got {self.kl_estimator!r}")
        if self.kl_in not in ("reward", "loss"):
            problems.append(f"kl_in must be 'reward' or 'loss', got {self.kl_in!r}")
        if self.kl_in == "loss" and self.kl_estimator not in (None, "k3"):
            problems.append(f"kl_in 'loss' is GRPO's term, which is k3; got kl_estimator {self.kl_estimator!r}")
        if self.critic not in ("auto", "adapter", "model"):
            problems.append(f"critic must be 'auto', 'adapter' or 'model', got {self.critic!r}")
        if self.critic == "adapter" and self.critic_model_name_or_path is not None:
            problems.append("critic_model_name_or_path is for critic 'model'; an adapter is on the policy's model")
        if self.critic_warmup_steps < 0:
            problems.append(f"critic_warmup_steps must not be negative, got {self.critic_warmup_steps}")
        if self.loss_type not in LOSS_TYPES:
            problems.append(f"loss_type must be one of {', '.join(LOSS_TYPES)} (how tokens are averaged), got "
                            f"{self.loss_type!r}")  # fmt: skip
        if self.lr_scheduler_type == "reduce_lr_on_plateau":
            problems.append(
                "lr_scheduler_type 'reduce_lr_on_plateau' waits for evaluations, which the critic has none of"
            )
        if isinstance(self.generation_kwargs, dict) and "eos_token_id" in self.generation_kwargs:
            problems.append("generation_kwargs: TRL cuts completions at the model's own end tokens and not at this "
                            "eos_token_id; set it in the model's generation_config")  # fmt: skip
        if self.importance_sampling_level != "token":
            problems.append("importance_sampling_level must be 'token': PPO's advantages are one per token")
        if problems:
            raise ValueError("; ".join(problems))

    def check_critic(self, lora: bool) -> None:
        """ValueError if the critic asked for cannot go with a policy that is trained with LoRA, or without."""
        if self.critic == "adapter" and not lora:
            raise ValueError(
                "critic 'adapter' needs a policy with LoRA: give a peft_config (use_peft: true), or critic 'model'"
            )
        if self.critic == "auto" and lora and self.critic_model_name_or_path is not None:
            raise ValueError("critic_model_name_or_path needs critic 'model': with LoRA the critic is an adapter")
        if self.fp16:
            raise ValueError("fp16 needs a scaled loss, which the critic does not have; use bf16")
