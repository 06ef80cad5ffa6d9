"""Preference pairs, labels and best answers from scored candidates: pure functions on plain data.

A candidate without a total is a hole: it is never chosen, rejected, labelled or kept.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from trl_rewards.components import RewardBatch
from trl_rewards.errors import did_you_mean
from trl_rewards.samples import Text, completion_text


class Candidate(NamedTuple):
    """One scored completion."""

    completion: Text
    total: float
    """NaN is a hole."""
    scores: dict[str, float]
    """Each source's raw score, NaN for a hole."""
    tokens: int
    """Its length; 0 where nobody counted."""
    ended: bool = True
    """False: it was cut at the length limit."""


class Group(NamedTuple):
    """A prompt and its candidates."""

    prompt: Text
    candidates: Sequence[Candidate]
    columns: Mapping[str, Any] = {}
    """Dataset columns that go with each of its rows, such as `tools`."""


class Pair(NamedTuple):
    """Two candidates of a group of which the first has the higher total."""

    chosen: Candidate
    rejected: Candidate

    @property
    def margin(self) -> float:
        return self.chosen.total - self.rejected.total


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. The defaults are the policy's own distribution."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    """0 is greedy: every candidate of a prompt is the same text."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    batch_tokens: int = 32768
    """Tokens of a batch, prompts and completions, padding included."""
    batch_size: int | None = None
    """Rows of a batch at most; none: as many as `batch_tokens` lets."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "temperature and top_k must be at least 0 and top_p in (0, 1], "
                f"got {self.temperature}, {self.top_k} and {self.top_p}"
            )
        if self.max_new_tokens < 1 or self.batch_tokens < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                "max_new_tokens, batch_tokens and batch_size must be at least 1, "
                f"got {self.max_new_tokens}, {self.batch_tokens} and {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pairs are made of a group."""

    select: Literal["best_worst", "best_random", "all"] = "best_worst"
    """`best_worst`: the pair with the largest margin. `best_random`: the best against one of the others, drawn evenly.
    `all`: every pair, largest margins first."""
    min_margin: float = 0.0
    """Pairs with a smaller difference of totals are left out, ties (a difference of 0) always."""
    max_pairs: int | None = None
    """Pairs per prompt at most, with `select: all`; none: all of them."""
    length_ratio: float | None = None
    """Length control: only pairs are considered whose longer completion has at most this many times the tokens of the
    shorter. `best_worst` is then the largest margin among them, and the best of `best_random` the highest total that
    is in one."""
    choose_truncated: bool = False
    """Whether a completion that was cut at the length limit may be chosen: TRL puts an end behind it, which the policy
    did not write. It may be rejected anyway."""

    def __post_init__(self):
        if not 0 <= self.min_margin < math.inf:
            raise ValueError(f"min_margin must be a number from 0, got {self.min_margin}")
        if self.max_pairs is not None and (self.max_pairs < 1 or self.select != "all"):
            raise ValueError(f"max_pairs must be at least 1 and goes with select: all, got {self.max_pairs}")
        if self.length_ratio is not None and not self.length_ratio >= 1:
            raise ValueError(f"length_ratio must be at least 1, got {self.length_ratio}")


@dataclass(frozen=True, kw_only=True)
class PairOptions(Selection, Sampling):
    """A recipe's `pairs:`: where candidates come from, which pairs they make, and in how many rounds."""

    source: Literal["sample", "dataset"] = "sample"
    """`sample`: the policy writes the candidates. `dataset`: they are in the `columns` of the dataset."""
    columns: list[str] = field(default_factory=list)
    """With `source: dataset`: one column that holds a list of completions, or several that hold one each. Every row
    must have as many as the others; rows in which one is missing (None) are left out."""
    candidates: int = 8
    """Per prompt, with `source: sample`. 8 as in RLHF Workflow, https://huggingface.co/papers/2405.07863"""
    rounds: int = 1
    """In each the policy as the round before left it samples, and is then trained on the pairs. 1 is offline DPO."""
    prompts_per_round: int | None = None
    """Rounds take prompts one after the other from the shuffled dataset, and begin again at its end. None: an even
    share of the dataset each."""
    reference: Literal["previous", "initial"] = "previous"
    """DPO's reference model: the policy at the beginning of the round, or the one before round 1."""
    score_prompts: int = 128
    """Prompts whose candidates the rewards are given at a time: what a shaper or combiner sees as its batch."""
    held_out: int = 200
    """Prompts of `dataset_test_split` on which the policy's mean total is measured before round 1 and after each
    round; 0: not at all."""
    held_out_candidates: int = 2
    """Completions of each of them."""

    def __post_init__(self):
        Selection.__post_init__(self)
        Sampling.__post_init__(self)
        per_round = 1 if self.prompts_per_round is None else self.prompts_per_round
        if min(self.rounds, self.score_prompts, self.held_out_candidates, per_round) < 1:
            raise ValueError("rounds, prompts_per_round, score_prompts and held_out_candidates must be at least 1")
        if self.held_out < 0:
            raise ValueError(f"held_out must be at least 0, got {self.held_out}")
        if self.source == "dataset" and not self.columns:
            raise ValueError("source: dataset needs `columns`, where the completions are, such as [responses]")
        if self.source == "sample" and self.columns:
            raise ValueError(
                "columns goes with source: dataset; with source: sample the policy writes the completions"
            )
        if self.source == "dataset" and self.rounds > 1:
            raise ValueError(f"rounds must be 1 with source: dataset, got {self.rounds}: later rounds sample")
        if self.source == "sample" and self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}: a pair has two")
        if self.source == "sample" and self.temperature == 0:
            raise ValueError("temperature must be above 0: greedy candidates of a prompt are all the same")

    def missing_columns(self, names: Sequence[str]) -> list[str]:
        """One problem per column of completions that is not among `names`."""
        there = ", ".join(names)
        return [
            f"pairs.columns: the dataset has no column {column!r}{did_you_mean(column, names)} (it has {there})"
            for column in self.columns
            if column not in names
        ]


