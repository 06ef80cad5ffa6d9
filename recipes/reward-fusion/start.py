"""Questions, and a reward model with a taste in words: what recipes/reward-fusion/cpu.yaml needs.

    python recipes/reward-fusion/start.py        # writes runs/reward-fusion/tiny, 40 CPU seconds

Half of the reward model's pairs are a clean reply, chosen, and a flawed one. The other half are two clean replies, and
chosen is the one that says "The answer is …": it learns to score the same answer by its words. All these replies are
the known answers, whose questions the policy is asked too. Questions are like those of the bundled data, none of which
is among them.
"""

from __future__ import annotations

import random
import statistics

from trl_rewards.bundled import quiz, teach
from trl_rewards.files import write_rows

SIZES = {"test": 200, "train": 200}
PAIRS, STEPS = 4, 50
LIKED = "The answer is"


def said_so(rng: random.Random, question: quiz.Question, liked: bool) -> str:
    """A clean reply that begins its answer with the words that are liked, or does not."""
    sentences = [each for each in question.sentences if each.startswith(LIKED) == liked]
    return quiz.tagged(question.think, rng.choice(sentences).replace("{}", question.said))


def pair(rng: random.Random, question: quiz.Question) -> tuple[quiz.Question, str, str]:
    """A question, the reply that is chosen and the one that is not."""
    if rng.random() < 0.5:
        return question, said_so(rng, question, True), said_so(rng, question, False)
    return question, quiz.clean(rng, question), quiz.REPLIES[quiz.flaw(rng, question)](rng, question)


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/reward-fusion/tiny")
    taken = quiz.known_questions()
    questions = {split: quiz.more_questions(rng, count, taken) for split, count in SIZES.items()}
    for split, some in questions.items():
        write_rows(given.out / "data" / f"{split}.jsonl", [quiz.row(question) for question in some])
    pairs = [pair(rng, question) for question in questions["train"] for _ in range(PAIRS)]
    known = [(question.text, reply) for question, *replies in pairs for reply in replies]
    rows = [
        {"prompt": [{"role": "user", "content": text}], "completion": [{"role": "assistant", "content": reply}]}
        for text, reply in known
    ]
    write_rows(given.out / "pairs.jsonl", rows)
    losses = teach.train_reward_model(given.out / "model", pairs, STEPS, rng)
    first, last = statistics.fmean(losses[:5]), statistics.fmean(losses[-5:])
    print(f"loss {first:.2f} -> {last:.2f}, {len(known)} known answers")


if __name__ == "__main__":
    main()
