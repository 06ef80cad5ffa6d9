"""BLEU of one answer against its references, as `evaluate` and as sacrebleu have it.

https://aclanthology.org/P02-1040; smoothing: https://aclanthology.org/C04-1072, https://aclanthology.org/W14-3346

Both conventions are made of the same counts: how many n-grams of the answer are in the references, and lengths.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

RefLength = Literal["min", "closest"]
Smoothing = Literal["add_one", "add_k", "exp", "floor", "none"]


class Convention(NamedTuple):
    """What a BLEU makes of the counts."""

    ref_length: RefLength
    smoothing: Smoothing
    smooth_value: float | None = None
    """k of add_k (None: 1), numerator of floor (None: 0.1)."""
    effective_order: bool = False
    right_strip: bool = False
    """White space at the end of a text goes before it is tokenised, so that a hyphen at the end stays."""


EVALUATE = Convention("min", "add_one")
"""Hugging Face `evaluate` with `smooth=True`, which is tensorflow/nmt's."""
SACREBLEU = Convention("closest", "exp", effective_order=True, right_strip=True)
"""sacrebleu's `sentence_bleu`."""


class Counts(NamedTuple):
    """What a BLEU is made of."""

    matches: list[int]
    """Per order, n-grams of the answer that are in the references."""
    length: int
    """Tokens of the answer."""
    ref_length: int
    """Tokens of the reference that the brevity penalty compares with."""


def bleu(
    answer: str,
    references: tuple[str, ...],
    convention: Convention = EVALUATE,
    max_order: int = 4,
    compiled: bool = False,
) -> float | None:
    """Brevity penalty times the geometric mean of the n-gram precisions, in [0, 1]; None without a reference.

    References without tokens are left out; an answer without tokens scores 0. `compiled` counts with bleuscore, which
    remembers no references.
    """
    if convention.right_strip:
        answer, references = answer.rstrip(), tuple(text.rstrip() for text in references)
    count = count_compiled if compiled else count_matches
    counts = count(answer, references, max_order, convention.ref_length)
    return None if counts is None else score_of(counts, convention)


def score_of(counts: Counts, convention: Convention) -> float:
    """BLEU from its counts, in [0, 1]."""
    if not counts.length or (convention.smoothing != "add_one" and not any(counts.matches)):
        return 0.0
    found = precisions(counts, convention)
    if not all(found):
        return 0.0
    brevity = 1.0 if counts.length >= counts.ref_length else math.exp(1 - counts.ref_length / counts.length)
    return brevity * math.exp(sum(map(math.log, found)) / len(found))


def precisions(counts: Counts, convention: Convention) -> list[float]:
    """Smoothed precision of each order, from unigrams on.

    add_one: one added to matches and totals of every order (as tensorflow/nmt has Lin & Och 2004). add_k: k added to
    both above unigrams (Lin & Och 2004). floor: `smooth_value` matches where there are none. exp: 1/2, 1/4, 1/8, …
    matches where there are none (NIST). With `effective_order`, orders that the answer is too short for are left out;
    with add_k they count, as in sacrebleu, since k gives them a precision.
    """
    _, smoothing, value, effective_order, _ = convention
    found: list[float] = []
    share = 1.0
    for order, matches in enumerate(counts.matches, start=1):
        total = max(counts.length - order + 1, 0)
        if effective_order and total == 0 and smoothing != "add_k":
            break
        if smoothing == "add_one":
            found.append((matches + 1) / (total + 1))
        elif smoothing == "add_k" and order > 1:
            k = 1.0 if value is None else value
            found.append((matches + k) / (total + k))
        elif matches or not total:
            found.append(matches / max(total, 1))
        elif smoothing == "exp":
            share /= 2
            found.append(share / total)
        elif smoothing == "floor":
            found.append((0.1 if value is None else value) / total)
        else:
            found.append(0.0)
    return found


# --- counting --------------------------------------------------------------------------------------------------------


def count_matches(answer: str, references: tuple[str, ...], max_order: int, ref_length: RefLength) -> Counts | None:
    """Counts of an answer; None where no reference has a token.

    An n-gram matches as often as it occurs in the reference that has it most often.
    """
    wanted = reference_statistics(references, max_order)
    if not wanted.lengths:
        return None
    tokens = tokenize_13a(answer)
    matches = []
    for order, highest in enumerate(wanted.counts, start=1):
        found = Counter(filter(highest.__contains__, ngrams(tokens, order)))
        matches.append(sum(map(min, found.values(), map(highest.__getitem__, found))))
    if ref_length == "min":
        length = min(wanted.lengths)
    else:  # of two equally close, the shorter
        length = min(wanted.lengths, key=lambda candidate: (abs(candidate - len(tokens)), candidate))
    return Counts(matches, len(tokens), length)


class ReferenceStatistics(NamedTuple):
    """What BLEU needs of the references of a prompt."""

    counts: tuple[dict[tuple[str, ...], int], ...]
    """Per order, each n-gram's highest count in any reference."""
    lengths: tuple[int, ...]
    """Tokens of each reference; those without any are left out."""


# The completions of a group come one after the other, so a small cache makes all but the first free of this cost.
# Five references of 300 words take about a megabyte.
@functools.lru_cache(maxsize=32)
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


def count_compiled(answer: str, references: tuple[str, ...], max_order: int, ref_length: RefLength) -> Counts | None:
    """The same counts by bleuscore (Rust), which counts the references each time."""
    import bleuscore

    texts = [text.translate(_SEPARATORS) for text in references if _has_tokens(text)]
    if not texts:
        return None
    if not _has_tokens(answer):
        return Counts([0] * max_order, 0, 0)
    method = "shortest" if ref_length == "min" else "closest"
    found: Any = bleuscore.compute([texts], [answer.translate(_SEPARATORS)], max_order, ref_len_method=method)
    length = found["translation_length"]
    totals = (max(length - order, 0) for order in range(max_order))
    matches = [round(share * total) for share, total in zip(found["precisions"], totals, strict=True)]
    return Counts(matches, length, found["reference_length"])


# Python's str.split splits at these four; Rust's, going by Unicode's White_Space, does not.
_SEPARATORS = str.maketrans(dict.fromkeys("\x1c\x1d\x1e\x1f", " "))


def _has_tokens(text: str) -> bool:
    return bool(text.replace("<skipped>", "").replace("-\n", "").strip())


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenize_13a(text: str) -> list[str]:
    """mteval-v13a's tokens. Case, accents, in-word hyphens and apostrophes stay; CJK text is not split."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return [token for word in text.split() for token in (_known_word if len(word) <= 32 else _split_word)(word)]


# ASCII punctuation but for the apostrophe, comma, hyphen and full stop.
_SPACED = str.maketrans({character: f" {character} " for character in '!"#$%&()*+/:;<=>?@[\\]^_`{|}~'})
_POINT_AFTER = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE = re.compile(r"([.,])([^0-9])")
_DASH = re.compile(r"([0-9])(-)")


def _split_word(word: str) -> tuple[str, ...]:
    text = f" {word} ".translate(_SPACED)
    text = _POINT_AFTER.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE.sub(r" \1 \2", text)
    return tuple(_DASH.sub(r"\1 \2 ", text).split())


# The rules of 13a never reach over white space, so they can run word by word, and most words come again. Long ones
# hardly do: a line of Chinese is one, and would fill memory.
_known_word = functools.lru_cache(maxsize=2**16)(_split_word)
