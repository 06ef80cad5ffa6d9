"""Weights that change over a run."""

from __future__ import annotations

import math

import pytest

from trl_rewards.schedules import Schedule


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (0.5, {0.0: 0.5, 0.7: 0.5, 1.0: 0.5}),
        (-2, {0.0: -2.0, 1.0: -2.0}),
        ({"constant": 3}, {0.0: 3.0, 1.0: 3.0}),
        ({"linear": [1.0, 0.0]}, {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        ({"linear": (0, 2)}, {0.0: 0.0, 0.5: 1.0, 1.0: 2.0}),
        ({"cosine": [1.0, 0.0]}, {0.0: 1.0, 0.25: (1 + math.sqrt(0.5)) / 2, 0.5: 0.5, 1.0: 0.0}),
        ({"steps": {0: 1.0, 0.5: 0.25, 0.2: 2}}, {0.0: 1.0, 0.19: 1.0, 0.2: 2.0, 0.49: 2.0, 0.5: 0.25, 1.0: 0.25}),
    ],
    ids=str,
)
def test_a_weight_at_some_progress(value, at):
    schedule = Schedule.parse(value)
    assert {progress: schedule.at(progress) for progress in at} == pytest.approx(at)


def test_progress_outside_the_run_is_its_nearest_end():
    schedule = Schedule.parse({"linear": [1.0, 0.5]})
    assert (schedule.at(-1), schedule.at(7)) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("1", "must be a number or one of"),
        (True, "must be a number or one of"),
        (None, "must be a number or one of"),
        (float("nan"), "must be a number or one of"),
        (float("inf"), "must be a number or one of"),
        ([1, 0], "must be a number or one of"),
        ({"step": [1, 0]}, "must be a number or one of"),
        ({"linear": [1, 0], "cosine": [1, 0]}, "must be a number or one of"),
        ({}, "must be a number or one of"),
        ({"linear": 1}, r"linear takes two numbers \[start, end\], got 1"),
        ({"linear": [1, 0, 1]}, "linear takes two numbers"),
        ({"cosine": [1, "0"]}, "cosine takes two numbers"),
        ({"constant": [1]}, r"constant takes one number, got \[1\]"),
        ({"linear": [1, -0.1]}, "a schedule must not go below 0"),
        ({"cosine": [-1, 1]}, "a schedule must not go below 0"),
        ({"steps": [1, 0]}, "steps takes a mapping from shares of the run"),
        ({"steps": {0.5: 1}}, "steps takes a mapping from shares of the run, from 0"),
        ({"steps": {0: 1, 200: 2}}, "below 1, to the weight from there on"),
        ({"steps": {0: 1, 0.5: -1}}, "a schedule must not go below 0"),
    ],
    ids=str,
)
def test_a_wrong_weight_is_refused(value, complaint):
    with pytest.raises(ValueError, match=complaint):
        Schedule.parse(value)


def test_a_schedule_reads_as_what_it_is():
    assert str(Schedule.parse(0.5)) == "0.5"
    assert str(Schedule.parse({"linear": [1, 0.1]})) == "linear(1->0.1)"
    assert str(Schedule.parse({"steps": {0.5: 0.1, 0: 1}})) == "steps(0:1,0.5:0.1)"


def test_the_lowest_weight_of_a_schedule_is_what_combiners_are_asked_about():
    assert Schedule.parse({"steps": {0: 1, 0.25: 0, 0.5: 2}}).lowest == 0.0
    assert Schedule.parse({"linear": [1, 0.5]}).lowest == 0.5
