"""The strict format reward of BLEUBERI's reasoning mode.  https://huggingface.co/papers/2505.11080"""

from __future__ import annotations

import re

from trl_rewards import Reward, Samples, Score


class ThinkAnswerFormat(Reward):
    """1.0 for `<think>…</think><answer>…</answer>` on a single line, else 0.0.  https://huggingface.co/papers/2505.11080

    As in the authors' code (lilakk/BLEUBERI@e0d15639): a line break inside, or anything before, between or after the
    two blocks fails, but for one line break at the end; tags may occur twice. It punishes reasoning of several
    paragraphs; `regex_format` allows it, and no tag twice.
    """

    def score(self, samples: Samples) -> list[Score]:
        return [float(bool(_FORMAT.match(text))) for text in samples.texts]


_FORMAT = re.compile(r"<think>.*?</think><answer>.*?</answer>$")
