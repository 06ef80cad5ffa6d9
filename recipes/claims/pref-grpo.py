"""What a reward model's scores become in a group: advantages, and what they have to do with the truth.

    python pref-grpo.py score OUT --answers A --model M --seed 0
    python pref-grpo.py advantages OUT --scores S --by win_rate

`A` is a folder that `ensembles.py draw` made: the bundled policy's answers, and whether each is right, which is the
truth. `score` puts them into groups of eight to one prompt, as they come and of right ones alone, and writes what the
reward model M says of each. `--by`:

score       the scores less their group's mean, over their deviation (GRPO)
centred     less the mean alone (Dr. GRPO)
win_rate    of each pair of a group the model says which is better, or that it cannot tell (below `SURE`); the share of
            comparisons won is the reward, and its advantage a group z-score too (Pref-GRPO)
"""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import torch
from ensembles import scored
from parts import run
from torch import Tensor
from trl_rewards_judges.comparing import Compared, win_rates

from trl_rewards.maths import centered, explained, zscore

GROUP, EPS, SURE = 8, 1e-4, 0.6


def score(out: Path, answers: Path, model: str, seed: int) -> None:
    """Write truth and score of the answers, in groups."""
    rng = random.Random(seed)
    rows = json.loads((answers / "test.json").read_text())
    found = scored(rows, [{"use": "model", "with": {"path": model, "dtype": "float32"}}], out / "scores.jsonl")
    mixed: list[tuple[float, float]] = []
    right: list[tuple[float, float]] = []
    for row, scores in zip(rows, found, strict=True):
        of_one = list(zip(row["gold"], [each["model"] for each in scores], strict=True))
        drawn = [each for each, count in zip(of_one, row["counts"], strict=True) for _ in range(count)]
        rng.shuffle(drawn)
        for pool, taken in ((mixed, drawn), (right, [each for each in drawn if each[0] == 1])):
            pool += taken[: len(taken) // GROUP * GROUP]
    (out / "groups.json").write_text(json.dumps({"mixed": mixed, "right": right}))


def rates(scores: Tensor) -> Tensor:
    """(N,) scores -> (N,) shares of comparisons won within groups; a pair of which neither is likely enough to be the
    better one, by Bradley-Terry, is a tie."""
    compared = []
    for start in range(0, len(scores), GROUP):
        for one, other in combinations(range(start, start + GROUP), 2):
            better = torch.sigmoid(scores[one] - scores[other]).item()
            compared.append(Compared(one, other, 0.5 if 1 - SURE <= better <= SURE else float(better > 0.5)))
    return torch.tensor(win_rates(compared, len(scores)), dtype=torch.float64)


BY = {
    "score": lambda scores: zscore(scores, GROUP, EPS),
    "centred": lambda scores: centered(scores, GROUP),
    "win_rate": lambda scores: zscore(rates(scores), GROUP, EPS),
}


def advantages(out: Path, scores: Path, by: str) -> None:
    """Write `illusory`, the size (root mean square) of advantages in groups of right answers as a multiple of that in
    groups as they come, and `truth`, how the latter correlate with being right within groups."""
    groups = json.loads((scores / "groups.json").read_text())
    (truth, mixed), (_, right) = (torch.tensor(groups[key], dtype=torch.float64).T for key in ("mixed", "right"))
    found, idle = BY[by](mixed), BY[by](right)
    size = found.square().mean().sqrt()
    result = {
        "illusory": (idle.square().mean().sqrt() / size).item(),
        "truth": explained(found, truth, GROUP)[0],
    }
    (out / "advantages.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run(
        __doc__,
        {score: {"--answers": Path, "--model": str, "--seed": int}, advantages: {"--scores": Path, "--by": BY}},
    )
