"""ProcessBench's F1, by hand and on its own data."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from trl_rewards_process.processbench import Figures, best_threshold, figures, first_error, harmonic_mean, main

CASES = json.loads((Path(__file__).parent / "process_cases.json").read_text())
DATA = Path(os.environ.get("TRL_REWARDS_TEST_DATA", "no data")) / "processbench"
ROWS = [[0.9, 0.2, 0.8], [0.9, 0.8, 0.7], [0.9, 0.95], [0.4, 0.9], None, [0.9, None, 0.1]]
LABELS = [1, 2, -1, -1, 0, 2]


def test_f1_is_the_harmonic_mean_of_two_accuracies():
    case = CASES["17_lessons.processbench_f1"]
    assert harmonic_mean(**{n.removeprefix("acc_"): v for n, v in case["inputs"].items()}) == pytest.approx(
        case["outputs"]["F1"]
    )
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_the_first_step_below_the_threshold_is_the_guess():
    assert [first_error(row, 0.5) for row in ROWS] == [1, -1, -1, 0, None, None]
    assert first_error([0.5, 0.4], 0.5) == 1
    # wrong: 1 of 4 found (rows 0), right: 1 of 2; two rows cannot be told
    assert figures(ROWS, LABELS, 0.5) == Figures(pytest.approx(1 / 3), 0.25, 0.5, 6, 2)


def test_the_best_threshold_is_better_than_all_others():
    rng = random.Random(0)
    rows, labels = [], []
    for _ in range(60):
        scores = [rng.choice([None] * (rng.random() < 0.05) + [rng.random()]) for _ in range(rng.randint(1, 6))]
        rows.append(scores)
        labels.append(rng.randint(-1, len(scores) - 1))
    found = figures(rows, labels, best_threshold(rows, labels)).f1
    every = sorted({score for row in rows for score in row if score is not None})
    assert found >= max(figures(rows, labels, threshold).f1 for threshold in [*every, 1.1])
    assert found > 0.2


def test_only_wrong_solutions_have_no_f1():
    with pytest.raises(ValueError, match="there are no right ones"):
        figures([[0.1]], [0], 0.5)
    with pytest.raises(ValueError, match="no row has scores"):
        best_threshold([None, None], [0, -1])


def test_the_command_scores_each_split_and_goes_on_where_it_stopped(token_classifier, tmp_path, capsys):
    for split in ("easy", "hard"):
        rows = [
            {"problem": f"{split} the cat", "steps": ["the cat sat", f"{count} times"], "label": count % 3 - 1}
            for count in range(6)
        ]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = f"{{use: prm, with: {{path: {token_classifier}, format: trl, dtype: float32}}}}"
    words = ["--data", str(tmp_path / "data"), "--reward", reward, "--out", str(tmp_path / "s.jsonl")]
    main([*words, "--batch-size", "4", "--search", "easy"])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["threshold", "F1", "easy", "hard", "mean"]
    lines = (tmp_path / "s.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 13
    (tmp_path / "s.jsonl").write_text("".join(lines[:6]) + lines[6][:9])  # interrupted
    main([*words, "--search", "easy"])
    assert capsys.readouterr().out == said
    scores = [json.loads(line)["scores"] for line in lines[1:]]
    reread = [json.loads(line)["scores"] for line in (tmp_path / "s.jsonl").read_text().splitlines()[1:]]
    assert reread == [pytest.approx(row, abs=1e-5) for row in scores]
    for wrong, message in (
        (["--search", "math"], "--search: no split 'math'"),
        (["--reward", "length"], "soft_limit"),
        (["--reward", "exact_match"], "'exact_match' scores no steps"),
        (["--data", "nowhere.jsonl"], "--data: no file"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="TRL_REWARDS_TEST_DATA has no processbench")
def test_the_benchmarks_rows_are_read_as_they_are():
    rows = [json.loads(line) for line in (DATA / "gsm8k.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    knowing = [[float(index != row["label"]) for index in range(len(row["steps"]))] for row in rows]
    assert figures(knowing, labels, 0.5) == Figures(1.0, 1.0, 1.0, 400, 0)
    assert figures([[1.0] * len(row["steps"]) for row in rows], labels, 0.5)[:3] == (0.0, 0.0, 1.0)
    assert sum(label != -1 for label in labels) == 207  # as in the benchmark's own evaluation
