"""Where the trainers here meet TRL's: methods whose signatures must be as the overrides expect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trl
from packaging.version import Version

KNOWN_TRL = "1.14 to 1.16"
LOGPS = {
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "..."]
}
"""Where rewards and limits look at log-probabilities: its inputs come by their places."""


def default_folder(model: Any, trainer: str) -> str:
    """The `output_dir` that TRL gives a run of this model (its name, or itself) without arguments."""
    path = model if isinstance(model, str) else model.config.name_or_path
    return f"{path.split('/')[-1]}-{trainer}"


def check_seam(cls: type, seam: Mapping[str, Sequence[str]]) -> None:
    """ImportError if the TRL trainer under `cls` lacks a method of `seam`, or has it with other parameters.

    A last "..." stands for more parameters, which the override passes on as they come.
    """
    for base in cls.__mro__:
        if base.__module__.startswith("trl."):
            break
    else:
        raise TypeError(f"{cls.__name__} is not a TRL trainer")
    differing = [
        f"{name}({', '.join(inspect.signature(getattr(base, name)).parameters)})"
        if hasattr(base, name)
        else f"no {name}"
        for name, wanted in seam.items()
        if not hasattr(base, name) or not _takes(getattr(base, name), wanted)
    ]
    if differing or Version(trl.__version__) < Version("1.14"):
        raise ImportError(
            f"trl {trl.__version__} does not fit this trl-rewards ({'; '.join(differing) or 'too old'}); "
            f"versions known to work: trl {KNOWN_TRL}"
        )


def _takes(method: Callable[..., Any], wanted: Sequence[str]) -> bool:
    parameters = inspect.signature(method).parameters
    if wanted[-1] != "...":
        return list(parameters) == list(wanted)
    first = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    begin = list(wanted[:-1])
    if any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):  # as GRPO's of TRL 1.14
        begin = begin[: len(first)]
    return first[: len(begin)] == begin
