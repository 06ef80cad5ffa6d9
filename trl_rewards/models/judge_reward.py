"""The base of judges: rewards that ask a language model what it thinks of completions.

A subclass says what to ask (`asks`) and how a reply is read (`parse`). Between the two, here: completions are made
safe to show, replies come from a server or from a model in this process, unreadable ones are asked for again, and what
stays unreadable is Failed, never a number. `trl_rewards.models.untrusted` says what is defended against, and what not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from trl_rewards.components import Context, Score
from trl_rewards.errors import RewardError
from trl_rewards.events import run_async
from trl_rewards.models.asking import Asker, Question
from trl_rewards.models.chat import Reply, Request
from trl_rewards.models.judge_options import JudgeOptions
from trl_rewards.models.untrusted import addresses_judge, as_text, without_control_tokens, without_thinking
from trl_rewards.samples import Failed, Samples

Message = dict[str, str]
MOST_FOLLOW_UPS = 64
"""Follow-ups that are made at a time."""
RETRY_TEMPERATURE = 0.7
"""At least this warm is a question asked again: at 0 the same reply would come."""


@dataclass
class Ask:
    """One question to the judge."""

    messages: list[Message]
    rows: list[int]
    """Rows of the samples that it is about, in the order they are shown."""
    names: list[str]
    """Their anonymous names, in the same order."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of its request, such as `stop`; the user's `extra_body` goes before them."""
    logprobs: dict[str, float] | None = None
    """Of the reply's first token, once it is there and if `extra` asked for them (`logprobs`, `top_logprobs`)."""


Answers = list[tuple[Ask, list[Score]]]
"""Questions, each with what its reply says of its rows."""


@dataclass
class _Exchange:
    """An ask on its way."""

    ask: Ask
    question: Question
    scores: list[Score]


