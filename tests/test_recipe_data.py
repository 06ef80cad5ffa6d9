"""The scripts that make recipes' datasets, on rows in the form of those that they read."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
READ = {  # what is read from the Hub: some rows of each dataset, as its card has them
    "openai/gsm8k": [{"question": "1 + 1?", "answer": "#### 2"}],
    "trl-lib/ultrafeedback-prompt": [{"prompt": CHAT[:1]}] * 7500,
    "trl-lib/ultrafeedback_binarized": [{"chosen": CHAT, "rejected": CHAT, "score_chosen": 9.0}] * 20000,
    "nvidia/HelpSteer2": [
        {"prompt": "why?", "response": "no", "helpfulness": 1, "verbosity": 0},
        {"prompt": "why?", "response": "because", "helpfulness": 4, "verbosity": 1},
    ],
    "databricks/databricks-dolly-15k": [
        {"instruction": "Who?", "context": "Ada.", "response": "Ada", "category": "closed_qa"},
        {"instruction": "Sing.", "context": "", "response": "la", "category": "creative_writing"},
    ],
    "PKU-Alignment/PKU-SafeRLHF": [
        {
            "prompt": "how?",
            "response_0": "so",
            "response_1": "I will not",
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "safer_response_id": 1,
        },
        {
            "prompt": "when?",
            "response_0": "a",
            "response_1": "b",
            "is_response_0_safe": False,
            "is_response_1_safe": False,
            "safer_response_id": 0,
        },
    ],
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Runs a recipe's script; the rows of the files that it wrote, by their paths."""
    monkeypatch.chdir(tmp_path)
    whole = datasets.load_dataset

    def load(name, *more, **options):
        return datasets.Dataset.from_list(READ[name]) if name in READ else whole(name, *more, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)

    def run(recipe, *words):
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        runpy.run_path(str(RECIPES / recipe / "data.py"), run_name="__main__")
        return {
            file.relative_to(tmp_path).as_posix(): [json.loads(line) for line in file.read_text().splitlines()]
            for file in tmp_path.rglob("*.jsonl")
        }

    return run


def test_harmo_mixes_questions_with_an_answer_and_prompts_without(made):
    rows = made("harmo")["runs/harmo/mixture.jsonl"]
    assert len(rows) == 7501
    assert {(row["prompt"], row["answer"]) for row in rows} == {("1 + 1?", "#### 2"), ("hello", "")}


def test_helpsteer2_puts_the_more_helpful_answer_first(made):
    (row,) = made("helpsteer2")["runs/helpsteer2/data/test.jsonl"]
    assert [turn["content"] for turn in row["chosen"]] == ["why?", "because"]
    assert [turn["content"] for turn in row["rejected"]] == ["why?", "no"]
    assert (row["chosen_rating"], row["rejected_rating"]) == (4.0, 1.0)


def test_r3_tells_open_from_closed_questions(made):
    assert made("r3")["runs/r3/dolly.jsonl"] == [
        {"prompt": "Who?\n\nAda.", "reference": "Ada", "query_type": "closed"},
        {"prompt": "Sing.", "reference": "la", "query_type": "open"},
    ]


def test_reward_fusion_keeps_prompt_and_preferred_answer(made):
    rows = made("reward-fusion")["runs/reward-fusion/pairs.jsonl"]
    assert len(rows) == 20000
    assert rows[0] == {"prompt": CHAT[:1], "completion": CHAT[1:]}


def test_dr_irl_demonstrates_what_is_safe_and_says_how_hard_it_is(made, tmp_path):
    rows = made("dr-irl")["runs/dr-irl/demonstrations.jsonl"]
    assert rows == [{"prompt": "how?", "demonstration": "I will not"}]
    scored = tmp_path / "similar.jsonl"
    scored.write_text(json.dumps(rows[0] | {"clause_similarity_score": 0.25}) + "\n")
    assert made("dr-irl", str(scored), "hard.jsonl")["hard.jsonl"][0]["hardness"] == 0.75
