"""The prompts of recipes/r3/gpu-*.yaml: Dolly's instructions, open or closed by category, with references.

python recipes/r3/data.py        # writes runs/r3/dolly.jsonl
"""

from pathlib import Path

from datasets import load_dataset

CLOSED = ("closed_qa", "information_extraction", "classification", "general_qa", "open_qa")


def prompt_of(row):
    return {
        "prompt": f"{row['instruction']}\n\n{row['context']}".strip(),
        "reference": row["response"],
        "query_type": "closed" if row["category"] in CLOSED else "open",
    }


Path("runs/r3").mkdir(parents=True, exist_ok=True)
data = load_dataset("databricks/databricks-dolly-15k", split="train").map(prompt_of)
data.select_columns(["prompt", "reference", "query_type"]).to_json("runs/r3/dolly.jsonl")
