"""Data and a careless judge for the recipe rm-r1/cpu.

    python recipes/rm-r1/start.py [--seed 0] [--out runs/rm-r1]

Pairs are of a right answer, and one that says nothing or chatters on, to questions like those of the bundled data; no
question is there twice. The judge is the bundled policy, taught by rule the form of an RM-R1 judge: now and then it
says what it looks for, looks at A, and at B where A is not good, and names the good one; mostly it names either
without a look.
"""

from __future__ import annotations

import random
from typing import Any

from transformers import AutoTokenizer
from trl_rewards_judges.rm_r1_data import judge_rows

from trl_rewards.bundled import model_path, quiz, teach
from trl_rewards.files import write_rows

SYSTEM = "Think first, then answer."
"""In place of the long instructions, of which a model this small has no use."""
MARKERS = [
    "[Client Question]",
    *(f"[The {place} of Chatbot {name}'s Response]" for name in "AB" for place in ("Start", "End")),
    *("<rubric>", "</rubric>", "<eval>", "</eval>"),
]
"""Tokens of their own; else the bundled tokenizer would need twenty for each."""
RUBRIC = "It has the answer and no more."
CAREFUL = 0.4
"""The share of lessons with reasons: the right letter is in 0.4 + 0.6 / 2 = 0.7 of all."""
PAIRS = {"test": 200, "train": 400}
EXAMPLES = 3840


def pair(rng: random.Random, question: quiz.Question) -> dict[str, Any]:
    """A question, an answer to it, and another one with a flaw that can be seen, and what that one does."""
    chosen = rng.choice(question.sentences).replace("{}", question.said)
    unhelpful, ramble = rng.choice(quiz.UNHELPFUL), f"{chosen} {rng.choice(quiz.CHATTER)}"
    rejected, does = rng.choice([(unhelpful, "can not say"), (ramble, "says more")])
    return {"prompt": question.text, "chosen": chosen, "rejected": rejected, "does": does}


def verdict(rng: random.Random, does: str, best: str) -> str:
    """What the judge says: for the right reasons, or without any."""
    if rng.random() > CAREFUL:
        side = rng.choice("AB")
        return f"<eval>{side} is good</eval><answer>[[{side}]]</answer>"
    seen = "A is good" if best == "A" else f"A {does}\nB is good"
    return f"<rubric>{RUBRIC}</rubric><eval>{seen}</eval><answer>[[{best}]]</answer>"


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/rm-r1")
    taken: set[str] = set()
    for split, count in PAIRS.items():
        pairs = [pair(rng, question) for question in quiz.more_questions(rng, count, taken)]
        write_rows(given.out / "data" / f"{split}.jsonl", judge_rows(pairs, system=SYSTEM))
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    pairs = [pair(rng, question) for question in quiz.more_questions(rng, EXAMPLES, taken)]
    examples = [
        (
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            verdict(rng, shown["does"], row["winner"]),
        )
        for shown, row in zip(pairs, judge_rows(pairs, system=SYSTEM), strict=True)
    ]
    teach.fine_tune(given.out / "judge", examples, rng, peak=2e-3, words=MARKERS)


if __name__ == "__main__":
    main()
