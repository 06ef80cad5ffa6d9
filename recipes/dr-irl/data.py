"""The prompts of recipes/dr-irl/*.yaml, with demonstrations and how hard each prompt is.

python recipes/dr-irl/data.py                                  # safe answers: runs/dr-irl/demonstrations.jsonl
python recipes/dr-irl/data.py --bundled                        # the bundled references: runs/dr-irl/tiny.jsonl and
                                                               # the test split of runs/dr-irl/tiny
python recipes/dr-irl/data.py SIMILAR.jsonl HARD.jsonl         # hardness, from `trl-rewards select`'s scores
"""

import sys
from pathlib import Path

from datasets import load_dataset

from trl_rewards.bundled import load_data


def demonstrations():
    Path("runs/dr-irl").mkdir(parents=True, exist_ok=True)
    data = load_dataset("PKU-Alignment/PKU-SafeRLHF", split="train")
    data = data.filter(lambda row: row["is_response_0_safe"] or row["is_response_1_safe"])
    data = data.map(lambda row: {"demonstration": row[f"response_{row['safer_response_id']}"]})
    data.select_columns(["prompt", "demonstration"]).to_json("runs/dr-irl/demonstrations.jsonl")


def bundled():
    """A demonstration is the five references, and its likeness to itself is 1; held-out prompts need no hardness."""
    Path("runs/dr-irl/tiny").mkdir(parents=True, exist_ok=True)
    data = load_data().map(lambda row: {"demonstration": " ".join(row["references"]), "demo_reward": 1.0})
    data = data.select_columns(["prompt", "answer", "task", "demonstration", "demo_reward"])
    data["train"].shuffle(seed=0).select(range(400)).to_json("runs/dr-irl/tiny.jsonl")
    data["test"].map(lambda row: {"hardness": None}).to_json("runs/dr-irl/tiny/test.jsonl")


def hardness(similar, out):
    data = load_dataset("json", data_files=similar, split="train")
    data.map(lambda row: {"hardness": 1 - row["clause_similarity_score"]}).to_json(out)


if sys.argv[1:] == ["--bundled"]:
    bundled()
elif sys.argv[1:]:
    hardness(*sys.argv[1:])
else:
    demonstrations()
