"""The prompts of recipes/r3/*.yaml, open or closed, with references.

python recipes/r3/data.py            # Dolly's instructions, by category: writes runs/r3/dolly.jsonl
python recipes/r3/data.py --bundled  # the bundled questions, by kind: writes runs/r3/tiny
"""

import sys
from pathlib import Path

from datasets import concatenate_datasets, load_dataset

from trl_rewards.bundled import load_data, quiz

CLOSED = ("closed_qa", "information_extraction", "classification", "general_qa", "open_qa")


def prompt_of(row):
    return {
        "prompt": f"{row['instruction']}\n\n{row['context']}".strip(),
        "reference": row["response"],
        "query_type": "closed" if row["category"] in CLOSED else "open",
    }


def dolly():
    Path("runs/r3").mkdir(parents=True, exist_ok=True)
    data = load_dataset("databricks/databricks-dolly-15k", split="train").map(prompt_of)
    data.select_columns(["prompt", "reference", "query_type"]).to_json("runs/r3/dolly.jsonl")


def question_of(row):
    """Questions about numbers are closed; those about words are taken for open ones, and have no answer."""
    closed = row["task"] in quiz.SUMS
    kind = "closed" if closed else "open"
    return {"reference": row["references"][0], "query_type": kind, "answer": row["answer"] if closed else None}


def bundled():
    """Of the test split all; of the train split as many closed questions as open ones."""
    Path("runs/r3/tiny").mkdir(parents=True, exist_ok=True)
    for split, data in load_data().items():
        data = data.map(question_of).select_columns(["prompt", "reference", "query_type", "answer"])
        if split == "train":
            kinds = [data.filter(lambda row, kind=kind: row["query_type"] == kind) for kind in ("open", "closed")]
            data = concatenate_datasets([kind.select(range(min(map(len, kinds)))) for kind in kinds]).shuffle(seed=0)
        data.to_json(f"runs/r3/tiny/{split}.jsonl")


bundled() if sys.argv[1:] == ["--bundled"] else dolly()
