"""The bundled policy, brought to sums of six steps in each of which it may slip, and such sums: what clip-delta.yaml,
ppr.yaml and prime.yaml begin with.

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


def questions(rng: random.Random, count: int, taken: set[str]) -> list[Question]:
    """Different ones; their texts are added to `taken`, which has none of them."""
    found: list[Question] = []
    while len(found) < count:
        question = quiz.chain(rng, [STEPS])
        if question.text not in taken:
            taken.add(question.text)
            found.append(question)
    return found


def reply(rng: random.Random, question: Question) -> str:
    """In form, with slips; drawn anew where they lead below zero, since the questions have no negative numbers."""
    while True:
        value, lines = int(question.think.split()[0]), []
        for line in question.think.splitlines():
            _, symbol, number, *_ = line.split()
            result = quiz.apply(symbol, value, int(number))
            if result > 0 and rng.random() < SLIPS:
                result = quiz.near(rng, result)
            lines.append(f"{value} {symbol} {number} = {result}")
            value = result
        if "-" not in "".join(line.replace(" - ", "") for line in lines):
            return quiz.tagged("\n".join(lines), rng.choice(question.sentences).replace("{}", str(value)))


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/slips", steps=200)
    taken = quiz.known_questions()
    for split, size in SIZES.items():
        write_rows(given.out / "data" / f"{split}.jsonl", map(quiz.row, questions(rng, size, taken)))
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    taught = questions(rng, 32 * given.steps, taken)
    replies = [(teach.prompt_text(tokenizer, question.text), reply(rng, question)) for question in taught]
    teach.fine_tune(given.out, replies, rng)


if __name__ == "__main__":
    main()
