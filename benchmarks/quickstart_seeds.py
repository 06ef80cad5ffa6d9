"""The quickstart over five seeds: what a first run can be expected to show.

    python benchmarks/quickstart_seeds.py [--seeds 5]

Runs `recipes/quickstart.yaml` as a user would, once per seed, and writes the line for the tables into
`recipes/results.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(seed: int, folder: Path) -> dict[str, float]:
    """First and last held-out values of one run, and its wall seconds."""
    command = [sys.executable, "recipes/train.py", "--config", "recipes/quickstart.yaml"]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--seed", str(seed), "--output_dir", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    seconds = time.perf_counter() - start
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [log for log in logs if "eval_reward" in log]
    first, last = held_out[0], held_out[-1]
    return {
        "seed": seed,
        "exact_before": first["eval_rewards/exact_match/mean"],
        "exact_after": last["eval_rewards/exact_match/mean"],
        "reward_before": first["eval_reward"],
        "reward_after": last["eval_reward"],
        "training_seconds": next(log["train_runtime"] for log in logs if "train_runtime" in log),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    runs = []
    for seed in range(seeds):
        runs.append(run(seed, ROOT / "runs" / f"quickstart-seed{seed}"))
        print(json.dumps(runs[-1]), flush=True)

    def span(name: str) -> str:
        values = [found[name] for found in runs]
        return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    wall = statistics.fmean(found["seconds"] for found in runs)
    line = (
        f"held-out exact answers {span('exact_before')} -> {span('exact_after')}, reward {span('reward_before')} -> "
        f"{span('reward_after')}; {seeds} seeds, {wall:.0f} s a run on two CPU cores"
    )
    file = ROOT / "recipes" / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(results | {"quickstart": line}, indent=2, ensure_ascii=False) + "\n")
    print(line)


if __name__ == "__main__":
    main()
