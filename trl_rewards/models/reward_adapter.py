"""A trained reward adapter on disk: LoRA weights and a head, read and checked before the base is in memory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType, load_peft_weights
from transformers.utils import cached_file

from trl_rewards.errors import RewardError
from trl_rewards.models.heads import value_head_file
from trl_rewards.models.pretrained import Loading, load_config, load_tokenizer

_HEAD = re.compile(r"(?:.*\.)?(?:score|v_head|v_head\.summary)\.(weight|bias)")
_LAYER = re.compile(r"\.(\d+)\.")
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""What `init_lora_weights` may be: the others (PiSSA, OLoRA, CorDA, LoftQ …) change the base's own weights."""


@dataclass(frozen=True)
class RewardAdapter:
    """LoRA weights for a base that others use too, and a head for its hidden states."""

    path: str
    config: Any
    """LoraConfig without what is not in the layers; None where there is a head alone."""
    weights: dict[str, torch.Tensor]
    """LoRA weights by the names that PEFT saves them under."""
    head: torch.nn.Linear
    """H -> K outputs, float32."""
    first_layer: int
    """The first decoder layer with LoRA; the number of layers where there is a head alone."""
    tokenizer: Any


def read_adapter(path: str, base: Loading, revision: str | None = None) -> RewardAdapter:
    """The adapter in a folder or on the Hub, as `trainer: reward` with LoRA leaves it, or a folder with a value head.

    RewardError if there is none, if it was trained on another base, or if it changes more than decoder layers.
    """
    tensors, config = {}, _lora_config(path, base, revision)
    if config is not None:
        tensors = load_peft_weights(path, device="cpu", revision=revision)
    head = {match[1]: tensors.pop(name) for name in list(tensors) if (match := _HEAD.fullmatch(name))}
    head = head or value_head_file(path, revision)
    if not head and config is None and os.path.isfile(os.path.join(path, "config.json")):
        raise RewardError(
            f"adapter: {path!r} is a whole model and no LoRA adapter; train one with use_peft: true, or give it "
            "as `path`"
        )
    if not head:
        raise RewardError(f"adapter: {path!r} has no head (`score` or `v_head`): was it trained with trainer: reward?")
    layers = load_config(base).get_text_config().num_hidden_layers
    if config is None:
        first_layer = layers
    else:
        _check_weights(path, tensors)
        first_layer = min(int(_LAYER.search(name)[1]) for name in tensors)  # ty: ignore[not-subscriptable]
    return RewardAdapter(path, config, tensors, _linear(path, head), first_layer, _tokenizer(path, base, revision))


def _lora_config(path: str, base: Loading, revision: str | None) -> Any:
    """Its LoraConfig for a causal LM; None where the folder has no adapter."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(path, "adapter_config.json", revision=revision, **missing)
    except (OSError, ValueError) as error:
        raise RewardError(f"adapter: nothing at {path!r}: {str(error).splitlines()[0]}") from error
    if found is None:
        return None
    config = PeftConfig.from_pretrained(path, revision=revision)
    if config.peft_type != PeftType.LORA:
        raise RewardError(f"adapter: {path!r} is {config.peft_type}; only LoRA shares a base")
    assert isinstance(config, LoraConfig)
    _check_base(path, str(config.base_model_name_or_path), base)
    if config.init_lora_weights not in KEEPS_BASE:
        raise RewardError(
            f"adapter: {path!r} was begun with init_lora_weights={config.init_lora_weights!r}, which changes the "
            "base's own weights; give it a base of its own (`path:`)"
        )
    if config.trainable_token_indices:
        raise RewardError(
            f"adapter: {path!r} brings token embeddings of its own (trainable_token_indices), which the policy has "
            "not; give it a base of its own (`path:`)"
        )
    if config.bias != "none":
        raise RewardError(f"adapter: {path!r} trains biases of the base (bias={config.bias!r}), which others use too")
    config.modules_to_save = config.task_type = None
    config.init_lora_weights = True
    return config


def _check_weights(path: str, tensors: dict[str, torch.Tensor]) -> None:
    whole = sorted(name for name in tensors if ".lora_" not in name or not _LAYER.search(name))
    if whole:
        raise RewardError(
            f"adapter: {path!r} brings more than a head and LoRA in decoder layers: {', '.join(whole)}; give it a "
            "base of its own (`path:`)"
        )
    if not tensors:
        raise RewardError(f"adapter: {path!r} has no LoRA weights")


def _check_base(path: str, trained_on: str, base: Loading) -> None:
    """RewardError unless the adapter's base is the policy's. Other spellings of its name need an equal config."""
    if trained_on == base.path or os.path.realpath(trained_on) == os.path.realpath(base.path):
        return
    problem = (
        f"adapter: {path!r} was trained on {trained_on!r}, and the policy is {base.path!r}: an adapter fits no other "
        "base than its own. Give it one (`path:`), or, if both are the same model, write the policy's name as "
        "base_model_name_or_path into its adapter_config.json"
    )
    if os.path.basename(trained_on.rstrip("/")).lower() != os.path.basename(base.path.rstrip("/")).lower():
        raise RewardError(problem)
    try:
        theirs = load_config(Loading(path=trained_on))
    except RewardError:
        return  # it is not here to compare with: its name must do
    names = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    mine, theirs = load_config(base).get_text_config().to_dict(), theirs.get_text_config().to_dict()
    if differing := [name for name in names if mine.get(name) != theirs.get(name)]:
        raise RewardError(f"{problem} (they differ in {', '.join(differing)})")


def _tokenizer(path: str, base: Loading, revision: str | None) -> Any:
    """The adapter's own tokenizer where it was saved with one (its chat template is the one it was trained with)."""
    policys = load_tokenizer(base)
    own = Loading(path=base.path, revision=base.revision, adapter=path, trust_remote_code=base.trust_remote_code)
    found = load_tokenizer(own)
    mine, theirs = policys.get_vocab(), found.get_vocab()
    if mine != theirs:
        added = sorted(theirs.keys() - mine.keys())
        what = f"added tokens {', '.join(map(repr, added[:5]))}" if added else "other tokens"
        raise RewardError(
            f"adapter: the tokenizer of {path!r} is not the policy's: it has {what}; give it a base of "
            "its own (`path:`)"
        )
    return found


def _linear(path: str, values: dict[str, torch.Tensor]) -> torch.nn.Linear:
    if "weight" not in values or values["weight"].dim() != 2:
        raise RewardError(f"adapter: the head of {path!r} is not one linear layer")
    outputs, inputs = values["weight"].shape
    linear = torch.nn.Linear(inputs, outputs, bias="bias" in values, dtype=torch.float32)
    linear.load_state_dict(values)
    return linear.requires_grad_(False)
