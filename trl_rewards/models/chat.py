"""Chat completions from OpenAI-compatible servers: vLLM, SGLang, llama.cpp, hosted ones."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

from trl_rewards.models.http import HttpClient, HttpFailure
from trl_rewards.samples import Failed

Structured = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Request:
    """What a judge is asked, and how it is to answer."""

    model: str
    messages: list[dict[str, str]]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    extra: dict[str, Any]
    """More fields of the request; None takes one out."""
    schema: dict[str, Any] | None
    attempt: int
    """0, or how often an unreadable reply to the same question came before."""

    @property
    def repeatable(self) -> bool:
        """Whether the same request has the same reply."""
        return self.temperature == 0 or self.seed is not None

    def key(self) -> str:
        """A hash of all of it. No address and no API key is in it."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Reply(NamedTuple):
    """What the judge said."""

    text: str
    finish: str = "stop"
    """`stop`; `length` if it was cut off at max_tokens; `refused`; or another of the server's words."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: dict[str, float] | None = None
    """What the first token could have been, and the logarithm of its probability; where the request asked for it."""


class ChatModel(Protocol):
    """A model in this process that answers."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that mean something to the model, and must not come from a completion."""
        ...

    def replies(self, requests: list[Request]) -> list[Reply | Failed]:
        """One reply per request, in order."""
        ...


class ChatServer:
    """One or several servers of the same model, which take turns; one that is down is passed over."""

    def __init__(self, clients: list[HttpClient], structured: Structured):
        self._clients = clients
        self._turns = itertools.cycle(clients)
        self._structured: Structured = structured

    async def reply(self, request: Request, before: Callable[[], None]) -> Reply:
        """The reply to one request. Raises HttpFailure, and what `before` raises when it is about to be sent."""
        tried: list[HttpClient] = []
        while True:
            client = self._next_client(tried)
            tried.append(client)
            try:
                return await self._reply(client, request, before)
            except HttpFailure as failure:
                refused = failure.status is not None and not failure.retryable
                if refused or len(tried) == len(self._clients):
                    raise

    async def _reply(self, client: HttpClient, request: Request, before: Callable[[], None]) -> Reply:
        payload = payload_of(request)
        characters = sum(len(message["content"]) for message in request.messages)

        async def post(body: dict[str, Any]) -> Reply:
            tokens = characters // 4 + request.max_tokens
            return read_answer(await client.post("/chat/completions", body, tokens, before), characters)

        if request.schema is None or self._structured == "off":
            return await post(payload)
        schema = {"name": "verdict", "schema": request.schema, "strict": True}
        try:
            return await post(payload | {"response_format": {"type": "json_schema", "json_schema": schema}})
        except HttpFailure as failure:
            if self._structured == "on" or failure.status not in (400, 422):
                raise
        reply = await post(payload)
        self._structured = "off"  # it was the format that the server refused
        return reply

    def _next_client(self, tried: list[HttpClient]) -> HttpClient:
        """The next in turn that was not tried, one that is not down if there is one."""
        turn = [next(self._turns) for _ in self._clients]
        next(self._turns)  # so that the next request begins with the next one
        left = [client for client in turn if client not in tried]
        return next((client for client in left if not client.is_down), left[0])

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()

    def metrics(self) -> dict[str, float]:
        """The sums of the clients' counts since the last call."""
        counts = [client.metrics() for client in self._clients]
        return {name: sum(count[name] for count in counts) for name in counts[0]}


def payload_of(request: Request) -> dict[str, Any]:
    """The JSON body of a request, without a format for its reply."""
    fields = {
        "model": request.model,
        "messages": request.messages,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }
    return {name: value for name, value in (fields | request.extra).items() if value is not None}


def read_answer(answer: Any, characters: int) -> Reply:
    """The reply in a server's answer. Where it reports no usage, four characters count as a token.

    Servers that part thinking from answer leave the thinking out of `content`; one that takes the whole reply for
    thinking has no content at all, and then that is the reply, unless it was cut off. Raises HttpFailure if the answer
    is not of this form.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        finish = choice.get("finish_reason") or "stop"
        text = _content(message.get("content"))
        if not text and finish != "length":
            text = _content(message.get("reasoning_content") or message.get("reasoning"))
        if message.get("refusal") or finish == "content_filter":
            text, finish = "", "refused"
        usage = answer.get("usage") or {}
        prompt_tokens = usage.get("prompt_tokens") or characters // 4
        completion_tokens = int(usage.get("completion_tokens") or len(text) // 4)
        return Reply(text, str(finish), int(prompt_tokens), completion_tokens, _first_logprobs(choice))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        words = json.dumps(answer)[:300]
        raise HttpFailure(f"POST /chat/completions: the answer holds no reply: {words}") from None


def _first_logprobs(choice: dict[str, Any]) -> dict[str, float] | None:
    tokens = (choice.get("logprobs") or {}).get("content")
    return {str(each["token"]): float(each["logprob"]) for each in tokens[0]["top_logprobs"]} if tokens else None


def _content(content: Any) -> str:
    """A message's content as text; that of a list of parts is joined."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
