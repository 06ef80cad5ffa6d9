"""Follow-up likelihood: how much likelier a user is to be pleased with an answer than to complain.
https://huggingface.co/papers/2409.13948
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_rewards import Context, Failed, RewardError, Samples, Score
from trl_rewards.models import Held, InProcess, as_text, control_tokens_of, without_control_tokens, without_thinking
from trl_rewards_judges._language import load_language_model

if TYPE_CHECKING:
    from trl_rewards.models import Scorer

Utterances = dict[str, dict[str, list[str]]]
"""{category: {"positive": utterances, "negative": utterances}}"""
_PLACE = "follow-up"
"""Stands for an utterance while a chat is rendered."""


class FLR(InProcess):
    """How much likelier praise is than a complaint as the user's next turn: the mean log-likelihood per token of
    positive follow-ups less that of negative ones, in nats.

    https://huggingface.co/papers/2409.13948. Nothing is trained, and any chat model can be the judge. A category
    (`understanding`, `relevance`, `correctness`, `engagingness`, `informativeness`, `instruction_following`) scores
    the mean over its positive utterances less the mean over its negative ones, and the score is the mean over the
    categories. The utterances are in our words, ten of each kind. A prompt with its completion goes through the model
    once for all of them. One that is too long is cut at its beginning.

    The authors' code averages raw logits of one place, and not log-likelihoods of all; this is the formula.
    """

    path: str
    """Folder or Hub name of a causal language model. One without a chat template reads plain text."""
    utterances: str | Utterances | None = None
    """Other utterances, `{category: {positive: […], negative: […]}}`, or the path of a YAML or JSON file of them.
    None: those that come with this."""
    categories: list[str] | None = None
    """The categories that count; None: all."""
    drop_thinking: bool = True
    """Leave out what a completion says up to `</think>`."""
    max_length: int | None = None
    """Tokens of prompt, completion and utterance together. None: what model and tokenizer allow."""
    token_budget: int | None = None
    """Tokens in one forward pass, padding and copies of the shared prefix included: what bounds memory. None: 16384,
    on a CPU 4096. Halved when memory runs out."""

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("max_length", self.max_length), ("token_budget", self.token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._chosen: dict[str, Kinds] = {}
        if not isinstance(self.utterances, str):
            self._chosen = chosen(self.utterances or shipped(), self.categories)
        self._context = Context()
        self._reader: Reader | None = None

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        self._context = context
        if isinstance(self.utterances, str):
            self._chosen = chosen(_read(self.utterances, context), self.categories)
        texts = dict.fromkeys(text for kinds in self._chosen.values() for kind in kinds for text in kind)
        loading = self.loading(self.path, context)
        self._reader = Reader(load_language_model(loading, context, self.max_length, self.token_budget), list(texts))

    def close(self) -> None:
        self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None, "_context": Context()}

    def score(self, samples: Samples) -> list[Score]:
        if self._reader is None:
            self.setup(self._context)
        assert self._reader is not None
        # White space around an answer is left as it is: plain text goes on from the prompt.
        said = [without_thinking(text) if self.drop_thinking and "think>" in text else text for text in samples.texts]
        found: list[Score] = []
        by_category: dict[str, list[float]] = {name: [] for name in self._chosen}
        for means in self._reader.likelihoods(samples.prompts, said):
            if isinstance(means, Failed):
                found.append(means)
                continue
            values = {
                name: likelier([means[text] for text in positive], [means[text] for text in negative])
                for name, (positive, negative) in self._chosen.items()
            }
            for name, value in values.items():
                by_category[name].append(value)
            found.append(fmean(values.values()))
        if log_metric := self._context.log_metric:
            of_categories = {name: fmean(values) for name, values in by_category.items() if values}
            for name, value in (self._reader.metrics | of_categories).items():
                log_metric(f"{self.display_name}/{name}", value)
        return found


def likelier(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Mean log-likelihood of positive utterances less that of negative ones."""
    return fmean(positive) - fmean(negative)


class Kinds(NamedTuple):
    """A category's utterances."""

    positive: list[str]
    negative: list[str]


def shipped() -> Utterances:
    """The utterances that come with this."""
    return json.loads(files("trl_rewards_judges").joinpath("utterances.json").read_text(encoding="utf-8"))


