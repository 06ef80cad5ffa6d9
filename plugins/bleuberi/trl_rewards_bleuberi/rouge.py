"""ROUGE-L, and its harmonic mean with BLEU.  https://aclanthology.org/W04-1013

As rewards: https://huggingface.co/papers/2505.11080
"""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Any

from trl_rewards import Samples, Score
from trl_rewards_bleuberi.answers import AgainstReferences
from trl_rewards_bleuberi.bleu import bleu


class RougeL(AgainstReferences):
    """F1 of the longest common subsequence of words, ROUGE-L, with the best reference, in [0, 1].

    https://huggingface.co/papers/2505.11080 compares BLEU with it. The numbers are those of the package `rouge_score`
    without stemming, which `evaluate` uses: lower case, words of `a-z0-9` alone, so text in other scripts scores 0.
    An empty answer scores 0.0; a row without a reference has no opinion (None).
    """

    compiled: bool = False
    """Compute with rouge-score-rs (`pip install "trl-rewards[fast]"`): the same numbers in about half the time, and in
    an eighth where each prompt has one completion."""

    def __post_init__(self):
        if self.compiled and importlib.util.find_spec("rouge_score_rs") is None:
            raise ValueError('compiled needs rouge-score-rs: pip install "trl-rewards[fast]"')

    def score(self, samples: Samples) -> list[Score]:
        one = rouge_l_compiled if self.compiled else rouge_l
        return [one(answer, references) for answer, references in self.pairs(samples)]


class BleuRougeF1(AgainstReferences):
    """Harmonic mean of BLEU and ROUGE-L, 2 · B · R / (B + R), in [0, 1].  https://huggingface.co/papers/2505.11080

    Both as `bleuberi` and `rouge_l` have them by default; 0 where both are 0. A row without a usable reference has no
    opinion (None).
    """

    def score(self, samples: Samples) -> list[Score]:
        return [
            harmonic_mean(bleu(answer, references), rouge_l(answer, references))
            for answer, references in self.pairs(samples)
        ]


def harmonic_mean(one: float | None, other: float | None) -> float | None:
    """2ab / (a + b), 0 where both are 0; None where either is missing."""
    if one is None or other is None:
        return None
    return 2 * one * other / (one + other) if one + other else 0.0


def rouge_l(answer: str, references: tuple[str, ...]) -> float | None:
    """The highest ROUGE-L F1 with any reference, in [0, 1]; None where all references are blank."""
    there = [text for text in references if text.strip()]
    words = words_of(answer)
    return max((_f1(words, text) for text in there), default=None)


def rouge_l_compiled(answer: str, references: tuple[str, ...]) -> float | None:
    """`rouge_l` by rouge-score-rs (Rust)."""
    there = [text for text in references if text.strip()]
    return _compiled_scorer().score_multi(there, answer)["rougeL"].fmeasure if there else None


def words_of(text: str) -> list[str]:
    """Runs of ASCII letters and digits, in lower case."""
    return _WORD.findall(text.lower())


_WORD = re.compile("[a-z0-9]+")


def _f1(words: list[str], reference: str) -> float:
    places, length = word_places(reference)
    common = common_subsequence(words, places, length)
    if not common:
        return 0.0
    precision, recall = common / len(words), common / length
    return 2 * precision * recall / (precision + recall)


# As many as the references of some prompts: completions of a group come one after the other.
@functools.lru_cache(maxsize=128)
def word_places(reference: str) -> tuple[dict[str, int], int]:
    """Where each word of a reference stands, as the bits of a number, and the count of its words."""
    words = words_of(reference)
    places: dict[str, int] = {}
    for index, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << index
    return places, len(words)


def common_subsequence(words: list[str], places: dict[str, int], length: int) -> int:
    """Length of the longest common subsequence, one row of the table at a time as the bits of a number.

    The bit-parallel algorithm of Hyyrö 2004: a bit is 0 where the row is one higher than at the bit before it, and one
    addition carries along the row.
    """
    whole = (1 << length) - 1
    row = whole
    for word in words:
        if word in places:
            hits = row & places[word]
            row = ((row + hits) | (row - hits)) & whole
    return length - row.bit_count()


@functools.cache
def _compiled_scorer() -> Any:
    from rouge_score_rs import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
