"""The bundled policy, brought to chatter on after its answer: what dler.yaml begins with.

    python recipes/claims/talkative.py --out runs/talkative

Supervised fine-tuning on replies that are right, and then say up to four things more, or wrong, and say up to two.
What is said more changes no answer, so these tokens are slack; that right answers have more of them keeps GRPO from
dropping them as a part of wrong ones.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rewards import bundled
from trl_rewards.bundled import make

SLIPS = 0.2
"""Share of replies that are wrong."""


def reply(rng: random.Random, question: make.Question) -> str:
    """Working, the answer, and none to four sentences of chatter."""
    slips = rng.random() < SLIPS
    think, said = rng.choice(question.wrong) if slips else (question.think, question.said)
    more = rng.sample(make.CHATTER, rng.randint(0, 2 if slips else 4))
    return make.tagged(think, " ".join([rng.choice(question.sentences).replace("{}", said), *more]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120, help="of 64 replies")
    given = parser.parse_args()
    rng = random.Random(0)
    folder = bundled.model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = make.batches(rng, tokenizer, reply, given.steps, 64, make.known_questions())
    make.train(model, data, given.steps, 1e-3, "talkative")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
