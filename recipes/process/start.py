"""A tiny process reward model, and solutions that it has not seen: what the recipes process/cpu and reasonflux-prm/cpu
need.

    python recipes/process/start.py        # writes runs/process; two minutes

Solutions are replies to sums of several steps as in the bundled data, none of which is among them, with the flaws
that the bundled policy was taught. Their steps are labelled by rule up to the first wrong one. Some are read as one
step, as ReasonFlux has it, which is right if the answer is and nothing follows it. The model is the bundled policy
with two layers on top and a head of the shape of Qwen2.5-Math-PRM's, which learn by cross-entropy to read the formats
of both. `solutions.jsonl` is in ProcessBench's form, with the kind of each solution. Last it says of how many of each
kind the first wrong step, or that there is none, is found: in so short a time of hardly any with a wrong sum, or one
that is left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from trl_rewards_process.formats import LAYOUTS, Layout, encode_steps
from trl_rewards_process.processbench import figures, first_error, score_rows

from trl_rewards import Failed, load_reward
from trl_rewards.bundled import model_path, quiz, teach
from trl_rewards.files import write_rows
from trl_rewards.steps import splitter, steps_in

STEPS = splitter({"separator": r"\n|</?think>|</?answer>"})
"""Lines of the working, and the answer: as in the recipes."""
SYSTEM = "Check each step."
"""Of format qwen, whose own is longer than the solutions."""
READ = LAYOUTS["qwen"]._replace(system=SYSTEM), LAYOUTS["reasonflux"]
KINDS = {"clean": 0.4, "slip": 0.2, "leap": 0.1, "ramble": 0.1, "guess": 0.1, "bare": 0.05, "unhelpful": 0.05}
"""How often a solution is of each kind."""
FURTHER = 2
"""Layers on top of the policy's, which stay as they are."""
BATCH, HELD_OUT = 32, 300
WHOLE = 0.25
"""Share of solutions that are a single step."""


class Solution(NamedTuple):
    """A problem, the steps of a solution, the index of the first wrong one (-1 without one), and its kind."""

    problem: str
    steps: list[str]
    label: int
    kind: str


def leap(rng: random.Random, question: quiz.Question) -> str:
    """Right, but for a line of the working that is left out."""
    lines = question.think.splitlines()
    lines.pop(rng.randrange(len(lines)))
    return quiz.tagged("\n".join(lines), rng.choice(question.sentences).replace("{}", question.said))


REPLIES = quiz.REPLIES | {"leap": leap}


def says(step: str, question: quiz.Question) -> bool:
    """Whether a step is a sentence with the result, and nothing more."""
    return step in [sentence.replace("{}", question.said) for sentence in question.sentences]


def first_wrong(question: quiz.Question, steps: list[str]) -> int:
    """Lines of the working must come in turn, and then the result and no chatter; -1 where they do."""
    lines = question.think.splitlines()
    for number, step in enumerate(steps):
        if not (step == lines[number] if number < len(lines) else says(step, question)):
            return number
    return -1


def solutions(rng: random.Random, taken: set[str], whole: float = 0.0) -> Iterator[Solution]:
    """Without end, a share of them as a single step; of questions that are not in `taken`."""
    while True:
        question = quiz.chain(rng)
        if question.text in taken:
            continue
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        steps = steps_in(REPLIES[kind](rng, question), STEPS)
        if rng.random() < whole:
            yield Solution(question.text, ["\n\n".join(steps)], -1 if says(steps[-1], question) else 0, kind)
        else:
            yield Solution(question.text, steps, first_wrong(question, steps), kind)


def encoded(tokenizer: Any, layout: Layout, row: Solution) -> tuple[list[int], list[int]]:
    """Ids, and labels: 0 or 1 where a step's score is read, up to the first wrong one."""
    found = encode_steps(tokenizer, layout, row.problem, row.steps)
    assert not isinstance(found, Failed), found
    labels = [-100] * len(found.ids)
    for number, place in enumerate(found.places[: row.label + 1 if row.label >= 0 else None]):
        labels[place] = int(number != row.label)
    return found.ids, labels


def batches(rng: random.Random, tokenizer: Any, found: Iterator[Solution], count: int) -> Iterator[tuple]:
    """Ids and labels, both (BATCH, T), of rows of about equal length, so that little is padding."""
    groups: list[list[tuple[list[int], list[int]]]] = []
    for _ in range(count):
        if not groups:
            rows = [encoded(tokenizer, rng.choice(READ), next(found)) for _ in range(8 * BATCH)]
            rows.sort(key=lambda row: len(row[0]))
            groups = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
            rng.shuffle(groups)
        ids, labels = zip(*groups.pop(), strict=True)
        yield padded(ids, tokenizer.pad_token_id), padded(labels, -100)


def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def new_tokenizer() -> Any:
    """The bundled policy's, with the tag as one token."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": [READ[0].tag]})
    return tokenizer


def train(folder: Path, rng: random.Random, found: Iterator[Solution], steps: int) -> Any:
    """The model, which is saved in the folder."""
    tokenizer = new_tokenizer()
    config = AutoConfig.from_pretrained(model_path(), num_labels=2)
    config.num_hidden_layers += FURTHER
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    model = AutoModelForTokenClassification.from_pretrained(model_path(), config=config)
    model.resize_token_embeddings(len(tokenizer))
    size = config.hidden_size
    model.score = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 2))
    model.model.requires_grad_(False)
    model.model.layers[-FURTHER:].requires_grad_(True)
    teach.train(model, batches(rng, tokenizer, found, steps), steps, 2e-3, "steps")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/process", steps=240)
    taken = quiz.known_questions()
    held_out = solutions(rng, taken)
    rows = [next(held_out)._asdict() for _ in range(HELD_OUT)]
    taken |= {row["problem"] for row in rows}
    train(given.out / "model", rng, solutions(rng, taken, WHOLE), given.steps)
    write_rows(given.out / "solutions.jsonl", rows)
    reward = load_reward("prm", path=str(given.out / "model"), format="qwen", system_prompt=SYSTEM, dtype="float32")
    scores = score_rows(reward, rows)
    print(figures(scores, [row["label"] for row in rows], 0.5))
    for kind in KINDS:
        found = [
            first_error(each, 0.5) == row["label"]
            for each, row in zip(scores, rows, strict=True)
            if row["kind"] == kind
        ]
        print(f"{kind}: {sum(found)} of {len(found)}")


if __name__ == "__main__":
    main()
