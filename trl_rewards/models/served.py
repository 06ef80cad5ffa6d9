"""Scalar reward models behind a server: what SGLang, vLLM and LMDeploy are sent, and where in a reply the scores are.

Not an OpenAI interface: each server has its own route and its own shape of reply, which also differs by the model's
head (https://github.com/vllm-project/vllm/issues/8967). A reply of another shape than the dialect's fails; it is never
guessed at.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trl_rewards.errors import RewardError
from trl_rewards.events import run_async
from trl_rewards.models.http import HttpClient, HttpFailure
from trl_rewards.samples import Failed

logger = logging.getLogger(__name__)

REFUSALS = (400, 413, 422)
"""Statuses by which a server refuses a request for what is in it, such as one input that is too long: then the others
of its chunk are sent again."""

Input = str | list[int]
"""A text, which the server tokenises, or token ids."""


class Dialect(NamedTuple):
    """How one kind of server is asked."""

    path: str
    payload: Callable[[list[Any]], dict[str, Any]]
    """The request for some inputs, without the model's name."""
    scores: Callable[[Any], list[Any]]
    """The raw score of each input in a reply; KeyError, TypeError or ValueError if the reply has another shape."""
    takes_ids: bool = True
    tokens: Callable[[Any], int] | None = None
    """How many tokens the server found in the one input of a reply, where it says so; raises like `scores`."""


def _items(reply: Any) -> list[Any]:
    """The entries of a reply's `data`, by their index where they have one."""
    return sorted(reply["data"], key=lambda item: item.get("index", 0))


def _only(values: Any) -> Any:
    """The one element of a list; more would be an embedding, or classes."""
    (value,) = values
    return value


def _last(values: list[Any]) -> Any:
    """A score of one token each, of which the last counts, or a list with the score of the sequence."""
    return _only(values[-1]) if isinstance(values[-1], list) else _only(values)


DIALECTS: dict[str, Dialect] = {
    "sglang": Dialect(
        "/classify",
        lambda inputs: {"text": inputs},
        lambda reply: [_only(item["embedding"]) for item in reply],
        takes_ids=False,
        tokens=lambda reply: reply[0]["meta_info"]["prompt_tokens"],
    ),
    # Models with a head for every token (POLAR, other `…ForRewardModel`). Servers that know no `task` ignore it.
    "vllm": Dialect(
        "/pooling",
        lambda inputs: {"input": inputs, "task": "token_classify", "use_activation": False},
        lambda reply: [_last(item["data"]) for item in _items(reply)],
    ),
    # Models with one head for the sequence (`…ForSequenceClassification`).
    "vllm_sequence": Dialect(
        "/pooling",
        lambda inputs: {"input": inputs, "task": "classify", "use_activation": False},
        lambda reply: [_only(item["data"]) for item in _items(reply)],
    ),
    "vllm_classify": Dialect(
        "/classify",
        lambda inputs: {"input": inputs, "use_activation": False},
        lambda reply: [_only(item["probs"]) for item in _items(reply)],
    ),
    # What POLAR's own client sends, for servers that refuse the fields above.
    "vllm_bare": Dialect(
        "/pooling",
        lambda inputs: {"input": inputs},
        lambda reply: [_last(item["data"]) for item in _items(reply)],
    ),
    "lmdeploy": Dialect(
        "/pooling",
        lambda inputs: {"input": inputs},
        lambda reply: [item["data"] for item in _items(reply)],
    ),
}


