import json
from pathlib import Path

import pytest
from trl_rewards_shaping.rlcr import (
    by_any,
    calibrated,
    most_confident,
    read_reply,
    vote_weights,
    weighted_vote,
)

from trl_rewards import Context, Failed, RewardError, load_reward
from trl_rewards.maths import auroc, brier, ece
from trl_rewards.testing import make_samples

CASES = {
    case["case"]: case
    for case in json.loads(Path(__file__).with_name("shaping_cases.json").read_text(encoding="utf-8"))["08_RLCR"]
}


def reply(answer, confidence, start="reason</think> "):
    return f"{start}<answer>{answer}</answer> <analysis>x</analysis> <confidence>{confidence}</confidence>"


def test_form_accuracy_and_brier_equal_the_authors_code():
    case = CASES["hotpot exact-match, format tabc"]
    texts, wanted = case["inputs"]["completions"], case["outputs"]
    samples = make_samples(texts, answer=[case["inputs"]["answer"]] * len(texts))
    scores = {name: load_reward("rlcr", measure=name).score(samples) for name in ("format", "accuracy", "brier")}
    assert scores["format"] == wanted["format"]
    assert scores["accuracy"] == wanted["accuracy"]
    assert scores["brier"] == pytest.approx(wanted["brier_reward_1_minus_sq"])
    halves = [sum(row) / 2 for row in zip(*scores.values(), strict=True)]
    assert halves == pytest.approx(wanted["weighted_total_0.5_0.5_0.5"])
    # the paper's reward is twice the weighted sum without the form, less 1, also for replies of another form
    rewards = load_reward("rlcr").score(samples)
    assert rewards == pytest.approx([a + b - 1 for a, b in zip(scores["accuracy"], scores["brier"], strict=True)])


def test_the_papers_values():
    given = CASES["paper reward"]["inputs"]
    values = [calibrated(c, q) for c, q in zip(given["correct"], given["conf"], strict=True)]
    assert values == CASES["paper reward"]["outputs"]["reward"]


@pytest.mark.parametrize("p", [0.0, 0.13, 0.5, 0.8, 1.0])
def test_the_reward_is_proper_and_bounded(p):
    """The best confidence is the chance of being right, and earns its square."""
    grid = [step / 100 for step in range(101)]
    means = [p * calibrated(1.0, q) + (1 - p) * calibrated(0.0, q) for q in grid]
    assert grid[max(range(101), key=means.__getitem__)] == p
    assert max(means) == pytest.approx(p**2)
    assert all(-1 <= calibrated(c, q) <= 1 for q in grid for c in (0.0, 1.0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (reply("Paris", "0.9"), ("Paris", 0.9)),
        (reply(" Paris\n", " 1 \n") + "\n\n", ("Paris", 1.0)),
        (reply("Paris", "1e-1", "I write <answer>Rome</answer> then\n</think>\n"), ("Paris", 0.1)),
        (reply("Paris", "90%"), None),
        (reply("Paris", "nan"), None),
        (reply("Paris", "-0.1"), None),
        (reply("Paris", ""), None),
        (reply("Paris", "0.9", ""), None),
        (reply("Paris", "0.9", "x</think> <answer>Rome</answer> "), None),  # two answers
        (reply("Paris", "0.9") + ".", None),
        (reply("Paris", "0.9").replace("<analysis>x</analysis> ", ""), None),
        ("", None),
    ],
)
def test_only_the_whole_form_is_read(text, found):
    assert read_reply(text) == found


def test_a_form_without_analysis_and_rows_without_a_reference():
    text = "x</think><answer>The Paris!</answer><confidence>0.5</confidence>"
    reward = load_reward("rlcr", analysis=False, answer="gold")
    samples = make_samples([text] * 4, gold=["paris", None, ["Rome", "Paris"], "Rome"])
    assert reward.score(samples) == [0.75, None, 0.75, -0.25]


def test_calibration_is_logged():
    logged = {}
    reward = load_reward("rlcr")
    reward.setup(Context(log_metric=logged.__setitem__))
    texts = [reply("Paris", q) for q in ("0.9", "0.8", "0.3")] + ["no form"]
    reward.score(make_samples(texts, answer=["Paris", "Rome", "Rome", "Paris"]))
    assert logged == {
        "rlcr/accuracy": pytest.approx(1 / 3),
        "rlcr/brier": pytest.approx((0.01 + 0.64 + 0.09) / 3),
        "rlcr/ece": pytest.approx((0.1 + 0.8 + 0.3) / 3),
        "rlcr/auroc": 1.0,
    }


def test_calibration_worked_by_hand():
    confidences, right = [0.05, 0.15, 0.15, 1.0, 0.9], [0.0, 1.0, 0.0, 1.0, 0.0]
    assert brier(confidences, right) == pytest.approx((0.0025 + 0.7225 + 0.0225 + 0 + 0.81) / 5)
    # bins: [0.05] off by 0.05; [0.15, 0.15] by 0.3 - 1; [0.9, 1.0] by 1.9 - 1
    assert ece(confidences, right) == pytest.approx((0.05 + 0.7 + 0.9) / 5)
    # right ones 0.15 and 1.0 against 0.05, 0.15, 0.9: 1.5 and 3 of six
    assert auroc(confidences, right) == pytest.approx(4.5 / 6)
    assert auroc([0.2, 0.9], [1.0, 1.0]) is None
    assert auroc([0.2, 0.2], [1.0, 0.0]) == 0.5


def test_votes_equal_the_recorded_ones():
    case = CASES["test-time: max-confidence, majority vote, confidence-weighted vote"]
    answers, confidences = case["inputs"]["answers"], case["inputs"]["confidence"]
    assert most_confident(answers, confidences) == case["outputs"]["max_confidence"]
    assert vote_weights(answers, confidences) == pytest.approx(case["outputs"]["vote_weights"])
    assert weighted_vote(answers, confidences) == case["outputs"]["confidence_weighted"]


def test_a_reference_of_nothing_is_none():
    gold = [float("nan"), "", " ", [], [None, ""], ["", "Paris"]]
    samples = make_samples([reply("Paris", "1")] * 6, answer=gold)
    assert load_reward("rlcr").score(samples) == [None] * 5 + [1.0]


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ([0.0, 1.0], 1.0),
        ([0.0, None, 0.0], 0.0),
        ([Failed("late"), 1.0], 1.0),
        ([0.0, Failed("late")], Failed("late")),
        ([None, None], None),
        ([], None),
    ],
)
def test_an_answer_is_right_by_any_reference_and_wrong_by_all(scores, found):
    assert by_any(scores) == found


@pytest.mark.slow
def test_answers_may_be_compared_as_mathematics():
    reward = load_reward("rlcr", match="math")
    try:
        samples = make_samples([reply("$\\frac{1}{2}$", "1"), reply("3", "1"), "x"], answer=[["2", "0.5"], "4", None])
        assert reward.score(samples) == [1.0, -1.0, None]
    except RewardError as error:
        pytest.skip(str(error))
    finally:
        reward.close()
