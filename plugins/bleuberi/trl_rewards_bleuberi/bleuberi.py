"""BLEU against references as a reward for instruction following.  https://huggingface.co/papers/2505.11080"""

from __future__ import annotations

import importlib.util
from typing import Literal

from trl_rewards import Samples, Score
from trl_rewards_bleuberi.answers import AgainstReferences
from trl_rewards_bleuberi.bleu import EVALUATE, SACREBLEU, Convention, RefLength, Smoothing, bleu


class Bleuberi(AgainstReferences):
    """Smoothed BLEU of the answer against one or more references, in [0, 1].  https://huggingface.co/papers/2505.11080

    By default the BLEU of Hugging Face `evaluate` with `smooth=True`, as in the authors' code
    (lilakk/BLEUBERI@e0d15639); with `convention: sacrebleu` that of sacrebleu's `sentence_bleu`, divided by 100.
    `ref_length`, `smoothing` and `effective_order` depart from the convention one by one.

    The answer is what follows the first `<answer>` tag, or the whole completion without one; `<think>` text outside
    of it is not removed. An empty answer scores 0.0; a row without a usable reference has no opinion (None), whatever
    its answer is.

    Beware of short references: every order is smoothed by one, so a wrong one-word answer to a one-word reference
    scores 0.84. Set `smoothing: add_k` where references are short: then it scores 0.

    Deviation from the authors' code: where it divides by zero (an empty reference, no reference, an answer without
    tokens) the rules above hold.
    """

    convention: Literal["evaluate", "sacrebleu"] = "evaluate"
    """`evaluate`: shortest reference, add-one smoothing of every order. `sacrebleu`: closest reference, exponential
    smoothing, effective order."""
    over_references: Literal["joint", "mean", "max"] = "joint"
    """`joint`: one BLEU against all references at once, as the authors do. It lets an answer collect n-grams from all
    of them, and the shortest sets the brevity penalty, so with references of uneven quality or length it can do worse
    than the `mean` or `max` of one BLEU per reference."""
    ref_length: RefLength | None = None
    """Length that the brevity penalty compares with: of the shortest reference (`min`), or of the one closest in
    length. None: the convention's."""
    smoothing: Smoothing | None = None
    """`add_one` adds one to matches and totals of every order; `add_k` adds k above unigrams, so an answer that shares
    no word with any reference scores 0; `exp` halves, quarters, … an order without matches; `floor` gives it
    `smooth_value` matches; `none` makes it 0. None: the convention's."""
    smooth_value: float | None = None
    """k of `add_k` (None: 1), or the matches that `floor` gives (None: 0.1)."""
    effective_order: bool | None = None
    """Leave out orders that the answer is too short for; without smoothing they make it 0, with `add_one` 1. With
    `add_k` they stay, as in sacrebleu. None: the convention's."""
    max_order: int = 4
    """Longest n-gram."""
    compiled: bool = False
    """Count with bleuscore (`pip install "trl-rewards[fast]"`). The same numbers, and faster where each prompt has one
    completion; slower for groups, whose references are otherwise counted once."""

    def __post_init__(self):
        standard = EVALUATE if self.convention == "evaluate" else SACREBLEU
        self._convention: Convention = standard._replace(
            ref_length=self.ref_length or standard.ref_length,
            smoothing=self.smoothing or standard.smoothing,
            smooth_value=self.smooth_value,
            effective_order=standard.effective_order if self.effective_order is None else self.effective_order,
        )
        if self.max_order < 1:
            raise ValueError(f"max_order must be at least 1, got {self.max_order}")
        if self.smooth_value is not None:
            if self._convention.smoothing not in ("add_k", "floor"):
                raise ValueError(
                    f"smooth_value belongs to smoothing add_k or floor; smoothing is {self._convention.smoothing}"
                )
            if not self.smooth_value > 0:
                raise ValueError(f"smooth_value must be above 0, got {self.smooth_value}")
        if self.compiled and importlib.util.find_spec("bleuscore") is None:
            raise ValueError('compiled needs bleuscore: pip install "trl-rewards[fast]"')

    def score(self, samples: Samples) -> list[Score]:
        return [self._score(answer, references) for answer, references in self.pairs(samples)]

    def _score(self, answer: str, references: tuple[str, ...]) -> float | None:
        if self.over_references == "joint":
            return self._bleu(answer, references)
        each = [self._bleu(answer, (reference,)) for reference in references]
        there = [score for score in each if score is not None]
        if not there:
            return None
        return max(there) if self.over_references == "max" else sum(there) / len(there)

    def _bleu(self, answer: str, references: tuple[str, ...]) -> float | None:
        return bleu(answer, references, self._convention, self.max_order, self.compiled)
