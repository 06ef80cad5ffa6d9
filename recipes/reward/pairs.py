"""The preference pairs that recipes/reward/cpu*.yaml learn from, without a model and without a download.

    python recipes/reward/pairs.py        # writes runs/reward/pairs, some seconds

Questions are drawn like those of the bundled data, none of which is among them. The chosen reply is clean, and the
rejected one has a flaw, of the kinds and with the shares that the bundled policy was taught
(`trl_rewards.bundled.quiz`): about half are wrong. Columns: `prompt`, `chosen`, `rejected` (conversational), and
`chosen_rating` and `rejected_rating` in [0, 4], for objectives that read them. The splits share no question.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from trl_rewards.bundled import quiz
from trl_rewards.files import write_rows

RATINGS = {"clean": 4.0, "bare": 3.0, "ramble": 2.0, "unhelpful": 1.0, "slip": 0.0, "guess": 0.0}


def pair(rng: random.Random, question: quiz.Question) -> dict[str, Any]:
    """A row: a question with a clean reply and a flawed one."""
    flaw = quiz.flaw(rng, question)
    return {
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": [{"role": "assistant", "content": quiz.clean(rng, question)}],
        "rejected": [{"role": "assistant", "content": quiz.REPLIES[flaw](rng, question)}],
        "chosen_rating": RATINGS["clean"],
        "rejected_rating": RATINGS[flaw],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward/pairs"))
    parser.add_argument("--train", type=int, default=8000, help="pairs to train on")
    parser.add_argument("--test", type=int, default=400, help="pairs held out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    taken = quiz.known_questions()
    for split, count in {"test": given.test, "train": given.train}.items():
        rows = [pair(rng, question) for question in quiz.more_questions(rng, count, taken)]
        write_rows(given.out / f"{split}.jsonl", rows)
    print(f"{given.train} + {given.test} pairs -> {given.out}")


if __name__ == "__main__":
    main()
