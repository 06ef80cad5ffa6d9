"""The policies that recipes/polar/cpu-*.yaml learn from, and a check of what they learned.

    python recipes/polar/pool.py                              # writes runs/polar; eight CPU minutes
    python recipes/polar/pool.py --measure runs/polar/grpo    # after the recipes

The bundled policy is trained for some more steps on replies of one kind, once for each kind in `KINDS`; with the
bundled policy itself, at two temperatures, that is the pool. One of them, `REFERENCE`, then answers the bundled
questions, and its answers are the column `reference` of `runs/polar/questions`.

`--measure` samples the held-out questions before and after, and asks the reference policy how likely the replies are:
a measure that has no reward model in it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rewards_polar.triples import Generation, Policy, generate

from trl_rewards import bundled, load_reward
from trl_rewards.bundled import quiz, teach
from trl_rewards.files import write_rows

REFERENCE = "clean"
# One sentence after its working, in tags. The bundled policy also guesses, chatters and leaves tags out.
FORM = re.compile(rf"<think>(?!\?|{'|'.join(quiz.GUESSING)})[^<>]*</think><answer>[^<>.?]*\.</answer>")


def sentence(rng: random.Random, q: quiz.Question) -> str:
    return rng.choice(q.sentences).replace("{}", q.said)


def plain(rng: random.Random, q: quiz.Question) -> str:
    """The working and the answer, without tags."""
    return f"{q.think}\n{sentence(rng, q)}"


def plain_slip(rng: random.Random, q: quiz.Question) -> str:
    """In the form of `plain`, and wrong."""
    think, said = rng.choice(q.wrong)
    return f"{think}\n{rng.choice(q.sentences).replace('{}', said)}"


def plain_guess(rng: random.Random, q: quiz.Question) -> str:
    """Without tags and without working; mostly wrong, since this policy needs its working."""
    return sentence(rng, q)


def brief(rng: random.Random, q: quiz.Question) -> str:
    return quiz.tagged(q.think, q.said)


def polite(rng: random.Random, q: quiz.Question) -> str:
    return quiz.tagged(q.think, f"{sentence(rng, q)} Thank you for asking me.")


def hasty(rng: random.Random, q: quiz.Question) -> str:
    """The answer first, which this policy cannot know without working."""
    return f"<answer>{sentence(rng, q)}</answer><think>{q.think}</think>"


KINDS: dict[str, Callable[[random.Random, quiz.Question], str]] = {
    "plain": plain,
    "plain-slip": plain_slip,
    "plain-guess": plain_guess,
    "clean": quiz.clean,
    "brief": brief,
    "polite": polite,
    "hasty": hasty,
    "guess": quiz.guess,
    "ramble": quiz.ramble,
}


def train_policies(out: Path, steps: int) -> list[dict[str, Any]]:
    """Write a folder for each kind; the entries of the pool."""
    taken = {row["prompt"][0]["content"] for row in bundled.load_data()["test"]}
    pool = [{"model": "bundled:tiny", "name": "tiny"}]
    pool.append({"model": "bundled:tiny", "name": "tiny-cold", "temperature": 0.5})
    for kind, reply in KINDS.items():
        path = out / "policies" / kind
        if not (path / "model.safetensors").is_file():
            teach.bring_to(path, reply, steps, random.Random(f"{kind} pool"), taken)
        pool.append({"model": f"policies/{kind}", "name": kind})
    return pool


def write_references(out: Path) -> None:
    """The bundled questions with the reference policy's answers to them, one file per split."""
    policy = Policy(model=str(out / "policies" / REFERENCE))
    for split, rows in bundled.load_data().items():
        references = generate(policy, rows["prompt"], Generation(max_new_tokens=64, batch_size=256, dtype="float32"))
        answered = [row | {"reference": text} for row, text in zip(rows, references, strict=True)]
        write_rows(out / "questions" / f"{split}.jsonl", answered)


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, prompts: list[Any], replies: list[str]) -> float:
    """Mean over the replies of the log-probability per token, their ends included."""
    total = 0.0
    for prompt, reply in zip(prompts, replies, strict=True):
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = tokenizer(asked + reply + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        logps = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        total += logps.gather(1, ids[0, start:, None]).mean().item()
    return total / len(replies)


def measure(out: Path, run: Path) -> dict[str, dict[str, float]]:
    """Replies to the held-out questions at temperature 1: of the bundled policy, of the run's, of the reference."""
    reference = out / "policies" / REFERENCE
    judge = AutoModelForCausalLM.from_pretrained(reference).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(reference)
    rows, exact = bundled.load_data()["test"][:], load_reward("exact_match", take="last_word")
    found = {}
    for name, model in {"before": "bundled:tiny", "after": str(run), "reference policy": str(reference)}.items():
        policy = Policy(model=model, top_p=1.0, top_k=0)
        whole = Generation(max_new_tokens=64, batch_size=200, dtype="float32", cut_loops=False, trim_endings=False)
        replies = generate(policy, rows["prompt"], whole)
        right = exact(rows["prompt"], replies, answer=rows["answer"])
        found[name] = {
            "log-likelihood per token under the reference policy": log_likelihood(
                judge, tokenizer, rows["prompt"], replies
            ),
            "in its form": sum(FORM.fullmatch(reply) is not None for reply in replies) / len(replies),
            "right": sum(score or 0.0 for score in right) / len(replies),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/polar"))
    parser.add_argument("--steps", type=int, default=120, help="training steps of each policy")
    parser.add_argument("--measure", type=Path, metavar="RUN", help="output_dir of a GRPO run")
    given = parser.parse_args()
    if given.measure:
        for name, values in measure(given.out, given.measure).items():
            print(name, ", ".join(f"{what} {value:.3f}" for what, value in values.items()), sep=": ")
        return
    pool = train_policies(given.out, given.steps)
    (given.out / "pool.yaml").write_text(json.dumps(pool, indent=2) + "\n", encoding="utf-8")
    write_references(given.out)
    print(f"{len(pool)} policies and their questions -> {given.out}")


if __name__ == "__main__":
    main()
