"""What R³ pays for, with the encoder and options of recipes/r3/cpu.yaml: its mean over kinds of replies.

python recipes/r3/kinds.py        # after encoder.py; 10 CPU seconds
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import yaml
from trl_rewards_shaping.r3 import RelevanceR3

from trl_rewards import Samples
from trl_rewards.bundled import quiz


def replies(rng: random.Random, question: quiz.Question, other: quiz.Question) -> dict[str, str]:
    """One of each kind; what is off the topic is right about another question."""
    sentences = [sentence.replace("{}", question.said) for sentence in question.sentences]
    kinds = {kind: quiz.REPLIES[kind](rng, question) for kind in ("clean", "ramble", "slip", "unhelpful")}
    return kinds | {
        "off-topic": quiz.clean(rng, other),
        "one word": question.answer,
        "four times the same": quiz.tagged(question.think, " ".join(sentences[:1] * 4)),
        "five sentences": quiz.tagged(question.think, " ".join(sentences)),
    }


def main() -> None:
    recipe = yaml.safe_load(Path(__file__).with_name("cpu.yaml").read_text(encoding="utf-8"))
    reward = RelevanceR3(**recipe["rewards"][0]["with"])
    rng = random.Random(0)
    for query_type, tasks in (("closed", quiz.SUMS), ("open", sorted(set(quiz.TASKS) - set(quiz.SUMS)))):
        questions = [quiz.TASKS[rng.choice(tasks)](rng) for _ in range(100)]
        columns = {
            "query_type": [query_type] * len(questions),
            "reference": [question.sentences[0].replace("{}", question.said) for question in questions],
        }
        prompts = [question.text for question in questions]
        others = [*questions[1:], questions[0]]
        rows = [replies(rng, question, other) for question, other in zip(questions, others, strict=True)]
        for kind in rows[0]:
            scores = reward.score(Samples(prompts, [row[kind] for row in rows], columns=columns))
            print(f"{query_type:8}{kind:22}{statistics.fmean(scores):.3f}")


if __name__ == "__main__":
    main()
