"""PPO against GRPO on the bundled task at equal samples: exact answers over completions, three seeds each.

    python benchmarks/ppo_grpo.py [--seeds 3] [--work runs/ppo-grpo]

Both start from recipes/ppo/cpu.yaml: the same reward, policy learning rate, completions per step and steps. PPO takes
one completion of each prompt, and has a critic and a small KL penalty; GRPO takes eight of each of an eighth as many
prompts, and has neither. A run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from trl_rewards import Recipe
from trl_rewards.train import quieten_libraries, train

RECIPE = "recipes/ppo/cpu.yaml"
PPO_ONLY = ("num_ppo_epochs", "critic", "critic_learning_rate", "kl_coef", "advantage")


def recipe_of(kind: str) -> dict[str, Any]:
    """The recipe as PPO's or made GRPO's."""
    recipe = Recipe.load(RECIPE).raw
    if kind == "ppo":
        return recipe
    kept = {key: value for key, value in recipe.items() if key not in PPO_ONLY}
    return kept | {"trainer": "grpo", "num_generations": 8, "advantage": {"use": "group_norm"}}


def run(kind: str, seed: int, work: Path, completions: int) -> dict[str, Any]:
    """What a run logged: its reward at each step, the held-out reward before and after, CPU seconds."""
    folder = work / f"{kind}-{seed}"
    if (folder / "curve.json").is_file():
        return json.loads((folder / "curve.json").read_text())
    settings = {
        "output_dir": str(folder),
        "seed": seed,
        "per_device_train_batch_size": completions,
        "logging_steps": 1,
    }
    file = work / f"{kind}-{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recipe_of(kind) | settings, indent=2))
    began = time.process_time()
    trainer = train(str(file))
    seconds = time.process_time() - began
    logs = trainer.state.log_history
    held_out = [log["eval_reward"] for log in logs if "eval_reward" in log]
    found = {
        "reward": [log["reward"] for log in logs if "reward" in log],
        "held out": [held_out[0], held_out[-1]],
        "explained variance": [log["value/explained_variance"] for log in logs if "value/explained_variance" in log],
        "CPU seconds": seconds,
    }
    (folder / "curve.json").write_text(json.dumps(found))
    return found


def plot(curves: dict[str, list[dict[str, Any]]], completions: int, file: Path) -> None:
    """Training reward over completions, one thin line a seed and a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for index, (kind, runs) in enumerate(curves.items()):
        steps = range(len(runs[0]["reward"]))
        at = [completions * (step + 1) for step in steps]
        for found in runs:
            axes.plot(at, found["reward"], color=f"C{index}", lw=0.6, alpha=0.6)
        mean = [statistics.fmean(found["reward"][step] for found in runs) for step in steps]
        axes.plot(at, mean, color=f"C{index}", lw=2, label=kind.upper())
    axes.set(xlabel="completions", ylabel="exact answers")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/ppo-grpo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--completions", type=int, default=128, help="in a step")
    given = parser.parse_args()
    quieten_libraries()
    curves = {
        kind: [run(kind, seed, given.work, given.completions) for seed in range(1, given.seeds + 1)]
        for kind in ("ppo", "grpo")
    }
    plot(curves, given.completions, given.work / "curves.png")
    print("| | held out, before | after | training reward, mean of all steps | last quarter | CPU seconds |")
    print("|" + " --- |" * 6)
    for kind, runs in curves.items():
        columns = {
            "before": [found["held out"][0] for found in runs],
            "after": [found["held out"][1] for found in runs],
            "all": [statistics.fmean(found["reward"]) for found in runs],
            "last": [statistics.fmean(found["reward"][-len(found["reward"]) // 4 :]) for found in runs],
        }
        cells = [f"{statistics.fmean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in columns.values()]
        print(f"| {kind.upper()} | {' | '.join(cells)} | {statistics.fmean(f['CPU seconds'] for f in runs):.0f} |")


if __name__ == "__main__":
    main()
