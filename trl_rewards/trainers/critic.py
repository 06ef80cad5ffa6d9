"""PPO's critic: a value for the text before every token, by an adapter on the policy's base or by its own model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from trl_rewards.errors import RewardError
from trl_rewards.models.adapters import adapter_parameters, trunk_of, using, with_adapter
from trl_rewards.models.pretrained import Loading, base_of_adapter, load_pretrained
from trl_rewards.scoring import private_randomness

ADAPTER = "critic"


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, targets: torch.Tensor, cliprange: float | None
) -> torch.Tensor:
    """½ (V - target)² of each token, same shape; with a cliprange the larger of it and that of the clipped value.

    The clipped value is V held within `cliprange` of the value at the time of the rollout (PPO's released code,
    https://github.com/openai/baselines/tree/master/baselines/ppo2).
    """
    loss = (values - targets).square()
    if cliprange is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
        loss = torch.maximum(loss, (clipped - targets).square())
    return loss / 2


class Critic:
    """A trunk and a linear head that gives one value per position."""

    def __init__(
        self,
        trunk: Any,
        head: torch.nn.Linear,
        trained: dict[str, torch.nn.Parameter],
        working: Callable[[bool], AbstractContextManager[Any]],
        in_policy: bool = False,
    ):
        self._trunk, self._head = trunk, head
        self.trained = trained | {f"value_head.{name}": weight for name, weight in head.named_parameters()}
        """Name -> parameter of everything that learns."""
        self.in_policy = in_policy
        """Whether it is an adapter in the policy's own model, called `ADAPTER`."""
        self.working = working
        """`with critic.working(training):` around `values` and the backward pass, which recomputes under gradient
        checkpointing."""

    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
        """(B, L) ids -> (B, tokens) float32: the value of the text before each of the last `tokens` ids."""
        hidden = self._trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self._head(hidden[:, -tokens - 1 : -1].float()).squeeze(-1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is trained, by name."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave. ValueError if it is another critic's."""
        if state.keys() != self.trained.keys():
            differing = sorted(state.keys() ^ self.trained.keys())
            raise ValueError(f"the checkpoint's critic is another one: {len(differing)} names differ, {differing[:3]}")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[name])


def adapter_critic(policy: Any, seed: int) -> Critic:
    """A value head and a LoRA adapter, of the policy adapter's shape, on the policy's own base.

    `policy` is a PeftModel. The head starts at 0, and so do all values.
    """
    config = copy.deepcopy(policy.peft_config[policy.active_adapter])
    config.lora_dropout = 0.0  # values of a rollout and of its training should differ by what was learnt only
    config.modules_to_save = None
    config.init_lora_weights = True  # PiSSA and its like would change the base, and with it the policy
    with_adapter(policy, ADAPTER, config, seed=seed)
    trunk = trunk_of(policy)
    head = _head(trunk.config.get_text_config().hidden_size, next(policy.parameters()).device)
    trained = adapter_parameters(policy, ADAPTER)
    return Critic(trunk, head, trained, lambda training: using(policy, ADAPTER, training=training), in_policy=True)


def model_critic(loading: Loading, peft_config: Any, seed: int, gradient_checkpointing: bool = False) -> Critic:
    """A model of its own; its score head is the value head, and starts at 0 if the checkpoint has none.

    With a `peft_config` its trunk is trained by LoRA, else as a whole. RewardError if it cannot be loaded.
    """
    if base_of_adapter(loading.path, loading.revision):
        raise RewardError(
            f"critic_model_name_or_path: {loading.path!r} is a LoRA adapter; merge it into a model first "
            "(peft: AutoPeftModelForSequenceClassification.from_pretrained(…).merge_and_unload().save_pretrained(…))"
        )
    with private_randomness(seed):  # a head that the checkpoint lacks is drawn, and then replaced
        model, fresh = load_pretrained(AutoModelForSequenceClassification, loading, num_labels=1)
    named = dict(model.named_children())
    if not isinstance(named.get("score"), torch.nn.Linear):
        raise RewardError(f"critic: {type(model).__name__} of {loading.path!r} has no linear head called `score`")
    trunk = trunk_of(model)
    if peft_config is not None:
        from peft import inject_adapter_in_model

        config = copy.deepcopy(peft_config)
        config.task_type, config.modules_to_save, config.lora_dropout = None, None, 0.0
        with private_randomness(seed):
            inject_adapter_in_model(config, model, ADAPTER)  # layers have the names that they have in the policy
        for weight in trunk.parameters():
            if weight.requires_grad:  # in bfloat16 most steps would be too small to move it
                weight.data = weight.data.float()
    else:
        model.requires_grad_(True)
    head = _head(model.config.get_text_config().hidden_size, next(trunk.parameters()).device)
    if not any(name.startswith("score.") for name in fresh):
        head.weight.data.copy_(named["score"].weight.data)
        if named["score"].bias is not None:
            head.bias.data.copy_(named["score"].bias.data)
    del model.score
    if gradient_checkpointing:
        trunk.gradient_checkpointing_enable({"use_reentrant": False})
        if peft_config is not None:
            trunk.enable_input_require_grads()
    trained = {name: weight for name, weight in trunk.named_parameters() if weight.requires_grad}

    @contextmanager
    def working(training: bool) -> Generator[None]:
        trunk.train(training)
        yield

    return Critic(trunk, head, trained, working)


def _head(width: int, device: Any) -> torch.nn.Linear:
    head = torch.nn.utils.skip_init(torch.nn.Linear, width, 1, device=device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head
