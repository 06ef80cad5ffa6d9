"""JSON over HTTP: retries, rate limits, bounded concurrency and a circuit breaker, shared by judges and scorers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import quote_plus, urlencode, urlsplit

from trl_rewards.errors import RewardError

BUSY = (408, 425, 429)
"""Statuses below 500 after which the same request may well succeed."""
LONGEST_PAUSE = 60.0
"""Seconds that a server's Retry-After may ask for; more is not waited."""


class HttpFailure(RuntimeError):
    """A request that failed for good. Says path, status and the server's own words, never the API key."""

    def __init__(
        self,
        message: str,
        status: int | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        timed_out: bool = False,
    ):
        super().__init__(message)
        self.status = status
        """HTTP status; None where there was no answer."""
        self.retryable = retryable
        """Whether the same request may well succeed later."""
        self.retry_after = retry_after
        """Seconds that the server asked to wait."""
        self.timed_out = timed_out


class HttpClient:
    """JSON requests to one server, many at a time. Use it from one event loop at a time; it follows to another.

    Proxies and certificates are taken from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), but a server on
    this machine is never asked through a proxy. Redirects are not followed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str | None = None,
        key_header: str = "Authorization",
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        break_after: int = 5,
        cool_down: float = 5.0,
        patience: float = 60.0,
        first_pause: float = 0.5,
    ):
        """The key is sent in `key_header`, after "Bearer " where that is Authorization.

        `timeout` is in seconds, for one try. `retries` is how often a request is sent again after a broken
        connection, a time-out or one of 408, 425, 429 and 5xx: after `first_pause` seconds, then twice as long each
        time, up to 8, and never sooner than the server's Retry-After asks. After `break_after` unanswered requests in
        a row all wait, and one of them tries the server every `cool_down` seconds; when it has been down for
        `patience` seconds, the others fail without waiting.
        """
        check_address(base_url)
        if api_key_env is not None:
            check_key_name(api_key_env)
        self._url = base_url.rstrip("/")
        self._api_key_env = api_key_env
        self._key_header = key_header
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._request_pace, self._token_pace = Pace(requests_per_minute), Pace(tokens_per_minute)
        self._breaker = Breaker(break_after, cool_down)
        self._patience = patience
        self._first_pause = first_pause
        self._last_words = ""
        self._session: _Session | None = None
        self._counts: Counter[str] = Counter()
        self._seconds_waited = 0.0
        self._jitter = random.Random()

    async def post(
        self, path: str, payload: dict[str, Any], tokens: int = 0, before: Callable[[], None] | None = None
    ) -> Any:
        """The parsed JSON of the answer. Raises HttpFailure.

        `tokens` count against `tokens_per_minute`. `before` is called when a try is about to be sent, after all
        waiting; what it raises ends the request.
        """
        return await self._request(_Asked("POST", path, payload), tokens, before or _go)

    async def get(self, path: str, query: Mapping[str, str] | None = None, secrets: Sequence[str] = ()) -> Any:
        """The parsed JSON of the answer. Raises HttpFailure.

        `query` goes behind the path and into no message; `secrets` are words in it, such as a key, that are masked
        wherever the server repeats them.
        """
        return await self._request(_Asked("GET", path, None, query, tuple(secrets)), 0, _go)

    async def aclose(self) -> None:
        """Close the connections. The client can be used again."""
        session, self._session = self._session, None
        if session and session.loop is asyncio.get_running_loop():
            await session.client.aclose()

    @property
    def is_down(self) -> bool:
        """Whether the server is being left alone."""
        return self._breaker.is_open

    def metrics(self) -> dict[str, float]:
        """Since the last call: `requests` sent, `retries` among them, `failures` for good, `seconds_waited` for rate
        limits and before retries."""
        counts, self._counts = self._counts, Counter()
        waited, self._seconds_waited = self._seconds_waited, 0.0
        sums = {name: float(counts[name]) for name in ("requests", "retries", "failures")}
        return sums | {"seconds_waited": waited}

    async def _request(self, asked: _Asked, tokens: int, before: Callable[[], None]) -> Any:
        import stamina

        logging.getLogger("stamina").addFilter(_not_ours)
        number = 0

        # Stamina's own pauses draw jitter from the global random stream; these do not.
        def pause(error: Exception) -> bool | float:
            if not isinstance(error, HttpFailure) or not error.retryable:
                return False
            own = self._jitter.uniform(0.75, 1.25) * min(self._first_pause * 2 ** (number - 1), 8.0)
            wait = max(own, error.retry_after or 0.0)
            self._seconds_waited += wait if number <= self._retries else 0.0
            return wait

        try:
            async for attempt in stamina.retry_context(on=pause, attempts=self._retries + 1, timeout=None):
                with attempt:
                    number = attempt.num
                    async with self._bound_session().slots:
                        await self._wait_for_server(asked)
                        self._seconds_waited += await self._request_pace.take(1)
                        self._seconds_waited += await self._token_pace.take(tokens)
                        before()
                        self._counts["requests"] += 1
                        self._counts["retries"] += number > 1
                        return await self._send(asked)
        except HttpFailure:
            self._counts["failures"] += 1
            raise

    async def _wait_for_server(self, asked: _Asked) -> None:
        """Wait while the server is being left alone. HttpFailure if that has been too long already."""
        session = self._bound_session()
        while (wait := self._breaker.wait(now := time.monotonic())) > 0:
            left = self._patience - self._breaker.open_for(now)
            if left <= 0:
                raise HttpFailure(f"{asked.name}: the server does not answer ({self._last_words})")
            session.back.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(session.back.wait(), min(wait, left))
            self._seconds_waited += time.monotonic() - now

    async def _send(self, asked: _Asked) -> Any:
        from huggingface_hub.utils import httpx

        key = api_key(self._api_key_env) if self._api_key_env else None
        secrets = [*asked.secrets, *([key] if key else [])]
        bearer = "Bearer " if self._key_header == "Authorization" else ""
        headers = {"Content-Type": "application/json"} | ({self._key_header: bearer + key} if key else {})
        # Lone surrogates, which a broken completion may hold, are no UTF-8.
        payload = asked.payload
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace") if payload is not None else None
        query = f"?{urlencode(asked.query, errors='replace')}" if asked.query else ""
        if asked.secrets:
            _in_addresses.update(map(quote_plus, asked.secrets))
            logging.getLogger(httpx.__name__).addFilter(_holds_no_secret)
        session = self._bound_session()
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                url = self._url + asked.path + query
                answer = await session.client.request(asked.method, url, content=body, headers=headers)
        except (TimeoutError, httpx.RequestError) as error:
            self._breaker.failed(started, time.monotonic())
            timed_out = isinstance(error, TimeoutError | httpx.TimeoutException)
            broke = f"{type(error).__name__}: {_cut(str(error), secrets) or 'the connection broke'}"
            self._last_words = f"no answer within {self._timeout:g} s" if timed_out else broke
            message = f"{asked.name}: {self._last_words}"
            raise HttpFailure(message, retryable=True, timed_out=timed_out) from None
        self._breaker.succeeded(time.monotonic())
        session.back.set()
        status = answer.status_code
        if not answer.is_success:
            retryable = status in BUSY or status >= 500
            raise HttpFailure(
                f"{asked.name}: {status} {answer.reason_phrase}: {_cut(_server_words(answer.text), secrets)}",
                status=status,
                retryable=retryable,
                retry_after=_retry_after(answer.headers.get("retry-after")),
            )
        try:
            # Some servers repeat the request; what is kept and quoted of an answer must not hold the key.
            return json.loads(_masked(answer.text, secrets))
        except (ValueError, RecursionError):
            words = _cut(answer.text, secrets)
            raise HttpFailure(f"{asked.name}: the answer is not JSON: {words}", status=status) from None

    def _bound_session(self) -> _Session:
        """Connections of the running loop: an httpx client belongs to the loop it was used in first."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            from huggingface_hub.utils import httpx

            client = httpx.AsyncClient(
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, 10.0)),
                limits=httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency),
                trust_env=not _is_local(self._url),
            )
            self._session = _Session(loop, client, asyncio.Semaphore(self._concurrency), asyncio.Event())
        return self._session