def refused_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Problems with arguments of TRL's DPOConfig, {name: value}, that rounds of pairs leave no room for."""
    problems = []
    if arguments.get("eval_strategy", "no") != "no" or arguments.get("eval_on_start"):
        problems.append(
            "eval_strategy: the held-out reward is measured before and after each round (pairs.held_out); TRL's "
            "evaluation would need preference pairs; leave eval_strategy and eval_on_start out"
        )
    if arguments.get("precompute_ref_log_probs"):
        problems.append(
            "precompute_ref_log_probs: the pairs are made when training begins; leave it out (with LoRA the reference "
            "takes no memory)"
        )
    return problems


@dataclass
class Counts:
    """What became of the candidates and prompts."""

    prompts: int = 0
    candidates: int = 0
    holes: int = 0
    """Candidates without a total."""
    repeats: int = 0
    """Candidates with the text of another one of their prompt."""
    truncated: int = 0
    """Candidates cut at the length limit."""
    alone: int = 0
    """Prompts with fewer than two candidates left."""
    ties: int = 0
    """Prompts whose candidates all have the same total."""
    filtered: int = 0
    """Prompts of which no pair has the margin, the lengths or the end that is asked for."""
    pairs: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Counts)))


def groups_of(batch: RewardBatch, columns: Sequence[dict[str, Any]], ended: Sequence[bool]) -> list[Group]:
    """A scored batch as groups. `columns`: what each group's rows keep; `ended`: per candidate."""
    n, samples = batch.scores.group_size, batch.samples
    totals, values = batch.rewards.tolist(), batch.scores.values.tolist()
    candidates = [
        Candidate(
            samples.completions[row],
            totals[row],
            dict(zip(batch.scores.names, values[row], strict=True)),
            len(samples.completion_ids[row]) if samples.completion_ids else 0,
            ended[row],
        )
        for row in range(len(totals))
    ]
    return [
        Group(samples.prompts[start], candidates[start : start + n], columns[start // n])
        for start in range(0, len(candidates), n)
    ]


def describe(counts: Counts) -> str:
    """What became of the candidates, in a line."""
    left_out = {
        "all equal": counts.ties,
        "fewer than two different scored candidates": counts.alone,
        "no pair within min_margin, length_ratio and choose_truncated": counts.filtered,
    }
    reasons = "; ".join(f"{number} prompts {why}" for why, number in left_out.items() if number)
    return (
        f"{counts.pairs} pairs of {counts.prompts} prompts and {counts.candidates} candidates ({counts.holes} without "
        f"a score, {counts.repeats} repeated, {counts.truncated} truncated)" + (f"; {reasons}" if reasons else "")
    )


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that have a total; of equal texts the first."""
    kept: dict[str, Candidate] = {}
    for candidate in candidates:
        if not math.isnan(candidate.total):
            kept.setdefault(completion_text(candidate.completion), candidate)
    return list(kept.values())


def make_pairs(group: Group, selection: Selection, seed: int = 0) -> tuple[list[Pair], Counts]:
    """The pairs of one prompt, and what was left out. Equal totals never make a pair.

    Of equal totals the earlier candidate counts as the better one. The draws of `best_random` depend on `seed` and
    the candidates' texts alone.
    """
    scored = [candidate for candidate in group.candidates if not math.isnan(candidate.total)]
    usable = distinct(scored)
    counts = Counts(
        prompts=1,
        candidates=len(group.candidates),
        holes=len(group.candidates) - len(scored),
        repeats=len(scored) - len(usable),
        truncated=sum(not candidate.ended for candidate in group.candidates),
    )
    ranked = sorted(usable, key=lambda candidate: -candidate.total)  # stable
    pairs = [
        Pair(chosen, rejected)
        for place, chosen in enumerate(ranked)
        for rejected in ranked[place + 1 :]
        if _fits(Pair(chosen, rejected), selection)
    ]
    if len(ranked) < 2:
        counts.alone = 1
    elif ranked[0].total == ranked[-1].total:
        counts.ties = 1
    elif not pairs:
        counts.filtered = 1
    elif selection.select == "best_random":
        texts = repr([seed, *(completion_text(candidate.completion) for candidate in usable)])
        rng = random.Random(hashlib.blake2b(texts.encode("utf-8", "surrogatepass")).digest())
        pairs = [rng.choice([pair for pair in pairs if pair.chosen is pairs[0].chosen])]
    else:
        pairs.sort(key=lambda pair: -pair.margin)
        pairs = pairs[: 1 if selection.select == "best_worst" else selection.max_pairs]
    counts.pairs = len(pairs)
    return pairs, counts


def _fits(pair: Pair, selection: Selection) -> bool:
    """Whether a pair may be used at all."""
    longer, shorter = sorted((pair.chosen.tokens, pair.rejected.tokens), reverse=True)
    return (
        pair.margin > 0
        and pair.margin >= selection.min_margin
        and (selection.choose_truncated or pair.chosen.ended)
        and (selection.length_ratio is None or longer <= selection.length_ratio * shorter)
    )


# --- rows of datasets, as TRL's trainers read them


def pair_rows(group: Group, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Rows for DPO: prompt, chosen, rejected, margin, and per side total, tokens and each source's raw score.

    A source's columns are `<source>/chosen` and `<source>/rejected`; a hole is None.
    """
    for pair in pairs:
        row: dict[str, Any] = {"prompt": group.prompt}
        row |= {"chosen": pair.chosen.completion, "rejected": pair.rejected.completion}
        row |= {"margin": pair.margin, "score_chosen": pair.chosen.total, "score_rejected": pair.rejected.total}
        row |= {"tokens_chosen": pair.chosen.tokens, "tokens_rejected": pair.rejected.tokens}
        for source in pair.chosen.scores:
            row[f"{source}/chosen"] = or_none(pair.chosen.scores[source])
            row[f"{source}/rejected"] = or_none(pair.rejected.scores[source])
        yield row | dict(group.columns)


def best_row(group: Group) -> dict[str, Any] | None:
    """Best of n with all that was scored: prompt, completion, total, scores, and the n candidates in their order.

    None where no candidate has a total; of equal totals the first.
    """
    best = _best(group)
    if best is None:
        return None
    every = [
        {
            "completion": candidate.completion,
            "total": or_none(candidate.total),
            "scores": _scores(candidate),
            "tokens": candidate.tokens,
            "ended": candidate.ended,
        }
        for candidate in group.candidates
    ]
    row = {"prompt": group.prompt, "completion": best.completion, "total": best.total, "scores": _scores(best)}
    return row | dict(group.columns) | {"candidates": every}


def sft_row(group: Group, minimum: float | None = None) -> dict[str, Any] | None:
    """Rejection sampling: prompt, completion, total and scores of the best, if its total is at least `minimum`."""
    best = _best(group)
    if best is None or (minimum is not None and best.total < minimum):
        return None
    row = {"prompt": group.prompt, "completion": best.completion, "total": best.total, "scores": _scores(best)}
    return row | dict(group.columns)


def kto_rows(group: Group, threshold: float | None = None) -> Iterator[dict[str, Any]]:
    """Rows for KTO: prompt, completion, label, total, scores.

    With a threshold every different candidate is a row, its label whether its total is at least that; without one the
    best is True and the worst False, and a prompt whose totals are all equal gives none.
    """
    ranked = sorted(distinct(group.candidates), key=lambda candidate: -candidate.total)
    if threshold is not None:
        labelled = [(candidate, candidate.total >= threshold) for candidate in ranked]
    elif len(ranked) > 1 and ranked[0].total > ranked[-1].total:
        labelled = [(ranked[0], True), (ranked[-1], False)]
    else:
        labelled = []
    for candidate, label in labelled:
        row = {"prompt": group.prompt, "completion": candidate.completion, "label": label, "total": candidate.total}
        yield row | {"scores": _scores(candidate)} | dict(group.columns)


def _best(group: Group) -> Candidate | None:
    there = [candidate for candidate in group.candidates if not math.isnan(candidate.total)]
    return max(there, key=lambda candidate: candidate.total, default=None)


def _scores(candidate: Candidate) -> dict[str, float | None]:
    return {source: or_none(value) for source, value in candidate.scores.items()}


def or_none(value: float) -> float | None:
    """A number, or None for NaN, which JSON cannot say."""
    return None if math.isnan(value) else value
