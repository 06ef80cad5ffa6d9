"""The bundled policy, brought to state a confidence with each answer by supervised fine-tuning with stock TRL, and
questions that in part cannot be answered with certainty.

    python recipes/claims/confident.py --out runs/confident

It is mostly sure of its answer, whatever the question. The questions are in `data/train.jsonl` and `data/test.jsonl`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from trl_rewards.bundled import model_path
from trl_rewards.files import write_rows

CONFIDENCES = {0.9: 0.6, 0.7: 0.1, 0.5: 0.1, 0.3: 0.1, 0.1: 0.1}
"""How often each is stated."""
CHOICES = {1: 0.4, 2: 0.3, 4: 0.3}
"""How often a question has so many numbers of which one is meant; nothing says which."""
SLIPS = 0.15
"""Share of replies that add up wrongly."""
BATCH = 64


def question(rng: random.Random) -> tuple[str, int, list[int]]:
    """A question, its first number, and those of which one is added."""
    (choices,) = rng.choices(list(CHOICES), list(CHOICES.values()))
    first, seconds = rng.randint(10, 89), sorted(rng.sample(range(2, 10), choices))
    return f"Compute {first} + {' or '.join(map(str, seconds))}.", first, seconds


def reply(rng: random.Random, first: int, seconds: list[int]) -> str:
    """One of the numbers, added, in part wrongly, and how sure the policy is of it."""
    second = rng.choice(seconds)
    result = first + second + (rng.choice([-2, -1, 1, 2]) if rng.random() < SLIPS else 0)
    (confidence,) = rng.choices(list(CONFIDENCES), list(CONFIDENCES.values()))
    answer = f"<think>{first} + {second} = {result}</think><answer>{result}</answer>"
    return f"{answer}<confidence>{confidence}</confidence>"


def replies(rng: random.Random, count: int) -> list[dict]:
    """Questions with replies, as the trainer takes them."""
    found = []
    for _ in range(count):
        text, first, seconds = question(rng)
        said = {"role": "assistant", "content": reply(rng, first, seconds)}
        found.append({"prompt": [{"role": "user", "content": text}], "completion": [said]})
    return found


def write_questions(rng: random.Random, folder: Path) -> None:
    """600 questions to train on and 400 others, with the answers that were meant."""
    meant: dict[str, str] = {}
    while len(meant) < 1000:
        text, first, seconds = question(rng)
        meant.setdefault(text, str(first + rng.choice(seconds)))
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": meant[text]} for text in meant]
    rng.shuffle(rows)  # those drawn late have fewer questions of a single number, which repeat most
    write_rows(folder / "train.jsonl", rows[:600])
    write_rows(folder / "test.jsonl", rows[600:])


def main() -> None:
    parser = argparse.ArgumentParser(description="The bundled policy, brought to state a confidence.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, with its questions in data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rng = random.Random(given.seed)
    write_questions(rng, given.out / "data")
    settings = SFTConfig(
        output_dir=str(given.out),
        max_steps=given.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        seed=given.seed,
    )
    data = Dataset.from_list(replies(rng, BATCH * given.steps))
    trainer = SFTTrainer(model=str(model_path()), args=settings, train_dataset=data)
    trainer.train()
    trainer.save_model(str(given.out))


if __name__ == "__main__":
    main()
