"""Tools that ask a web API: one request for equal questions, answers on disk, and a deadline that is kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from trl_rewards.components import Context, Tool
from trl_rewards.events import run_async
from trl_rewards.models.http import HttpClient, api_key
from trl_rewards.models.kept import KeptAnswers


class WebTool(Tool):
    """A tool that asks a web API. A subclass says how, in `fetch`, and calls `look_up`.

    While a question is being asked, equal ones wait for its answer; later ones find it in the cache.
    """

    key_header: ClassVar[str | None] = "Authorization"
    """The header that carries the key, after "Bearer " where it is Authorization. None: `fetch` puts it elsewhere."""

    endpoint: str
    """Address of the API."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    timeout: float = 20.0
    """Seconds that a call may take: tries, pauses, and the wait for its turn. One try may take half of it."""
    retries: int = 2
    """How often a request is sent again after a broken connection, a time-out, or status 408, 425, 429 or 5xx."""
    concurrency: int = 8
    """Requests at a time."""
    requests_per_minute: float | None = None
    """At most so many, evenly spaced."""
    cache: str | None = "~/.cache/trl_rewards/tools.sqlite"
    """SQLite file that keeps answers for later runs, and for other processes of this machine; null: none is kept."""

    def __post_init__(self):
        super().__post_init__()
        if self.retries < 0 or self.concurrency < 1:
            raise ValueError(
                f"retries must be 0 or more and concurrency 1 or more, got {self.retries} and {self.concurrency}"
            )
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_asking", "_client", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()  # sockets stay in their process

    def setup(self, context: Context) -> None:
        """RewardError where the key is not set."""
        if self.api_key_env is not None:
            api_key(self.api_key_env)

    async def fetch(self, client: HttpClient, question: Mapping[str, Any]) -> str:
        """The answer to a question, as text. Raise HttpFailure or ToolError where there is none: it is not kept."""
        raise NotImplementedError(f"{type(self).__name__} must define fetch(self, client, question)")

    def look_up(self, question: Mapping[str, Any]) -> str:
        """The kept answer to a question, or the API's; from any thread.

        Raises what `fetch` raises, and TimeoutError.
        """
        words = json.dumps([type(self).__qualname__, self.endpoint, dict(question)], sort_keys=True)
        key = hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()
        return run_async(self._ask_once(key, question))

    async def _ask_once(self, key: str, question: Mapping[str, Any]) -> str:
        task = self._asking.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = self._asking[key] = asyncio.create_task(self._ask(key, question))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return await task

    async def _ask(self, key: str, question: Mapping[str, Any]) -> str:
        async with asyncio.timeout(self.timeout):
            kept = await asyncio.to_thread(self._kept.find, key) if self._kept else None
            if kept is not None:
                return kept
            answer = await self.fetch(self._client, question)
        if not isinstance(answer, str):
            raise TypeError(f"the API's answer is no text but {answer!r:.200}")
        if self._kept:
            await asyncio.to_thread(self._kept.keep, key, answer)
        return answer

    def _connect(self) -> None:
        self._asking: dict[str, asyncio.Task[str]] = {}
        self._kept = KeptAnswers(self.cache, "cache") if self.cache else None
        self._client = HttpClient(
            self.endpoint,
            api_key_env=self.api_key_env if self.key_header else None,
            key_header=self.key_header or "",
            timeout=self.timeout / 2,
            retries=self.retries,
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            patience=0.0,  # a model in the middle of its text should not wait for a server that is down
        )
