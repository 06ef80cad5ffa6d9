"""BLEU against references as a reward for instruction following.  https://huggingface.co/papers/2505.11080

The BLEU is that of Hugging Face `evaluate` with `smooth=True` (tensorflow/nmt's), as in the authors' code
(lilakk/BLEUBERI@e0d15639). No setting of sacrebleu gives the same numbers.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from trl_rewards import Reward, Samples, Score


class Bleuberi(Reward):
    """Smoothed BLEU of the answer against one or more references, in [0, 1].  https://huggingface.co/papers/2505.11080

    The answer is what follows the first `<answer>` tag, or the whole completion without one; `<think>` text outside
    of it is not removed. An empty answer scores 0.0; a row without a usable reference has no opinion (None), whatever
    its answer is.

    Beware of short references: every order is smoothed by one, so a wrong one-word answer to a one-word reference
    scores 0.84. Set `smooth_unigrams: false` where references are short.

    Deviation from the authors' code: where it divides by zero (an empty reference, no reference, an answer without
    tokens) the rules above hold.
    """

    references: str = "references"
    """Dataset column with a list of reference answers per row; a string counts as a list of one. Empty ones are left
    out."""
    max_order: int = 4
    """Longest n-gram."""
    smooth: bool = True
    """Add one to matches and totals of every order. False: an answer without a match in some order, or of fewer than
    `max_order` tokens, scores 0."""
    ref_length: Literal["min", "closest"] = "min"
    """Length that the brevity penalty compares with: of the shortest reference, or of the one closest in length."""
    extract_answer: bool = True
    """False scores the whole completion, as the authors do when they select training data."""
    smooth_unigrams: bool = True
    """False leaves the first order unsmoothed: an answer that shares no word with any reference scores 0."""
    turn: Literal["first", "last"] = "first"
    """Which assistant message of a chat completion is read: the first, as the authors do, or the last, which is the
    answer where the policy calls tools."""

    def __post_init__(self):
        if self.max_order < 1:
            raise ValueError(f"max_order must be at least 1, got {self.max_order}")

    def reads(self) -> tuple[str, ...]:
        return (self.references,)

    def score(self, samples: Samples) -> list[Score]:
        read = samples
        if self.turn == "first":
            read = replace(samples, completions=[first_turn(completion) for completion in samples.completions])
        return [
            self._score(text, self._row(row, value))
            for row, (text, value) in enumerate(zip(read.texts, samples[self.references], strict=True))
        ]

    def _row(self, row: int, value: Any) -> tuple[str, ...]:
        """The references of a row, missing ones left out."""
        found = value if isinstance(value, (list, tuple)) else [value]
        found = [text for text in found if text is not None and text == text]  # NaN is not equal to itself
        if not all(isinstance(text, str) for text in found):
            raise TypeError(f"column {self.references!r}, row {row}: wanted text or a list of texts, got {value!r}")
        return tuple(found)

    def _score(self, text: str, references: tuple[str, ...]) -> float | None:
        answer = answer_in(text) if self.extract_answer else text
        return bleu(answer, references, self.max_order, self.smooth, self.smooth_unigrams, self.ref_length)


def bleu(
    answer: str,
    references: tuple[str, ...],
    max_order: int = 4,
    smooth: bool = True,
    smooth_unigrams: bool = True,
    ref_length: Literal["min", "closest"] = "min",
) -> float | None:
    """Brevity penalty times the geometric mean of the n-gram precisions, in [0, 1]; None without a reference.

    An n-gram matches as often as it occurs in the reference that has it most often (Papineni et al. 2002). Smoothing
    is add-one (Lin & Och 2004), on the first order too.
    """
    wanted = reference_statistics(references, max_order)
    if not wanted.lengths:
        return None
    tokens = tokenize_13a(answer)
    if not tokens:
        return 0.0

    log_precision = 0.0
    for order, counts in enumerate(wanted.counts, start=1):
        found = Counter(filter(counts.__contains__, ngrams(tokens, order)))
        matches = sum(min(count, counts[ngram]) for ngram, count in found.items())
        possible = max(len(tokens) - order + 1, 0)
        add = int(smooth and (order > 1 or smooth_unigrams))
        if matches + add == 0:
            return 0.0
        log_precision += math.log((matches + add) / (possible + add)) / max_order

    return math.exp(log_precision) * brevity_penalty(len(tokens), wanted.lengths, ref_length)


def brevity_penalty(length: int, reference_lengths: tuple[int, ...], ref_length: Literal["min", "closest"]) -> float:
    """1 for an answer longer than its reference, else exp(1 - reference / length). Of two closest, the shorter."""
    if ref_length == "min":
        reference = min(reference_lengths)
    else:
        reference = min(reference_lengths, key=lambda candidate: (abs(candidate - length), candidate))
    return 1.0 if length > reference else math.exp(1 - reference / length)


class ReferenceStatistics(NamedTuple):
    """What BLEU needs of the references of a prompt."""

    counts: tuple[dict[tuple[str, ...], int], ...]
    """Per order, each n-gram's highest count in any reference."""
    lengths: tuple[int, ...]
    """Tokens of each reference; those without any are left out."""


# The completions of a group come one after the other, so a small cache makes all but the first free of this cost.
@functools.lru_cache(maxsize=128)
def reference_statistics(references: tuple[str, ...], max_order: int) -> ReferenceStatistics:
    """Merged n-gram counts and the lengths of the references."""
    tokenized = [tokens for tokens in map(tokenize_13a, references) if tokens]
    merged: list[dict[tuple[str, ...], int]] = [{} for _ in range(max_order)]
    for order, counts in enumerate(merged, start=1):
        for tokens in tokenized:
            for ngram, count in Counter(ngrams(tokens, order)).items():
                if count > counts.get(ngram, 0):
                    counts[ngram] = count
    return ReferenceStatistics(tuple(merged), tuple(map(len, tokenized)))


def ngrams(tokens: list[str], order: int) -> Iterable[tuple[str, ...]]:
    """All runs of `order` tokens."""
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def first_turn(completion: Any) -> Any:
    """A chat completion up to its first assistant message; a plain one as it is."""
    if not isinstance(completion, list):
        return completion
    first = next((index for index, message in enumerate(completion) if message.get("role") == "assistant"), 0)
    return completion[: first + 1]


def answer_in(text: str) -> str:
    """What follows the first `<answer>`, up to the next answer tag of either kind; the text where there is none."""
    _, tag, rest = text.partition("<answer>")
    return rest.partition("<answer>")[0].partition("</answer>")[0].strip() if tag else text.strip()


def tokenize_13a(text: str) -> list[str]:
    """mteval-v13a's tokens. Case, accents, in-word hyphens and apostrophes stay; CJK text is not split."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return [token for word in text.split() for token in _split_word(word)]


# ASCII punctuation but for the apostrophe, comma, hyphen and full stop.
_SPACED = str.maketrans({character: f" {character} " for character in '!"#$%&()*+/:;<=>?@[\\]^_`{|}~'})
_POINT_AFTER = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE = re.compile(r"([.,])([^0-9])")
_DASH = re.compile(r"([0-9])(-)")


# The rules of 13a never reach over white space, so they can run word by word, and most words come again.
@functools.lru_cache(maxsize=2**16)
def _split_word(word: str) -> tuple[str, ...]:
    text = f" {word} ".translate(_SPACED)
    text = _POINT_AFTER.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE.sub(r" \1 \2", text)
    return tuple(_DASH.sub(r"\1 \2 ", text).split())
