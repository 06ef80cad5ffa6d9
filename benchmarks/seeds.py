"""A recipe over some seeds: what a run can be expected to show, for the tables.

    python benchmarks/seeds.py quickstart.yaml "held-out exact answers=eval_rewards/exact_match/mean" \\
        "reward=eval_reward" [--seeds 5] [--save] [--learning_rate 1e-4]
    python benchmarks/seeds.py rewardanything/cpu.yaml "held-out exact answers=eval_rewards/exact_match/mean"
    python benchmarks/seeds.py dpo/cpu.yaml "held-out exact answers=eval_reward" --seeds 3

Runs `recipes/NAME` as a user would, once per seed, and says the first and the last value of each metric, or that
before the first round and after each, in the mean over seeds. Further options are the recipe's, and come last.
`--save` writes the line into `recipes/results.json`. A run that is there already is not made again. What compares two
ways to train is a claim: `trl-rewards reproduce`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"
COST = "cost.json"


def run(recipe: str, seed: int, folder: Path, more: list[str]) -> None:
    """Train, unless it is done already, by the recipe as it is."""
    made = hashlib.sha256((RECIPES / recipe).read_bytes() + repr(more).encode()).hexdigest()
    if (folder / COST).is_file() and json.loads((folder / COST).read_text(encoding="utf-8"))["made"] == made:
        return
    command = [sys.executable, "recipes/train.py", "--config", f"recipes/{recipe}", "--seed", str(seed)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--output_dir", str(folder), *more], cwd=RECIPES.parent, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder / COST).write_text(json.dumps({"seconds": seconds, "made": made}), encoding="utf-8")


def values(folder: Path, key: str) -> list[float]:
    """Of a run with rounds: before the first and after each. Of others: the first and the last."""
    if (folder / "held_out.json").is_file():
        return [found[key] for found in json.loads((folder / "held_out.json").read_text(encoding="utf-8")).values()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line[key] for line in lines if key in line]
    if not logged:
        known = ", ".join(sorted({key for line in lines for key in line}))
        raise SystemExit(f"{folder / 'metrics.jsonl'} has no {key!r}; it has {known}")
    return [logged[0], logged[-1]]


def span(found: tuple[float, ...]) -> str:
    among = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.2f}{among}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="below recipes/, such as dpo/cpu.yaml")
    parser.add_argument("measures", nargs="+", metavar="WORDS=KEY", help="what a metric is called, and its key")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write the line into recipes/results.json")
    given, more = parser.parse_known_args()
    if given.save and more:
        parser.error(f"--save keeps what the recipe does as it is; leave out {' '.join(more)}")
    name = given.recipe.removesuffix(".yaml")
    folders = [RECIPES.parent / "runs" / "seeds" / f"{name.replace('/', '-')}-{seed}" for seed in range(given.seeds)]
    for seed, folder in enumerate(folders):
        run(given.recipe, seed, folder, more)
        print(f"seed {seed}: {folder}", flush=True)
    parts = []
    for each in given.measures:
        said, _, key = each.rpartition("=")
        series = zip(*(values(folder, key) for folder in folders), strict=True)
        parts.append(f"{said} {' -> '.join(map(span, series))}")
    seconds = statistics.fmean(
        json.loads((folder / COST).read_text(encoding="utf-8"))["seconds"] for folder in folders
    )
    seeds = f"{given.seeds} seeds" if given.seeds > 1 else "1 seed"
    line = f"{', '.join(parts)}; {seeds}, {seconds:.0f} CPU seconds a run"
    if given.save:
        file = RECIPES / "results.json"
        results = json.loads(file.read_text(encoding="utf-8")) | {name: line}
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
