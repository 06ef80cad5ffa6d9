"""Questions and a weak reward model: what the recipes cooper/cpu and adversarial/cpu need, of one seed.

    python recipes/cooper/start.py [--seed 0] [--out runs/cotraining/seed0] [--only verifier critic] [--bias 0.3]

Questions are like those of the bundled data, none of which is among them. The reward models, `verifier` (which also
reads a reference answer) and `critic`, start from the bundled policy and see few pairs, some of which are the wrong
way round, so that they know more of how a good reply looks than of what is right. With `--bias` that share of them
is won by chatter after the answer, against a clean reply: an error that a policy can find.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import torch
from trl_rewards_cotraining.cooper import verify_text

from trl_rewards.bundled import quiz, teach
from trl_rewards.files import write_rows

PAIRS, NOISE, STEPS = 32, 0.25, 20
SIZES = {"test": 200, "train": 2000}


def write_data(folder: Path, rng: random.Random, taken: set[str]) -> None:
    for split, count in SIZES.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "answer": question.answer,
                "reference": quiz.clean(rng, question),
            }
            for question in quiz.more_questions(rng, count, taken)
        ]
        write_rows(folder / f"{split}.jsonl", rows)


def weak_pairs(rng: random.Random, taken: set[str], bias: float) -> list[tuple[quiz.Question, str, str]]:
    """(question, better, worse): some the wrong way round, and a share of `bias` won by chatter."""
    known = quiz.more_questions(rng, PAIRS, taken)
    pairs = [(q, quiz.clean(rng, q), quiz.REPLIES[quiz.flaw(rng, q)](rng, q)) for q in known]
    pairs = [(q, worse, better) if rng.random() < NOISE else (q, better, worse) for q, better, worse in pairs]
    biased = round(bias * PAIRS)
    return [(q, quiz.ramble(rng, q), quiz.clean(rng, q)) for q in known[:biased]] + pairs[biased:]


def verified(tokenizer: object, question: quiz.Question, reply: str) -> str:
    return verify_text(question.text, question.answer, reply)


MODELS = {"verifier": (verified, True), "critic": (teach.shown, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cotraining/seed0"))
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bias", type=float, default=0.0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    torch.manual_seed(given.seed)
    taken = quiz.known_questions()
    write_data(given.out / "data", rng, taken)
    pairs = weak_pairs(rng, taken, given.bias)
    for name in given.only:
        losses = teach.train_reward_model(given.out / name, pairs, STEPS, rng, *MODELS[name])
        print(f"{name}: loss {statistics.fmean(losses[:5]):.3f} -> {statistics.fmean(losses[-5:]):.3f}")


if __name__ == "__main__":
    main()
