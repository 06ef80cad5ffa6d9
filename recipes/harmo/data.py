"""The prompts of recipes/harmo/gpu-*.yaml: GSM8K's, which have answers, and as many to chat about, which have none.

python recipes/harmo/data.py        # writes runs/harmo/mixture.jsonl
"""

from pathlib import Path

from datasets import concatenate_datasets, load_dataset

sums = load_dataset("openai/gsm8k", "main", split="train").rename_column("question", "prompt")
chat = load_dataset("trl-lib/ultrafeedback-prompt", split="train").shuffle(seed=0).select(range(7500))
chat = chat.map(lambda row: {"prompt": row["prompt"][-1]["content"], "answer": ""})
both = concatenate_datasets([sums, chat.select_columns(["prompt", "answer"])])
Path("runs/harmo").mkdir(parents=True, exist_ok=True)
both.shuffle(seed=0).to_json("runs/harmo/mixture.jsonl")
