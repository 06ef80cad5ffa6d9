"""The pairs of recipes/helpsteer2/gpu-*.yaml: two answers to each prompt, and how helpful they are, in [0, 4].

python recipes/helpsteer2/data.py        # writes runs/helpsteer2/data
"""

from pathlib import Path

from datasets import Dataset, load_dataset


def turns(row):
    """A row as a conversation."""
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


Path("runs/helpsteer2/data").mkdir(parents=True, exist_ok=True)
for split, name in (("train", "train"), ("validation", "test")):
    rows = load_dataset("nvidia/HelpSteer2", split=split).to_list()
    pairs = [sorted(rows[at : at + 2], key=lambda row: -row["helpfulness"]) for at in range(0, len(rows) - 1, 2)]
    made = [
        {
            "chosen": turns(better),
            "rejected": turns(worse),
            "chosen_rating": float(better["helpfulness"]),
            "rejected_rating": float(worse["helpfulness"]),
        }
        for better, worse in pairs
    ]
    Dataset.from_list(made).to_json(f"runs/helpsteer2/data/{name}.jsonl")
