"""recipes/rewardanything/cpu.yaml over some seeds: how far a tiny policy comes to follow a principle.

    python benchmarks/rewardanything_cpu.py [--seeds 3] [--reward rank]

Runs the recipe as a user would, once per seed, and prints the line for the tables in `recipes/results.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = "recipes/rewardanything/cpu.yaml"


def run(seed: int, reward: str, folder: Path) -> dict[str, float]:
    """First and last held-out values of one run, and its CPU seconds."""
    options = ["--seed", str(seed), "--output_dir", str(folder), "--rewards.rewardanything.with.reward", reward]
    before = cpu_seconds()
    subprocess.run(
        [sys.executable, "recipes/train.py", "--config", RECIPE, *options], cwd=ROOT, check=True, capture_output=True
    )
    seconds = cpu_seconds() - before
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [log for log in logs if "eval_reward" in log]
    first, last = held_out[0], held_out[-1]
    return {
        "seed": seed,
        "three_words_before": first["eval_rewards/three_words/mean"],
        "three_words_after": last["eval_rewards/three_words/mean"],
        "exact_before": first["eval_rewards/exact_match/mean"],
        "exact_after": last["eval_rewards/exact_match/mean"],
        "seconds": seconds,
    }


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reward", default="rank", help="the judge's option of that name")
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        folder = ROOT / "runs" / f"rewardanything-cpu-{arguments.reward}-seed{seed}"
        runs.append(run(seed, arguments.reward, folder))
        print(json.dumps(runs[-1]), flush=True)

    def span(name: str) -> str:
        values = [found[name] for found in runs]
        return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    seconds = statistics.fmean(found["seconds"] for found in runs)
    print(
        f"held-out answers of at most three words {span('three_words_before')} -> {span('three_words_after')}, exact "
        f"answers {span('exact_before')} -> {span('exact_after')}; {arguments.seeds} seeds, {seconds:.0f} CPU seconds "
        "a run"
    )


if __name__ == "__main__":
    main()
