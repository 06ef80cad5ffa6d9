"""Loading a model for scoring: the one place that calls `from_pretrained` for rewards and judges."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations import deepspeed
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from trl_rewards.errors import RewardError

Quantization = Literal["4bit", "8bit"] | None


def quantization_of(load_in_4bit: bool | None, load_in_8bit: bool | None) -> Quantization:
    """What two options of that name, TRL's or ours, ask for; 4 bits where both are set."""
    return "4bit" if load_in_4bit else "8bit" if load_in_8bit else None


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, how it is loaded, and where it is kept."""

    path: str
    """Folder or Hub name."""
    revision: str | None = None
    dtype: str = "bfloat16"
    attn_implementation: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    quantization: Quantization = None
    device: Any = None
    """torch.device or its name; None: `default_device()`."""
    offload: bool = False
    """Keep the weights in CPU memory outside `at_work`."""
    trust_remote_code: bool = False


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def device_of(loading: Loading) -> torch.device:
    """The device that the model works on. RewardError if this machine does not have it."""
    name = loading.device or default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RewardError(f"device: {name!r} is none; use 'same', 'cpu' or an accelerator such as 'cuda:1'") from error
    if device.type == "cpu":
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or device.type != accelerator.type or (device.index or 0) >= count:
        there = ", ".join(["cpu", *(f"{accelerator}:{index}" for index in range(count))])
        raise RewardError(f"device: {name!r} is not there; this process sees {there}")
    return device


def base_of_adapter(path: str, revision: str | None = None) -> str | None:
    """The base model's folder or Hub name where `path` is an adapter's; None where it is a model's."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        if cached_file(path, "config.json", revision=revision, **missing):
            return None
        file = cached_file(path, "adapter_config.json", revision=revision, **missing)
    except (OSError, ValueError):  # neither a folder nor a name: loading it says so
        return None
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)["base_model_name_or_path"]


def with_base(loading: Loading, resolve: Callable[[str], str]) -> Loading:
    """Of a folder with nothing but an adapter, as training with LoRA leaves it, its base model with the adapter on.

    `resolve` makes a path of the base's name, as the adapter has it.
    """
    if loading.adapter is not None or not (base := base_of_adapter(loading.path, loading.revision)):
        return loading
    return replace(loading, path=resolve(base), revision=None, adapter=loading.path, adapter_revision=loading.revision)


def load_config(loading: Loading, what: str = "model") -> Any:
    """The model's config. RewardError if there is no such model; `what` is what the message calls it."""
    try:
        return AutoConfig.from_pretrained(
            loading.path, revision=loading.revision, trust_remote_code=loading.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RewardError(f"no {what} at {loading.path!r}: {_said(error)}") from error


def load_tokenizer(loading: Loading) -> Any:
    """The tokenizer, with a pad token: the adapter's own where it was saved with one, which may have more tokens.

    RewardError if there is none.
    """
    path, revision = loading.path, loading.revision
    if loading.adapter and os.path.isfile(os.path.join(loading.adapter, "tokenizer_config.json")):
        path, revision = loading.adapter, None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=loading.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RewardError(f"no tokenizer at {path!r}: {_said(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(auto_class: Any, loading: Loading, **options: Any) -> tuple[Any, list[str]]:
    """The model in evaluation mode on its device, and the names of weights that its checkpoint lacks.

    `auto_class` is `AutoModelForCausalLM` or the like, or a model class; `options` go to its `from_pretrained`.
    Weights that the adapter brings (a trained head among `modules_to_save`) count as there. RewardError if it cannot
    be loaded, the device is not there, or the adapter does not fit.
    """
    device = device_of(loading)
    options = {
        "revision": loading.revision,
        "trust_remote_code": loading.trust_remote_code,
        "dtype": getattr(torch, loading.dtype),
    } | options
    if loading.attn_implementation:
        options["attn_implementation"] = loading.attn_implementation
    if loading.quantization:
        options["quantization_config"] = _quantization(loading)
        options["device_map"] = {"": device}
    try:
        with outside_deepspeed(), without_loading_report():
            model, info = auto_class.from_pretrained(loading.path, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise RewardError(f"{loading.path!r} cannot be loaded: {_said(error)}") from error
    missing = set(info["missing_keys"])
    keep_4bit_unpacked(model)
    if loading.adapter:
        if (tokens := len(load_tokenizer(loading))) > model.get_input_embeddings().num_embeddings:
            with outside_deepspeed():  # the adapter brings the embeddings of the tokens that it added
                model.resize_token_embeddings(tokens)
        model, brought = _with_adapter(model, loading)
        missing -= brought
    model.eval().requires_grad_(False)
    if loading.offload:
        model.to("cpu")
    elif not loading.quantization:
        model.to(device)
    return model, sorted(missing)


@contextmanager
def without_loading_report() -> Generator[None]:
    """Keep transformers from reporting at length which weights a checkpoint lacks: callers are told, and say it."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _quantization(loading: Loading) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise RewardError(f"load_in_{loading.quantization} needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=loading.quantization == "4bit",
        load_in_8bit=loading.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, loading.dtype),
    )


def _with_adapter(model: Any, loading: Loading) -> tuple[Any, set[str]]:
    """The model with LoRA layers in it, and the names of whole weights that the adapter brought."""
    from peft import PeftModel

    adapter = loading.adapter
    assert adapter is not None
    try:
        # Without autocast_adapter_dtype=False LoRA weights become fp32, which doubles the time of a bf16 model on CPU.
        with outside_deepspeed():
            adapted = PeftModel.from_pretrained(
                model, adapter, revision=loading.adapter_revision, autocast_adapter_dtype=False
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardError(f"adapter: {adapter!r} does not fit {loading.path!r}: {_said(error)}") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise RewardError(f"adapter: {adapter!r} learns prompts; only adapters inside the layers (LoRA …) are known")
    infix = ".modules_to_save.default."
    inner = adapted.get_base_model()
    brought = {name.replace(infix, ".") for name, _ in inner.named_parameters() if infix in name}
    return inner, brought


def _said(error: Exception) -> str:
    """An error's words on one line."""
    return textwrap.shorten(str(error), 400)


@contextmanager
def at_work(model: Any, loading: Loading) -> Generator[torch.device]:
    """The device that the model works on; an offloaded model is moved there, and back to CPU memory afterwards."""
    device = device_of(loading)
    if not loading.offload:
        yield device
        return
    model.to(device)
    try:
        yield device
    finally:
        model.to("cpu")
        free_memory(device)


def free_memory(device: torch.device) -> None:
    """Give memory that the allocator holds but nobody uses back to the accelerator, where the policy needs it."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def keep_4bit_unpacked(model: Any) -> Any:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16. Returns the model.

    There, a `Linear4bit` in evaluation mode repacks its weight for a fused inference kernel, and nothing unpacks it:
    training afterwards gets wrong gradients without an error, and merging an adapter gives a wrong model
    (bitsandbytes 0.50; https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078 is of the same packing).
    A model without 4-bit layers is left as it is.
    """
    if "bitsandbytes" not in sys.modules:  # importing it takes seconds, and a model with its layers has done so
        return model
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def outside_deepspeed() -> Generator[None]:
    """Hide the policy's ZeRO-3, and FSDP's loading on one rank, from `from_pretrained`.

    With ZeRO-3 it would partition this model's weights too: they would be empty on every rank outside DeepSpeed's own
    forward. With FSDP's `cpu_ram_efficient_loading` only the first rank of a machine would get weights.
    """
    zero3, fsdp = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    deepspeed.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if fsdp is None:
            del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp
