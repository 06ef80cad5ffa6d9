"""The DPO recipe over three seeds: the held-out reward before and after each round.

    python benchmarks/dpo_seeds.py [--seeds 3]

Runs `recipes/dpo/cpu.yaml` as a user would, once per seed, and writes the line for the tables into
`recipes/results.json`. A run that is there already is not made again.
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


def run(seed: int, folder: Path) -> list[float]:
    """The held-out rewards of one run: before the first round, and after each."""
    command = [sys.executable, "recipes/train.py", "--config", "recipes/dpo/cpu.yaml"]
    if not (folder / "report.html").is_file():
        start = time.perf_counter()
        subprocess.run(
            [*command, "--seed", str(seed), "--output_dir", str(folder)], cwd=ROOT, check=True, capture_output=True
        )
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    known = json.loads((folder / "held_out.json").read_text())
    return [found["eval_reward"] for found in known.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    runs = []
    for seed in range(seeds):
        runs.append(run(seed, ROOT / "runs" / f"dpo-seed{seed}"))
        print(runs[-1], flush=True)
    spans = [f"{statistics.fmean(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in zip(*runs, strict=True)]
    line = f"held-out exact answers {' -> '.join(spans)}, before and after each of two rounds; {seeds} seeds"
    file = ROOT / "recipes" / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(results | {"dpo/cpu": line}, indent=2, ensure_ascii=False) + "\n")
    print(line)


if __name__ == "__main__":
    main()
