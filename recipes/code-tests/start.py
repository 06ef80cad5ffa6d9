"""The bundled policy, brought to write small programs, and questions with unit tests: what recipes/code-tests/cpu.yaml
needs.

    python recipes/code-tests/start.py        # writes runs/code-tests; a minute

A question is like "Start with x. Add 5. Double it. Write f(x).", and the program a function of one expression. About
half of the programs that the policy is taught have a fault. It is taught no question of the test split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rewards.bundled import model_path, quiz, teach
from trl_rewards.files import write_rows

FAULTS = {"none": 0.3, "parentheses": 0.3, "number": 0.15, "sign": 0.15, "syntax": 0.1}
"""How often a program has which. Where no parentheses are needed, none are left out."""
BATCH = 64
SIZES = {"test": 100, "train": 600}
WORDS = {"+": "Add {}.", "-": "Take away {}.", "*": "Double it."}

Operations = list[tuple[str, int]]


def operations(rng: random.Random) -> Operations:
    """Two or three things to do to x."""
    signs = (rng.choice("+-*") for _ in range(rng.choice([2, 3])))
    return [(sign, 2 if sign == "*" else rng.randint(2, 9)) for sign in signs]


def question(todo: Operations) -> str:
    return "Start with x. " + " ".join(WORDS[sign].format(number) for sign, number in todo) + " Write f(x)."


def expression(todo: Operations, parentheses: bool = True) -> str:
    """From left to right: x + 5, doubled, is (x + 5) * 2."""
    text, is_sum = "x", False
    for sign, number in todo:
        if sign == "*" and is_sum and parentheses:
            text = f"({text})"
        text += f" {sign} {number}"
        is_sum = sign != "*"
    return text


def program(rng: random.Random, todo: Operations) -> str:
    """A fenced function, with a fault or without."""
    (fault,) = rng.choices(list(FAULTS), list(FAULTS.values()))
    place = rng.randrange(len(todo))
    sign, number = todo[place]
    if fault == "number":
        todo = [*todo[:place], (sign, number + rng.choice([-1, 1])), *todo[place + 1 :]]
    elif fault == "sign":
        todo = [*todo[:place], (rng.choice([other for other in "+-*" if other != sign]), number), *todo[place + 1 :]]
    text = expression(todo, parentheses=fault != "parentheses")
    if fault == "syntax":
        text = rng.choice([f"{text})", f"({text}", text.replace("x", "x x", 1)])
    return f"```python\ndef f(x):\n    return {text}\n```"


def tests(rng: random.Random, todo: Operations) -> list[str]:
    """What f should be at three places."""
    found = []
    for x in rng.sample(range(20), 3):
        value = x
        for sign, number in todo:
            value = quiz.apply(sign, value, number)
        found.append(f"assert f({x}) == {value}")
    return found


def batches(rng: random.Random, tokenizer: Any, steps: int, taken: set[str]) -> Iterator[tuple]:
    """Ids and labels, both (BATCH, T), of questions that are not in `taken`."""

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for _ in range(steps):
        pairs: list[tuple[list[int], list[int]]] = []
        while len(pairs) < BATCH:
            todo = operations(rng)
            if (text := question(todo)) not in taken:
                reply = program(rng, todo) + tokenizer.eos_token
                pairs.append((ids_of(teach.prompt_text(tokenizer, text)), ids_of(reply)))
        yield teach.pad(pairs, tokenizer.pad_token_id)


def main() -> None:
    given, rng = teach.command_line(__doc__, "runs/code-tests", steps=150)
    asked: dict[str, Operations] = {}
    while len(asked) < sum(SIZES.values()):
        todo = operations(rng)
        asked[question(todo)] = todo
    rows = [{"prompt": [{"role": "user", "content": text}], "tests": tests(rng, todo)} for text, todo in asked.items()]
    rng.shuffle(rows)  # those drawn late are the longer ones, of which there are more
    held_out, rows = rows[: SIZES["test"]], rows[SIZES["test"] :]
    write_rows(given.out / "data" / "test.jsonl", held_out)
    write_rows(given.out / "data" / "train.jsonl", rows)

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    taken = {row["prompt"][0]["content"] for row in held_out}
    teach.train(model, batches(rng, tokenizer, given.steps, taken), given.steps, 2e-3, "programs")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    for row, reply in zip(held_out[:4], teach.sample(model, tokenizer, held_out[:4], 1.0), strict=True):
        print(row["prompt"][0]["content"], reply, sep="\n")


if __name__ == "__main__":
    main()
