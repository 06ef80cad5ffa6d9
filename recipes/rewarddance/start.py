"""Data and a judge for the recipe rewarddance/cpu: the bundled policy, taught to say yes or no.

    python recipes/rewarddance/start.py [--seed 0] [--out runs/rewarddance]

Questions are like those of the bundled data, none of which is among them. A reference is a right answer that is not in
the form that was asked for. What beats it, by rule, is an answer that is right as well, in that form, and no longer
than it must be. The judge is asked as the recipe asks it, and learns the rule's yes or no and then, as the paper's
does, to say why.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trl_rewards import Samples, load_reward
from trl_rewards.bundled import make, model_path
from trl_rewards.models import fenced, fill, without_control_tokens, without_thinking
from trl_rewards.recipe import Recipe

RECIPE = Path(__file__).parent / "cpu.yaml"
QUESTIONS, HELD_OUT = 3500, 300
WORDS = ("yes", "no", "<reference-", "</reference-", "<answer-", "</answer-")
"""Tokens of their own: the component reads the first two, and the others are in every question to it."""
PROMPTS = {"test": 200, "train": 2000}
FLAWS = {"slip": 0.5, "guess": 0.1, "bare": 0.15, "ramble": 0.1, "unhelpful": 0.15}
"""How often an answer that is not better has each flaw: what is wrong is hardest to see."""


def reference(rng: random.Random, question: make.Question) -> str:
    """A right answer without the form."""
    return rng.choice(question.sentences).replace("{}", question.said)


def answer(rng: random.Random, question: make.Question) -> tuple[str, bool]:
    """A reply, and whether it is better than the reference; half are."""
    better = rng.random() < 0.5
    kind = "clean" if better else rng.choices(list(FLAWS), list(FLAWS.values()))[0]
    return make.REPLIES[kind](rng, question), better


def opinion(question: make.Question, reply: str, better: bool) -> str:
    """What the judge is to say."""
    if better:
        return f"yes, it is {question.answer}."
    said = last_word(reply)
    return f"no, {said} is not {question.answer}." if said != question.answer else "no, the form."


def last_word(reply: str) -> str:
    return re.sub("</?answer>", "", without_thinking(reply)).split()[-1].strip(".,!?")


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


def agreement(judge: Path, rng: random.Random, questions: list[make.Question]) -> float:
    """The share of answers of which the judge says what the rule says."""
    reward = load_reward("yes_token", **(options() | {"model": str(judge)}))
    answers = [answer(rng, question) for question in questions]
    samples = Samples(
        prompts=[[{"role": "user", "content": question.text}] for question in questions],
        completions=[reply for reply, _ in answers],
        columns={"reference": [reference(rng, question) for question in questions]},
    )
    agreed = [(score > 0.5) == better for score, (_, better) in zip(reward.score(samples), answers, strict=True)]
    return sum(agreed) / len(agreed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rewarddance"))
    given = parser.parse_args()
    rng = random.Random(given.seed)
    torch.manual_seed(given.seed)
    taken = make.known_questions()
    (given.out / "data").mkdir(parents=True, exist_ok=True)
    for split, count in PROMPTS.items():
        rows = [make.row(q) | {"reference": reference(rng, q)} for q in make.more_questions(rng, count, taken)]
        make.write_rows(given.out / "data" / f"{split}.jsonl", rows)
    tokenizer, template = AutoTokenizer.from_pretrained(model_path()), options()["template"]
    examples = []
    for question in 2 * make.more_questions(rng, QUESTIONS, taken):
        reply, better = answer(rng, question)
        text = asked(template, rng, reference(rng, question), reply)
        examples.append((make.prompt_text(tokenizer, text), opinion(question, reply, better)))
    make.fine_tune(given.out / "judge", examples, rng, peak=2e-3, words=WORDS)
    share = agreement(given.out / "judge", rng, make.more_questions(rng, HELD_OUT, taken))
    print(f"of {HELD_OUT} held-out answers the judge says what the rule says of {share:.2f}")


if __name__ == "__main__":
    main()
