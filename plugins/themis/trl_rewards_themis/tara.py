"""From tool-use records to the rows that objective `themis` learns from.  https://huggingface.co/papers/2310.01045

    python -m trl_rewards_themis.tara data/calendar/agent_calendar_train.json --out runs/themis/calendar \\
        --test data/calendar/agent_calendar_test.json

The records are those of TARA (https://huggingface.co/papers/2310.01045): JSON lines with `question`, an optional
`context` and `test_list`, and for each of `pos_answer` and `neg_answer` the `answer`, the `actions` (an object of
Thought, Action, Action Input and Observation, or the whole trace as one text) and a rationale in `score_agent`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trl_rewards import RewardError
from trl_rewards.files import write_rows
from trl_rewards_themis.trajectory import OBSERVATION, TOOL, WORK, Step, marked, without_marks, written_by

SIDES = {"pos_answer": "chosen", "neg_answer": "rejected"}
_SAID = re.compile(rf"{OBSERVATION} Observation: .*?\n(?={TOOL}|\Z)", re.DOTALL)
DROPOUT = 0.01
"""The paper drops this share of observations, at random, so that the model does not lean on them blindly."""


def trace_of(side: dict[str, Any], drop_observation: bool = False) -> str:
    """What model and tools say of an answer, with the marks and the rationale. ValueError where that is not there.

    With `drop_observation` the tools say nothing.
    """
    actions, rationale = side.get("actions"), (side.get("score_agent") or {}).get("explanation")
    if isinstance(actions, dict):
        names = ("Thought", "Action", "Action Input", "Observation")
        if missing := [name for name in names if name not in actions]:
            raise ValueError(f"actions lack {', '.join(missing)}")
        thought, tool, given, said = (without_marks(str(actions[name])) for name in names)
        trace = written_by([Step(thought, tool, given, said)])
    elif isinstance(actions, str):
        trace = marked(actions)
    else:
        raise ValueError(f"actions must be an object or a text, got {actions!r}")
    if drop_observation:
        trace = _SAID.sub(f"{OBSERVATION} Observation: \n", trace)
    return trace + (f"{WORK} Work: {without_marks(rationale)}" if rationale is not None else "")


def rows_of(records: Iterable[dict[str, Any]], observation_dropout: float = 0.0, seed: int = 0) -> list[dict]:
    """One row per record: `prompt`, `chosen`, `rejected`, `chosen_trace`, `rejected_trace`, and what else there is.

    Records whose answers are equal are left out: there is no order to learn. ValueError names the record that cannot
    be read.
    """
    rng = random.Random(seed)
    rows = []
    for number, record in enumerate(records):
        row: dict[str, Any] = {"id": record.get("id", str(number)), "prompt": record.get("question")}
        row |= {name: record[name] for name in ("context", "test_list") if name in record}
        if not isinstance(row["prompt"], str):
            raise ValueError(f"record {row['id']}: no question")
        for name, side in SIDES.items():
            answer = record.get(name) or {}
            if not isinstance(answer.get("answer"), str):
                raise ValueError(f"record {row['id']}: {name} has no answer")
            try:
                row |= {side: answer["answer"], f"{side}_trace": trace_of(answer, rng.random() < observation_dropout)}
            except ValueError as error:
                raise ValueError(f"record {row['id']}: {name}: {error}") from None
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    return rows


def read_records(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of JSON-lines files, in order. RewardError names the line that is none."""
    found = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                assert isinstance(record, dict)
            except (ValueError, AssertionError):
                raise RewardError(f"{file}, line {number}: not a JSON object; a record is one line") from None
            found.append(record)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_rewards_themis.tara", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="files to train on")
    parser.add_argument("--test", nargs="+", type=Path, default=[], help="files of the split `test`")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument(
        "--observation-dropout", type=float, default=DROPOUT, help="share of training traces without observations"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    try:
        splits = {"train": rows_of(read_records(given.records), given.observation_dropout, given.seed)}
        if given.test:
            splits["test"] = rows_of(read_records(given.test))
    except (RewardError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    for split, rows in splits.items():
        write_rows(given.out / f"{split}.jsonl", rows)
    print(f"{', '.join(f'{len(rows)} {split}' for split, rows in splits.items())} pairs -> {given.out}")


if __name__ == "__main__":
    main()