class ServedScorer:
    """Scores from a server, in chunks that succeed or fail on their own. Raw: activations are turned off."""

    def __init__(
        self,
        endpoint: str,
        dialect: str,
        *,
        model: str | None = None,
        chunk_size: int = 64,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        attempts: int = 8,
        in_flight: int = 8,
        first_pause: float = 0.5,
    ):
        """`endpoint` is the server's address without `/v1`; `model` its name there, left out if None. `timeout` is in
        seconds, for one request of `chunk_size` inputs; `in_flight` requests are made at a time; `first_pause` is
        `HttpClient`'s. ValueError if the address or the dialect (one of `DIALECTS`) is wrong."""
        if dialect not in DIALECTS:
            raise ValueError(f"no dialect {dialect!r}; there is {', '.join(DIALECTS)}")
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must start with http:// or https://, got {endpoint!r}")
        if endpoint.rstrip("/").endswith("/v1"):
            raise ValueError(f"endpoint must be the server's address without /v1, got {endpoint!r}")
        self.dialect = DIALECTS[dialect]
        self.name = f"{dialect} at {endpoint}"
        self._model, self._chunk_size = model, chunk_size
        self._client = HttpClient(
            endpoint,
            api_key_env=api_key_env,
            timeout=timeout,
            retries=attempts - 1,
            concurrency=in_flight,
            first_pause=first_pause,
        )

    async def score(self, inputs: Sequence[Input]) -> list[float | Failed]:
        """One score per input, in order; no inputs, no request. What a request could not give is Failed, for the
        inputs of its chunk alone; a score that is no finite number, for its input. When it is cancelled, as at a
        source's deadline, the chunks that are finished count, and the others are Failed; without any it stays
        cancelled."""
        size = self._chunk_size
        chunks = [list(inputs[start : start + size]) for start in range(0, len(inputs), size)]
        asked = [asyncio.ensure_future(self._chunk(chunk)) for chunk in chunks]
        try:
            await asyncio.gather(*asked)
        except asyncio.CancelledError:
            if all(task.cancelled() for task in asked):
                raise
        late = Failed("no answer by the source's deadline", "timeout")
        scored = [
            [late] * len(chunk) if task.cancelled() else task.result()
            for chunk, task in zip(chunks, asked, strict=True)
        ]
        return [score for chunk in scored for score in chunk]

    def check(self, first: Input, second: Input, tokens: int | None = None) -> None:
        """`acheck`, from where no event loop runs."""
        run_async(self.acheck(first, second, tokens))

    async def acheck(self, first: Input, second: Input, tokens: int | None = None) -> None:
        """Score two different inputs. RewardError unless the server answers with finite scores that are the same again
        (to 1 %, or to 5 % of the difference between the two inputs' scores) and not the same for both.

        Equal scores for all are the sign of an activation: the softmax of one output is 1. With `tokens`, the length
        of `first` by our tokenizer, a server that tokenises by itself has to have found as many: a reward token that
        it splits would be scored at its last piece, without an error.
        """
        try:
            together = await self._post([first, second, first])
            alone = await self._post([first])
        except HttpFailure as failure:
            raise RewardError(f"{self.name}: {failure}") from None
        values = []
        for score in _read(self.dialect, together, 3) + _read(self.dialect, alone, 1):
            if isinstance(score, Failed):
                raise RewardError(f"{self.name}: {score.reason}")
            values.append(score)
        one, other, *again = values
        # A server in bfloat16 is off by some hundredths of the spread of its scores from batch to batch.
        allowed = max(1e-2 * max(1.0, abs(one)), 0.05 * abs(one - other))
        if any(abs(one - value) > allowed for value in again):
            said = ", ".join(f"{value:g}" for value in (one, *again))
            raise RewardError(f"{self.name} gives different scores for the same input: {said}")
        if abs(one - other) < 1e-6:
            raise RewardError(
                f"{self.name} gives {one:g} for different inputs: is an activation on, or is it another model?"
            )
        if tokens is not None and self.dialect.tokens:
            self._check_tokens(alone, tokens)

    def _check_tokens(self, reply: Any, tokens: int) -> None:
        assert self.dialect.tokens is not None
        try:
            found = self.dialect.tokens(reply)
        except (KeyError, IndexError, TypeError):
            logger.warning("%s does not say how many tokens it reads; whether as we do is not known", self.name)
            return
        if found != tokens:
            raise RewardError(
                f"{self.name} reads {found} tokens in a text of {tokens}: its tokenizer is another one, or splits the "
                "reward token (SGLang: --tokenizer-mode slow); vllm and lmdeploy are sent token ids"
            )

    async def _chunk(self, inputs: list[Input]) -> list[float | Failed]:
        try:
            return _read(self.dialect, await self._post(inputs), len(inputs))
        except HttpFailure as failure:
            if failure.status in REFUSALS and len(inputs) > 1:
                half = len(inputs) // 2
                return [*await self._chunk(inputs[:half]), *await self._chunk(inputs[half:])]
            return [Failed(str(failure), "timeout" if failure.timed_out else "failed")] * len(inputs)

    async def _post(self, inputs: list[Input]) -> Any:
        payload = self.dialect.payload(inputs)
        return await self._client.post(
            self.dialect.path, payload if self._model is None else {"model": self._model} | payload
        )

    def metrics(self) -> dict[str, float]:
        """`requests`, `retries`, `failures` and `seconds_waited` since the last call."""
        return self._client.metrics()

    def close(self) -> None:
        """Close the connections."""
        run_async(self._client.aclose())


def _read(dialect: Dialect, reply: Any, count: int) -> list[float | Failed]:
    """The scores of a reply; all Failed where it has another shape than the dialect's, or another number of them."""
    try:
        raw = dialect.scores(reply)
        for value in raw:
            if value is None:  # how some servers write NaN
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{value!r:.100} for a score")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}, in {str(reply)[:200]}"
        return [Failed(f"{dialect.path}: the reply has another shape than this server's ({said})")] * count
    if len(raw) != count:
        return [Failed(f"{dialect.path}: {len(raw)} scores for {count} inputs")] * count
    return [
        float(value) if value is not None and math.isfinite(value) else Failed(f"{dialect.path}: scored {value}")
        for value in raw
    ]
