"""ProcessBench: how well a reward of steps finds the first wrong one.  https://huggingface.co/papers/2412.06559

    python -m trl_rewards_process.processbench --data Qwen/ProcessBench \\
        --reward "{use: prm, with: {path: Qwen/Qwen2.5-Math-PRM-7B, format: qwen, load_in_4bit: true}}"

Data are a Hub name, a folder or a file; rows have `problem`, `steps` and `label`, the index of the first wrong step or
-1. A step is called wrong where its score is below the threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from trl_rewards import RecipeError, Reward, RewardError, Samples, StepReward, load_reward

Steps = Sequence[float | None] | None
"""A row's scores; None for a step, or a row, without one."""


class Figures(NamedTuple):
    """How often the first wrong step was found."""

    f1: float
    """Harmonic mean of the two accuracies, in [0, 1]."""
    error: float
    """Accuracy on solutions with a wrong step."""
    correct: float
    """Accuracy on solutions without one."""
    rows: int
    missing: int
    """Rows in which a step without a score decides. They count as not found."""


def first_error(scores: Steps, threshold: float) -> int | None:
    """Index of the first step below the threshold, -1 without one; None where a step without a score comes before."""
    for index, score in enumerate(scores if scores is not None else [None]):
        if score is None:
            return None
        if score < threshold:
            return index
    return -1


def harmonic_mean(error: float, correct: float) -> float:
    """ProcessBench's F1 of the accuracies on wrong and on right solutions; 0 where both are."""
    return 2 * error * correct / (error + correct) if error + correct else 0.0


def figures(rows: Sequence[Steps], labels: Sequence[int], threshold: float) -> Figures:
    """How often the first wrong step is found at a threshold. ValueError without right or without wrong solutions."""
    predicted = [first_error(row, threshold) for row in rows]
    found: dict[bool, list[bool]] = {True: [], False: []}
    for guess, label in zip(predicted, labels, strict=True):
        found[label == -1].append(guess == label)
    if not (found[True] and found[False]):
        lacking = "right" if found[False] else "wrong"
        raise ValueError(f"F1 is of right and of wrong solutions, and there are no {lacking} ones")
    error, correct = fmean(found[False]), fmean(found[True])
    return Figures(harmonic_mean(error, correct), error, correct, len(labels), predicted.count(None))


def best_threshold(rows: Sequence[Steps], labels: Sequence[int]) -> float:
    """The threshold with the highest F1, the lowest of several. ValueError as for `figures`, or without a score.

    A wrong solution is judged rightly by every threshold above the score of its first wrong step, up to the lowest
    score before it; a right one up to its lowest score.
    """
    import numpy as np

    figures(rows, labels, 0.0)
    wrong = np.array([label != -1 for label in labels])
    above, up_to = np.full(len(labels), np.inf), np.full(len(labels), -np.inf)  # of a row without scores: none
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        decisive = [] if row is None else row if label == -1 else row[: label + 1]
        before = [score for score in decisive if score is not None]
        if before and len(before) == len(decisive):
            above[index] = -np.inf if label == -1 else before.pop()
            up_to[index] = min(before, default=np.inf)
    highest = up_to[np.isfinite(up_to)]
    lowest = np.nextafter(above[np.isfinite(above)], np.inf)  # where all steps before are right, whatever is above
    candidates = np.unique(np.concatenate([highest, lowest]))
    if not len(candidates):
        raise ValueError("no row has scores to find a threshold among")
    right = (above[:, None] < candidates) & (candidates <= up_to[:, None])  # (rows, candidates)
    scores = [harmonic_mean(*pair) for pair in zip(right[wrong].mean(axis=0), right[~wrong].mean(axis=0), strict=True)]
    return float(candidates[int(np.argmax(scores))])


def score_rows(reward: StepReward, rows: Sequence[dict[str, Any]]) -> list[Steps]:
    """Scores of each row's steps, by any reward of steps."""
    samples = Samples(
        prompts=[row["problem"] for row in rows],
        completions=["\n\n".join(row["steps"]) for row in rows],
        completion_ids=[],
        columns={name: [row[name] for row in rows] for name in reward.reads()},
    )
    found = reward.score_steps(samples, [list(row["steps"]) for row in rows])
    return [values if isinstance(values, list) else None for values in found]


