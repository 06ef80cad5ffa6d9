"""Questions and a weak reward model: what the recipes cooper/cpu and adversarial/cpu need, of one seed.

    python recipes/cooper/start.py [--seed 0] [--out runs/cotraining/seed0] [--only verifier critic]

Questions are like those of the bundled data, none of which is among them. The reward models, `verifier` (which also
reads a reference answer) and `critic`, start from the bundled policy and see few pairs, some of which are the wrong
way round, so that they know more of how a good reply looks than of what is right.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from trl_rewards_cotraining.cooper import verify_text

from trl_rewards import bundled
from trl_rewards.bundled import make
from trl_rewards.models import Loading, load_scorer, shown_text

PAIRS, NOISE, STEPS, BATCH = 32, 0.25, 20, 32
SIZES = {"test": 200, "train": 2000}


def write_data(folder: Path, rng: random.Random, taken: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "answer": question.answer,
                "reference": make.clean(rng, question),
            }
            for question in make.more_questions(rng, count, taken)
        ]
        make.write_rows(folder / f"{split}.jsonl", rows)


def flawed(rng: random.Random, question: make.Question) -> str:
    """A reply with a flaw that the bundled policy has too."""
    shares = make.HABIT if question.habit else make.NOISE
    flaws = [kind for kind in shares if kind != "clean"]
    return make.REPLIES[rng.choices(flaws, [shares[kind] for kind in flaws])[0]](rng, question)


def verified(tokenizer: object, question: make.Question, reply: str) -> str:
    return verify_text(question.text, question.answer, reply)


def shown(tokenizer: object, question: make.Question, reply: str) -> str:
    return shown_text(tokenizer, [{"role": "user", "content": question.text}], reply, "")


MODELS = {"verifier": (verified, True), "critic": (shown, False)}


def fit(folder: Path, pairs: list, text_of: Callable, plain: bool, rng: random.Random) -> str:
    """A reward model by Bradley-Terry on the pairs, saved; the loss it ends with."""
    scorer = load_scorer(Loading(path=str(bundled.model_path()), dtype="float32"), fresh_head=True)
    model = scorer.head.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        batch = rng.sample(pairs, BATCH)
        texts = [text_of(scorer.tokenizer, q, better) for q, better, _ in batch]
        texts += [text_of(scorer.tokenizer, q, worse) for q, _, worse in batch]
        better, worse = scorer.scores_with_gradient(scorer.encode_texts(texts, plain)[0]).chunk(2)
        loss = torch.nn.functional.softplus(worse - better).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    return f"loss {statistics.fmean(losses[:5]):.3f} -> {statistics.fmean(losses[-5:]):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cotraining/seed0"))
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    given = parser.parse_args()
    rng = random.Random(given.seed)
    torch.manual_seed(given.seed)
    taken = {row["prompt"][0]["content"] for rows in bundled.load_data().values() for row in rows}
    write_data(given.out / "data", rng, taken)
    known = make.more_questions(rng, PAIRS, taken)
    pairs = [(question, make.clean(rng, question), flawed(rng, question)) for question in known]
    pairs = [(q, worse, better) if rng.random() < NOISE else (q, better, worse) for q, better, worse in pairs]
    for name in given.only:
        print(f"{name}: {fit(given.out / name, pairs, *MODELS[name], rng)}")


if __name__ == "__main__":
    main()
