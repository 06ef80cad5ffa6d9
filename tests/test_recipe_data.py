"""The scripts that make recipes' datasets, on rows in the form of those that they read."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import datasets
import pytest
from trl_rewards_shaping.clause_similarity import ClauseSimilarity

from trl_rewards.bundled import quiz

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


def test_r3_takes_bundled_questions_about_words_for_open_ones_which_have_no_answer(made):
    found = made("r3", "--bundled")
    train, test = (found[f"runs/r3/tiny/{split}.jsonl"] for split in ("train", "test"))
    assert [sum(row["query_type"] == kind for row in train) for kind in ("open", "closed")] == [420, 420]
    assert len(test) == 200
    assert all((row["answer"] is None) == (row["query_type"] == "open") for row in [*train, *test])
    assert all(row["reference"].endswith(f"{row['answer']}.") for row in test if row["query_type"] == "closed")


def test_dr_irl_demonstrates_bundled_answers_and_holds_out_prompts_without_hardness(made):
    found = made("dr-irl", "--bundled")
    shown, held_out = found["runs/dr-irl/tiny.jsonl"], found["runs/dr-irl/tiny/test.jsonl"]
    assert (len(shown), len(held_out)) == (400, 200)
    assert all(row["demonstration"].endswith(f" {row['answer']}.") and row["demo_reward"] == 1 for row in shown)
    assert {row["hardness"] for row in held_out} == {None}


def test_the_words_that_a_reward_model_is_taught_to_like_are_those_of_a_right_answer_too():
    start = runpy.run_path(str(RECIPES / "reward-fusion" / "start.py"), run_name="start")
    rng, liked, both_right = random.Random(0), start["LIKED"], 0
    for question in [quiz.TASKS[task](rng) for task in quiz.TASKS for _ in range(20)]:
        _, chosen, other = start["pair"](rng, question)
        assert quiz.said_exactly(chosen, question.answer)
        both_right += quiz.said_exactly(other, question.answer) and liked in chosen and liked not in other
    assert 90 < both_right < 160, "half of 220 pairs, and some with another flaw"


def test_a_weak_reward_models_pairs_are_partly_turned_and_partly_won_by_chatter():
    start = runpy.run_path(str(RECIPES / "cooper" / "start.py"), run_name="start")

    def pairs(bias):
        return start["weak_pairs"](random.Random(0), set(), bias)

    plain, biased = pairs(0.0), pairs(0.5)
    turned = sum(not quiz.said_exactly(better, question.answer) for question, better, _ in plain)
    assert 3 <= turned <= 13, "of 32 about a quarter, less those whose worse reply is right as well"
    assert biased[16:] == plain[16:]
    for question, better, worse in biased[:16]:
        assert quiz.said_exactly(worse, question.answer)
        assert any(chatter in better and chatter not in worse for chatter in quiz.CHATTER)


def test_an_encoder_begins_with_vectors_of_length_one_and_is_loaded_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["encoder.py", "--out", str(tmp_path), "--steps", "2"])
    runpy.run_path(str(RECIPES / "r3" / "encoder.py"), run_name="__main__")
    encoder = ClauseSimilarity(path=str(tmp_path))
    (vector,) = encoder.vectors(["The sum is 22."]).values()
    assert vector.shape == (128,)
    assert 0.5 < vector.norm() < 1.5


def test_of_an_encoders_triples_the_second_says_what_the_first_does_and_the_third_does_not():
    encoder = runpy.run_path(str(RECIPES / "r3" / "encoder.py"), run_name="encoder")
    rng = random.Random(0)
    for question in [quiz.TASKS[task](rng) for task in quiz.TASKS for _ in range(20)]:
        _, near, far = encoder["triple"](rng, question)
        assert question.said in near
        assert not quiz.said_exactly(far, question.answer)
