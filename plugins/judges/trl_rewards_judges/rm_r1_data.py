"""From preference pairs to what an RM-R1 judge is trained on.  https://huggingface.co/papers/2505.02387

    python -m trl_rewards_judges.rm_r1_data --pairs DATASET --out judge.jsonl

Reads `chosen` and `rejected`, with `prompt` or with a prompt that both begin with, from a file, folder, `bundled:` or
Hub dataset. Writes `prompt`, the judge's messages, and `winner`, A or B, for reward `rm_r1_reward`. As in the paper
the chosen answer is A and B in turn; `--orders both` writes each pair in both orders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from trl_rewards import RecipeError, Samples
from trl_rewards.data import load_splits
from trl_rewards.files import write_rows
from trl_rewards_judges.rm_r1 import Form, judge_messages

Orders = Literal["alternate", "both"]


def judge_rows(
    pairs: Iterable[dict[str, Any]], form: Form = "instruct", orders: Orders = "alternate", system: str | None = None
) -> Iterator[dict[str, Any]]:
    """{prompt, winner} of each pair {prompt, chosen, rejected} that can teach something: both answers are there, and
    are not the same. With `alternate` the chosen answer is A for the first of these, B for the second, and so on."""
    number = 0
    for pair in pairs:
        answers = [pair["chosen"], pair["rejected"]]
        chosen, rejected = Samples(prompts=[pair["prompt"]] * 2, completions=answers).texts
        if not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
            continue
        for first in (True, False) if orders == "both" else (number % 2 == 0,):
            a, b = (chosen, rejected) if first else (rejected, chosen)
            messages = judge_messages(pair["prompt"], a, b, form, system)
            yield {"prompt": messages, "winner": "A" if first else "B"}
        number += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trl_rewards_judges.rm_r1_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", required=True, help="file, folder, bundled: or Hub dataset of preference pairs")
    parser.add_argument("--out", required=True, type=Path, help=".jsonl file to write")
    parser.add_argument("--split", default="train")
    parser.add_argument("--form", choices=get_args(Form), default="instruct")
    parser.add_argument("--system", type=Path, help="file with other words for the system prompt of form instruct")
    parser.add_argument("--orders", choices=get_args(Orders), default="alternate")
    options = parser.parse_args(arguments)
    if options.system and options.form == "reasoning":
        parser.error("--system: form reasoning has no system prompt")
    try:
        pairs = load_splits(options.pairs, option="--pairs")
        if options.split not in pairs:
            parser.error(f"--split: no split {options.split!r} (there is {', '.join(pairs)})")
        system = options.system.read_text(encoding="utf-8") if options.system else None
    except (RecipeError, OSError) as error:
        parser.error(str(error))
    dataset = pairs[options.split]
    missing = [name for name in ("chosen", "rejected") if name not in dataset.column_names]
    if missing:
        parser.error(f"--pairs: no column {', '.join(missing)} (there is {', '.join(dataset.column_names)})")
    if "prompt" not in dataset.column_names:
        from trl import extract_prompt

        dataset = dataset.map(extract_prompt)
    rows = list(judge_rows(dataset, options.form, options.orders, system))
    write_rows(options.out, rows)
    used = len(rows) // (2 if options.orders == "both" else 1)
    print(f"{options.out}: {len(rows)} rows of {used} pairs; {len(dataset) - used} had nothing to tell apart")
    return 0


if __name__ == "__main__":
    sys.exit(main())
