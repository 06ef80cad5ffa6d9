"""`trl-rewards select`: rows chosen by score, from a model's answers or a column, with what is left out counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trl_rewards import RecipeError
from trl_rewards.cli import app
from trl_rewards.commands.select import lacks, spread, thresholds
from trl_rewards.data import load_splits

ANSWERS = ["the cat sat on the mat", "a dog", "the cat sat", "", "the cat sat on a mat", None]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def select(tmp_path):
    """Runs the command on rows; returns its result and the written rows."""

    def run(rows: list[dict], *words: str, out: str = "out/train.jsonl"):
        data = tmp_path / "data" / "train.jsonl"
        data.parent.mkdir(exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["select", "--data", str(data.parent), "--out", str(tmp_path / out), *words]
        result = CliRunner().invoke(app, command)
        written = tmp_path / out
        return result, lines(written) if result.exit_code == 0 and written.suffix == ".jsonl" else []

    return run


def rows_with(answers=ANSWERS, **columns) -> list[dict]:
    wanted = {"references": ["the cat sat on the mat"]} | columns
    return [{"id": row, "prompt": f"p{row}", "answer_7b": text} | wanted for row, text in enumerate(answers)]


RECORDED = ("--completions", "answer_7b", "--reward", "bleuberi")


def test_the_hardest_rows_are_written_with_their_score_beside_their_columns(select, tmp_path):
    result, rows = select(rows_with(), *RECORDED, "--count", "3")
    assert result.exit_code == 0, result.exception
    assert [row["id"] for row in rows] == [2, 1, 3]  # lowest three, best first; no answer is not a bad one
    assert [round(row["bleuberi_score"], 4) for row in rows] == [0.3679, 0.0865, 0.0]
    assert set(rows[0]) == {"id", "prompt", "answer_7b", "references", "bleuberi_score"}
    assert "6 rows of" in result.output
    assert "1 without 'answer_7b' left out" in result.output
    assert "bleuberi of 3 chosen by hard: 0 to 0.3679" in result.output
    card = (tmp_path / "out/train.md").read_text()
    assert "data_files: train.jsonl" in card
    assert "`bleuberi_score`" in card
    assert (tmp_path / "out/train.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/train.jsonl.unfinished").exists()
    # and back in as a dataset, chosen from again
    again, rows = select(rows, *RECORDED, "--count", "1", "--selector", "easy", out="again.jsonl")
    assert "has a column 'bleuberi_score' already" in str(again.exception)


def test_parquet_other_splits_and_the_whole_score_of_several_rewards(select, tmp_path):
    test = tmp_path / "data" / "test.jsonl"
    test.parent.mkdir()
    test.write_text(json.dumps(rows_with(["held out"])[0]) + "\n")
    rewards = ("--reward", "bleuberi", "--reward", "{use: exact_match, weight: 0.5, with: {answer: gold}}")
    words = ("--completions", "answer_7b", *rewards, "--count", "2", "--copy", "test", "--selector", "easy")
    result, _ = select(rows_with(gold="a dog"), *words, out="out/train.parquet")
    assert result.exit_code == 0, result.exception
    found = load_splits(str(tmp_path / "out"))  # what a recipe's dataset_name reads
    assert found["test"]["id"] == [0]
    assert found["train"]["id"] == [0, 4]
    names = ("bleuberi_score", "exact_match_score")
    totals = [b + e / 2 for b, e in zip(*(found["train"][name] for name in names), strict=True)]
    assert found["train"]["total_score"] == pytest.approx(totals)


def test_rows_without_a_reference_or_prompt_are_left_out_and_holes_are_counted(select, write):
    code = "def f(completions, **columns):\n    return [None if 'hole' in c else float(len(c)) for c in completions]\n"
    rows = rows_with(["a", "hole", "ccc", "dd"])
    rows += [rows_with(["x"], references=value)[0] for value in ([], None, [""], ["a", " "])]
    rows += [rows_with(["y"])[0] | {"prompt": " "}]
    rewards = ("--reward", f"{write('r.py', code)}:f", "--reward", "{use: bleuberi, weight: 0}")
    words = ("--completions", "answer_7b", *rewards, "--count", "9")
    result, chosen = select(rows, *words)
    assert result.exit_code == 0, result.exception
    assert chosen[0]["total_score"] == chosen[0]["f_score"] == 3.0
    assert "4 without 'references' left out, 1 without 'prompt' left out" in result.output
    assert "4 scored, 1 of them without a score" in result.output
    assert [row["answer_7b"] for row in chosen] == ["ccc", "dd", "a"]
    _, chosen = select(rows, *words, "--selector", "{use: hard, with: {holes: true}}", out="holes.jsonl")
    assert [row["f_score"] for row in chosen] == [3.0, 2.0, 1.0, None]


def test_columns_of_the_release_become_prompt_and_references(select):
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello there."}]
    more = [{"role": "user", "content": "Again?"}, {"role": "assistant", "content": "No."}]
    rows = [
        {"id": 0, "messages": chat + more, "ref_a": "Hello there.", "ref_b": "Hello.", "said": "Hello there."},
        {"id": 1, "messages": chat, "ref_a": "Hello there.", "ref_b": None, "said": "Bye."},
        {"id": 2, "messages": chat, "ref_a": "Good day.", "ref_b": "Good day to you.", "said": "Bye."},
    ]
    words = ("--completions", "said", "--reward", "bleuberi", "--count", "5")
    result, chosen = select(rows, *words, "--references", "ref_a", "--references", "ref_b")
    assert result.exit_code == 0, result.exception
    assert "1 without 'references' left out" in result.output
    assert [row["id"] for row in chosen] == [0, 2]
    assert chosen[0]["references"] == ["Hello there.", "Hello."]
    assert chosen[0]["prompt"] == [{"role": "user", "content": "Hi?"}]
    assert "messages" not in chosen[0]
    _, chosen = select(rows, *words, "--references", "messages", out="other.jsonl")
    assert chosen[0]["references"] == ["Hello there."]


def test_several_answers_per_row_count_as_their_mean(select):
    groups = [["the cat sat on the mat", ""], ["the cat sat on the mat"] * 2]
    _, chosen = select(rows_with(groups), *RECORDED, "--count", "1")
    assert (chosen[0]["id"], chosen[0]["bleuberi_score"]) == (0, 0.5)
    uneven, _ = select(rows_with([["a"], ["a", "b"]]), *RECORDED, "--count", "1", out="x.jsonl")
    assert "every row of 'answer_7b' must have as many; there are [1, 2]" in str(uneven.exception)


def test_a_row_that_lacks_one_of_its_answers_is_left_out(select):
    result, chosen = select(rows_with([["a dog", None], ["a", "b"]]), *RECORDED, "--count", "2")
    assert "1 without 'answer_7b' left out" in result.output
    assert [row["id"] for row in chosen] == [1]


def test_a_total_that_is_not_the_score_is_written_beside_it(select):
    words = ("--completions", "answer_7b", "--reward", "{use: bleuberi, weight: -2}", "--count", "2")
    result, chosen = select(rows_with(), *words)
    assert [row["id"] for row in chosen] == [4, 0]  # the lowest totals are the highest scores
    assert [row["total_score"] for row in chosen] == [-2 * row["bleuberi_score"] for row in chosen]
    assert "total of these: -2 to 0" in result.output


def test_what_json_cannot_say_is_refused_before_anything_is_scored(select, tmp_path):
    from datetime import date

    from datasets import Dataset

    data = tmp_path / "dated.parquet"
    Dataset.from_list([row | {"day": date(2025, 1, row["id"] + 1)} for row in rows_with()]).to_parquet(data)
    words = ("--data", str(data), *RECORDED, "--count", "1")  # the last --data counts
    result, _ = select([], *words)
    assert "column 'day' holds date, which JSON lines cannot; give a name that ends in .parquet" in str(
        result.exception
    )
    assert not (tmp_path / "out").exists()
    result, _ = select([], *words, out="out/train.parquet")
    assert result.exit_code == 0, result.exception
    assert load_splits(str(tmp_path / "out"))["train"]["day"] == [date(2025, 1, 4)]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--count", "0", *RECORDED), "--count: at least 1, got 0"),
        (("--count", "1", *RECORDED, "--limit", "-1"), "--limit: at least 1, got -1"),
        (
            ("--count", "1", *RECORDED, "--model", "m"),
            "--completions: the answers are the column's, so leave out --model",
        ),
        (("--count", "1", *RECORDED, "--n", "4"), "so leave out --model and --n"),
        (("--count", "1", *RECORDED, "--copy", "train"), "--copy: 'train' would be written to "),
        (("--count", "1", *RECORDED, "--selecter", "easy"), "--selecter: no option of this command and no key of a"),
        (("--count", "1", *RECORDED, "--selecter", "easy"), "did you mean 'selector'"),
        (
            ("--count", "1", *RECORDED, "--references", "answer_7b", "--dataset.columns.references", "references"),
            "--references: dataset.columns.references is given too",
        ),
        (("--count", "1", "--reward", "bleuberi"), "--model: a model to write the answers is needed"),
        (("--count", "1", "--completions", "answer_7b"), "give --config RECIPE, or --reward once or more"),
        (("--count", "1", *RECORDED, "--selector", "hrad"), "unknown selector 'hrad', did you mean 'hard'"),
        (("--count", "1", *RECORDED, "--selector", "{use: hard, with: {hole: true}}"), "unknown option 'hole', did"),
        (("--count", "1", *RECORDED, "--selector", "{with: {}}"), "a component's name is needed"),
        (("--count", "1", "--reward", "bleuberi", "--completions", "answer"), "no column 'answer', did you mean"),
        (("--count", "1", *RECORDED, "--references", "reference"), "--references: no column 'reference', did you"),
        (("--count", "1", *RECORDED, "--copy", "dev"), "--copy: no split 'dev' (there is train)"),
        (("--count", "1", *RECORDED, "--split", "dev"), "--split: no split 'dev'"),
        (("--count", "1", *RECORDED, "--rewards.0.with.references", "golds"), "needs dataset column 'golds'"),
        (("--count", "1", "--reward", "blueberi", "--model", "m"), "unknown reward 'blueberi', did you mean"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_it_says_what_is_wrong_before_a_model_is_loaded(words, wanted, select):
    result, _ = select(rows_with(), *words)
    assert isinstance(result.exception, (RecipeError, LookupError)), result.output
    assert wanted in str(result.exception)


def test_a_file_that_is_there_is_not_written_over(select, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    result, _ = select(rows_with(), *RECORDED, "--count", "1", out="notes.jsonl")
    assert "notes.md exists; delete it, or give another name" in str(result.exception)
    assert (tmp_path / "notes.md").read_text() == "mine"


@pytest.mark.slow
def test_a_model_s_answers_are_kept_when_the_command_dies(select, policy_path, monkeypatch, tmp_path):
    rows = rows_with([""] * 6)
    words = ["--model", policy_path, "--dtype", "float32", "--max-new-tokens", "4", "--reward", "bleuberi"]
    words += ["--count", "2", "--batch-tokens", "16", "--selector", "{use: random}"]
    _, whole = select(rows, *words, out="whole.jsonl")
    assert len(whole) == 2
    with monkeypatch.context() as patched:
        from trl_rewards.models.sampling import WorkFile

        append, done = WorkFile.append, []

        def dies(self, value):
            append(self, value)
            done.append(value)
            if len(done) == 2:
                raise KeyboardInterrupt

        patched.setattr(WorkFile, "append", dies)
        select(rows, *words, out="later.jsonl")
    kept = (tmp_path / "later.jsonl.unfinished" / "candidates.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 2  # a header and two of the three batches
    result, again = select(rows, *words, out="later.jsonl")
    assert result.exit_code == 0, result.exception
    assert again == whole


def test_nothing_is_something_that_is_not_there():
    assert all(map(lacks, [None, float("nan"), "", " \n", [], ["a", None], ["a", ""]]))
    assert not any(map(lacks, ["a", 0, 0.0, False, ["a"], [{"role": "user", "content": ""}]]))


def test_a_threshold_is_where_a_whole_range_of_scores_ends():
    pool = [0.0, 0.1, 0.2, 0.3, 0.4]
    assert thresholds(pool, [0.1, 0.0]) == [0.1]
    assert thresholds(pool, [0.2, 0.3]) == [0.2, 0.3]
    assert thresholds(pool, [0.4, 0.1]) == []  # drawn at random
    assert thresholds(pool, pool) == []
    assert thresholds(pool, []) == []
    assert spread([1.0]) == "1"
