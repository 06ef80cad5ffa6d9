"""`trl-rewards reference`: rewards of a policy's own answers as a column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trl_rewards import Pipeline, Recipe, RecipeError, models
from trl_rewards.cli import app
from trl_rewards.commands.reference import column_names, unshaped
from trl_rewards.data import load_splits

ROWS = [
    {"id": 0, "question": "the cat", "gold": ["the cat sat"]},
    {"id": 1, "question": "the dog", "gold": None},  # nothing to score with
    {"id": 2, "question": "the sky", "gold": ["the dog ran 3 times", "the sky ran"]},
]
RECIPE = """
model_name_or_path: {policy}
dataset_name: data.jsonl
dataset: {{columns: {{prompt: question}}}}
rewards:
  - use: rouge_l
    with: {{references: gold}}
    shape: [{{use: par}}]
"""


@pytest.fixture
def reference(tmp_path, policy_path):
    """Runs the command in a folder with a recipe and its dataset; the result, and the rows that it wrote."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(policy=policy_path))

    def run(*words: str, out: str = "out.jsonl"):
        command = ["reference", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / out), *words]
        result = CliRunner().invoke(app, [*command, "--max-new-tokens", "6", "--dtype", "float32"])
        written = tmp_path / out
        there = written.is_file() and written.suffix == ".jsonl"
        return result, [json.loads(line) for line in written.read_text().splitlines()] if there else []

    return run


def test_the_column_holds_the_sources_raw_rewards_and_its_own_recipe_reads_it(reference, tmp_path, monkeypatch):
    result, rows = reference("--n", "3")
    assert result.exit_code == 0, result.exception
    assert [row["id"] for row in rows] == [0, 2]
    assert "1 rows without 'gold' left out" in result.output
    assert set(rows[0]) == {"id", "question", "gold", "reference_rewards"}
    assert all(len(row["reference_rewards"]) == 3 for row in rows)
    assert not (tmp_path / "out.jsonl.unfinished").exists()

    # the same answers, sampled and scored by hand
    loading = models.Loading(path=Recipe.load(tmp_path / "recipe.yaml").trl["model_name_or_path"], dtype="float32")
    sampling = models.Sampling(temperature=0.9, top_p=0.9, top_k=50, max_new_tokens=6)
    drawn = models.sample_candidates(models.load_sampler(loading), ["the cat", "the sky"], 3, sampling)
    from trl_rewards import Samples, load_reward

    for row, answers in zip(rows, drawn, strict=True):
        samples = Samples([row["question"]] * 3, [each.text for each in answers], columns={"gold": [row["gold"]] * 3})
        assert row["reference_rewards"] == pytest.approx(load_reward("rouge_l", references="gold").score(samples))

    # the column is read as PAR's references
    pipeline = Pipeline.from_recipe(Recipe.load(tmp_path / "recipe.yaml"))
    dataset = load_splits(str(tmp_path / "out.jsonl"))["train"].rename_column("question", "prompt")
    assert pipeline.missing_columns(dataset.column_names) == []
    again, _ = reference("--data", str(tmp_path / "out.jsonl"), out="again.jsonl")
    assert "has a column 'reference_rewards' already" in str(again.exception)


def test_an_interrupted_call_goes_on_with_what_it_sampled(reference, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_rewards.commands.reference.score_candidates", broken)
    reference("--n", "2")
    candidates = tmp_path / "out.jsonl.unfinished" / "candidates.jsonl"
    kept = candidates.read_text()
    assert len(kept.splitlines()) > 1
    monkeypatch.undo()
    monkeypatch.setattr("trl_rewards.models.sampling.LocalSampler.draw", broken)  # nothing is left to sample
    result, rows = reference("--n", "2")
    assert result.exit_code == 0, result.exception
    assert [len(row["reference_rewards"]) for row in rows] == [2, 2]


def test_several_sources_have_a_column_each_and_nothing_behind_them_runs():
    assert column_names(["rouge_l"]) == {"rouge_l": "reference_rewards"}
    assert column_names(["a", "b"]) == {"a": "a_reference_rewards", "b": "b_reference_rewards"}
    raw = {
        "rewards": [
            {"use": "rouge_l", "shape": [{"use": "par"}]},
            {"use": "length", "with": {"soft_limit": 1, "hard_limit": 2}},
        ],
        "shape": [{"use": "par"}],
        "combine": {"use": "min"},
        "advantage": {"use": "bnpo"},
    }
    pipeline = Pipeline.from_recipe(unshaped(Recipe.parse(raw, check_trl=False)))
    assert list(pipeline.components()) == ["rewards.rouge_l", "rewards.length", "combine"]


def test_a_source_with_an_only_if_scores_all_rows():
    raw = {
        "rewards": [
            {"use": "rouge_l", "timeout": 9, "only_if": {"source": "length", "at_least": 0, "otherwise": -5}},
            {"use": "length", "with": {"soft_limit": 1, "hard_limit": 2}},
        ]
    }
    recipe = Recipe.parse(raw, check_trl=False)
    assert unshaped(recipe).rewards[0].running == {"timeout": 9}
    assert "only_if" in recipe.rewards[0].running


def test_what_is_wrong_is_said_before_a_model_is_loaded(reference, tmp_path):
    result, _ = reference("--n", "0", "--limit", "0", "--model", "/no/model", out="out.txt")
    assert isinstance(result.exception, RecipeError)
    assert len(result.exception.problems) == 3
    result, _ = reference("--dataset.columns.prompt", "answer")
    assert "the dataset has no column 'answer'" in str(result.exception)
    assert not Path(tmp_path / "out.jsonl.unfinished").exists()
