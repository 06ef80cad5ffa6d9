"""Judges: rewards that ask a language model what it thinks of completions, one by one, in pairs or as a list."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any, ClassVar, Literal

from trl_rewards.components import Score
from trl_rewards.models.judge_reward import Ask, JudgeReward, Message, mean_score
from trl_rewards.models.ranking import merge_windows, pairs, settle, windows
from trl_rewards.models.replies import as_number, extract_json
from trl_rewards.models.untrusted import as_text, fenced, without_control_tokens
from trl_rewards.samples import Failed, Samples

__all__ = [
    "Ask",
    "JudgeReward",
    "ListwiseJudge",
    "PairwiseJudge",
    "as_number",
    "as_text",
    "extract_json",
    "fenced",
    "score_in",
]


class PairwiseJudge(JudgeReward):
    """Base of judges of two completions at a time. Score: the mean share of comparisons won, in [0, 1].

    Subclasses define `messages`. A tie gives half a point to both. A completion that is `gated` loses to each other
    one of its group unasked. A completion with nothing to be compared with has no opinion (None); one whose verdicts
    all failed is Failed, and else its mean is over those that there are.
    """

    scope = "group"

    against: Literal["all", "ring", "reference"] = "all"
    """Compare with all others of the group (G(G-1)/2 comparisons), with two on a ring (G), or with the reference."""
    reference: str | None = None
    """Dataset column with a reference answer, which `against: reference` needs."""
    both_orders: bool = True
    """Ask twice, each completion being shown first once. False: in one order, at random."""
    inconsistent: Literal["tie", "mean"] = "tie"
    """What two orders with different verdicts mean: a tie, or the mean of their points."""

    def __post_init__(self):
        super().__post_init__()
        if self.against == "reference" and not self.reference:
            raise ValueError("against: reference needs reference, a dataset column with an answer per row")

    def reads(self) -> tuple[str, ...]:
        return (self.reference,) if self.reference else ()

    def floor(self) -> float | None:
        return 0.0

    def gated(self, samples: Samples) -> dict[int, float]:
        gated = super().gated(samples)
        if self.against != "reference":
            return gated
        assert self.reference is not None
        return {row: low for row, low in gated.items() if _is_text(samples[self.reference][row])}

    def messages(self, samples: Samples, row: int, texts: dict[str, str]) -> list[Message]:
        """One comparison: `texts` are two completions, "A" and "B"; `row` has their prompt and columns."""
        raise NotImplementedError(f"{type(self).__name__} must define messages(self, samples, row, texts)")

    def asks(self, samples: Samples) -> list[Ask]:
        gated, shown = self.gated(samples), self.shown(samples)
        found: list[Ask] = []

        def ask(row: int, *sides: tuple[int | None, str]) -> None:
            """About two texts, each with its row, or None for a reference."""
            orders = [sides, sides[::-1]]
            if not self.both_orders:
                orders = [self.private_random(samples, [row], str(sides)).choice(orders)]
            for order in orders:
                messages = self.messages(samples, row, {"A": order[0][1], "B": order[1][1]})
                there = [(name, side[0]) for name, side in zip("AB", order, strict=True) if side[0] is not None]
                found.append(Ask(messages, [side for _, side in there], [name for name, _ in there]))

        if self.against == "reference":
            assert self.reference is not None
            for row, reference in enumerate(samples[self.reference]):
                if _is_text(reference) and row not in gated:
                    ask(row, (row, shown[row]), (None, without_control_tokens(str(reference))))
            return found
        for group in _groups(samples):
            rows = [row for row in group if row not in gated]
            if self.against == "ring":
                self.private_random(samples, rows).shuffle(rows)
            for one, other in pairs(rows, self.against == "ring"):
                ask(one, (one, shown[one]), (other, shown[other]))
        return found

    def parse(self, ask: Ask, text: str) -> list[Score]:
        """Points by `read_winner`."""
        won = read_winner(text)
        return [won if isinstance(won, Failed) or name == "A" else 1 - won for name in ask.names]

    def schema(self, ask: Ask) -> dict[str, Any] | None:
        return winner_schema()

    def merge(self, samples: Samples, answers: list[tuple[Ask, list[Score]]]) -> list[Score]:
        verdicts: dict[tuple[int, ...], list[tuple[Ask, list[Score]]]] = {}
        for ask, scores in answers:
            verdicts.setdefault(tuple(sorted(ask.rows)), []).append((ask, scores))
        won: list[list[Score]] = [[] for _ in range(len(samples))]
        for pair, both in verdicts.items():
            for row in pair:
                said = [scores[ask.rows.index(row)] for ask, scores in both]
                points = [score for score in said if isinstance(score, float)]
                won[row].append(settle(points, self.inconsistent == "tie") if points else mean_score(said))
        gated = self.gated(samples)
        if self.against != "reference":
            for group in _groups(samples):
                walkovers: list[Score] = [1.0 for row in group if row in gated]
                for row in group:
                    if row not in gated and (not won[row] or any(isinstance(score, float) for score in won[row])):
                        won[row] += walkovers
        return [mean_score(scores) for scores in won]


class ListwiseJudge(JudgeReward):
    """Base of judges of a whole group at once. Score: the judge's, in `scale`.

    Subclasses define `messages`; by default a reply is `{"scores": {name: number}}`. Completions are shown shuffled,
    under anonymous names. A group of more than `window` is shown in chunks that share `overlap` completions and are
    put on one scale through these (`merge_windows`), so scores may leave the scale a little.
    """

    scope = "group"
    candidate_name: ClassVar[str] = "response-{}"
    """Name of the completion in each place, counted from 1."""

    scale: list[float] = field(default_factory=lambda: [1.0, 5.0])
    """Lowest and highest score; others in a reply are not believed."""
    window: int = 8
    """Completions in one ask, at most."""
    overlap: int = 2
    """Completions that neighbouring chunks of a larger group share."""
    permutations: int = 1
    """How often the group is asked about, each time in another order; scores are averaged."""
    partial: Literal["fail", "keep"] = "fail"
    """What a group with completions that the judge did not score becomes: Failed as a whole, or holes where they are.
    Scores of a part bias the group's baseline."""

    def __post_init__(self):
        super().__post_init__()
        check_scale(self.scale)
        if not 1 <= self.overlap < self.window:
            raise ValueError(f"overlap must be in [1, window), got {self.overlap} and {self.window}")
        if self.permutations < 1:
            raise ValueError(f"permutations must be at least 1, got {self.permutations}")

    def floor(self) -> float | None:
        return self.scale[0]

    def messages(self, samples: Samples, row: int, texts: dict[str, str]) -> list[Message]:
        """One ask: `texts` are completions by name, in the order to show; `row` has their prompt and columns."""
        raise NotImplementedError(f"{type(self).__name__} must define messages(self, samples, row, texts)")

    def shuffled(self, samples: Samples, rows: list[int], permutation: int) -> list[int]:
        """Rows of a group in the order to show them: at random, another for each permutation, step and content."""
        return self.private_random(samples, rows, f"order {permutation}").sample(rows, len(rows))

    def asks(self, samples: Samples) -> list[Ask]:
        gated, shown = self.gated(samples), self.shown(samples)
        found = []
        for group in _groups(samples):
            rows = [row for row in group if row not in gated]
            for permutation in range(self.permutations if rows else 0):
                for chunk in windows(self.shuffled(samples, rows, permutation), self.window, self.overlap):
                    names = [self.candidate_name.format(place + 1) for place in range(len(chunk))]
                    texts = {name: shown[row] for name, row in zip(names, chunk, strict=True)}
                    found.append(Ask(self.messages(samples, chunk[0], texts), chunk, names))
        return found

    def parse(self, ask: Ask, text: str) -> list[Score]:
        found = extract_json(text, ["scores"])
        scores = found["scores"] if found else None
        if not isinstance(scores, dict):
            return [Failed(f"the judge's reply has no scores: {excerpt(text)}")] * len(ask.rows)
        return [score_in(self.scale, scores.get(name)) for name in ask.names]

    def merge(self, samples: Samples, answers: list[tuple[Ask, list[Score]]]) -> list[Score]:
        merged = super().merge(samples, answers)  # for the reasons of what failed
        asked = {row for ask, _ in answers for row in ask.rows}
        for group in _groups(samples):
            verdicts = [
                {row: score for row, score in zip(ask.rows, scores, strict=True) if isinstance(score, int | float)}
                for ask, scores in answers
                if ask.rows[0] in group
            ]
            scores = merge_windows(verdicts)
            for row in group:
                if row in scores:
                    merged[row] = scores[row]
                elif isinstance(merged[row], float):
                    merged[row] = Failed("its part of the group shares no scored completion with the others")
            holes = [merged[row] for row in group if row in asked and row not in scores]
            if holes and self.partial == "fail":
                reason = next((hole.reason for hole in holes if isinstance(hole, Failed)), "it has no opinion")
                why = f"{len(holes)} of {len(group)} completions of the group have no score: {reason}"
                for row in group:
                    merged[row] = Failed(why)
        return merged


