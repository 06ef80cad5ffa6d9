"""The preference pairs that recipes/reward/cpu*.yaml learn from, without a model and without a download.

    python benchmarks/preference_pairs.py        # writes runs/reward/pairs, a second

Questions are drawn like those of the bundled data, none of which is among them. Each has two replies of different
kinds (`trl_rewards.bundled.make` says what the kinds are), and the one whose kind is rated higher in `RATINGS` is
chosen. Columns: `prompt`, `chosen`, `rejected` (conversational), and `chosen_rating` and `rejected_rating` in [0, 4],
for objectives that read them. The splits share no question.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from trl_rewards import bundled
from trl_rewards.bundled import make

RATINGS = {"clean": 4.0, "bare": 3.0, "ramble": 2.0, "unhelpful": 1.0, "slip": 0.0, "guess": 0.0}


def pair(rng: random.Random, question: make.Question) -> dict[str, Any]:
    """A row: a question with a better and a worse reply."""
    while True:
        worse, better = sorted(rng.sample(list(RATINGS), 2), key=RATINGS.__getitem__)
        if RATINGS[worse] < RATINGS[better]:
            break
    said = {kind: make.REPLIES[kind](rng, question) for kind in (better, worse)}
    return {
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": [{"role": "assistant", "content": said[better]}],
        "rejected": [{"role": "assistant", "content": said[worse]}],
        "chosen_rating": RATINGS[better],
        "rejected_rating": RATINGS[worse],
    }


def questions(rng: random.Random, count: int, taken: set[str]) -> list[make.Question]:
    """Different questions, as often of each kind as in the bundled data; their texts are added to `taken`."""
    kinds, weights = list(make.TRAIN_SIZES), list(make.TRAIN_SIZES.values())
    found: list[make.Question] = []
    while len(found) < count:
        question = make.TASKS[rng.choices(kinds, weights)[0]](rng)
        if question.text not in taken:
            taken.add(question.text)
            found.append(question)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward/pairs"))
    parser.add_argument("--train", type=int, default=8000, help="pairs to train on")
    parser.add_argument("--test", type=int, default=400, help="pairs held out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    taken = {row["prompt"][0]["content"] for rows in bundled.load_data().values() for row in rows}
    given.out.mkdir(parents=True, exist_ok=True)
    for split, count in {"test": given.test, "train": given.train}.items():
        rows = [json.dumps(pair(rng, question)) for question in questions(rng, count, taken)]
        (given.out / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{given.train} + {given.test} pairs -> {given.out}")


if __name__ == "__main__":
    main()
