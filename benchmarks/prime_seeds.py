"""PRIME against outcomes alone on sums of several steps: the reward at each step, over seeds.

    python benchmarks/prime_seeds.py [--seeds 5] [--steps 40] [--out runs/prime-seeds]

Runs `recipes/prime/cpu.yaml` as it is, and with the process rewards' weight at 0, per seed. Says in how many steps
each gets to the reward that outcomes alone end with (a mean of ten steps), and writes the line for the tables into
`recipes/results.json`. A run that is in the folder already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINDOW = 10
VARIANTS = {"prime": [], "outcomes": ["--rewards.1.weight", "0", "--rewards.1.with.update_mode", "none"]}


def run(seed: int, variant: str, steps: int, folder: Path) -> tuple[list[float], list[float]]:
    """Exact answers at each training step, and those on held-out prompts before and after."""
    if not (folder / "report.html").is_file():
        command = [sys.executable, "recipes/train.py", "--config", "recipes/prime/cpu.yaml", "--logging_steps", "1"]
        more = ["--seed", seed, "--max_steps", steps, "--eval_steps", steps, "--output_dir", folder]
        subprocess.run([*command, *map(str, more), *VARIANTS[variant]], cwd=ROOT, check=True, capture_output=True)
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [log["rewards/exact_match/mean"] for log in logs if "rewards/exact_match/mean" in log]
    held_out = [log["eval_rewards/exact_match/mean"] for log in logs if "eval_rewards/exact_match/mean" in log]
    return trained, held_out


def smooth(curve: list[float]) -> list[float]:
    """The mean of each step and the nine before it, from the tenth step on."""
    return [statistics.fmean(curve[end - WINDOW : end]) for end in range(WINDOW, len(curve) + 1)]


def steps_to(curve: list[float], level: float) -> int | None:
    """The first step at which the smoothed curve reaches a level."""
    return next((step for step, value in enumerate(smooth(curve), WINDOW) if value >= level), None)


def mean_curve(curves: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prime-seeds")
    args = parser.parse_args()
    curves: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    held_out: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    before: list[float] = []
    for seed in range(args.seeds):
        for variant in VARIANTS:
            trained, ends = run(seed, variant, args.steps, args.out / f"{variant}-{seed}")
            curves[variant].append(trained)
            held_out[variant].append(ends[-1])
            before.append(ends[0])
            print(
                f"seed {seed} {variant}: last ten steps {smooth(trained)[-1]:.3f}, held out {ends[-1]:.3f}", flush=True
            )

    means = {variant: mean_curve(found) for variant, found in curves.items()}
    for step in range(WINDOW, args.steps + 1, WINDOW):
        row = ", ".join(f"{variant} {smooth(mean)[step - WINDOW]:.3f}" for variant, mean in means.items())
        print(f"steps {step - WINDOW + 1}-{step}: {row}")
    level = smooth(means["outcomes"])[-1]
    reached = {variant: steps_to(mean, level) for variant, mean in means.items()}
    print(f"steps to {level:.3f}: {reached}")
    each = [
        (steps_to(prime, smooth(outcomes)[-1]), steps_to(outcomes, smooth(outcomes)[-1]))
        for prime, outcomes in zip(curves["prime"], curves["outcomes"], strict=True)
    ]
    print(f"of each seed, PRIME and outcomes alone: {each}")

    def span(values: list[float]) -> str:
        return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    line = (
        f"held-out exact answers {span(before)} -> {span(held_out['prime'])}, outcomes alone "
        f"{span(held_out['outcomes'])}; the reward that outcomes alone reach in {reached['outcomes']} steps takes "
        f"PRIME {reached['prime'] or f'more than {args.steps}'}; {args.seeds} seeds"
    )
    file = ROOT / "recipes" / "results.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"prime/cpu": line}, indent=2, ensure_ascii=False) + "\n"
    )
    print(line)


if __name__ == "__main__":
    main()