_WINNER = re.compile(r"(?i:\bwinner\b[\"'*\s]{0,6}(?:is|:|=))[\"'*\s\[(]{0,6}(A|B|(?i:tie))\b")


def read_winner(text: str) -> float | Failed:
    """Points of A: 1, 0 or 0.5 for a tie, by `{"winner": "A"}` ("A", "B" or "tie") or "winner:" in plain words.

    A reply with several winners, of which one may be quoted from what is judged, is Failed.
    """
    found = extract_json(text, ["winner"])
    if not found and extract_json(text, ["winner"], last=True):
        return Failed(f"the judge's reply has several winners: {excerpt(text)}")
    winner = str(found["winner"]) if found else _said(_WINNER, text)
    winner = winner.strip().upper() if winner else ""
    if winner not in ("A", "B", "TIE"):
        return Failed(f"the judge named no winner: {excerpt(text)}")
    return {"A": 1.0, "B": 0.0, "TIE": 0.5}[winner]


def winner_schema() -> dict[str, Any]:
    """JSON schema of what `read_winner` reads, with a reason before it."""
    return object_schema({"reason": {"type": "string"}, "winner": {"type": "string", "enum": ["A", "B", "tie"]}})


def check_scale(scale: list[float]) -> None:
    """ValueError unless it is a lowest and a highest score."""
    if len(scale) != 2 or not scale[0] < scale[1]:
        raise ValueError(f"scale must be [lowest, highest], got {scale}")


def score_in(scale: list[float], value: Any) -> Score:
    """A judge's number, or Failed if it is none or outside the scale."""
    number = as_number(value)
    if number is None:
        return Failed(
            f"the judge's score is no number: {value!r:.60}" if value is not None else "the judge gave no score"
        )
    if not scale[0] <= number <= scale[1]:
        return Failed(f"the judge's score {number:g} is outside {scale[0]:g} to {scale[1]:g}")
    return number


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with just these members, in this order."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _is_text(reference: Any) -> bool:
    """Whether there is a reference; NaN is how tables say None."""
    return reference is not None and reference == reference and bool(str(reference).strip())


def _groups(samples: Samples) -> list[range]:
    size = samples.group_size or len(samples)
    return [range(first, first + size) for first in range(0, len(samples), size)] if len(samples) else []


def _said(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match after the thinking; None where JSON is about that says several things, one of them quoted."""
    found = pattern.findall(text.rpartition("</think>")[2])
    return found[-1] if found and ("{" not in text or len({said.upper() for said in found}) == 1) else None


def excerpt(text: str) -> str:
    """The end of a reply, for a reason."""
    return repr(" ".join(text[-2000:].split())[-80:])
