"""RLCR: right answers with honest confidence.  https://huggingface.co/papers/2507.16806

An answer comes with a confidence q in [0, 1]; c is 1 where it is right. Nothing is earned by claiming another q than
the chance of being right.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from trl_rewards import Context, Failed, Reward, Samples, Score, load_reward
from trl_rewards.maths import auroc, brier, ece

MALFORMED = -1.0
"""What a reply of another form earns: as little as a wrong answer of full confidence."""


def calibrated(right: float, confidence: float) -> float:
    """c - (q - c)², in [-1, 1]. Its mean over c is highest at q = P(c = 1) = p, where it is p²."""
    return right - (confidence - right) ** 2


def read_reply(text: str, analysis: bool = True) -> tuple[str, float] | None:
    """Answer and confidence of `…</think> <answer>…</answer> <analysis>…</analysis> <confidence>q</confidence>`.

    Only white space may stand between the blocks and after them. None for any other form, and for a confidence that is
    no number in [0, 1]. Without `analysis` that block is not there.
    """
    found = []
    for tag in ("confidence", "analysis", "answer") if analysis else ("confidence", "answer"):
        text = text.rstrip()
        before, opened, content = text.removesuffix(f"</{tag}>").rpartition(f"<{tag}>")
        if not opened or not text.endswith(f"</{tag}>"):
            return None
        text = before
        found.append(content)
    confidence = as_confidence(found[0])
    if confidence is None or not text.rstrip().endswith("</think>"):
        return None
    return found[-1].strip(), confidence


def as_confidence(text: str) -> float | None:
    """A number in [0, 1]; None for anything else, such as `90%`."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces, as HotpotQA compares answers."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def vote_weights(answers: Sequence[str], confidences: Sequence[float]) -> Mapping[str, float]:
    """Each answer's sum of confidences; the one with the most is the confidence-weighted vote."""
    weights: dict[str, float] = {}
    for answer, confidence in zip(answers, confidences, strict=True):
        weights[answer] = weights.get(answer, 0.0) + confidence
    return weights


def weighted_vote(answers: Sequence[str], confidences: Sequence[float]) -> str:
    """The answer with the largest sum of confidences, the first of equal ones."""
    weights = vote_weights(answers, confidences)
    return max(weights, key=weights.__getitem__)


def most_confident(answers: Sequence[str], confidences: Sequence[float]) -> str:
    """The answer of the highest confidence, the first of equal ones."""
    return answers[max(range(len(answers)), key=confidences.__getitem__)]


class RLCR(Reward):
    """c - (q - c)² of an answer that is right (c = 1) or not (c = 0) and its stated confidence q, in [-1, 1].

    https://huggingface.co/papers/2507.16806. The completion must be `…</think> <answer>…</answer>
    <analysis>…</analysis> <confidence>q</confidence>`; another form earns -1. A row without a reference answer has no
    opinion (None). Set `scale_rewards: none` or `advantage: {use: center}`: a z-score within groups divides by a
    deviation that depends on q, and then another q than the true chance pays.

    The authors' code (damanimehul/RLCR@8904bed) adds up the measures `format`, `accuracy` and `brier`, 1 - (q - c)²,
    as three sources of weight 0.5 each, all 0 for another form: half of this reward and 0.5 more, and the format. Logs
    accuracy, Brier score, calibration error (ten bins) and AUROC of each batch.
    """

    sees_every_row = True  # a confidence that is said often counts as often
    answer: str = "answer"
    """Dataset column with the reference answer, or a list of them, any of which is right."""
    match: Literal["exact", "math"] = "exact"
    """How answers are compared: as plain text, without case, punctuation and articles, or as `accuracy` does."""
    measure: Literal["reward", "format", "accuracy", "brier"] = "reward"
    """`reward`, or one of the three that the authors' code adds up."""
    analysis: bool = True
    """Whether the form has an `<analysis>` block."""

    def __post_init__(self):
        self._context = Context()
        self._math = load_reward("accuracy", answer="answer") if self.match == "math" else None

    def reads(self) -> tuple[str, ...]:
        return (self.answer,)

    def proper(self) -> bool:
        return self.measure in ("reward", "brier")

    def setup(self, context: Context) -> None:
        self._context = context
        if self._math:
            self._math.setup(context)

    def close(self) -> None:
        if self._math:
            self._math.close()

    def score(self, samples: Samples) -> list[Score]:
        replies = [read_reply(text, self.analysis) for text in samples.texts]
        if self.measure == "format":
            return [float(reply is not None) for reply in replies]
        right = self._right(samples, [reply[0] if reply else "" for reply in replies])
        self._log([(reply[1], c) for reply, c in zip(replies, right, strict=True) if reply and isinstance(c, float)])
        return [self._one(reply, c) for reply, c in zip(replies, right, strict=True)]

    def _one(self, reply: tuple[str, float] | None, right: Score) -> Score:
        if not isinstance(right, float):
            return right
        if reply is None:
            return MALFORMED if self.measure == "reward" else 0.0
        if self.measure == "accuracy":
            return right
        _, confidence = reply
        return calibrated(right, confidence) if self.measure == "reward" else 1 - (confidence - right) ** 2

    def _right(self, samples: Samples, answers: Sequence[str]) -> list[Score]:
        """1.0 or 0.0 for each answer; None without a reference."""
        references = [_texts(value) for value in samples[self.answer]]
        if self._math is None:
            return [
                float(plain(answer) in map(plain, wanted)) if wanted else None
                for answer, wanted in zip(answers, references, strict=True)
            ]
        rows = [row for row, wanted in enumerate(references) for _ in wanted]
        tagged = replace(
            samples.take(rows),
            completions=[f"<answer>{answers[row]}</answer>" for row in rows],
            columns={"answer": [text for wanted in references for text in wanted]},
        )
        scores = iter(self._math.score(tagged))
        return [by_any([next(scores) for _ in wanted]) for wanted in references]

    def _log(self, pairs: Sequence[tuple[float, float]]) -> None:
        if not pairs or not self._context.log_metric:
            return
        confidences, right = [q for q, _ in pairs], [c for _, c in pairs]
        measured = {
            "accuracy": sum(right) / len(right),
            "brier": brier(confidences, right),
            "ece": ece(confidences, right),
            "auroc": auroc(confidences, right),
        }
        for name, value in measured.items():
            if value is not None:
                self._context.log_metric(f"{self.display_name}/{name}", value)


def by_any(scores: Sequence[Score]) -> Score:
    """Of an answer's scores, 1.0 or 0.0 or holes, by several references: right by one is right, wrong is wrong by all.

    A reference that says nothing (None) does not count; a failed comparison leaves open what is not right by another.
    """
    if 1.0 in scores:
        return 1.0
    failed = [score for score in scores if isinstance(score, Failed)]
    return failed[0] if failed else 0.0 if 0.0 in scores else None


def _texts(value: Any) -> list[str]:
    """The reference answers of a row, missing ones (None, NaN of tables, empty texts) left out."""
    given = value if isinstance(value, (list, tuple)) else [value]
    return [str(text) for text in given if text is not None and text == text and str(text).strip()]
