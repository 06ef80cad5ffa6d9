"""recipes/prime/cpu-implicit.yaml over some seeds: best of n by a model that was trained on outcomes alone.

    python benchmarks/implicit_prm.py [--seeds 1] [--n 8]

Samples and labels answers as the recipe's header says, once; trains on them once per seed; and lets each model choose
among n answers to each held-out prompt. Prints the line for the tables in `recipes/results.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from trl_rewards import bundled

ROOT = Path(__file__).parent.parent
RECIPE = "recipes/prime/cpu-implicit.yaml"
FOLDER = ROOT / "runs" / "prime"
EXACT = "{use: exact_match, with: {take: last_word}, weight: %s}"
CHOICES: dict[str, dict[str, Any]] = {  # what chooses: ways to make one number of a completion
    "sum": {"take": "sum"},
    "mean of tokens": {"take": "mean"},
    "least token": {"take": "min"},
    "without its reference": {"take": "sum", "use_reference": False},
    "the policy's own likelihood": {"take": "sum", "use_reference": False, "path": str(bundled.model_path("tiny"))},
}


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


def bon(out: Path, rewards: list[str], *words: str) -> None:
    """`trl-rewards bon` on the bundled prompts; nothing where its file is there."""
    if out.exists():
        return
    fixed = ["--config", "quickstart", "--prompts", "bundled:tiny", "--max-new-tokens", "48", "--dtype", "float32"]
    entries = f"[{', '.join(rewards)}]"
    command("-m", "trl_rewards.cli", "bon", *fixed, "--rewards", entries, "--out", str(out), *words)


def run(seed: int, n: int) -> dict[str, float]:
    """Shares of held-out prompts with a right answer: by chance, chosen by the model, and best possible."""
    model = FOLDER / f"implicit-seed{seed}"
    before = cpu_seconds()
    if not (model / "adapter_config.json").exists():
        command("recipes/train.py", "--config", RECIPE, "--seed", str(seed), "--output_dir", str(model))
    seconds = cpu_seconds() - before
    sources = [EXACT % 0]
    for number, options in enumerate(CHOICES.values()):
        given = json.dumps({"path": str(model), "dtype": "float32", "micro_batch": 64} | options)
        sources.append(f"{{use: implicit_prm, as: p{number}, with: {given}}}")
    chosen = FOLDER / f"chosen-seed{seed}.jsonl"
    bon(chosen, sources, "--split", "test", "--n", str(n), "--seed", str(seed))
    groups = [json.loads(line)["candidates"] for line in chosen.read_text().splitlines()]
    found = {"seed": seed, "seconds": seconds}
    found["chance"] = statistics.fmean(row["scores"]["exact_match"] for group in groups for row in group)
    for number, name in enumerate(CHOICES):
        best = [max(group, key=lambda row, key=f"p{number}": row["scores"][key]) for group in groups]
        found[name] = statistics.fmean(row["scores"]["exact_match"] for row in best)
    found["oracle"] = statistics.fmean(max(row["scores"]["exact_match"] for row in group) for group in groups)
    return found


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n", type=int, default=8)
    arguments = parser.parse_args()
    data = FOLDER / "outcomes" / "train.jsonl"
    bon(data, [EXACT % 1], "--n", "4", "--format", "kto", "--threshold", "1")
    runs = []
    for seed in range(arguments.seeds):
        runs.append(run(seed, arguments.n))
        print(json.dumps(runs[-1]), flush=True)

    def span(name: str) -> str:
        values = [found[name] for found in runs]
        return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    seconds = statistics.fmean(found["seconds"] for found in runs)
    others = ", ".join(f"{name} {span(name)}" for name in CHOICES if name != "sum")
    print(
        f"held-out exact answers, best of {arguments.n}: {span('chance')} by chance -> {span('sum')} by the model's "
        f"sum ({others}; one right among them {span('oracle')}); {arguments.seeds} seed(s), {seconds:.0f} CPU seconds "
        "a run"
    )


if __name__ == "__main__":
    main()
