"""The bundled policy, brought to chatter on after its answer: what dler.yaml begins with.

    python recipes/claims/talkative.py --out runs/talkative

Supervised fine-tuning on replies that are right, and then say up to four things more, or wrong, and say up to two.
What is said more changes no answer, so these tokens are slack; that right answers have more of them keeps GRPO from
dropping them as a part of wrong ones.
"""

from __future__ import annotations

import random

from trl_rewards.bundled import quiz, teach

SLIPS = 0.2
"""Share of replies that are wrong."""


def reply(rng: random.Random, question: quiz.Question) -> str:
    """Working, the answer, and none to four sentences of chatter."""
    slips = rng.random() < SLIPS
    think, said = rng.choice(question.wrong) if slips else (question.think, question.said)
    more = rng.sample(quiz.CHATTER, rng.randint(0, 2 if slips else 4))
    return quiz.tagged(think, " ".join([rng.choice(question.sentences).replace("{}", said), *more]))


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/talkative", steps=120)
    teach.bring_to(given.out, reply, given.steps, rng, quiz.known_questions())


if __name__ == "__main__":
    main()
