"""Several LoRA adapters on one model: adding one, and making one of them active for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from trl_rewards.errors import RewardError
from trl_rewards.scoring import private_randomness


@contextmanager
def using(model: Any, adapter: str | None, training: bool = False) -> Generator[Any]:
    """The model with one adapter active, or with adapters off (None: the reference), and nothing else changed.

    `training=False`: evaluation mode, without gradients. `training=True`: training mode, and the parameters of this
    adapter are the only ones that require gradients. Gradient checkpointing runs the forward again during the
    backward, with what is active then, so `backward()` must be called inside. Give the PEFT model itself, not what
    DistributedDataParallel made of it: no parameter is replaced, but a forward pass that goes around DDP leaves it to
    the caller to average gradients. On leaving, also by an exception, active adapters, `requires_grad` and the
    training flag of every module are what they were. RewardError if there is no such adapter or if one is merged.
    """
    if adapter is not None and adapter not in model.peft_config:
        raise RewardError(f"the model has no adapter {adapter!r}; it has {', '.join(model.peft_config)}")
    if merged := sorted({name for layer in _layers(model) for name in _merged(layer)}):
        raise RewardError(f"adapter {', '.join(merged)} is merged into the base; unmerge it before another is used")
    with _restored(model):
        if adapter is not None:
            model.base_model.enable_adapter_layers()
        else:
            for layer in _layers(model):
                layer.enable_adapters(False)
        model.requires_grad_(False)
        if adapter is not None:
            model.set_adapter(adapter, inference_mode=not training)
        model.train(training)
        with nullcontext() if training else torch.no_grad():
            yield model


def add_adapter(model: Any, name: str, config: Any, autocast_adapter_dtype: bool = True) -> None:
    """Put a fresh adapter beside those that a PEFT model has. It is neither active nor trainable until `using` it.

    Before the model goes into DistributedDataParallel. With PEFT's own `add_adapter` and `load_adapter` an adapter
    for inference freezes the one that is active. RewardError if there is an adapter of that name, or if PEFT cannot
    put it beside the others.
    """
    try:
        with _restored(model):
            model.add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
    except ValueError as error:
        raise RewardError(f"adapter {name!r} cannot be put beside {', '.join(model.peft_config)}: {error}") from error
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)


def with_adapter(
    model: Any, name: str, config: Any, autocast_adapter_dtype: bool = True, seed: int | None = None
) -> PeftModel:
    """The model with a fresh adapter, neither active nor trainable: added to a PEFT model, or a model's first.

    With a `seed` it starts alike on every process, and all other random streams stay where they were.
    """
    with private_randomness(seed) if seed is not None else nullcontext():
        if isinstance(model, PeftModel):
            add_adapter(model, name, config, autocast_adapter_dtype)
            return model
        wrapped = get_peft_model(model, config, name, autocast_adapter_dtype=autocast_adapter_dtype)
        return wrapped.requires_grad_(False)


def adapter_parameters(model: Any, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, by their names in the model."""
    own = {
        id(parameter)
        for layer in _layers(model)
        for kind in layer.adapter_layer_names
        for path, parameter in layer.get_submodule(kind).named_parameters()
        if path.split(".")[0] == name
    }
    return {path: parameter for path, parameter in model.named_parameters() if id(parameter) in own}


@contextmanager
def left_out(model: Any, names: Iterable[str]) -> Generator[None]:
    """The PEFT model saves itself without these adapters inside."""
    configs = dict(model.peft_config)
    for name in names:
        del model.peft_config[name]
    try:
        yield
    finally:
        model.peft_config.clear()
        model.peft_config.update(configs)


def trunk_of(model: Any) -> Any:
    """The decoder of a causal LM, without its LM head: token ids -> hidden states (B, T, H) after the last norm.

    Of a PEFT model it is the decoder with the adapter layers in it. RewardError if the model has no such part.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if whole.base_model is whole:
        raise RewardError(f"{type(whole).__name__} has no decoder apart from its head")
    return whole.base_model


@contextmanager
def _restored(model: Any) -> Generator[None]:
    """What a switch of adapters changes is put back, also where PEFT's own methods would not (several active adapters,
    frozen active ones, layers that are switched off one by one)."""
    named = [(model, "active_adapter"), (model.base_model, "active_adapter"), (model, "_adapters_disabled")]
    active = [(part, name, getattr(part, name)) for part, name in named] if isinstance(model, PeftModel) else []
    layers = [(layer, layer._active_adapter, layer._disable_adapters) for layer in _layers(model)]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for part, name, value in active:
            setattr(part, name, value)
        for layer, names, disabled in layers:
            layer._active_adapter, layer._disable_adapters = names, disabled
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for module, training in modules:
            module.training = training


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _merged(layer: Any) -> list[str]:
    return layer.merged_adapters if isinstance(layer, BaseTunerLayer) else []
