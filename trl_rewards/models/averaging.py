"""One model whose weights are the mean of several models', from file to file.  https://huggingface.co/papers/2401.12187

No model is built: a tensor at a time is read of each, so memory holds one file of the result and little more.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from trl_rewards.data import model_path
from trl_rewards.errors import RewardError
from trl_rewards.models.pretrained import Loading, load_tokenizer
from trl_rewards.models.reward_adapter import KEEPS_BASE

FILE_BYTES = 4 * 2**30
"""A file of weights is at most so large, but for a tensor that is larger."""
_BESIDE = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "chat_template*", "*processor*.json", "*.py"),
)
"""What is copied beside config and weights."""
_NO_MATTER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of a config in which members may differ: none of them changes what a weight does."""
_SHARDED = "model.safetensors.index.json"


def average(
    out: str | os.PathLike,
    members: Sequence[str | os.PathLike],
    weights: Sequence[float] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the model Σ w_i · member_i into the folder `out`, which must be empty or absent. Returns the folder.

    Members are folders or Hub names with safetensors: whole models, or LoRA adapters with their score heads, which are
    merged into their bases first (the mean of B and of A is not that of B·A). `weights` are divided by their sum;
    None: 1/M each. Sums are float32, and each tensor keeps its dtype; integers are the first member's. Config and
    tokenizer are the first member's.

    RewardError names the file and the tensor in which members differ, before anything is written.
    """
    shares = shares_of(weights, len(members))
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RewardError(f"{target} exists already; give another folder")
    with ExitStack() as stack:
        opened = [_open(os.fspath(member), stack) for member in members]
        first = opened[0]
        if problems := [problem for other in opened[1:] for problem in _differences(first, other)]:
            raise RewardError("\n".join(["these models cannot be averaged:", *(f"  - {line}" for line in problems)]))
        target.mkdir(parents=True, exist_ok=True)
        plan = list(_files(first.stored, file_bytes))
        for number, names in enumerate(plan, start=1):
            mean = {name: _mean(name, opened, shares) for name in names}
            save_file(mean, target / _file_name(number, len(plan)), metadata={"format": "pt"})
        if len(plan) > 1:
            where = {name: _file_name(number, len(plan)) for number, names in enumerate(plan, 1) for name in names}
            size = sum(stored.bytes for stored in first.stored.values())
            _write_json(target / _SHARDED, {"metadata": {"total_size": size}, "weight_map": where})
        for folder in first.beside:
            for file in sorted(Path(folder).iterdir()):
                if file.is_file() and any(fnmatch(file.name, name) for name in _BESIDE):
                    shutil.copyfile(file, target / file.name)
        made_of = [{"member": os.fspath(path), "weight": share} for path, share in zip(members, shares, strict=True)]
        _write_json(target / "average.json", made_of)
        _write_json(target / "config.json", first.config)  # last: what was broken off is no model
    return target


class _Stored(NamedTuple):
    """A tensor in a file, as its header has it."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * int(re.sub(r"\D", "", self.dtype.split("_")[0]) or 8) // 8  # BOOL: 8


@dataclass
class _Member:
    path: str
    config: dict[str, Any]
    stored: dict[str, _Stored]
    """Where each tensor of the model is, by name."""
    read: Callable[[str], torch.Tensor]
    beside: list[str]
    """Folders of the tokenizer and what else belongs to the model; files of later ones replace those of earlier."""


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """What each member counts; the sum is 1. RewardError for weights that cannot be."""
    if not count:
        raise RewardError("no members to average")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise RewardError(f"{len(weights)} weights for {count} members; give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        raise RewardError(f"weights must not be negative, nor all 0, got {', '.join(map(str, weights))}")
    return [weight / sum(weights) for weight in weights]


def _mean(name: str, members: Sequence[_Member], shares: Sequence[float]) -> torch.Tensor:
    tensor = members[0].read(name)
    if not tensor.is_floating_point():
        return tensor
    dtype = getattr(torch, _TORCH[members[0].stored[name].dtype])
    total = torch.zeros(tensor.shape, dtype=torch.promote_types(dtype, torch.float32))
    for member, share in zip(members, shares, strict=True):
        total.add_(member.read(name).to(total.dtype), alpha=share)
    return total.to(dtype)


_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _differences(first: _Member, other: _Member) -> Iterator[str]:
    for key in sorted({*first.config, *other.config} - _NO_MATTER):
        mine, theirs = first.config.get(key), other.config.get(key)
        if mine != theirs:
            yield f"config.json: {key} is {mine!r} in {first.path}, and {theirs!r} in {other.path}"
    for here, there in ((first, other), (other, first)):
        if missing := sorted(here.stored.keys() - there.stored.keys()):
            stored, more = here.stored[missing[0]], f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            yield f"{there.path} has no tensor {missing[0]}{more}, which is in {stored.file}"
    for name in first.stored.keys() & other.stored.keys():
        mine, theirs = first.stored[name], other.stored[name]
        if mine[1:] != theirs[1:]:
            yield (
                f"{name} is {mine.dtype} {list(mine.shape)} in {mine.file}, and {theirs.dtype} {list(theirs.shape)} "
                f"in {theirs.file}"
            )


def _files(stored: dict[str, _Stored], limit: int) -> Iterator[list[str]]:
    """The names of the tensors in each file of the result."""
    names: list[str] = []
    size = 0
    for name, tensor in stored.items():
        if names and size + tensor.bytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.bytes
    yield names


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- reading members -------------------------------------------------------------------------------------------------


def _open(path: str, stack: ExitStack) -> _Member:
    folder = _folder(path)
    if os.path.isfile(os.path.join(folder, "config.json")):
        return _whole(path, folder, stack)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return _merged(path, folder, stack)
    raise RewardError(f"{path}: neither a model (config.json) nor an adapter (adapter_config.json)")


def _folder(path: str) -> str:
    found = model_path(path)
    if os.path.isdir(found):
        return found
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(found, allow_patterns=["*.safetensors", "*.json", *_BESIDE])
    except (OSError, ValueError) as error:
        raise RewardError(f"{path}: no such folder, and the Hub says: {str(error).splitlines()[0]}") from error


def _whole(path: str, folder: str, stack: ExitStack) -> _Member:
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise RewardError(f"{path}: quantised weights have no mean; give the model as it was before")
    for name in ("value_head.safetensors", "value_head.bin"):
        if os.path.isfile(os.path.join(folder, name)):
            raise RewardError(f"{path}: its head is in a file of its own, {name}; save it within the model's weights")
    stored, read = _tensors(folder, _weight_files(folder), stack)
    return _Member(path, config, stored, read, [folder])


def _weight_files(folder: str) -> list[str]:
    index = Path(folder, _SHARDED)
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if os.path.isfile(os.path.join(folder, "model.safetensors")):
        return ["model.safetensors"]
    raise RewardError(f"{folder}: neither model.safetensors nor {_SHARDED}; save the model with save_pretrained")


def _tensors(
    folder: str, files: Sequence[str], stack: ExitStack
) -> tuple[dict[str, _Stored], Callable[[str], torch.Tensor]]:
    """Where each tensor of the files is, and what reads one."""
    handles: dict[str, Any] = {}
    stored: dict[str, _Stored] = {}
    for name in files:
        file = os.path.join(folder, name)
        try:
            handles[file] = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise RewardError(f"{file} cannot be read: {error}") from error
        for key in handles[file].keys():  # noqa: SIM118 (it is no dict)
            part = handles[file].get_slice(key)
            stored[key] = _Stored(file, part.get_dtype(), tuple(part.get_shape()))
    return stored, lambda key: handles[stored[key].file].get_tensor(key)


# --- LoRA ------------------------------------------------------------------------------------------------------------

_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")
_PREFIX = "base_model.model."  # of every name in an adapter's file


def _merged(path: str, folder: str, stack: ExitStack) -> _Member:
    """A LoRA adapter as the sequence classifier that it makes of its base."""
    lora = PeftConfig.from_pretrained(folder)
    _check_lora(path, lora)
    base = _folder(str(lora.base_model_name_or_path))
    of_base, read_base = _tensors(base, _weight_files(base), stack)
    brought, read_brought = _tensors(folder, ["adapter_model.safetensors"], stack)
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in brought:
        inner = name.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(inner):
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = name
        elif ".lora_" in inner or "trainable_tokens" in inner:
            raise RewardError(f"{brought[name].file}: {name} is more than plain LoRA; merge it with PEFT first")
        else:
            whole[inner] = name
    head = next((name for name in whole if name.split(".")[0] == "score" and name.endswith("weight")), None)
    if head is None:
        raise RewardError(f"{path}: the adapter has no score head; was it trained with trainer: reward?")
    config, names = _classifier(base, folder, outputs=brought[whole[head]].shape[0])
    stored: dict[str, _Stored] = {}
    for name in names:
        if name in whole:
            stored[name] = brought[whole[name]]
        elif name in of_base:
            stored[name] = of_base[name]
        else:
            raise RewardError(f"{base} has no tensor {name}, which a {config.architectures[0]} needs")
    if lost := sorted({*pairs, *whole} - stored.keys()):
        raise RewardError(f"{path}: {lost[0]} of the adapter is no tensor of {base}")
    for name in pairs:
        if stored[name].dtype not in _TORCH:
            raise RewardError(f"{stored[name].file}: {name} is {stored[name].dtype}; LoRA is merged into floats")

    def read(name: str) -> torch.Tensor:
        if name in whole:
            return read_brought(whole[name])
        weight = read_base(name)
        if name not in pairs:
            return weight
        a, b = (read_brought(pairs[name][part]).float() for part in ("A", "B"))
        change = b @ a * _scale(lora, name.removesuffix(".weight"), rank=len(a))
        return weight.float() + (change.T if lora.fan_in_fan_out else change)

    beside = [base, *([folder] if os.path.isfile(os.path.join(folder, "tokenizer_config.json")) else [])]
    return _Member(path, json.loads(config.to_json_string()), stored, read, beside)


def _check_lora(path: str, lora: Any) -> None:
    """RewardError for an adapter that is more than W + scale · B·A on the base's own weights."""
    if lora.peft_type != PeftType.LORA:
        raise RewardError(f"{path}: the adapter is {lora.peft_type}; only LoRA can be merged here")
    if lora.use_dora or lora.lora_bias or lora.bias != "none":
        raise RewardError(f"{path}: DoRA and trained biases are more than plain LoRA; merge it with PEFT first")
    if lora.init_lora_weights not in KEEPS_BASE:
        raise RewardError(
            f"{path}: init_lora_weights={lora.init_lora_weights!r} changed the base's own weights; merge it with PEFT"
        )


def _scale(lora: Any, module: str, rank: int) -> float:
    alpha = lora.alpha_pattern.get(get_pattern_key(list(lora.alpha_pattern), module), lora.lora_alpha)
    return alpha / (math.sqrt(rank) if lora.use_rslora else rank)


def _classifier(base: str, adapter: str, outputs: int) -> tuple[Any, list[str]]:
    """The config of the base as a sequence classifier, and the names of its weights, which are given no memory."""
    config = AutoConfig.from_pretrained(base, num_labels=outputs)
    config.pad_token_id = load_tokenizer(Loading(path=base, adapter=adapter)).pad_token_id
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise RewardError(f"{base}: transformers has no sequence classifier of type {config.model_type}") from error
    config.architectures = [type(model).__name__]
    return config, list(model.state_dict())
