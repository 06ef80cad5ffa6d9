"""Over-optimisation on the bundled task: a policy against a fixed reward model, and one that learns meanwhile.

    python benchmarks/cotraining.py --prepare        # what the recipes cooper/cpu and adversarial/cpu need
    python benchmarks/cotraining.py [--seeds 3] [--only cooper adversarial]

For each seed: questions like those of the bundled data, none of which is among them; two reward models that start from
the bundled policy and see few pairs, some of which are the wrong way round, so that they know more of how a good reply
looks than of what is right; and the bundled policy trained by GRPO on the reward model alone, once as it is and once
with it learning. The reward is what the policy is trained for, exact answers are the truth; both are of 200 held-out
questions. One line per run, and a summary.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from preference_pairs import questions
from trl_rewards_cotraining.cooper import verify_text

from trl_rewards import bundled
from trl_rewards.bundled import make
from trl_rewards.models import Loading, load_scorer, shown_text
from trl_rewards.train import quieten_libraries, train

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "cotraining"
PAIRS, NOISE, STEPS, BATCH = 32, 0.25, 20, 32


def prepare(seed: int) -> Path:
    """Data, `verifier` (reads a reference answer) and `critic` (reads prompt and reply) of a seed."""
    rng, folder = random.Random(seed), FOLDER / f"seed{seed}"
    taken = {row["prompt"][0]["content"] for rows in bundled.load_data().values() for row in rows}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, count in {"test": 200, "train": 2000}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "answer": question.answer,
                "reference": make.clean(rng, question),
            }
            for question in questions(rng, count, taken)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    known = questions(rng, PAIRS, taken)
    pairs = [(question, make.clean(rng, question), flawed(rng, question)) for question in known]
    pairs = [(q, worse, better) if rng.random() < NOISE else (q, better, worse) for q, better, worse in pairs]

    def verified(tokenizer: object, question: make.Question, reply: str) -> str:
        return verify_text(question.text, question.answer, reply)

    def shown(tokenizer: object, question: make.Question, reply: str) -> str:
        return shown_text(tokenizer, [{"role": "user", "content": question.text}], reply, "")

    for name, text_of, plain in (("verifier", verified, True), ("critic", shown, False)):
        print(f"seed {seed}: {name} {fit(folder / name, pairs, text_of, plain, rng)}", flush=True)
    return folder


def flawed(rng: random.Random, question: make.Question) -> str:
    """A reply with a flaw that the bundled policy has too."""
    shares = make.HABIT if question.habit else make.NOISE
    flaws = [kind for kind in shares if kind != "clean"]
    return make.REPLIES[rng.choices(flaws, [shares[kind] for kind in flaws])[0]](rng, question)


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


def run(name: str, seed: int, fixed: bool, extra: list[str]) -> dict[str, Any]:
    """Held-out reward and exact answers at each evaluation of a recipe's run, and its CPU seconds."""
    folder, out = FOLDER / f"seed{seed}", FOLDER / f"{name}-{'fixed' if fixed else 'learning'}-seed{seed}"
    options = ["--seed", str(seed), "--dataset_name", str(folder / "data"), "--output_dir", str(out)]
    options += [f"--rewards.{name}.with.path", str(folder / ("verifier" if name == "cooper" else "critic"))]
    options += [f"--rewards.{name}.with.update_mode", "none"] if fixed else []
    before = time.process_time()
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train(str(ROOT / "recipes" / name / "cpu.yaml"), [*options, *extra])
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [log for log in logs if "eval_reward" in log]
    return {
        "recipe": name,
        "seed": seed,
        "fixed": fixed,
        "exact": [round(log["eval_rewards/exact_match/mean"], 3) for log in held_out],
        "reward": [round(log[f"eval_rewards/{name}/mean"], 3) for log in held_out],
        "seconds": round(time.process_time() - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write data and reward models of seed 0, and stop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["cooper", "adversarial"])
    given, extra = parser.parse_known_args()
    if given.prepare:
        prepare(0)
        return
    quieten_libraries()
    runs = []
    for seed in range(given.seeds):
        prepare(seed)
        for name in given.only:
            for fixed in (True, False):
                runs.append(run(name, seed, fixed, extra))
                print(json.dumps(runs[-1]), flush=True)

    def span(name: str, fixed: bool, value: str, at: int) -> str:
        values = [found[value][at] for found in runs if found["recipe"] == name and found["fixed"] == fixed]
        return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for name in given.only:
        for fixed in (True, False):
            changes = [
                f"{what} {span(name, fixed, what, 0)} -> {span(name, fixed, what, -1)}" for what in ("exact", "reward")
            ]
            print(f"{name}, {'fixed' if fixed else 'learning'}: {', '.join(changes)}")


if __name__ == "__main__":
    main()
