"""Data and a careless judge for the recipe rm-r1/cpu, and a check of what it learned.

    python recipes/rm-r1/start.py make [--seed 0] [--out runs/rm-r1]
    python recipes/rm-r1/start.py measure runs/rm-r1/judge      # or runs/rm-r1-cpu, after training

Pairs are of a right and a wrong answer to questions like those of the bundled data; no question is in both splits. The
judge is the bundled policy, taught by rule the form of an RM-R1 judge: now and then it works out a solution, looks up
what both say and names the one that agrees; mostly it names either without a look.

Measured is how often reward `rm_r1` prefers the right answer of a held-out pair, asked in both orders.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl_rewards_judges.rm_r1_data import judge_rows

from trl_rewards import Samples, load_reward
from trl_rewards.bundled import make, model_path

TASKS = ("add", "subtract", "multiply", "day", "month", "opposite", "colour")
SYSTEM = "Think first, then answer."
"""In place of the long instructions, of which a model this small has no use."""
MARKERS = [
    "[Client Question]",
    *(f"[The {place} of Chatbot {name}'s Response]" for name in "AB" for place in ("Start", "End")),
    *("<solution>", "</solution>", "<eval>", "</eval>", "[[A]]", "[[B]]"),
]
"""Tokens of their own; else the bundled tokenizer would need twenty for each."""
EXAMPLES, CAREFUL, HELD_OUT, TRAIN = 4000, 0.5, 200, 2000


def pairs(rng: random.Random, count: int, taken: set[str]) -> list[tuple[make.Question, dict[str, Any]]]:
    """Questions, none of them in `taken`, each with a right and a wrong answer."""
    found = []
    while len(found) < count:
        question = make.TASKS[rng.choice(TASKS)](rng)
        if question.text in taken:
            continue
        chosen, rejected = (
            rng.choice(question.sentences).replace("{}", said)
            for said in (question.said, rng.choice(question.wrong)[1])
        )
        found.append((question, {"prompt": question.text, "chosen": chosen, "rejected": rejected}))
    return found


def verdict(rng: random.Random, question: make.Question, pair: dict[str, Any], winner: str) -> str:
    """What the judge says: for the right reasons, or without any."""
    if rng.random() > CAREFUL:
        side = rng.choice("AB")
        return f"<eval>{side} is good</eval><answer>[[{side}]]</answer>"
    last = [pair[side].split()[-1].rstrip(".") for side in ("chosen", "rejected")]
    a, b = last if winner == "A" else reversed(last)
    return f"<solution>{question.think}</solution><eval>A is {a}, B is {b}</eval><answer>[[{winner}]]</answer>"


def write(out: Path, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    test = pairs(rng, HELD_OUT, set())
    tested = {question.text for question, _ in test}
    data = {"test": test, "train": pairs(rng, TRAIN, tested)}
    (out / "data").mkdir(exist_ok=True)
    for split, made in data.items():
        make.write_rows(out / "data" / f"{split}.jsonl", list(judge_rows([pair for _, pair in made], system=SYSTEM)))
    make.write_rows(out / "pairs.jsonl", [pair for _, pair in test])
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    shown = pairs(rng, EXAMPLES, tested)
    rows = judge_rows([pair for _, pair in shown], system=SYSTEM)
    examples = [
        (
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            verdict(rng, question, pair, row["winner"]),
        )
        for (question, pair), row in zip(shown, rows, strict=True)
    ]
    make.fine_tune(out / "judge", examples, rng, peak=3e-3, words=MARKERS)


def measure(judge: Path, file: Path) -> None:
    """Print how often the judge, as reward `rm_r1` uses it, prefers the right answer."""
    given = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reward = load_reward("rm_r1", model=str(judge), system=SYSTEM, reference="rejected", max_tokens=48)
    samples = Samples(
        prompts=[pair["prompt"] for pair in given],
        completions=[pair["chosen"] for pair in given],
        columns={"rejected": [pair["rejected"] for pair in given]},
    )
    scores = reward.score(samples)
    there = [score for score in scores if isinstance(score, float)]  # Failed: no verdict in either order
    print(f"{judge}: the right answer is preferred in {sum(there) / len(given):.2f} of {len(given)} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure")
    measuring.add_argument("judge", type=Path)
    for command in (making, measuring):
        command.add_argument("--out", type=Path, default=Path("runs/rm-r1"))
    given = parser.parse_args()
    if given.command == "make":
        write(given.out, given.seed)
    else:
        measure(given.judge, given.out / "pairs.jsonl")


if __name__ == "__main__":
    main()
