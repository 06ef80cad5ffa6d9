"""The options of whoever asks a language model, and those that all judges have, whatever they ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards.components import Context
from trl_rewards.models.http import check_address, check_key_name
from trl_rewards.models.options import Held, InProcess

if TYPE_CHECKING:
    from trl_rewards.models.chat import ChatModel

SCRIPTED = "bundled:judge"
_FOR_SERVERS = (
    "api_key_env",
    "request_timeout",
    "attempts",
    "in_flight",
    "cool_down",
    "patience",
    "requests_per_minute",
    "tokens_per_minute",
)


class ChatOptions(InProcess):
    """Which language model is asked, over HTTP or in this process, and what that may cost."""

    model: str
    """The model's name on the server; without `endpoint`, the folder or Hub name of a causal language model."""
    endpoint: str | list[str] | None = None
    """Address of an OpenAI-compatible server, such as `http://localhost:8000/v1` (vLLM, SGLang, llama.cpp, hosted), or
    several that take turns. `bundled:judge` starts the scripted judge, a set of rules for trying things out. None:
    the model runs in this process."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key. The key itself belongs in no recipe."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    """Tokens of a reply, thinking included. Prompt and reply together must fit the judge's context."""
    seed: int | None = None
    """Sent with every request; None sends none."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """More fields of the request, such as `chat_template_kwargs`; a null takes one out. Cassettes hold them as they
    are. In this process only `chat_template_kwargs` is used."""
    request_timeout: float = 120.0
    """Seconds for one request. The source's `timeout` bounds the whole batch, with all retries and pauses."""
    attempts: int = 5
    """How often a request is sent that meets a broken connection, a time-out or a busy server. The source's `retries`
    would score the batch again, which a judge does not need: rows that failed are holes, not errors."""
    in_flight: int = 16
    """Requests at a time, per server. Leave the source's `concurrency` and `isolate` unset: they cut the batch into
    rows. `isolate` is refused with a cassette or a budget, of which each of its processes would have one."""
    cool_down: float = 5.0
    """Seconds between tries of a server that cannot be reached; the requests wait for it together."""
    patience: float = 60.0
    """Seconds that a server may be gone before requests fail. A source's `timeout` should be longer."""
    requests_per_minute: float | None = None
    """Per server and process; requests are spaced evenly."""
    tokens_per_minute: float | None = None
    """Per server and process, of prompt (four characters count as one) and `max_tokens`."""
    price_in: float = 0.0
    """Price of a million prompt tokens, for `<name>/cost` and `max_cost`."""
    price_out: float = 0.0
    """Price of a million tokens of reply."""
    max_cost: float | None = None
    """Budget of this run in the unit of the prices, shared equally by its ranks. Requests in flight when it is reached
    are still paid; a resumed run starts anew."""
    max_total_tokens: int | None = None
    """Budget of this run in tokens, of prompts and replies, shared equally by its ranks."""
    on_budget: Literal["stop", "abstain"] = "stop"
    """When a budget is spent: stop the run (a trainer saves a checkpoint first), or leave the other rows without a
    score."""
    cassette: str | None = None
    """File of requests and replies (JSON lines), from which a run can be repeated without the judge. Of several ranks
    each has its own: `judge.jsonl`, `judge.rank1.jsonl`, …"""
    cassette_mode: Literal["record", "replay", "auto"] = "auto"
    """`record` starts a file, `replay` asks nobody, `auto` replays what is there and records the rest."""
    reply_cache: bool | str = False
    """Keep replies in an sqlite file and use them for equal requests, if `temperature` is 0 or `seed` is set. True:
    `~/.cache/trl_rewards/replies.sqlite`."""
    token_budget: int = 16384
    """Tokens of one batch in this process, replies included."""

    def __post_init__(self):
        super().__post_init__()
        positive = ("top_p", "max_tokens", "request_timeout", "attempts", "in_flight", "token_budget")
        limits = ("requests_per_minute", "tokens_per_minute", "max_cost", "max_total_tokens")
        for name in (*positive, *limits):
            value = vars(self)[name]
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("temperature", "price_in", "price_out", "cool_down", "patience"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError("max_cost needs price_in or price_out, per million tokens")
        if self.endpoint == []:
            raise ValueError("endpoint is an empty list; leave it out to run the model in this process")
        for endpoint in [self.endpoint] if isinstance(self.endpoint, str) else self.endpoint or []:
            check_address(endpoint)
            if endpoint != SCRIPTED and not endpoint.startswith(("http://", "https://")):
                raise ValueError(f"endpoint must start with http:// or https://, got {endpoint!r}")
        if self.api_key_env is not None:
            check_key_name(self.api_key_env)
        if self.endpoint is None:
            defaults = {option.name: option.default for option in fields(self)}
            unused = [name for name in self._for_servers() if vars(self)[name] != defaults[name]]
            if unused:
                raise ValueError(
                    f"{', '.join(unused)}: without endpoint the model runs in this process, where this does nothing; "
                    "leave it out, or set endpoint"
                )

    def held(self) -> list[Held]:
        return [] if self.endpoint else [Held(self.model, self.token_budget, cached=self.token_budget)]

    def local_chat(self, context: Context) -> ChatModel:
        """What answers where there is no endpoint. Loaded once, before anything is asked."""
        from trl_rewards.models.local_chat import LocalChat

        return LocalChat(self.loading(self.model, context), self.token_budget, context.seed)

    def _for_servers(self) -> tuple[str, ...]:
        """Options that do nothing for a model in this process."""
        return _FOR_SERVERS


class JudgeOptions(ChatOptions):
    """A reward that asks a language model, over HTTP or in this process."""

    structured: Literal["auto", "on", "off"] = "auto"
    """Ask the server for replies of the judge's JSON schema, where it has one. `auto` does without on servers that
    refuse it."""
    parse_retries: int = 1
    """How often an unreadable reply is asked for again, at a temperature of at least 0.7."""
    drop_thinking: bool = True
    """Do not show the judge what a completion says up to `</think>`."""
    min_length: int = 1
    """Completions of fewer characters, white space aside, get the lowest score without asking. 0 asks always."""
    screen: Literal["off", "flag", "floor"] = "off"
    """Look for words that address a judge in completions: `flag` logs their share as `<name>/flagged`, `floor` also
    gives the lowest score without asking."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("parse_retries", "min_length"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")

    def _for_servers(self) -> tuple[str, ...]:
        return (*_FOR_SERVERS, *(["structured"] if self.structured == "on" else []))

    def check_running(self, running: Mapping[str, Any]) -> None:
        if not running.get("isolate"):
            return
        for name in ("cassette", "max_cost", "max_total_tokens"):
            if vars(self)[name] is not None:
                raise ValueError(f"isolate: each of its processes would have a {name} of its own; set one of the two")
