"""BLEUBERI's CPU recipe over seeds: what BLEU alone teaches, from the hard half of the questions or from another.

    python benchmarks/bleuberi_cpu.py [--seeds 3] [--selectors hard random]

Runs the commands in the header of `recipes/bleuberi/cpu.yaml` as a user would, and writes the line for the tables into
`recipes/results.json` (of `hard`; the others are printed).
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "bleuberi" / "cpu.yaml"


def select_command() -> list[str]:
    """The `trl-rewards select` command of the recipe's header, for this interpreter."""
    header = re.sub(r"\\\n#\s*", "", RECIPE.read_text(encoding="utf-8"))
    (line,) = (line for line in header.splitlines() if line.startswith("#   trl-rewards select"))
    return [sys.executable, "-m", "trl_rewards.cli", *shlex.split(line.removeprefix("#   trl-rewards"))]


def run(command: list[str]) -> float:
    """CPU seconds of a command in the checkout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(seed: int, data: Path, folder: Path) -> dict[str, float]:
    """First and last held-out values of one run, and its CPU seconds."""
    command = [sys.executable, "recipes/train.py", "--config", str(RECIPE), "--dataset_name", str(data)]
    seconds = run([*command, "--seed", str(seed), "--output_dir", str(folder)])
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [log for log in logs if "eval_reward" in log]
    found: dict[str, float] = {"seed": seed, "seconds": seconds}
    for name in ("bleuberi", "exact_match", "regex_format"):
        key = f"eval_rewards/{name}/mean"
        found |= {f"{name}_before": held_out[0][key], f"{name}_after": held_out[-1][key]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--selectors", nargs="+", default=["hard"])
    arguments = parser.parse_args()
    for selector in arguments.selectors:
        data = ROOT / "runs" / "bleuberi" / selector
        if not data.is_dir():
            seconds = run([*select_command(), "--selector", selector, "--out", str(data / "train.jsonl")])
            print(f"{selector}: selection took {seconds:.0f} CPU seconds", flush=True)
        runs = []
        for seed in range(arguments.seeds):
            runs.append(train(seed, data, ROOT / "runs" / "bleuberi" / f"{selector}-seed{seed}"))
            print(json.dumps(runs[-1]), flush=True)
        line = summary(runs)
        print(f"{selector}: {line}", flush=True)
        if selector == "hard":
            file = ROOT / "recipes" / "results.json"
            results = json.loads(file.read_text())
            file.write_text(json.dumps(results | {"bleuberi/cpu": line}, indent=2, ensure_ascii=False) + "\n")


def summary(runs: list[dict[str, float]]) -> str:
    """The line for the tables."""

    def span(name: str) -> str:
        values = [found[name] for found in runs]
        among = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{among}"

    seconds = statistics.fmean(found["seconds"] for found in runs)
    return (
        f"held-out exact answers {span('exact_match_before')} -> {span('exact_match_after')}, BLEU "
        f"{span('bleuberi_before')} -> {span('bleuberi_after')}; {len(runs)} seed{'s' * (len(runs) > 1)}, "
        f"{seconds:.0f} CPU seconds a run"
    )


if __name__ == "__main__":
    main()
