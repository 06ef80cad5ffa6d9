"""Regularised relevance: what is asked for, at some length, without repetition.  https://huggingface.co/papers/2402.03469"""

from __future__ import annotations

import math
from typing import Any

from trl_rewards import Failed, Samples, Score
from trl_rewards_shaping.encoder import Encoder
from trl_rewards_shaping.repetition import repeated_share


def length_incentive(text: str) -> float:
    """Words / 100."""
    return len(text.split()) / 100


def distinct_trigrams(text: str) -> float:
    """Share of distinct ones among the trigrams of words, in (0, 1]; 1 with one or two words, 0 without any."""
    words = text.split()
    return 1 - repeated_share(words, 3) if words else 0.0


def mapped(value: float, closed: list[float], opened: list[float]) -> float:
    """F: the range `closed` onto the range `opened`, linearly, and beyond."""
    return opened[0] + (value - closed[0]) / (closed[1] - closed[0]) * (opened[1] - opened[0])


class RelevanceR3(Encoder):
    """Relevance of the answer by an encoder's dot product, times length and distinct trigrams.

    https://huggingface.co/papers/2402.03469. Of an open question it is M(prompt) · M(answer) · words / 100 · distinct
    trigrams; of a closed one, which has a definite answer, F(M(reference) · M(answer)) · distinct trigrams. M is
    `facebook/contriever` in the paper. F brings the second into the range of the first; the paper's is not known to
    us, and here it is linear between two ranges that you give, or does nothing. The repository is not public: formulas
    are those of two independent reviews.

    An empty answer scores 0.0; a row whose type is missing has no opinion (None).
    """

    query_type: str = "query_type"
    """Dataset column with `open` or `closed`."""
    references: str = "reference"
    """Dataset column with the reference answer, which closed questions need."""
    closed_range: list[float] | None = None
    """Lowest and highest relevance of closed questions, which F maps onto `open_range`; None: F does nothing."""
    open_range: list[float] | None = None
    """Lowest and highest relevance times length of open questions."""
    clip_negative: bool = False
    """A relevance below 0, which length would make worse, counts as 0. Contriever's are rarely negative."""

    def __post_init__(self):
        super().__post_init__()
        ranges = [each for each in (self.closed_range, self.open_range) if each is not None]
        if len(ranges) == 1 or any(len(each) != 2 or not each[0] < each[1] for each in ranges):
            raise ValueError(
                "closed_range and open_range go together and are [lowest, highest], "
                f"got {self.closed_range} and {self.open_range}"
            )

    def reads(self) -> tuple[str, ...]:
        return (self.query_type, self.references)

    def score(self, samples: Samples) -> list[Score]:
        kinds = [self._kind(row, value) for row, value in enumerate(samples[self.query_type])]
        against = [
            reference if kind == "closed" else prompt
            for kind, reference, prompt in zip(kinds, samples[self.references], samples.prompt_texts, strict=True)
        ]
        answers = [text.strip() for text in samples.texts]
        rows = [row for row, answer in enumerate(answers) if answer and kinds[row] and against[row]]
        vectors = self.vectors([text for row in rows for text in (answers[row], against[row])])
        scores: list[Score] = [0.0 if kind and other else None for kind, other in zip(kinds, against, strict=True)]
        for row in rows:
            relevance = float(vectors[answers[row]] @ vectors[against[row]])
            if not math.isfinite(relevance):
                scores[row] = Failed(f"the encoder's relevance is {relevance}")
                continue
            relevance = max(relevance, 0.0) if self.clip_negative else relevance
            scores[row] = self.regularised(answers[row], relevance, kinds[row] == "closed")
        return scores

    def regularised(self, answer: str, relevance: float, closed: bool) -> float:
        """R³ of an answer whose relevance is known."""
        if not closed:
            return relevance * length_incentive(answer) * distinct_trigrams(answer)
        if self.closed_range is not None and self.open_range is not None:
            relevance = mapped(relevance, self.closed_range, self.open_range)
        return relevance * distinct_trigrams(answer)

    def _kind(self, row: int, value: Any) -> str | None:
        if value not in ("open", "closed", None):
            raise ValueError(f"column {self.query_type!r}, row {row}: wanted `open` or `closed`, got {value!r}")
        return value
