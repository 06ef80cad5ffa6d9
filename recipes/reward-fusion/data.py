"""The known answers of recipes/reward-fusion/gpu-*.yaml: 20,000 that UltraFeedback's raters preferred.

python recipes/reward-fusion/data.py        # writes runs/reward-fusion/pairs.jsonl
"""

from pathlib import Path

from datasets import load_dataset

Path("runs/reward-fusion").mkdir(parents=True, exist_ok=True)
rows = load_dataset("trl-lib/ultrafeedback_binarized", split="train").shuffle(seed=0).select(range(20000))
rows = rows.map(lambda row: {"prompt": row["chosen"][:-1], "completion": row["chosen"][-1:]})
rows.select_columns(["prompt", "completion"]).to_json("runs/reward-fusion/pairs.jsonl")