class JudgeReward(JudgeOptions):
    """Base of judges. Subclasses define `asks` and `parse`, and may define `merge`, `schema` and `floor`."""

    deterministic = False  # equal completions are asked about separately
    system_prompt: ClassVar[str | None] = None
    """First message of `chat`; None: there is none."""
    extra_fields: ClassVar[dict[str, Any]] = {}
    """More fields of every request; the user's `extra_body` goes before them."""

    def __post_init__(self):
        super().__post_init__()
        self.metrics: dict[str, float] = {}
        """Counts of the last batch, as they are logged."""

    def asks(self, samples: Samples) -> list[Ask]:
        """What to ask about these rows. Asks that are about `gated` rows only are not asked."""
        raise NotImplementedError(f"{type(self).__name__} must define asks(self, samples)")

    def parse(self, ask: Ask, text: str) -> list[Score]:
        """One score per row of `ask.rows`, Failed(reason) for what cannot be read. No text may make it raise."""
        raise NotImplementedError(f"{type(self).__name__} must define parse(self, ask, text)")

    def follow_up(self, ask: Ask, text: str) -> Ask | None:
        """The next question of a conversation; None where the reply is the verdict, which `parse` reads.

        For judges of several turns, whose next question has the messages so far. It may take its time, such as for a
        tool: many are made side by side.
        """
        return None

    def more_asks(self, samples: Samples, answers: Answers) -> list[Ask]:
        """What to ask once all that was asked is answered; nothing where that was it.

        For judges whose questions depend on the answers to others, such as the rounds of a tournament. `answers` are
        all so far.
        """
        return []

    def merge(self, samples: Samples, answers: Answers) -> list[Score]:
        """One score per row: the mean over its asks; the first Failed where none gave one; None where nobody asked."""
        found: list[list[Score]] = [[] for _ in range(len(samples))]
        for ask, scores in answers:
            for row, score in zip(ask.rows, scores, strict=True):
                found[row].append(score)
        return [mean_score(scores) for scores in found]

    def measures(self, samples: Samples, answers: Answers) -> dict[str, float]:
        """What else to log of a batch, as `<name>/<key>`."""
        return {}

    def schema(self, ask: Ask) -> dict[str, Any] | None:
        """JSON schema of the reply, for servers with structured output. It leaves a judge no room to think first."""
        return None

    def floor(self) -> float | None:
        """The lowest score there is, which completions without content get. None: the judge is asked about them."""
        return None

    def chat(self, text: str) -> list[Message]:
        """`text` as the user's message, after the system prompt if there is one."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": text}]

    def shown(self, samples: Samples) -> list[str]:
        """What the judge is shown of each completion: no thinking of the policy's, no chat-control tokens."""
        return [self.made_safe(text) for text in self._answers(samples)]

    def shown_prompt(self, samples: Samples, row: int) -> str:
        """The prompt of a row as one text without chat-control tokens."""
        return self.made_safe(as_text(samples.prompts[row]))

    def made_safe(self, text: str) -> str:
        """`text` without chat-control tokens, those of the judge's tokenizer included where it is known."""
        return without_control_tokens(text, self._ready().control_tokens)

    def gated(self, samples: Samples) -> dict[int, float]:
        """Rows that get the lowest score without asking, by `min_length` and `screen`."""
        floor = self.floor()
        if floor is None:
            return {}
        known: tuple[Samples, dict[int, float]] | None = vars(self).get("_last_gated")
        if known is not None and known[0] is samples:  # asks, merge and what is around them all need it
            return dict(known[1])
        found = {
            row: floor
            for row, text in enumerate(self._answers(samples))
            if len("".join(text.split())) < self.min_length or (self.screen == "floor" and addresses_judge(text))
        }
        self._last_gated = (samples, found)
        return dict(found)

    def nonce(self, *content: str) -> str:
        """Sixteen hex digits that whoever wrote `content` cannot know: a hash of it and the run's seed."""
        return hashlib.blake2b(json.dumps([self._context().seed, content]).encode(), digest_size=8).hexdigest()

    def private_random(self, samples: Samples, rows: list[int], salt: str = "") -> random.Random:
        """A random stream of its own for these rows: of the run's seed, the step and the rows' content."""
        content = [[samples.prompts[row], samples.completions[row]] for row in rows]
        seed = json.dumps([self._context().seed, samples.step, salt, content], default=str)
        return random.Random(hashlib.blake2b(seed.encode(), digest_size=16).digest())

    def setup(self, context: Context) -> None:
        self._run_context = context
        self._asker = Asker(self, context, self.structured)

    def close(self) -> None:
        if asker := vars(self).pop("_asker", None):
            asker.close()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_asker", "_run_context", "_last_gated")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def is_async(self) -> bool:
        return self.endpoint is not None

    async def ascore(self, samples: Samples) -> list[Score]:
        asker = self._ready()
        exchanges: list[_Exchange] = []
        outcomes: list[BaseException | None] = []
        counts: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        # Not asyncio's own few threads: a follow-up may wait for something else that is to run in one of those.
        threads = ThreadPoolExecutor(MOST_FOLLOW_UPS, thread_name_prefix="follow-up")

        async def converse(exchange: _Exchange) -> None:
            done = False
            while not done:
                reply = await asker.ask(exchange.question)
                if self._has_turns and await loop.run_in_executor(threads, self._goes_on, exchange, reply):
                    continue
                done = self._take(exchange, reply, counts)

        try:
            waiting = self._exchanges(samples, self.asks(samples))
            while waiting:
                exchanges += waiting
                # All are waited for, also when one stops the run: what is under way is paid for, and kept.
                outcomes = await asyncio.gather(*map(converse, waiting), return_exceptions=True)
                if any(outcomes):
                    break
                waiting = self._exchanges(samples, self.more_asks(samples, _answers(exchanges)))
        except asyncio.CancelledError:  # the source's deadline: what is answered counts
            if not any(exchange.scores for exchange in exchanges):
                raise
            late = Failed("no answer by the source's deadline", "timeout")
            for exchange in exchanges:
                exchange.scores = exchange.scores or [late] * len(exchange.ask.rows)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            counts.update(asker.finish())
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        return self._finish(samples, _answers(exchanges), counts)

    def score(self, samples: Samples) -> list[Score]:
        if self.is_async():
            return run_async(self.ascore(samples))
        asker = self._ready()
        waiting = self._exchanges(samples, self.asks(samples))
        exchanges = list(waiting)
        counts: Counter[str] = Counter()
        try:
            while waiting:
                replies = asker.ask_here([exchange.question for exchange in waiting])
                done = [
                    not (self._has_turns and self._goes_on(*pair)) and self._take(*pair, counts)
                    for pair in zip(waiting, replies, strict=True)
                ]
                waiting = [exchange for exchange, over in zip(waiting, done, strict=True) if not over]
                if not waiting:
                    waiting = self._exchanges(samples, self.more_asks(samples, _answers(exchanges)))
                    exchanges += waiting
        finally:
            counts.update(asker.finish())
        return self._finish(samples, _answers(exchanges), counts)

    def _ready(self) -> Asker:
        if "_asker" not in vars(self):
            self.setup(self._context())
        return self._asker

    def _context(self) -> Context:
        return vars(self).get("_run_context") or Context()

    def _answers(self, samples: Samples) -> list[str]:
        return [without_thinking(text) if self.drop_thinking else text for text in samples.texts]

    def _exchanges(self, samples: Samples, asks: list[Ask]) -> list[_Exchange]:
        gated = self.gated(samples)
        asks = [ask for ask in asks if not all(row in gated for row in ask.rows)]
        return [_Exchange(ask, self._ready().question(self._request(ask, 0)), []) for ask in asks]

    @property
    def _has_turns(self) -> bool:
        return type(self).follow_up is not JudgeReward.follow_up

    def _goes_on(self, exchange: _Exchange, reply: Reply | Failed) -> bool:
        """Whether there is another question; then the exchange holds it."""
        if isinstance(reply, Failed):
            return False
        ask = self.follow_up(exchange.ask, reply.text)
        if ask is None:
            return False
        exchange.ask, exchange.question = ask, self._ready().question(self._request(ask, 0))
        return True

    def _request(self, ask: Ask, attempt: int) -> Request:
        return Request(
            model=self.model,
            messages=ask.messages,
            temperature=max(self.temperature, RETRY_TEMPERATURE) if attempt else self.temperature,
            top_p=self.top_p,
            max_tokens=ask.extra.get("max_tokens", self.max_tokens),
            seed=None if self.seed is None else self.seed + attempt,
            extra={**self.extra_fields, **ask.extra, **self.extra_body},
            schema=None if self.structured == "off" else self.schema(ask),
            attempt=attempt,
        )

    def _take(self, exchange: _Exchange, reply: Reply | Failed, counts: Counter[str]) -> bool:
        """Read a reply. False if it is to be asked again: then the exchange holds the question."""
        attempt = exchange.question.request.attempt
        scores: list[Score]
        if isinstance(reply, Failed):
            scores = [reply] * len(exchange.ask.rows)
        else:
            scores = self._read(exchange.ask, exchange.question.request, reply)
            counts["cut_replies"] += _is_cut(exchange.question.request, reply)
            counts["unparsable"] += _holes(scores) > 0
        if not exchange.scores or _holes(scores) < _holes(exchange.scores):
            exchange.scores = scores
        if isinstance(reply, Failed) or not _holes(scores) or attempt >= self.parse_retries:
            return True
        if exchange.question.request.max_tokens == 1:  # its probabilities would be the same again
            return True
        exchange.question = exchange.question._replace(request=self._request(exchange.ask, attempt + 1))
        return False

    def _read(self, ask: Ask, request: Request, reply: Reply) -> list[Score]:
        """What a reply says of each row; where it says nothing, the reason tells also of a cut or a refusal."""
        text, is_cut = reply.text, _is_cut(request, reply)
        if is_cut:  # a number at the cut may have been going on
            text = text[:-100] + re.sub(r"[\w.,+-]+\Z", "", text[-100:])
        ask.logprobs = reply.logprobs
        scores: list[Score]
        try:
            scores = self.parse(ask, text)
        except Exception as error:  # one odd reply must not cost the batch, which would be asked about again
            scores = [Failed(f"the reply could not be read: {error!r}")] * len(ask.rows)
        if len(scores) != len(ask.rows):
            raise RewardError(f"{self.display_name}.parse returned {len(scores)} scores for {len(ask.rows)} rows")
        why = f" (the reply was cut off at max_tokens {request.max_tokens})" if is_cut else ""
        why += " (it refused)" if reply.finish == "refused" else ""
        return [Failed(score.reason + why) if isinstance(score, Failed) else score for score in scores]

    def _finish(self, samples: Samples, answers: Answers, counts: Counter[str]) -> list[Score]:
        gated = self.gated(samples)
        scores = self.merge(samples, answers)
        scores = [gated.get(row) if score is None else score for row, score in enumerate(scores)]
        metrics = {name: float(counts[name]) for name in ("unparsable", "cut_replies", *counts)}
        metrics["gated"] = len(gated) / max(len(samples), 1)
        if self.screen != "off":
            flagged = [addresses_judge(text) for text in self._answers(samples)]
            metrics["flagged"] = sum(flagged) / max(len(samples), 1)
        metrics |= self.measures(samples, answers)
        self.metrics = metrics
        if log_metric := self._context().log_metric:
            for name, value in metrics.items():
                log_metric(f"{self.display_name}/{name}", value)
        return scores


def mean_score(scores: list[Score]) -> Score:
    """The mean of the numbers among some scores; without any, the first Failed, or None."""
    numbers = [score for score in scores if isinstance(score, int | float)]
    if numbers:
        return fmean(numbers)
    return next((score for score in scores if isinstance(score, Failed)), None)


def _answers(exchanges: list[_Exchange]) -> Answers:
    return [(exchange.ask, exchange.scores) for exchange in exchanges]


def _is_cut(request: Request, reply: Reply) -> bool:
    """Whether there was more to say. One token that is asked for, for its probabilities, is all that is wanted."""
    return reply.finish == "length" and request.max_tokens > 1


def _holes(scores: list[Score]) -> int:
    return sum(isinstance(score, Failed) for score in scores)
