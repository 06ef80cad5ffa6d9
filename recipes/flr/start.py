"""A user for the recipe flr/cpu: the bundled policy, taught to say what a user says after an answer.

    python recipes/flr/start.py [--seed 0] [--out runs/flr/user]

Questions are like those of the bundled data, none of which is among them. After a right answer in the right form the
user is pleased. After a wrong one, or one that helps nobody or is not in the form, the user complains of that.
"""

from __future__ import annotations

import random
from typing import Any

from transformers import AutoTokenizer

from trl_rewards.bundled import model_path, quiz, teach
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


def example(rng: random.Random, tokenizer: Any, question: quiz.Question) -> tuple[str, str]:
    """A chat up to the user's second turn, and that turn. Half of the answers are flawed."""
    kind = rng.choice(["clean", quiz.flaw(rng, question)])
    # As the reward shows it: without the tags of thinking, which mean something to chat models.
    answer = without_control_tokens(quiz.REPLIES[kind](rng, question))
    chat = teach.prompt_text(tokenizer, question.text) + f"{answer}<|im_end|>\n<|im_start|>user\n"
    if kind == "clean":
        return chat, SAID[rng.choice(list(SAID))][0]
    return chat, SAID[COMPLAINTS[kind]][1]


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/flr/user")
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    questions = quiz.more_questions(rng, EXAMPLES, quiz.known_questions())
    teach.fine_tune(given.out, [example(rng, tokenizer, question) for question in questions], rng)


if __name__ == "__main__":
    main()
