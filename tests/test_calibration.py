"""Calibration finds the truth behind a distortion, refuses what says nothing, and knows its source again."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from typer.testing import CliRunner

from trl_rewards import Pipeline, Recipe, RecipeError, load_reward, load_shaper
from trl_rewards.calibration import (
    Calibration,
    Curve,
    calibration,
    fit,
    held_out,
    logistic,
    read_calibrations,
    refusal,
    rising_means,
    write_calibrations,
)
from trl_rewards.cli import app
from trl_rewards.maths import ece, kendall_in_groups, log_loss, reliability
from trl_rewards.report import write_report
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples

CODE = """
def words(completions, bonus=0.0, **columns):
    return [None if "hole" in text else len(text.split()) + bonus for text in completions]

def constant(completions, **columns):
    return [0.5] * len(completions)
"""
# The more words, the more often right.
LABELLED = [{"prompt": "p", "completion": "w " * (row % 5), "label": int(row % 5 + row % 3 > 3)} for row in range(40)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- the maths -------------------------------------------------------------------------------------------------------


def test_neighbours_that_fall_are_pooled_by_their_mean():
    assert rising_means([1, 2, 3, 4], [0, 1, 0, 1]) == ([1, 2, 3, 4], [0, 0.5, 0.5, 1])
    # equal scores are one point: 2 has the mean 0.5 of two labels, and pools with 3 to (0 + 1 + 0) / 3
    assert rising_means([3, 2, 2, 1], [0, 1, 0, 0]) == ([1, 2, 3], [0, pytest.approx(1 / 3), pytest.approx(1 / 3)])
    assert rising_means([1, 2, 3], [1, 0.5, 0]) == ([1, 3], [0.5, 0.5])


def test_a_sigmoid_distortion_is_undone():
    draw = random.Random(0)
    truth = [draw.uniform(0.02, 0.98) for _ in range(3000)]
    labels = [float(draw.random() < p) for p in truth]
    scores = [3 * math.log(p / (1 - p)) - 2 for p in truth]  # p = σ((s + 2) / 3)
    for method, near in (("platt", 0.03), ("isotonic", 0.05)):
        found = fit(method, scores, labels)(torch.tensor(scores)).tolist()
        assert sum(abs(q - p) for q, p in zip(found, truth, strict=True)) / len(truth) < near, method
        assert ece(held_out(method, scores, labels), labels) < 0.05 < ece([sigmoid(s) for s in scores], labels)
    slope, offset = logistic(scores, truth)  # grades are labels too, and these have no noise
    assert (slope, offset) == (pytest.approx(1 / 3, rel=0.01), pytest.approx(2 / 3, rel=0.01))


def test_a_temperature_is_found_of_logits_and_of_probabilities():
    truth = [row / 200 for row in range(1, 200)]
    logits = [math.log(p / (1 - p)) for p in truth]
    found = fit("temperature", [2.5 * x for x in logits], truth)
    assert (found.of_logits, found.slope) == (False, pytest.approx(1 / 2.5, rel=1e-4))
    found = fit("temperature", [sigmoid(2.5 * x) for x in logits], truth)
    assert (found.of_logits, found.slope) == (True, pytest.approx(1 / 2.5, rel=1e-4))
    assert found(torch.tensor([0.5])).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="use platt"):
        calibration(load_reward("repetition"), "temperature", [-2.0, 1.0] * 10, [0.0, 1.0] * 10)


def test_scores_that_part_the_labels_have_a_finite_slope():
    scores, labels = [float(row) for row in range(20)], [float(row >= 10) for row in range(20)]
    probabilities = fit("platt", scores, labels)(torch.tensor(scores))
    assert 0 < probabilities.min() < 0.1
    assert 0.9 < probabilities.max() < 1
    assert fit("isotonic", scores, labels).probabilities[0] == pytest.approx(1 / 22)  # not a certain 0


def test_scores_beyond_the_corners_are_held_to_them_and_holes_stay():
    curve = Curve(method="isotonic", scores=[0.0, 1.0, 3.0], probabilities=[0.25, 0.5, 1.0])
    found = curve(torch.tensor([-9.0, 0.0, 0.5, 2.0, 3.0, 99.0, math.nan])).tolist()
    assert found[:6] == [0.25, 0.25, 0.375, 0.75, 1.0, 1.0]
    assert math.isnan(found[6])


def test_measures_worked_by_hand():
    assert log_loss([0.5, 0.8], [1, 1]) == pytest.approx((math.log(2) - math.log(0.8)) / 2)
    assert log_loss([0.0], [1.0]) == pytest.approx(-math.log(1e-6))
    assert reliability([0.0, 0.05, 0.1, 1.0], [0, 1, 1, 1]) == [(2, 0.025, 0.5), (1, 0.1, 1.0), (1, 1.0, 1.0)]


def test_kendall_compares_rows_of_a_group_alone():
    one, other = torch.tensor([1.0, 2.0, 30.0, 40.0]), torch.tensor([1.0, 2.0, 0.0, 0.5])
    assert kendall_in_groups(one, other, 2) == pytest.approx(1.0)
    assert kendall_in_groups(one, -other, 2) == pytest.approx(-1.0)
    # a group of three pairs: two agree, one is tied in `other`: 2 / sqrt(3 · 2)
    assert kendall_in_groups(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 2]), 3) == pytest.approx(2 / 6**0.5)
    assert kendall_in_groups(one, torch.tensor([1.0, math.nan, 0.0, 0.0]), 2) is None


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        ([1.0] * 9, [0.0, 1.0] * 4 + [1.0], "9 rows with a score and a label, and at least 10"),
        ([*range(10)], [1.0] * 10, "every label is 1: add answers that are wrong"),
        ([*range(10)], [0.0] * 9 + [1.0], "1 right and 9 wrong answers"),
        ([0.5] * 10, [0.0, 1.0] * 5, "every score is 0.5"),
        ([*range(10)], [1.0] * 5 + [0.0] * 5, "are not right more often"),
    ],
)
@pytest.mark.parametrize("method", ["platt", "isotonic", "temperature"])
def test_what_says_nothing_is_refused_with_what_to_do(scores, labels, says, method):
    reward = load_reward("repetition")
    with pytest.raises(ValueError, match=says):
        calibration(reward, method, [score - 4.5 for score in scores] if "more often" in says else scores, labels)
    assert (refusal(scores, labels) is None) == ("more often" in says)


# --- the shaper and its file -----------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    """A file with the calibration of `repetition`, and that."""
    scores, labels = [row / 40 for row in range(40)], [float(row % 7 < row / 6) for row in range(40)]
    found = calibration(load_reward("repetition"), "isotonic", scores, labels)
    write_calibrations(tmp_path / "c.json", {"repetition": found})
    return str(tmp_path / "c.json"), found


def test_a_file_is_read_as_it_was_written_and_keeps_other_sources(kept, tmp_path):
    _, found = kept
    assert read_calibrations(tmp_path / "c.json") == {"repetition": found}
    write_calibrations(tmp_path / "c.json", {"other": found})
    assert set(read_calibrations(tmp_path / "c.json")) == {"repetition", "other"}
    (tmp_path / "c.json").write_text('{"sources": {"a": {"curve": {"method": "guess"}}}}')
    with pytest.raises(ValueError, match=r"holds no calibrations .*unknown method 'guess'"):
        read_calibrations(tmp_path / "c.json")


def test_the_shaper_stands_first_under_its_own_source_and_notices_a_change(kept, caplog):
    file, found = kept
    shaper = load_shaper("calibrated", path=file)
    source = Source("repetition", load_reward("repetition"), shape=[shaper])
    batch = Pipeline([source]).score(make_samples())
    assert torch.equal(batch.shaped[:, 0], found.curve(batch.scores.values[:, 0]).float())
    for sources, total, says in [
        ([Source("a", load_reward("repetition"), shape=[shaper])], [], "holds no curve of 'a'; there is repetition"),
        ([Source("a", load_reward("repetition"))], [shaper], "put it under `shape:` of that source"),
        ([Source("repetition", load_reward("repetition"), shape=[load_shaper("tanh"), shaper])], [], "behind tanh"),
        ([Source("repetition", load_reward("r1_format"), shape=[shaper])], [], "fitted to a Repetition"),
        ([Source("repetition", load_reward("repetition", ngram_size=2), shape=[shaper])], [], "ngram_size 'not set'"),
    ]:
        with pytest.raises(ValueError, match=says):
            Pipeline(sources, shape=total)
    warned = load_shaper("calibrated", path=file, changed="warn")
    Pipeline([Source("repetition", load_reward("repetition", ngram_size=2), shape=[warned])])
    assert "ngram_size 'not set' became 2; calibrate it again" in caplog.text


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, write):
    """Runs the command on rows with a recipe of `words` and `constant`."""
    code = write("r.py", CODE)
    recipe = write("r.yaml", f"rewards:\n  - use: '{code}:words'\n  - use: '{code}:constant'\n")

    def command(rows, *words):
        data = write("labelled.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return CliRunner().invoke(app, ["calibrate", recipe, data, *words])

    return command


def test_the_command_writes_curves_and_a_diagram_that_runs_show(run, tmp_path, write):
    done = run([*LABELLED, {"prompt": "p", "completion": "hole", "label": 1}])
    assert done.exit_code == 0, done.output
    assert "words: 1 labelled answers without a score left out" in done.output
    assert "constant: not calibrated: every score is 0.5" in done.output
    assert "shape: [{use: calibrated, with: {path: r.calibration.json}}]" in done.output
    kept = read_calibrations(tmp_path / "r.calibration.json")["words"]
    assert isinstance(kept, Calibration)
    assert (kept.n, kept.curve.method) == (40, "platt")
    assert kept.curve.slope > 0
    assert kept.after["ece"] < kept.before["ece"]
    assert kept.after["log_loss"] < kept.before["log_loss"]
    assert (tmp_path / "r.calibration.png").read_bytes().startswith(b"\x89PNG")

    source = {
        "use": f"{tmp_path}/r.py:words",
        "shape": [{"use": "calibrated", "with": {"path": "r.calibration.json"}}],
    }
    recipe = Recipe.parse({"rewards": [source]}, base_dir=str(tmp_path), check_trl=False)
    batch = Pipeline.from_recipe(recipe).score(make_samples(["w w", ""]))
    assert batch.rewards.tolist() == pytest.approx([sigmoid(kept.curve.slope * n + kept.curve.offset) for n in (2, 0)])
    changed = {**source, "use": "function", "as": "words", "with": {"path": "x.py:other"}}
    write("x.py", "def other(completions, **columns): return [0.0] * len(completions)")
    with pytest.raises(RecipeError, match=r"rewards.words.shape.0: .*the source has changed: path"):
        Pipeline.from_recipe(Recipe.parse({"rewards": [changed]}, base_dir=str(tmp_path), check_trl=False))

    (tmp_path / "run").mkdir()
    recipe.save(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert "the probability that their score stands for" in write_report(tmp_path / "run").read_text()
    assert (tmp_path / "run" / "plots" / "calibration.png").is_file()


def test_groups_have_lists_of_answers_and_labels(run, tmp_path):
    rows = [
        {
            "prompt": "p",
            "completion": [one["completion"], other["completion"]],
            "label": [one["label"], other["label"]],
        }
        for one, other in zip(LABELLED[::2], LABELLED[1::2], strict=True)
    ]
    rows[0]["label"][1] = None
    done = run(rows, "--source", "words", "--out", str(tmp_path / "c.json"), "--method", "isotonic")
    assert done.exit_code == 0, done.output
    assert read_calibrations(tmp_path / "c.json")["words"].n == 39


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [
        (LABELLED, ["--source", "wrds"], "no source 'wrds', did you mean 'words'"),
        (LABELLED, ["--label", "lable"], "--label: no column 'lable'"),
        (LABELLED, ["--source", "constant"], "constant: every score is 0.5"),
        (LABELLED, ["--method", "plat"], "--method: must be one of platt, isotonic, temperature"),
        ([{"prompt": "p", "completion": "a", "label": 2.5}], [], "row 0 has label 2.5; a label is 0 or 1"),
        ([{"prompt": "p", "completion": ["a", "b"], "label": [1]}], [], "row 0 has 1 labels for 2 completions"),
    ],
)
def test_what_cannot_be_calibrated_is_said(run, rows, words, says, tmp_path):
    done = run(rows, *words)
    assert says in str(done.exception), done.output
    assert not (tmp_path / "r.calibration.json").exists()
