"""The prompts of recipes/dr-irl/gpu-*.yaml, with demonstrations of safe answers and how hard each prompt is.

python recipes/dr-irl/data.py                                  # writes runs/dr-irl/demonstrations.jsonl
python recipes/dr-irl/data.py SIMILAR.jsonl HARD.jsonl         # hardness, from `trl-rewards select`'s scores
"""

import sys
from pathlib import Path

from datasets import load_dataset


def demonstrations():
    Path("runs/dr-irl").mkdir(parents=True, exist_ok=True)
    data = load_dataset("PKU-Alignment/PKU-SafeRLHF", split="train")
    data = data.filter(lambda row: row["is_response_0_safe"] or row["is_response_1_safe"])
    data = data.map(lambda row: {"demonstration": row[f"response_{row['safer_response_id']}"]})
    data.select_columns(["prompt", "demonstration"]).to_json("runs/dr-irl/demonstrations.jsonl")


def hardness(similar, out):
    data = load_dataset("json", data_files=similar, split="train")
    data.map(lambda row: {"hardness": 1 - row["clause_similarity_score"]}).to_json(out)


if sys.argv[1:]:
    hardness(*sys.argv[1:])
else:
    demonstrations()
