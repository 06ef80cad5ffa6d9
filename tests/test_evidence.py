"""The report says what the logs show, with the right numbers, and is silent where they show nothing."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from trl_rewards.report import figures, page
from trl_rewards.report.drawing import draw
from trl_rewards.report.evidence import change, findings
from trl_rewards.report.run import read_run


def ramp(start: float, end: float, first: int, last: int, logs: int = 100) -> list[float]:
    """Steps 1 … logs: `start` until step `first`, `end` from step `last` on, a straight line between."""
    slope = (end - start) / (last - first)
    return [start + slope * min(max(step - first, 0), last - first) for step in range(1, logs + 1)]


@pytest.fixture
def run(tmp_path):
    def make(**columns: list[float]):
        """A run with these metrics, `__` in a name being a slash."""
        steps = range(1, max(map(len, columns.values())) + 1)
        columns = {name.replace("__", "/"): values for name, values in columns.items()}
        lines = [{"step": s} | {name: values[s - 1] for name, values in columns.items()} for s in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_run(tmp_path)

    return make


def held_out(logs: int = 100) -> dict[str, list[float]]:
    """What is logged of a source that is watched."""
    return {"rewards__exact_match__weight": [0.0] * logs, "rewards__exact_match__std": [0.5] * logs}


def harms(found) -> list[str]:
    return [finding.text for finding in findings(found) if finding.harm]


def test_a_reward_that_rises_while_the_held_out_source_falls_is_said_with_step_and_numbers(run):
    # Eleven logs are a tenth. The last window of the held-out source that is all 0.52 is that around step 55.
    found = run(
        reward=ramp(0.41, 0.80, 60, 90),
        rewards__exact_match__mean=ramp(0.52, 0.31, 60, 90),
        kl=ramp(0.1, 0.4, 60, 90),
        **held_out(),
    )
    assert harms(found) == [
        "After step 55 the reward rose from 0.41 to 0.80 while the held-out exact_match fell from 0.52 to 0.31. "
        "The KL to the reference was 0.10 nats per token by then."
    ]


@pytest.mark.parametrize(
    "named",
    [
        {
            "rewards": [
                {"use": "exact_match", "weight": 0},
                {"use": "reward_fusion", "with": {"source": "exact_match"}},
            ]
        },
        {"rewards": [{"use": "bleuberi", "only_if": {"source": "exact_match", "at_least": 1}}]},
        {"rewards": ["bleuberi"], "combine": {"use": "hybrid_router", "with": {"rule": "exact_match"}}},
        {"rewards": ["bleuberi"], "combine": {"use": "lagrangian", "with": {"limits": {"exact_match": 0.5}}}},
        {"rewards": ["bleuberi"], "filter": {"source": "exact_match"}},
    ],
)
def test_a_source_that_another_part_of_the_recipe_uses_is_not_called_held_out(run, named):
    columns = {"reward": ramp(0.4, 0.8, 60, 90), "rewards__exact_match__mean": ramp(0.5, 0.3, 60, 90)}
    found = run(**columns, **held_out())
    alone = yaml.safe_dump({"rewards": ["bleuberi", {"use": "exact_match", "weight": 0}]})
    assert len(harms(found._replace(recipe=alone))) == 1
    used = found._replace(recipe=yaml.safe_dump(named))
    assert findings(used) == []
    assert "proxy_gold" not in [plot.name for plot in figures.plots(used)]


def test_the_kl_of_kto_is_said_to_be_of_answers(run):
    found = run(kl=ramp(0.0, 8.0, 10, 90))
    said = {name: findings(found._replace(recipe=f"trainer: {name}"))[0].text for name in ("grpo", "kto")}
    assert "nats per token" in said["grpo"]
    assert "nats per answer" in said["kto"]
    plots = figures.plots(found._replace(recipe="trainer: kto"))
    assert "whole answers" in next(plot.caption for plot in plots if plot.name == "policy")


def test_a_held_out_source_that_rises_with_the_reward_is_no_harm(run):
    found = run(reward=ramp(0.4, 0.8, 10, 90), rewards__exact_match__mean=ramp(0.3, 0.5, 10, 90), **held_out())
    assert harms(found) == []
    assert findings(found)[0].text == "The reward went from 0.40 to 0.80, the held-out exact_match from 0.30 to 0.50."


def test_a_source_with_a_weight_is_not_held_out(run):
    found = run(reward=ramp(0.4, 0.8, 10, 90), rewards__a__mean=ramp(0.5, 0.3, 10, 90), rewards__a__weight=[0.5] * 100)
    assert findings(found) == []


def test_a_fall_that_is_small_beside_the_rows_is_not_spoken_of(run):
    # 0.04 is less than a tenth of the rows' deviation of 0.5.
    found = run(reward=ramp(0.4, 0.8, 60, 90), rewards__exact_match__mean=ramp(0.52, 0.48, 60, 90), **held_out())
    assert harms(found) == []


def test_noise_alone_is_evidence_of_nothing(run):
    generator = random.Random(0)
    said = 0
    for _ in range(50):
        noise = [[generator.gauss(1.0, 0.3) for _ in range(60)] for _ in range(4)]
        found = run(
            reward=[value + step / 30 for step, value in enumerate(noise[0])],  # it rises for certain
            rewards__exact_match__mean=noise[1],
            rewards__total__length_explained=[value - 1 for value in noise[2]],
            completions__repetition=noise[3],
            completions__mean_length=[100 * value for value in noise[2]],
            **held_out(60),
        )
        said += len(harms(found))
    assert said == 0


def test_length_that_explains_the_reward_is_said_from_where_it_stays(run):
    share, correlation = [0.0] * 40 + [0.8] * 60, [0.1] * 40 + [0.9] * 60
    found = run(rewards__total__length_explained=share, rewards__total__length_correlation=correlation)
    # The running mean over eleven logs is 0.8 · 7 / 11 = 0.51 around step 42, the first of which six of eleven
    # or more are 0.8 and the share is 0.5.
    (said,) = harms(found)
    assert said == (
        "Length explains 0.80 of the reward's variance among answers to one prompt since step 42: longer ones score "
        "higher."
    )


def test_shorter_answers_that_score_higher_are_called_so(run):
    found = run(rewards__total__length_explained=[0.6] * 40, rewards__total__length_correlation=[-0.8] * 40)
    assert harms(found)[0].endswith("since step 1: shorter ones score higher.")


def test_drift_of_length_and_repetition(run):
    found = run(completions__mean_length=ramp(100, 250, 20, 80), completions__repetition=ramp(0.05, 0.3, 20, 80))
    assert harms(found) == [
        "Completions grew from 100 to 250 tokens between the first and the last tenth of the logs.",
        "Repeated 4-grams rose from 0.05 to 0.30 of a completion's between the first and the last tenth of the logs.",
    ]


def test_a_little_more_length_and_repetition_is_not_spoken_of(run):
    found = run(completions__mean_length=ramp(100, 140, 20, 80), completions__repetition=ramp(0.05, 0.14, 20, 80))
    assert harms(found) == []


def test_groups_without_variance_and_disagreement(run):
    found = run(
        frac_reward_zero_std=[0.1] * 50 + [0.9] * 50,
        combine__disagreement=ramp(0.1, 0.3, 20, 80),
        rewards__ensemble__disagreement=ramp(0.1, 0.12, 20, 80),
    )
    # Around step 51 six of eleven are 0.9, in the mean 0.54; around step 50 five, 0.46.
    assert harms(found) == [
        "In 0.90 of the groups all answers got the same reward since step 51: nothing is learnt from these.",
        "The disagreement of the sources rose from 0.10 to 0.30 between the first and the last tenth of the logs: its "
        "members are further apart on what the policy writes.",
    ]


def test_of_few_logs_nothing_is_said(run):
    found = run(
        reward=ramp(0.4, 0.8, 2, 15, 19),
        rewards__exact_match__mean=ramp(0.5, 0.3, 2, 15, 19),
        completions__repetition=ramp(0.0, 0.9, 2, 15, 19),
        rewards__total__length_explained=[0.9] * 19,
        kl=ramp(0.0, 0.9, 2, 15, 19),
        **held_out(19),
    )
    assert findings(found) == []


def test_the_error_of_a_change_is_that_of_neighbours_not_of_the_trend():
    # Differences are +1, -1, … : the variance of one log is 1 / 2, of the difference of two means of three 1 / 3.
    found = change([0.0, 1.0] * 15)
    assert found.error == pytest.approx((2 * 0.5 / 3) ** 0.5)
    assert not found.sure


def test_the_page_has_the_evidence_the_alarms_and_curves_over_kl(tmp_path, run):
    found = run(
        reward=ramp(0.41, 0.80, 60, 90),
        reward_std=[0.3] * 100,
        rewards__exact_match__mean=ramp(0.52, 0.31, 60, 90),
        kl=ramp(0.01, 0.4, 5, 95),
        **held_out(),
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 70, "alarm": "kl above 0.3: it is 0.31", "metric": "kl"}) + "\n")
    found = read_run(tmp_path)
    text = page._page(found, [])
    assert "<li class=harm>Alarm at step 70: kl above 0.3: it is 0.31.</li>" in text
    assert "<li class=harm>After step 55 the reward rose from 0.41 to 0.80" in text
    assert "<li>The KL to the reference went from" in text
    assert "exact_match, held out" in text
    (plot,) = [plot for plot in figures.plots(found) if plot.name == "proxy_gold"]
    steps, over_kl = plot.panels
    assert (steps.marks, over_kl.marks) == ((70,), ())
    reward, gold = steps.lines
    # In standard deviations of the rows: 0.39 / 0.3 up, 0.21 / 0.5 down.
    assert reward.curve.values[-1] == pytest.approx(1.3)
    assert gold.curve.values[-1] == pytest.approx(-0.42)
    assert over_kl.lines[1].curve.values == gold.curve.values
    assert over_kl.lines[1].curve.steps[-1] == pytest.approx(0.4, abs=0.01)
    assert draw(plot).startswith(b"\x89PNG")


def test_a_run_without_signs_says_what_it_is(tmp_path, run):
    assert "No sign of over-optimisation that is looked for here" in page._page(run(reward=ramp(0.4, 0.8, 10, 90)), [])
    assert "What the logs show" not in page._page(run(reward=[0.1, 0.2]), [])