class _Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    payload: dict[str, Any] | None = None
    query: Mapping[str, str] | None = None
    secrets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.method} {self.path}"


class _Session(NamedTuple):
    loop: asyncio.AbstractEventLoop
    client: Any
    slots: asyncio.Semaphore
    back: asyncio.Event
    """Set whenever the server answers."""


class Pace:
    """At most so many units a minute, spaced evenly: each call waits until what went before has been paid off."""

    def __init__(self, per_minute: float | None):
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    async def take(self, amount: float) -> float:
        """Wait for the turn of `amount` units; returns the seconds waited."""
        now = time.monotonic()
        turn = max(self._free_at, now)
        self._free_at = turn + amount * self._seconds_each
        if turn > now:
            await asyncio.sleep(turn - now)
        return turn - now


class Breaker:
    """Leaves a server alone that does not answer: open after some failures in a row, half-open after a cool-down."""

    def __init__(self, break_after: int, cool_down: float):
        self._break_after, self._cool_down = break_after, cool_down
        self._failures = 0
        self._last_success = -math.inf
        self._opened_at = self._try_at = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._break_after

    def open_for(self, now: float) -> float:
        """Seconds since it opened; 0 while it is closed."""
        return now - self._opened_at if self.is_open else 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next request may try; 0 for the one that may, and the others are to wait for it."""
        if not self.is_open:
            return 0.0
        if now < self._try_at:
            return self._try_at - now
        self._try_at = now + self._cool_down
        return 0.0

    def succeeded(self, now: float) -> None:
        self._failures, self._last_success = 0, now

    def failed(self, started: float, now: float) -> None:
        """A request sent at `started` had no answer. It says nothing of a server that has answered another since."""
        if self._last_success < started:
            self._failures += 1
            if self._failures == self._break_after:
                self._opened_at = now
            self._try_at = now + self._cool_down


def _go() -> None:
    """Nothing speaks against sending."""


def check_address(url: str) -> None:
    """ValueError for an address with a user name or a password in it, which recipes and logs would show."""
    if urlsplit(url).username is not None:
        raise ValueError("endpoint must hold no user name or password; give the key with api_key_env")


def check_key_name(name: str) -> None:
    """ValueError if this is no name of an environment variable: it might be the key, and is not repeated."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            "api_key_env must be the name of an environment variable in capitals, such as OPENAI_API_KEY; what it is "
            "is not shown, in case it is the key itself"
        )


def api_key(name: str) -> str:
    """The API key in an environment variable, read anew for each request and kept nowhere. RewardError without one."""
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        state = "holds no API key (other characters are in it)" if key else "is not set"
        raise RewardError(f"environment variable {name} (api_key_env) {state}")
    return key


def _not_ours(record: logging.LogRecord) -> bool:
    """Drops stamina's warning of each retry, which metrics count here."""
    return not str(vars(record).get("stamina.caused_by", "")).startswith("HttpFailure(")


_in_addresses: set[str] = set()
"""Secrets that were sent in a query."""


def _holds_no_secret(record: logging.LogRecord) -> bool:
    """Drops httpx's line of a request with a secret in its address."""
    return not any(secret in record.getMessage() for secret in _in_addresses)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header (a number or a date) asks for, at most LONGEST_PAUSE; None if it says none."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE)


def _server_words(text: str) -> str:
    """The message of an error answer: of OpenAI's and FastAPI's forms, or the whole text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def _cut(text: str, secrets: Sequence[str]) -> str:
    """On one line, at most 300 characters, without the keys, which some servers repeat."""
    return _masked(" ".join(text.split()), secrets)[:300]


def _masked(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
