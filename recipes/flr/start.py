"""A user for the recipe flr/cpu: the bundled policy, taught to say what a user says after an answer.

    python recipes/flr/start.py [--seed 0] [--out runs/flr/user]

Questions are like those of the bundled data, none of which is among them. After a right answer in the right form the
user is pleased. After a wrong one, or one that helps nobody or is not in the form, the user complains of that.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trl_rewards.bundled import make, model_path
from trl_rewards.models import without_control_tokens

SAID = {
    "correctness": ("That is right.", "That is not right."),
    "instruction_following": ("I like it a lot.", "I do not like it."),
}
"""{category: (praise, complaint)}, the recipe's utterances."""
COMPLAINTS = {
    "guess": "correctness",
    "slip": "correctness",
    "bare": "instruction_following",
    "ramble": "instruction_following",
    "unhelpful": "instruction_following",
}
EXAMPLES = 8000


def example(rng: random.Random, tokenizer: Any, question: make.Question) -> tuple[str, str]:
    """A chat up to the user's second turn, and that turn. Half of the answers are flawed."""
    kind = rng.choice(["clean", make.flaw(rng, question)])
    # As the reward shows it: without the tags of thinking, which mean something to chat models.
    answer = without_control_tokens(make.REPLIES[kind](rng, question))
    chat = make.prompt_text(tokenizer, question.text) + f"{answer}<|im_end|>\n<|im_start|>user\n"
    if kind == "clean":
        return chat, SAID[rng.choice(list(SAID))][0]
    return chat, SAID[COMPLAINTS[kind]][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/flr/user"))
    given = parser.parse_args()
    rng = random.Random(given.seed)
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    questions = make.more_questions(rng, EXAMPLES, make.known_questions())
    make.fine_tune(given.out, [example(rng, tokenizer, question) for question in questions], rng)


if __name__ == "__main__":
    main()