def reward_of(words: str, option: str) -> Reward:
    """A reward of an entry as under `rewards:` in a recipe. RewardError that begins with `option` if it is none."""
    import yaml

    entry = yaml.safe_load(words)
    entry = {"use": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry.keys() <= {"use", "with"} or "use" not in entry:
        raise RewardError(f"{option}: a name or {{use: …, with: {{…}}}}, got {words!r}")
    return load_reward(entry["use"], **entry.get("with") or {})


def evaluate(reward: StepReward, entry: str, data: str, out: Path, batch_size: int) -> dict[str, list[dict[str, Any]]]:
    """Every split's rows with their label and scores. `out` keeps them, and an interrupted call goes on from it."""
    from rich.console import Console
    from rich.progress import track

    from trl_rewards.data import load_splits
    from trl_rewards.models import WorkFile

    splits = load_splits(data, option="--data")
    wanted = {"problem", "steps", "label", *reward.reads()}
    problems = [
        f"--data: split {split!r} has no column {', '.join(sorted(wanted - set(rows.column_names)))}"
        for split, rows in splits.items()
        if wanted - set(rows.column_names)
    ]
    if problems:
        raise RecipeError(problems, data)
    header = json.dumps({"reward": entry, "data": data, "rows": {name: len(rows) for name, rows in splits.items()}})
    keeper = WorkFile(out, header, "scores of another reward or of other data")
    places = [(split, row) for split, rows in splits.items() for row in range(len(rows))]
    left = places[len(keeper.lines) :]
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    for batch in track(batches, "scoring", console=Console(stderr=True), transient=True):
        rows = [splits[split][row] for split, row in batch]
        for (split, row), values, scores in zip(batch, rows, score_rows(reward, rows), strict=True):
            keeper.append({"split": split, "row": row, "label": values["label"], "scores": scores})
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()[1:]]
    return {split: [line for line in lines if line["split"] == split] for split in splits}


def report(found: dict[str, Figures], threshold: float) -> str:
    """The figures as a table in lines."""
    lines = [f"threshold {threshold:g}", f"{'':16} F1  wrong  right   rows  missing"]
    for split, each in found.items():
        lines.append(f"{split:14} {each.f1:4.1%} {each.error:6.1%} {each.correct:6.1%} {each.rows:6} {each.missing:8}")
    if len(found) > 1:
        lines.append(f"{'mean':14} {fmean(each.f1 for each in found.values()):4.1%}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    import tempfile

    parser = argparse.ArgumentParser(
        prog="python -m trl_rewards_process.processbench",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="Hub name, folder or file")
    parser.add_argument("--reward", required=True, help="a reward of steps, as an entry under `rewards:` in a recipe")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--search", metavar="SPLIT", help="find the threshold on this split, instead of --threshold")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that the reward is given at a time")
    parser.add_argument("--out", type=Path, help="file that keeps the scores")
    given = parser.parse_args(words)
    try:
        reward = reward_of(given.reward, "--reward")
        if not isinstance(reward, StepReward):
            raise RewardError(f"--reward: {given.reward!r} scores no steps")
        with tempfile.TemporaryDirectory() as scratch:
            out = given.out or Path(scratch, "scores.jsonl")
            rows = evaluate(reward, given.reward, given.data, out, given.batch_size)
        if given.search and given.search not in rows:
            raise RewardError(f"--search: no split {given.search!r} (there is {', '.join(rows)})")
        scores = {split: [line["scores"] for line in lines] for split, lines in rows.items()}
        labels = {split: [line["label"] for line in lines] for split, lines in rows.items()}
        split, threshold = given.search, given.threshold
        if split:
            threshold = best_threshold(scores[split], labels[split])
        print(report({split: figures(scores[split], labels[split], threshold) for split in rows}, threshold))
    except (RewardError, RecipeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