def chosen(utterances: Any, categories: Sequence[str] | None) -> dict[str, Kinds]:
    """The categories that count. ValueError where one is not there, or is not two lists of texts."""
    if not isinstance(utterances, Mapping) or not utterances:
        raise ValueError("utterances must be {category: {positive: [texts], negative: [texts]}}")
    found = {}
    for name in utterances if categories is None else dict.fromkeys(categories):
        if name not in utterances:
            raise ValueError(f"categories: there is no {name!r} (there is {', '.join(map(str, utterances))})")
        given = utterances[name]
        kinds = [given.get(kind) for kind in Kinds._fields] if isinstance(given, Mapping) else []
        if len(kinds) != len(given) or not all(map(_are_texts, kinds)):
            raise ValueError(f"utterances: {name} must be {{positive: [texts], negative: [texts]}}, got {given!r:.80}")
        found[name] = Kinds(*kinds)
    if not found:
        raise ValueError("categories is an empty list; leave it out for all")
    return found


def _are_texts(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(text, str) and text.strip() for text in given)


def _read(path: str, context: Context) -> Any:
    import yaml

    try:
        with open(context.path(path), encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RewardError(f"utterances: {path!r}: {error} (looked in {context.looked_in})") from error


class Tail(NamedTuple):
    """An utterance as the model reads it."""

    ids: list[int]
    start: int
    """How many of the tokens open the user's turn."""


class Reader:
    """How likely a language model finds utterances after chats."""

    def __init__(self, scorer: Scorer, utterances: list[str]):
        self._scorer, self._utterances = scorer, utterances
        self._control = control_tokens_of(scorer.tokenizer)
        probe = self._before("a", "b") if scorer.tokenizer.chat_template else ""
        # Nothing that a special token begins can merge with what is before it.
        self._frame = probe[max(map(probe.rfind, self._control), default=-1) :] if probe else ""
        self._tails = [self._tail(utterance) for utterance in utterances]
        self._room = scorer.max_length - max(len(tail.ids) for tail in self._tails)
        if self._room < 2:
            raise RewardError(f"{scorer.loading.path!r} reads {scorer.max_length} tokens, too few for the utterances")
        self.metrics: dict[str, float] = {}
        """Of the last call: the scorer's, and `truncated`, the share of chats that were too long."""

    def likelihoods(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[dict[str, float] | Failed]:
        """Each utterance's mean log-likelihood per token after each chat."""
        chats = [self._chat(*chat) for chat in zip(prompts, completions, strict=True)]
        there = [row for row, ids in enumerate(chats) if ids]
        cut = [self._cut(chats[row]) for row in there]
        found: list[dict[str, float] | Failed] = [Failed("there is no text before the follow-up")] * len(chats)
        logps = self._scorer.continuations(cut, [tail.ids for tail in self._tails])
        for row, each in zip(there, logps, strict=True):
            if each is None:
                found[row] = Failed(f"out of memory for its {len(chats[row])} tokens")
                continue
            means = [fmean(at[tail.start :]) for tail, at in zip(self._tails, each, strict=True)]
            finite = all(map(math.isfinite, means))
            found[row] = dict(zip(self._utterances, means, strict=True)) if finite else Failed("a likelihood is none")
        truncated = sum(len(ids) > self._room for ids in chats) / max(len(chats), 1)
        self.metrics = self._scorer.metrics | {"truncated": truncated}
        return found

    def _chat(self, prompt: Any, completion: str) -> list[int]:
        """Token ids of what is said before the user's next turn."""
        tokenizer, said = self._scorer.tokenizer, without_control_tokens(completion, self._control)
        if not tokenizer.chat_template:
            text = (prompt if isinstance(prompt, str) else as_text(prompt)) + said + "\n"
            return tokenizer(text, verbose=False)["input_ids"]
        text = self._before(prompt, said).removesuffix(self._frame)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _before(self, prompt: Any, completion: str) -> str:
        """A chat as the model reads it, up to where the user's next turn says something."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answered = [*messages, {"role": "assistant", "content": completion}, {"role": "user", "content": _PLACE}]
        before, place, _ = self._scorer.tokenizer.apply_chat_template(answered, tokenize=False).rpartition(_PLACE)
        if not place:
            raise RewardError(f"{self._scorer.loading.path!r}: its chat template does not show the user's last turn")
        return before

    def _tail(self, utterance: str) -> Tail:
        frame, whole = (
            self._scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (self._frame, self._frame + utterance)
        )
        pairs = enumerate(zip(frame, whole, strict=False))
        return Tail(whole, next((place for place, (one, other) in pairs if one != other), len(frame)))

    def _cut(self, ids: list[int]) -> list[int]:
        kept = int(ids[0] == self._scorer.tokenizer.bos_token_id)
        return ids if len(ids) <= self._room else ids[:kept] + ids[len(ids) - self._room + kept :]
