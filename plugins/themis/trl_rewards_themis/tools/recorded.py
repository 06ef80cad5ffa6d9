"""Histories of tools, as TARA has them: answers that are replayed.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

import json
import os
from typing import Any

from trl_rewards import Context, RewardError


def read_history(path: str, context: Context) -> dict[str, Any]:
    """The JSON object in a file. RewardError says what is wrong with it."""
    resolved = context.path(path)
    if not os.path.isfile(resolved):
        raise RewardError(f"replay: no file {path!r} in {context.looked_in}")
    try:
        with open(resolved, encoding="utf-8") as file:
            history = json.load(file)
    except ValueError as error:
        raise RewardError(f"replay: {path!r} is not JSON: {error}") from None
    if not isinstance(history, dict):
        raise RewardError(f"replay: {path!r} must hold a JSON object, got {type(history).__name__}")
    return history
