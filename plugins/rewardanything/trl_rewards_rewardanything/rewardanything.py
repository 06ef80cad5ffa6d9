"""A judge that follows a principle written in plain words.  https://huggingface.co/papers/2506.03637

How the judge reads its question is in `prompts.py`, how its reply is read in `verdict.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from trl_rewards import Context, Failed, RewardError, Samples, Score
from trl_rewards.models import Ask, HttpClient, HttpFailure, ListwiseJudge
from trl_rewards_rewardanything import principles
from trl_rewards_rewardanything.agreement import Name, places
from trl_rewards_rewardanything.prompts import OWN, legacy_order, released_system_prompt, user_message
from trl_rewards_rewardanything.verdict import read_verdict


class RewardAnything(ListwiseJudge):
    """How well each completion follows a principle, as a judge says that sees the whole group at once.
    https://huggingface.co/papers/2506.03637

    The judge thinks, gives every completion a score s from 1 to 5, and ranks them. With k completions in the group and
    places from 0, the best (by score, equal ones by the judge's ranking, those that it does not tell apart sharing
    their mean place), the reward is

    - `score`: s, in [1, 5]
    - `unit`: (s - 1) / 4, in [0, 1]
    - `rank`: (k - 1 - place) / (k - 1), in [0, 1]; 0.5 for a group of one
    - `score_ranked`: s + tie_break · rank

    Whole scores tie often, and a group of equal scores teaches nothing: `score_ranked` keeps the order. A reply that
    cannot be read is a hole of its whole group; one that leaves candidates out is too, unless `partial` is `keep`. A
    row without a principle has no opinion (None).

    The model is WisdomShell/RewardAnything-8B-v1, or any chat model that can follow instructions. The names of
    principles that `principle` knows:
    """

    candidate_name = "model-{}"

    principle: str | list[str] | None = None
    """What a good completion is: in words, or a name of the library, or a file (`./principle.txt`, `file:PATH`). A
    list puts several together, the first having priority."""
    principle_column: str | None = None
    """Dataset column with each row's principle, in words or by name; `principle` is for rows where it is empty."""
    reward: Literal["score", "unit", "rank", "score_ranked"] = "score"
    """What becomes of scores and ranking; see above."""
    tie_break: float = 0.1
    """How much the first place is worth more than the last one, for `score_ranked`; breaks ties for `rank`."""
    clamp: bool = False
    """Move scores outside of 1 to 5 to the nearer end. False: they count as missing."""
    masks: Literal["seeded", "legacy_seed42", "off"] = "seeded"
    """The order in which completions become model-1, model-2, …: shuffled, differently for each group and step; in the
    one order per group size of the released code, for comparisons with it; or as they are."""
    system_prompt: Literal["own", "released"] = "own"  # ty: ignore[incompatible-attribute-override]
    """`released` is what the released checkpoint was trained with, read from the package `rewardanything`; install it
    for that model. `own` says the same in our words."""
    backend: Literal["chat", "server"] = "chat"
    """`chat`: a model in this process, or an OpenAI-compatible endpoint such as vLLM's. `server`: `endpoint` is a
    server started by `rewardanything serve`, whose own settings then hold for prompt and generation."""
    max_tokens: int = 4096
    """Tokens of a reply, thinking included; the authors' setting. Prompt and reply together must fit the judge's
    context: serve it with more than 8192 for groups of 8."""
    request_timeout: float = 180.0
    """Seconds for one request. A released server itself waits 120 for its model."""

    def __post_init__(self):
        super().__post_init__()
        given = [self.principle] if isinstance(self.principle, str) else self.principle
        if given == [] or (given is None and self.principle_column is None):
            raise ValueError(
                "a principle is needed: principle (words, a file, or of the library "
                f"{', '.join(principles.PRINCIPLES)}), or principle_column"
            )
        self._given = given or []
        for item in self._given:
            principles.check(item)
        if self.scale != [1.0, 5.0]:
            raise ValueError(f"RewardAnything scores from 1 to 5, got scale {self.scale}; shape the reward instead")
        if self.tie_break < 0:
            raise ValueError(f"tie_break must not be negative, got {self.tie_break}")
        if self.permutations > 1 and self.masks != "seeded":
            raise ValueError(f"masks {self.masks!r} shows one order only; set masks: seeded for permutations")
        if self.backend == "server":
            self._check_server()

    def _check_server(self) -> None:
        if not isinstance(self.endpoint, str):
            raise ValueError(
                "backend: server needs endpoint, the address of one server, such as http://localhost:8001"
            )
        names = ("cassette", "reply_cache", "max_cost", "max_total_tokens")
        if there := [name for name in names if vars(self)[name]]:
            raise ValueError(f"backend: server has no {', '.join(there)}; ask the model behind it with backend: chat")

    def reads(self) -> tuple[str, ...]:
        return (self.principle_column,) if self.principle_column else ()

    def floor(self) -> float | None:
        return 0.0 if self.reward in ("unit", "rank") else 1.0

    def setup(self, context: Context) -> None:
        try:
            texts = [
                principles.read(item, context.base_dir) if principles.is_file(item) else principles.words(item)
                for item in self._given
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(f"principle: {error}") from error
        if not all(texts):
            raise RewardError(f"principle: the file of {self._given[texts.index('')]!r} is empty")
        self._default = principles.compose(texts) if texts else ""
        self._system = released_system_prompt() if self.system_prompt == "released" else OWN
        super().setup(context)

    def principle_of(self, samples: Samples, row: int) -> str:
        """The principle that a row is judged by; empty where it has none."""
        value = samples[self.principle_column][row] if self.principle_column else None
        items = value if isinstance(value, list | tuple) else [value]
        # Files are for recipes: a dataset that names one must not have it read.
        texts = [principles.words(item) for item in items if isinstance(item, str) and item.strip()]
        return principles.compose(texts) if texts else self._default

    def messages(self, samples: Samples, row: int, texts: dict[str, str]) -> list[dict[str, str]]:
        user = user_message(self.principle_of(samples, row), self.shown_prompt(samples, row), texts)
        return [{"role": "system", "content": self._system}, {"role": "user", "content": user}]

    def shuffled(self, samples: Samples, rows: list[int], permutation: int) -> list[int]:
        if self.masks == "seeded":
            return super().shuffled(samples, rows, permutation)
        return [rows[place] for place in legacy_order(len(rows))] if self.masks == "legacy_seed42" else rows

    def asks(self, samples: Samples) -> list[Ask]:
        return [ask for ask in super().asks(samples) if self.principle_of(samples, ask.rows[0])]

    def gated(self, samples: Samples) -> dict[int, float]:
        return {row: low for row, low in super().gated(samples).items() if self.principle_of(samples, row)}

    def parse(self, ask: Ask, text: str) -> list[Score]:
        verdict = read_verdict(text, clamp=self.clamp)
        if verdict.problem:
            return [Failed(verdict.problem)] * len(ask.rows)
        scores = {name: verdict.scores[name] for name in ask.names if name in verdict.scores}
        missing = Failed(f"{len(ask.names) - len(scores)} of {len(ask.names)} candidates missing")
        if self.reward in ("rank", "score_ranked"):
            ranks = rank_rewards(scores, verdict.stated, len(scores))
            scores = {name: score + self.tie_break * ranks[name] for name, score in scores.items()}
        return [scores.get(name, missing) for name in ask.names]

    def merge(self, samples: Samples, answers: list[tuple[Ask, list[Score]]]) -> list[Score]:
        merged = super().merge(samples, answers)
        merged = [score if self.principle_of(samples, row) else None for row, score in enumerate(merged)]
        if self.reward == "unit":
            return [(score - 1) / 4 if isinstance(score, float) else score for score in merged]
        if self.reward == "rank":
            gated, size = self.gated(samples), samples.group_size or len(samples)
            for first in range(0, len(samples), size or 1):
                group = range(first, first + size)
                scores = {row: score for row in group if isinstance(score := merged[row], float)}
                count = len(scores) + sum(row in gated for row in group)  # gated ones take the last places
                for row, rank in rank_rewards(scores, (), count).items():
                    merged[row] = rank
        return merged

    async def ascore(self, samples: Samples) -> list[Score]:
        if self.backend == "chat":
            return await super().ascore(samples)
        return await self._ask_released_server(samples)

    async def _ask_released_server(self, samples: Samples) -> list[Score]:
        """One request per group, all at once. Its batch routes would answer in the order in which groups are done."""
        self._ready()
        asks, gated = self.asks(samples), self.gated(samples)
        client = HttpClient(
            str(self.endpoint),
            api_key_env=self.api_key_env,
            timeout=self.request_timeout,
            retries=self.attempts - 1,
            concurrency=self.in_flight,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            cool_down=self.cool_down,
        )
        try:
            replies = await asyncio.gather(*(self._ask_group(client, ask) for ask in asks))
        finally:
            await client.aclose()
        sent = client.metrics()
        holes = sum(any(isinstance(score, Failed) for score in scores) for scores in replies)
        names = {"requests": "requests", "retries": "retries", "failures": "http_failures"}
        self._log({new: sent[name] for name, new in names.items()} | {"unparsable": holes - sent["failures"]})
        merged = self.merge(samples, list(zip(asks, replies, strict=True)))
        return [gated.get(row) if score is None else score for row, score in enumerate(merged)]

    async def _ask_group(self, client: HttpClient, ask: Ask) -> list[Score]:
        # The names are anonymous already, and shuffled: the server's own mask has one order per group size.
        question = json.loads(ask.messages[-1]["content"]) | {"mask_responses": False}
        try:
            answer = await client.post("/api/rewardanything", question, tokens=len(ask.messages[-1]["content"]) // 4)
        except HttpFailure as failure:
            return [Failed(str(failure), "timeout" if failure.timed_out else "failed")] * len(ask.rows)
        return self.parse(ask, json.dumps(answer.get("results") if isinstance(answer, dict) else None))

    def _log(self, metrics: dict[str, float]) -> None:
        self.metrics = metrics
        if log_metric := self._context().log_metric:
            for name, value in metrics.items():
                log_metric(f"{self.display_name}/{name}", value)


RewardAnything.__doc__ = f"{inspect.getdoc(RewardAnything)}\n\n{principles.listing()}"


def rank_rewards(scores: Mapping[Name, float], ranking: Sequence[Name], count: int) -> dict[Name, float]:
    """(count - 1 - place) / (count - 1) of each name, in [0, 1]; 0.5 where there is only one. `count` may be higher
    than the number of scores: then others have the last places."""
    found = places(scores, ranking)
    return {name: (count - 1 - place) / (count - 1) if count > 1 else 0.5 for name, place in found.items()}
