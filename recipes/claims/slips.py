"""The bundled policy, brought to sums of six steps in each of which it may slip, and such sums: what clip-delta.yaml
and ppr.yaml begin with.

    python recipes/claims/slips.py --out runs/slips

Supervised fine-tuning on replies whose every step is wrong with the same chance, wherever it stands, and whose later
steps go on from the wrong number. So most replies have right steps and wrong ones, and are wrong at the end. The
questions are in `data/train.jsonl` and `data/test.jsonl`, and none of them was taught.
"""

from __future__ import annotations

import random

from transformers import AutoTokenizer

from trl_rewards.bundled import model_path, quiz, teach
from trl_rewards.bundled.quiz import Question
from trl_rewards.files import write_rows

STEPS = 6
SLIPS = 0.2
"""Chance that a step is wrong."""
SIZES = {"test": 160, "train": 800}


def long_sum(rng: random.Random) -> Question:
    return quiz.chain(rng, [STEPS])


def reply(rng: random.Random, question: Question) -> str:
    """In form, with slips; drawn anew where they lead below zero, since the questions have no negative numbers."""
    while True:
        value, values, lines = int(question.think.split()[0]), [], []
        for line in question.think.splitlines():
            _, symbol, number, *_ = line.split()
            result = quiz.apply(symbol, value, int(number))
            if result > 0 and rng.random() < SLIPS:
                result = quiz.near(rng, result)
            lines.append(f"{value} {symbol} {number} = {result}")
            value = result
            values.append(value)
        if min(values) >= 0:
            return quiz.tagged("\n".join(lines), rng.choice(question.sentences).replace("{}", str(value)))


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/slips", steps=200)
    taken = quiz.known_questions()
    for split, size in SIZES.items():
        asked = quiz.more_questions(rng, size, taken, long_sum)
        write_rows(given.out / "data" / f"{split}.jsonl", map(quiz.row, asked))
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    taught = quiz.more_questions(rng, 32 * given.steps, taken, long_sum)
    replies = [(teach.prompt_text(tokenizer, question.text), reply(rng, question)) for question in taught]
    teach.fine_tune(given.out, replies, rng)


if __name__ == "__main__":
    main()
