"""`trl-rewards agree`: ties, holes, intervals, and the shapes of preference data."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from trl_rewards import RecipeError
from trl_rewards.cli import app
from trl_rewards.commands.agree import Compared, agreement, bootstrap, wilson

CODE = """
from trl_rewards import Reward

def length(completions, **columns):
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [None if "hole" in text else float(len(text)) for text in texts]

class First(Reward):
    scope = "group"
    def score(self, samples):
        assert samples.group_size == 2
        return [float(row % 2 == 0) for row in range(len(samples))]
"""


@pytest.fixture
def agree(tmp_path, write):
    """Runs the command with the reward `length` on rows; returns its result and what --json says."""
    code = write("r.py", CODE)

    def run(rows: list[dict], *words: str, reward: str = "length"):
        data = write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        command = ["agree", "--data", data, "--reward", f"{code}:{reward}", *words]
        result = CliRunner().invoke(app, command)
        found = json.loads(result.output) if "--json" in words and result.exit_code == 0 else {}
        return result, found

    return run


def compared(*rows: tuple[str, int, float | None, float | None]) -> list[Compared]:
    return [Compared(*row) for row in rows]


# --- the maths -------------------------------------------------------------------------------------------------------


def test_ties_count_half_and_missing_scores_nothing():
    found = agreement(
        compared(("a", 1, 2.0, 1.0), ("b", 2, 2.0, 1.0), ("c", 1, 1.0, 1.0), ("d", 1, None, 1.0), ("e", 2, 1.0, None))
    )
    assert found.share == 0.5
    assert (found.pairs, found.ties, found.missing, found.prompts) == (3, 1, 2, 3)


def test_strictly_a_tie_agrees_with_a_recorded_tie_alone():
    rows = compared(("a", 0, 1.0, 1.0), ("b", 0, 2.0, 1.0), ("c", 1, 1.0, 1.0), ("d", 1, 2.0, 1.0))
    assert agreement(rows, "strict").share == 0.5
    assert agreement(rows, "strict").ties == 2


def test_without_a_scored_pair_there_is_no_share():
    assert agreement(compared(("a", 1, None, 1.0)))[:4] == (None, None, None, 0)


def test_wilsons_interval_of_8_in_10():
    low, high = wilson(0.8, 10)  # Wilson (1927), worked by hand: centre 0.7167, half-width 0.2266
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(1.0, 5)[1] == 1.0
    assert agreement(compared(*((str(row), 1, 1.0 + (row < 8), 1.5) for row in range(10))))[:3] == (0.8, low, high)


def test_repeated_prompts_widen_the_interval():
    alone = [[float(row < 80)] for row in range(100)]
    together = [[float(row < 8)] * 10 for row in range(10)]
    narrow, wide = bootstrap(alone), bootstrap(together)
    assert math.isclose(narrow[1] - narrow[0], 2 * 1.96 * 0.04, rel_tol=0.1)  # sqrt(0.8 · 0.2 / 100)
    assert math.isclose(wide[1] - wide[0], 2 * 1.96 * 0.126, rel_tol=0.25)  # sqrt(0.8 · 0.2 / 10)
    assert bootstrap(together) == wide
    rows = compared(*((str(row % 10), 1, float(row % 10 < 8), 0.5) for row in range(100)))
    assert agreement(rows)[1:3] == wide


# --- the command -----------------------------------------------------------------------------------------------------


def test_chosen_and_rejected_with_a_table_by_category(agree):
    rows = [
        {"question": "p", "chosen": "long", "rejected": "x", "kind": "a"},
        {"question": "q", "chosen": "x", "rejected": "long", "kind": "b"},
        {"question": "r", "chosen": "long", "rejected": "hole", "kind": "b"},
        {"question": "s", "chosen": None, "rejected": "x", "kind": "b"},
        {"question": "t", "chosen": "same", "rejected": "size", "kind": "b"},
    ]
    result, _ = agree(rows, "--dataset.columns.prompt", "question", "--by", "kind")
    assert result.exit_code == 0, result.exception
    left_out, title, total, first, second, *_ = result.output.strip().splitlines()
    assert left_out == "left out: 1 without two answers"
    assert title.split() == ["agrees", "95", "%", "interval", "pairs", "ties", "missing"]
    assert total.split() == ["total", "50.0%", "12.5%", "to", "87.5%", "3", "1", "1"]
    assert first.split()[:2] == ["a", "100.0%"]
    assert second.split() == ["b", "25.0%", "2.7%", "to", "80.2%", "2", "1", "1"]


def test_two_answers_and_a_label(agree):
    rows = [
        {"prompt": str(row), "one": "long", "two": "x", "won": label}
        for row, label in enumerate(["A", "A", "B", "=", "both bad", None])
    ]
    words = ("--answers", "one", "two", "--label", "won", "--label-values", "A", "B", "=", "--json")
    _, found = agree(rows, *words)
    assert found["left_out"] == {"without two answers": 0, "without a label": 2, "recorded ties": 1}
    assert found["results"][0]["share"] == pytest.approx(2 / 3)
    _, found = agree(rows, *words, "--ties", "strict")
    assert found["results"][0]["share"] == 0.5
    assert found["results"][0]["pairs"] == 4


def test_every_source_and_the_total_are_told_apart(agree):
    rows = [{"prompt": "p", "chosen": "long", "rejected": "x", "references": ["x"]}] * 2
    _, found = agree(rows, "--reward", "{use: bleuberi, weight: 0.1}", "--json")
    shares = {each["reward"]: each["share"] for each in found["results"]}
    assert shares == {"total": 1.0, "length": 1.0, "bleuberi": 0.0}


def test_a_reward_that_likes_the_first_answer_agrees_by_chance(agree):
    rows = [{"prompt": str(row), "chosen": "a", "rejected": "b"} for row in range(400)]
    _, found = agree(rows, "--json", reward="First")
    assert abs(found["results"][0]["share"] - 0.5) < 0.1  # four standard deviations


def test_conversations_that_hold_their_prompt_are_read_as_trl_reads_them(agree):
    ask = {"role": "user", "content": "Say something."}
    rows = [
        {
            "chosen": [ask, {"role": "assistant", "content": "something"}],
            "rejected": [ask, {"role": "assistant", "content": "no"}],
        }
    ]
    _, found = agree(rows, "--json")
    assert found["results"][0]["share"] == 1.0


def test_kept_scores_are_not_made_again(agree, tmp_path):
    rows = [{"prompt": "p", "chosen": "long", "rejected": "x"}] * 3
    kept = tmp_path / "scores.jsonl"
    first, _ = agree(rows, "--out", str(kept))
    text = kept.read_text()
    assert len(text.splitlines()) == 1 + 6
    again, _ = agree(rows, "--out", str(kept))
    assert (again.output.strip(), kept.read_text()) == (first.output.strip(), text)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--answers", "chosn", "rejected"), "--answers: no column 'chosn', did you mean 'chosen'"),
        (("--label", "chosen"), "--label-values: 'chosen' says long, not model_a, model_b, tie; no pair is left"),
        (("--answers", "chosen", "chosen"), "--answers: must be different ones, got chosen, chosen"),
        (
            ("--label", "prompt", "--label-values", "a", "b", "b"),
            "--label-values: must be different ones, got a, b, b",
        ),
        (("--lable", "prompt"), "--lable: no option of this command and no key of a recipe, did you mean 'label'"),
        (("--batch-size", "0"), "--batch-size: at least 1, got 0"),
        (("--data", "./none.jsonl"), "--data: no file './none.jsonl' in "),
        (("--by", "kind"), "--by: no column 'kind'"),
        (("--ties", "none"), "--ties: must be one of half, strict"),
        (("--config", "quickstart"), "give --config RECIPE, or --reward once or more"),
        (("--split", "dev"), "--split: no split 'dev'"),
        (("--reward", "bleuberi"), "rewards.bleuberi needs dataset column 'references'"),
    ],
)
def test_it_says_what_is_wrong(words, wanted, agree):
    result, _ = agree([{"prompt": "p", "chosen": "long", "rejected": "x"}], *words)
    assert isinstance(result.exception, RecipeError), result.output
    assert wanted in str(result.exception)
