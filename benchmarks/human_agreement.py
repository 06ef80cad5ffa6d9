"""How often a configured reward agrees with people: PandaLM's 999 response pairs, three votes each.

    python benchmarks/human_agreement.py --data FOLDER [--config RECIPE]

FOLDER holds `testset-v1.jsonl` (https://github.com/WeOpenML/PandaLM, Apache-2.0) and `references.jsonl` with
`{instruction, references: {model: text}}`. Pairs whose majority of people sees a tie, or that have no majority, are
left out; where the reward ties, half a point is given. The interval is Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

from trl_rewards.offline import score_file

CONFIG = "rewards:\n  - use: bleuberi\n    with: {extract_answer: false}\n"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prepare(folder: Path, out: Path, references: int | None) -> list[int | None]:
    """Write the pairs as groups of two completions; returns each pair's human majority: 1, 2, 0 for a tie, or None."""
    wanted = {row["instruction"]: list(row["references"].values()) for row in read(folder / "references.jsonl")}
    majorities: list[int | None] = []
    with out.open("w", encoding="utf-8") as stream:
        for row in read(folder / "testset-v1.jsonl"):
            prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
            found = wanted.get(prompt) or wanted.get(row["instruction"]) or []
            pair = [str(row["response1"]), str(row["response2"])]
            line = {"prompt": prompt, "completion": pair, "references": found[:references]}
            stream.write(json.dumps(line) + "\n")
            vote, count = Counter(row[f"annotator{index}"] for index in (1, 2, 3)).most_common(1)[0]
            majorities.append(int(vote) if count >= 2 else None)
    return majorities


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return middle - half, middle + half


def agreement(folder: Path, config: str, references: int | None) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch, "pairs.jsonl"), Path(scratch, "scores.jsonl")
        majorities = prepare(folder, data, references)
        score_file(config, (), str(data), out, "train", "completion", 64)
        totals: dict[int, list[float | None]] = {}
        for line in read(out)[1:]:
            totals.setdefault(line["row"], []).append(line["total"])
    points, ties, holes = [], 0, 0
    for row, majority in enumerate(majorities):
        if majority not in (1, 2):
            continue
        first, second = totals[row]
        if first is None or second is None:
            holes += 1
            continue
        ties += first == second
        points.append(0.5 if first == second else float((first > second) == (majority == 1)))
    share = sum(points) / len(points)
    low, high = wilson(share, len(points))
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    return f"{share:.1%} of {len(points)} pairs ({interval}; {ties} ties, {holes} without a score)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", help="a recipe; by default bleuberi alone, without answer tags")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as default:
        default.write(CONFIG)
        default.flush()
        for references in (1, 2, 3, 4, 5):
            found = agreement(arguments.data, arguments.config or default.name, references)
            print(f"{references} references: {found}")


if __name__ == "__main__":
    main()
