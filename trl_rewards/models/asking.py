"""Where replies come from, to a judge or another: cassette, cache, server or a model in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from trl_rewards.components import Context, resolve_path
from trl_rewards.errors import RewardError, did_you_mean
from trl_rewards.events import run_async
from trl_rewards.models.cassette import DEFAULT_REPLY_CACHE, Cassette, ReplyCache
from trl_rewards.models.chat import ChatServer, Reply, Request, Structured
from trl_rewards.models.http import HttpClient, HttpFailure, api_key
from trl_rewards.models.judge_options import SCRIPTED, ChatOptions
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.samples import Failed

if TYPE_CHECKING:
    from trl_rewards.models.chat import ChatModel


logger = logging.getLogger(__name__)


class Question(NamedTuple):
    """A request, its place among equal ones, and its number among all."""

    request: Request
    place: int
    number: int


CHECK_SECONDS = 10.0
FEW_MODELS = 20
"""Hosted servers list hundreds of models, and take names beside them."""
STRICT = ("vllm", "sglang")
"""Servers (`owned_by`) that answer to the names they list alone. Others take aliases, or any name."""


async def problem_of(endpoint: str, model: str, api_key_env: str | None) -> str | None:
    """Why a server cannot be used: nobody answers, the key is refused, or it does not list the model.

    None for one that seems fit, also where it keeps no list of models.
    """
    client = HttpClient(endpoint, api_key_env=api_key_env, timeout=CHECK_SECONDS, retries=0)
    try:
        listed = (await client.get("/models"))["data"]
        names = [str(entry["id"]) for entry in listed]
        strict = any(entry.get("owned_by") in STRICT for entry in listed)
    except HttpFailure as failure:
        if failure.status is None:
            return f"endpoint: {endpoint} cannot be used: {failure}; start the judge's server first"
        if failure.status in (401, 403):
            key = f"the key in {api_key_env}" if api_key_env else "requests without a key; set api_key_env"
            return f"endpoint: {endpoint} refuses {key}: {failure}"
        return None
    except (KeyError, TypeError, AttributeError):
        return None
    finally:
        await client.aclose()
    if not names or len(names) > FEW_MODELS or model in names:
        return None
    problem = f"model: {endpoint} does not list {model!r}{did_you_mean(model, names)} (it lists {', '.join(names)})"
    if strict:
        return problem
    logger.warning(problem)
    return None


class BudgetSpent(RuntimeError):
    """Nothing more may be asked."""


class Asker:
    """Asks, once what is known has been looked up and while the budget lasts; keeps replies and counts."""

    def __init__(self, options: ChatOptions, context: Context, structured: Structured = "auto"):
        """`structured`: whether replies of a request's JSON schema are asked for; `auto` where the server can."""
        self._options = options
        self._structured: Structured = structured
        self._budget = Budget(options)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._asked = 0
        self._server: ChatServer | None = None
        self._model: ChatModel | None = None
        self._scripted: ScriptedJudge | None = None
        self._cassette: Cassette | None = None
        if options.cassette:
            self._cassette = Cassette(resolve_path(options.cassette, context.base_dir), options.cassette_mode)
        if self._cassette is None or not self._cassette.replays_only:
            self._connect(context)
        self._cache: ReplyCache | None = None
        if options.reply_cache:
            path = DEFAULT_REPLY_CACHE if options.reply_cache is True else options.reply_cache
            self._cache = ReplyCache(resolve_path(path, context.base_dir), self._who())

    def _connect(self, context: Context) -> None:
        """Load the model, or prepare for the server. The server is first asked when there is something to ask."""
        options = self._options
        if options.endpoint is None:
            self._model = options.local_chat(context)
            return
        if options.api_key_env:
            api_key(options.api_key_env)  # found missing before a policy is loaded
        endpoints = [options.endpoint] if isinstance(options.endpoint, str) else options.endpoint
        if options.endpoint == SCRIPTED:
            self._scripted = ScriptedJudge()
            endpoints = [self._scripted.url]
        clients = [
            HttpClient(
                endpoint,
                api_key_env=options.api_key_env,
                timeout=options.request_timeout,
                retries=options.attempts - 1,
                concurrency=options.in_flight,
                requests_per_minute=options.requests_per_minute,
                tokens_per_minute=options.tokens_per_minute,
                cool_down=options.cool_down,
                patience=options.patience,
            )
            for endpoint in endpoints
        ]
        self._server = ChatServer(clients, self._structured)
        if self._scripted is None and not (self._cassette and self._cassette.holds_replies):
            self._check(endpoints)

    def _check(self, endpoints: list[str]) -> None:
        """RewardError where no server is fit: better than a policy loaded for nothing.

        Not from within the event loop, where a judge that nobody set up finds out by asking.
        """
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            return
        problems = [
            run_async(problem_of(endpoint, self._options.model, self._options.api_key_env)) for endpoint in endpoints
        ]
        if None not in problems:  # one of several is enough: the others are passed over until they are there
            raise RewardError("; ".join(filter(None, problems)))

    def _who(self) -> str:
        """What answers, for the cache: the same model's name may mean another elsewhere."""
        options = self._options
        if options.endpoint is not None:
            return str(options.endpoint)
        return f"{options.revision} {options.dtype} {options.adapter} {options.load_in_4bit} {options.load_in_8bit}"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Special tokens of the judge's tokenizer, where it is known."""
        return self._model.control_tokens if self._model else ()

    def question(self, request: Request) -> Question:
        """A request with its place and number. Call it in the order of questions, not for a question asked again."""
        with self._lock:
            self._asked += 1
            return Question(request, self._cassette.place(request) if self._cassette else 0, self._asked)

    async def ask(self, question: Question) -> Reply | Failed:
        """The reply of a server. RewardError if the budget is spent and that stops the run."""
        known = self._known(question)
        if known is not None:
            return known
        assert self._server is not None
        try:
            reply = await self._server.reply(question.request, self._budget.check)
        except BudgetSpent as spent:
            return Failed(str(spent))
        except HttpFailure as failure:
            return Failed(str(failure), "timeout" if failure.timed_out else "failed")
        self._keep(question, reply)
        return reply

    def ask_here(self, questions: list[Question]) -> list[Reply | Failed]:
        """The replies of the model in this process. The budget is looked at once, before it is asked."""
        found = [self._known(question) for question in questions]
        todo = [index for index, known in enumerate(found) if known is None]
        if todo:
            assert self._model is not None
            try:
                self._budget.check()
                replies = self._model.replies([questions[index].request for index in todo])
            except BudgetSpent as spent:
                replies = [Failed(str(spent))] * len(todo)
            for index, reply in zip(todo, replies, strict=True):
                found[index] = reply
                if isinstance(reply, Reply):
                    self._counts["requests"] += 1
                    self._keep(questions[index], reply)
        return [reply for reply in found if reply is not None]

    def replies(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """The replies of whoever answers, side by side where it is a server. RewardError as `ask`."""
        questions = [self.question(request) for request in requests]
        if self._options.endpoint is None:
            return self.ask_here(questions)

        async def all_of_them() -> list[Reply | Failed | BaseException]:
            return await asyncio.gather(*map(self.ask, questions), return_exceptions=True)

        found = run_async(all_of_them())
        for reply in found:  # once all are there: what was under way is paid for, and kept
            if isinstance(reply, BaseException):
                raise reply
        return found

    def _known(self, question: Question) -> Reply | Failed | None:
        reply = self._cassette.find(question.request, question.place) if self._cassette else None
        if reply is None and self._cassette and self._cassette.replays_only:
            return Failed(f"cassette {self._cassette.path!r} has no reply to this request, and is only replayed")
        if reply is None and self._cache:
            reply = self._cache.find(question.request)
            if reply and self._cassette:
                self._cassette.keep(question.request, question.place, reply, question.number)
        if reply is not None:
            self._counts["cache_hits"] += 1
        return reply

    def _keep(self, question: Question, reply: Reply) -> None:
        self._budget.pay(reply)
        self._counts["prompt_tokens"] += reply.prompt_tokens
        self._counts["completion_tokens"] += reply.completion_tokens
        if self._cassette:
            self._cassette.keep(question.request, question.place, reply, question.number)
        if self._cache:
            self._cache.keep(question.request, reply)

    def finish(self) -> dict[str, float]:
        """Write the cassette; what was counted since the last call."""
        if self._cassette:
            self._cassette.write()
        with self._lock:
            counts, self._counts = self._counts, Counter()
        names = ("prompt_tokens", "completion_tokens", "cache_hits", "requests", "retries", "http_failures")
        metrics = {name: float(counts[name]) for name in names}
        if self._server:
            sent = self._server.metrics()
            metrics |= {"requests": sent["requests"], "retries": sent["retries"], "http_failures": sent["failures"]}
            metrics["seconds_waited"] = sent["seconds_waited"]
        return metrics | {"cost": self._budget.cost(counts["prompt_tokens"], counts["completion_tokens"])}

    def close(self) -> None:
        """Close connections, end the scripted judge, and write what was recorded."""
        if self._cassette:
            self._cassette.write()
        if self._server:
            run_async(self._server.aclose())
        if self._scripted:
            self._scripted.close()


class Budget:
    """What this rank may spend: an equal share of the run's."""

    def __init__(self, options: ChatOptions):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._options = options
        self._most_cost = options.max_cost / ranks if options.max_cost else None
        self._most_tokens = options.max_total_tokens / ranks if options.max_total_tokens else None
        self._prompt_tokens = self._completion_tokens = 0

    def pay(self, reply: Reply) -> None:
        self._prompt_tokens += reply.prompt_tokens
        self._completion_tokens += reply.completion_tokens

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self._options.price_in + completion_tokens * self._options.price_out) / 1e6

    def check(self) -> None:
        """Raises BudgetSpent, or RewardError where `on_budget` is `stop`, once the budget is reached."""
        cost = self.cost(self._prompt_tokens, self._completion_tokens)
        tokens = self._prompt_tokens + self._completion_tokens
        if self._most_cost is not None and cost >= self._most_cost:
            spent = f"the judge's budget is spent: {cost:.4g} of max_cost {self._options.max_cost:g}"
        elif self._most_tokens is not None and tokens >= self._most_tokens:
            spent = f"the judge's budget is spent: {tokens} of max_total_tokens {self._options.max_total_tokens}"
        else:
            return
        if self._options.on_budget == "stop":
            raise RewardError(f"{spent}; raise it, or set on_budget to abstain to go on without the judge")
        raise BudgetSpent(spent)
