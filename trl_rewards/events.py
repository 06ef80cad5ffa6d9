"""One event loop per process, on a thread of its own: clients keep their connections, and notebooks may call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run_async(coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
    """What a coroutine returns. TimeoutError if it takes longer, because it blocks the loop: the next call gets a new
    loop, and the blocked one is left behind."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True, name="trl_rewards-events").start()
        loop = _loop
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(timeout)
    except TimeoutError:
        if not future.done():
            with _lock:
                if _loop is loop:  # else others' calls are on their way in the one that took its place
                    _loop = None
        raise
