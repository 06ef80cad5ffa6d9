"""A reward model in this process that learns while the policy does: what Cooper and Adv-GRPO have in common.

https://huggingface.co/papers/2508.05613, https://huggingface.co/papers/2511.20256
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trl_rewards import Context, Failed, RewardError, TrainableReward
from trl_rewards.models import Held, InProcess

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards.models import Learner, Scorer

ADAPTER = "cotraining"


class TrainedModel(InProcess, TrainableReward):
    """A scalar reward model that is trained while the policy is. Subclasses say what it reads and learns from.

    All processes hold the same model, take their share of each batch, and add up their gradients, which needs `device:
    same` where there are several. Dropout is off, so that what is learned is what is scored.
    """

    deterministic: ClassVar[bool] = False  # it learns

    path: str
    """Folder or Hub name of a reward model; with `fresh_head`, of any language model. A folder with a LoRA adapter
    alone, as `trainer: reward` leaves it, is trained further (`train: lora`)."""
    fresh_head: bool = False
    """A model without a score head gets one that starts at 0: all its rewards are equal until it has learned."""
    train: Literal["all", "lora", "head"] = "all"
    """Which weights learn: all (in float32; checkpoints and their copy in memory hold thrice the model), a LoRA
    adapter and the head, or the head alone."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    learning_rate: float = 1.0e-5
    """Of AdamW, constant."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mini_batch: int | None = None
    """Pairs per optimiser step, over all processes; None: those of the whole batch."""
    micro_batch: int = 4
    """Pairs that go through the model together, on each process."""
    max_length: int | None = None
    """Tokens that the model reads of a text; the prompt's beginning is cut first. None: what it allows."""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: str | list[str] = "all-linear"

    def __post_init__(self):
        super().__post_init__()
        for name in ("learning_rate", "max_grad_norm", "micro_batch", "lora_r", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("mini_batch", "max_length"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if self.train == "all" and self.dtype != "float32":
            raise ValueError(f"train: all needs dtype float32, in {self.dtype} small steps are lost; or train: lora")
        if self.train == "all" and (self.load_in_4bit or self.load_in_8bit or self.adapter):
            raise ValueError("train: all is for a whole model; with a quantised one or an adapter use train: lora")
        self.check_trained()
        self._scorer: Scorer | None = None
        self._learner: Learner | None = None

    def held(self) -> list[Held]:
        return [
            Held(
                self.path,
                trains=self.train,
                lora_r=self.lora_r,
                lora_target_modules=self.lora_target_modules,
                micro_batch=2 * self.micro_batch,  # both texts of a pair
            )
        ]

    def setup(self, context: Context) -> None:
        import torch

        from trl_rewards.models import Learner, load_scorer

        loading = self.loading(self.path, context)
        if loading.adapter and self.train == "all":
            raise RewardError(f"path: {self.path!r} is a LoRA adapter, which train: lora trains further")
        self._scorer = load_scorer(loading, fresh_head=self.fresh_head, max_length=self.max_length)
        self._scorer.surrounding = torch.no_grad  # inference mode leaves buffers that cannot be trained with
        trained = self._trained(self._scorer.head.model, loading.adapter is not None, context.seed)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._learner = Learner(
            self.display_name, trained, nullcontext, self.learning_rate, self.weight_decay, self.max_grad_norm
        )

    def close(self) -> None:
        self._scorer = self._learner = None

    def _trained(self, model: Any, adapted: bool, seed: int) -> dict[str, Any]:
        """The parameters that learn, by name."""
        from peft import LoraConfig

        from trl_rewards.models import adapter_parameters, head_parameters, with_adapter

        if self.train == "all":
            return dict(model.named_parameters())
        if self.train == "lora" and not adapted:
            config = LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, target_modules=self.lora_target_modules)
            with_adapter(model.base_model, ADAPTER, config, seed=seed)
        head = head_parameters(model)
        if not head:
            raise RewardError(f"path: {self.path!r} has no head to train apart from its other layers")
        if self.train == "head":
            return head
        return adapter_parameters(model, "default" if adapted else ADAPTER) | head

    def _ready(self) -> tuple[Scorer, Learner]:
        if self._scorer is None or self._learner is None:
            raise RewardError(f"{self.display_name!r} has not been set up")
        return self._scorer, self._learner

    def _scores(
        self, texts: Sequence[str], plain: bool, start: Callable[[int], int] | None = None
    ) -> list[float | Failed]:
        """The model's score of each text, without gradient."""
        return self._ready()[0].score_texts(texts, plain, start)

    def _trainable_scores(
        self, texts: Sequence[str], plain: bool, start: Callable[[int], int] | None = None
    ) -> Tensor:
        """(B,) the same with gradient, of texts that go through the model together."""
        scorer, _ = self._ready()
        encoded, _ = scorer.encode_texts(texts, plain, start)
        rows = [ids for ids in encoded if not isinstance(ids, Failed)]
        if len(rows) < len(texts):
            failed = next(ids for ids in encoded if isinstance(ids, Failed))
            raise RewardError(f"{self.display_name!r} cannot read a text to learn from: {failed.reason}")
        return scorer.scores_with_gradient(rows)

    def state_dict(self) -> dict[str, Any]:
        return self._learner.state_dict() if self._learner is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._ready()[1].load_state_dict(state)
