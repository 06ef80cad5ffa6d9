"""Data and a judge for the recipe rewarddance/cpu: the bundled policy, taught to say yes or no.

    python recipes/rewarddance/start.py [--seed 0] [--out runs/rewarddance]

Questions are like those of the bundled data, none of which is among them. A reference is a right answer that is not in
the form that was asked for. What beats it, by rule, is an answer in that form which says something and no more than
that. The judge is asked as the recipe asks it, and learns the rule's yes or no and then, as the paper's does, to say
why.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trl_rewards import Samples, load_reward
from trl_rewards.bundled import model_path, quiz, teach
from trl_rewards.files import write_rows
from trl_rewards.models import fenced, fill, without_control_tokens, without_thinking
from trl_rewards.recipe import Recipe

RECIPE = Path(__file__).parent / "cpu.yaml"
EXAMPLES, HELD_OUT = 4800, 300
PROMPTS = {"test": 200, "train": 400}
WORDS = ("yes", "no", "<reference-", "</reference-", "<answer-", "</answer-")
"""Tokens of their own: the component reads the first two, and the others are in every question to it."""
OPINIONS = {
    "clean": "yes, it is good.",
    "bare": "no, the form.",
    "ramble": "no, that is more.",
    "unhelpful": "no, it can not say.",
}
"""What the judge is to say of each kind of reply."""
FLAWS = ["bare", "bare", "ramble", "unhelpful"]
"""Missing tags are the hardest to see, and so there are more of them."""


def reference(rng: random.Random, question: quiz.Question) -> str:
    """A right answer without the form."""
    return rng.choice(question.sentences).replace("{}", question.said)


def answer(rng: random.Random, question: quiz.Question) -> tuple[str, str]:
    """A reply and its kind; half are better than the reference."""
    kind = rng.choice(["clean", rng.choice(FLAWS)])
    return quiz.REPLIES[kind](rng, question), kind


def asked(template: str, rng: random.Random, gold: str, reply: str) -> str:
    """What reward `yes_token` asks, with other random numbers in the tags."""
    shared, own = (f"{rng.getrandbits(64):016x}" for _ in range(2))
    values = {
        "reference": fenced("reference", gold, shared),
        "completion": fenced("answer", without_control_tokens(without_thinking(reply)), own),
    }
    return fill(template, values)


def options() -> dict[str, Any]:
    """Of the recipe's judge."""
    return Recipe.load(RECIPE, check_trl=False).rewards[0].options


def agreement(judge: Path, rng: random.Random, questions: list[quiz.Question]) -> float:
    """The share of answers of which the judge says what the rule says."""
    reward = load_reward("yes_token", **(options() | {"model": str(judge)}))
    answers = [answer(rng, question) for question in questions]
    samples = Samples(
        prompts=[[{"role": "user", "content": question.text}] for question in questions],
        completions=[reply for reply, _ in answers],
        columns={"reference": [reference(rng, question) for question in questions]},
    )
    scored = zip(reward.score(samples), answers, strict=True)
    agreed = [(score > 0.5) == (kind == "clean") for score, (_, kind) in scored]
    return sum(agreed) / len(agreed)


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/rewarddance")
    taken = quiz.known_questions()
    for split, count in PROMPTS.items():
        rows = [quiz.row(q) | {"reference": reference(rng, q)} for q in quiz.more_questions(rng, count, taken)]
        write_rows(given.out / "data" / f"{split}.jsonl", rows)
    tokenizer, template = AutoTokenizer.from_pretrained(model_path()), options()["template"]
    held_out = quiz.more_questions(rng, HELD_OUT, taken)
    examples = []
    for question in quiz.more_questions(rng, EXAMPLES, taken):
        reply, kind = answer(rng, question)
        text = asked(template, rng, reference(rng, question), reply)
        examples.append((teach.prompt_text(tokenizer, text), OPINIONS[kind]))
    teach.fine_tune(given.out / "judge", examples, rng, peak=2e-3, words=WORDS)
    share = agreement(given.out / "judge", rng, held_out)
    print(f"of {HELD_OUT} held-out answers the judge says what the rule says of {share:.2f}")


if __name__ == "__main__":
    main()
