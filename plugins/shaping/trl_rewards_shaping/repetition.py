"""A penalty on repeated n-grams.  https://huggingface.co/papers/2502.03373"""

from __future__ import annotations

from trl_rewards import Reward, Samples, Score
from trl_rewards.maths import repeated_share


class Repetition(Reward):
    """`max_penalty` times the share of n-grams of words that were there before, 1 - distinct / all; at most 0.

    Appendix C.2 of https://huggingface.co/papers/2502.03373 penalises repeated n-grams. Words are what is between
    white space, in lower case, as in the code of R1-Reward (yfzhang114/r1_reward@3693413a). TRL has the same of
    tokens, which suits languages without spaces: `{use: function, with: {path:
    "trl.rewards:get_repetition_penalty_reward", factory: {ngram_size: 3}}}`.
    """

    ngram_size: int = 3
    max_penalty: float = -1.0
    """What a completion comes near to that only repeats itself; at most 0."""

    def __post_init__(self):
        if self.ngram_size < 1 or self.max_penalty > 0:
            got = f"{self.ngram_size} and {self.max_penalty}"
            raise ValueError(f"ngram_size must be at least 1 and max_penalty at most 0, got {got}")

    def score(self, samples: Samples) -> list[Score]:
        shares = [repeated_share(text.lower().split(), self.ngram_size) for text in samples.texts]
        return [self.max_penalty * share if share else 0.0 for share in shares]
