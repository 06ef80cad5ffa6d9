import json
import math
from pathlib import Path

import pytest
from trl_rewards_rewardanything import register_rewards
from trl_rewards_rewardanything.agreement import (
    distribution_match,
    kendall_tau,
    ndcg,
    nearness,
    pairwise_accuracy,
    places,
    ranking_agreement,
    score_variance,
    weighted_pairs,
)
from trl_rewards_rewardanything.training import (
    RewardAnythingAccuracy,
    RewardAnythingFormat,
    consistency,
    format_credit,
    read_truth,
)

from trl_rewards import Context, Samples, load_reward
from trl_rewards.testing import check_reward

FILE = Path(__file__).with_name("rewardanything_cases.json")
CASES = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
TRUTH = {"scores": {"model-1": 5, "model-2": 2}, "best-to-worst": ["model-1", "model-2"]}
PERFECT = f"<think>{'x' * 60}</think>{json.dumps(TRUTH)}"


@pytest.mark.parametrize("case", [c for c in CASES if c["id"].startswith("ra-wpp-")], ids=lambda case: case["id"])
def test_weighted_pairs_are_the_released_ones(case):
    assert weighted_pairs(case["input"]["pred"], case["input"]["gt"]) == pytest.approx(case["output"], abs=1e-12)


def test_weighted_pairs_convert_numeric_strings():
    assert weighted_pairs({"a": "3", "b": "3", "c": "1"}, {"a": 5, "b": 3, "c": 1}) == pytest.approx(1 - 1.5 / 11)


@pytest.mark.parametrize("case", [c for c in CASES if c["id"].startswith("ra-fmt-")], ids=lambda case: case["id"])
def test_format_credit_is_the_released_one(case):
    # The released function raises NameError on the first, complete case; by its own sums it is worth 1.
    wanted = 1.0 if case["id"] == "ra-fmt-01" else case["output"]
    truth = read_truth(case["input"]["ground_truth"])
    assert format_credit(case["input"]["predict"], list(truth.scores)) == pytest.approx(wanted)


def test_consistency_is_the_share_of_ranked_pairs_that_scores_do_not_contradict():
    scores = {"a": 5, "b": "3", "c": 3, "d": 4}
    assert consistency(scores, ["a", "b", "c"]) == 1.0  # equal scores contradict no order
    assert consistency(scores, ["b", "a", "c"]) == pytest.approx(2 / 3)
    assert consistency(scores, ["b", "a", "b", "unknown", 7]) == 0.0
    assert consistency(scores, ["a"]) == 1.0
    assert consistency({}, []) == 0.0


def test_format_scores_rows_by_the_column_of_true_scores():
    samples = Samples(["q"] * 3, [PERFECT, "garbage", PERFECT], columns={"truth": [TRUTH, json.dumps(TRUTH), None]})
    assert RewardAnythingFormat(scores="truth").score(samples) == [pytest.approx(1.0), 0.0, None]


def accuracy(text, truth, **options):
    columns = {"scores": [truth]}
    return RewardAnythingAccuracy(**options).score(Samples(["q"], [text], columns=columns))[0]


def reply(scores, ranking=None):
    return json.dumps({"scores": scores} | ({"best-to-worst": ranking} if ranking else {}))


def test_accuracy_of_the_truth_is_1_and_of_nothing_0():
    assert accuracy(PERFECT, TRUTH) == pytest.approx(1.0)
    assert accuracy("I can not say.", TRUTH) == 0.0
    assert accuracy(reply({"somebody": 5}), TRUTH) == 0.0


def test_accuracy_worked_by_hand():
    # Predicted 3, 3, 1 for true 5, 3, 1. Pairs: 1 - 1.5/11. Means 7/3 and 3, deviations 0.942809 and 1.632993.
    # Nearness: (0.5 + 1 + 1) / 3. Ranking: tau-b = 2 / sqrt(2 · 3); two are predicted best, and one of them is.
    pairs = 1 - 1.5 / 11
    distribution = 1 - 0.5 * ((3 - 7 / 3) / 4 + (math.sqrt(8 / 3) - math.sqrt(8 / 9)) / 2)
    ranking = 0.5 * (2 / math.sqrt(6) + 1) / 2 + 0.5 * 0.5
    predicted, true = {"a": 3, "b": 3, "c": 1}, {"a": 5, "b": 3, "c": 1}
    assert weighted_pairs(predicted, true) == pytest.approx(pairs)
    assert distribution_match(predicted, true) == pytest.approx(distribution)
    assert nearness(predicted, true) == pytest.approx(2.5 / 3)
    assert ranking_agreement(predicted, true) == pytest.approx(ranking)
    mean = (pairs + distribution + 2.5 / 3 + ranking) / 4
    assert accuracy(reply(predicted), {"scores": true}) == pytest.approx(mean)
    weights = {"pair_weight": 1.0, "distribution_weight": 0.0, "nearness_weight": 3.0, "ranking_weight": 0.0}
    assert accuracy(reply(predicted), true, **weights) == pytest.approx((pairs + 3 * 2.5 / 3) / 4)


def test_scoring_fewer_candidates_never_pays():
    # The released pair measure alone gives 1.0 to a reply that scores one candidate.
    assert accuracy(reply({"model-1": 5}), TRUTH) < accuracy(reply({"model-1": 5, "model-2": 4}), TRUTH)
    assert accuracy(reply({"model-1": 5}), TRUTH) <= 0.5


def test_a_stated_ranking_breaks_ties_on_both_sides():
    tied = {"model-1": 3, "model-2": 3}
    first, second = ["model-1", "model-2"], ["model-2", "model-1"]
    truth = {"scores": tied, "best-to-worst": first}
    assert accuracy(reply(tied, first), truth) == pytest.approx(1.0)
    assert accuracy(reply(tied, second), truth) == pytest.approx(0.75)
    rows = Samples(["q"], [reply(tied, second)], columns={"scores": [tied], "order": [second]})
    assert RewardAnythingAccuracy(ranking="order").score(rows) == [pytest.approx(1.0)]


def test_a_row_without_truth_has_no_opinion():
    for truth in (None, "", "not json", {}, {"scores": {}}, [], 3, {"model-1": None}):
        assert accuracy(PERFECT, truth) is None


def test_names_that_datasets_fills_up_with_none_are_left_out():
    truth = read_truth({"scores": {"model-1": 5, "model-2": None, "model-3": 1}})
    assert truth.scores == {"model-1": 5.0, "model-3": 1.0}


def test_accuracy_logs_each_measure_once_per_batch():
    reward, logged = RewardAnythingAccuracy(), []
    reward.__name__ = "accuracy_of_judge"
    reward.setup(Context(log_metric=lambda name, value: logged.append((name, value))))
    reward.score(Samples(["q"] * 2, [PERFECT, "nothing"], columns={"scores": [TRUTH, TRUTH]}))
    assert logged == [
        (f"accuracy_of_judge/{name}", 0.5) for name in ("coverage", "pairs", "distribution", "nearness", "ranking")
    ]


def test_weights_that_make_no_mean_are_refused():
    with pytest.raises(ValueError, match="weights must not be negative"):
        RewardAnythingAccuracy(pair_weight=-1.0)
    with pytest.raises(ValueError, match="one must be positive"):
        RewardAnythingAccuracy(pair_weight=0.0, distribution_weight=0.0, nearness_weight=0.0, ranking_weight=0.0)


@pytest.mark.parametrize("name", ["rewardanything_format", "rewardanything_accuracy"])
def test_training_rewards_keep_the_contract(name):
    reward = load_reward(register_rewards()[name])
    check_reward(reward, scores=[TRUTH, json.dumps(TRUTH), None, {}, {"model-1": 1}, "x"])


def test_places_go_by_score_then_ranking_and_are_shared_where_nothing_tells():
    scores = {"a": 3, "b": 5, "c": 3, "d": 1}
    assert places(scores) == {"b": 0.0, "a": 1.5, "c": 1.5, "d": 3.0}
    assert places(scores, ["d", "c", "a", "b"]) == {"b": 0.0, "c": 1.0, "a": 2.0, "d": 3.0}
    assert places(scores, ["c"]) == places(scores)
    assert places({"a": 3}) == {"a": 0.0}


def test_kendall_tau_by_hand():
    assert kendall_tau([1, 2, 3], [1, 2, 3]) == 1.0
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert kendall_tau([1, 1], [2, 2]) == 1.0
    assert kendall_tau([1, 1], [1, 2]) == 0.0


def test_benchmark_measures_by_hand():
    true = {"a": 5, "b": 3, "c": 3, "d": 1}
    predicted = {"a": 4, "b": 4, "c": 2, "d": 3}
    # Pairs that differ: ab tied, ac right, ad right, bd right, cd wrong.
    assert pairwise_accuracy(predicted, true) == pytest.approx(3.5 / 5)
    assert pairwise_accuracy(predicted, true, ranking=["a", "b"]) == pytest.approx(4 / 5)
    assert pairwise_accuracy({"a": 1}, {"a": 1}) is None
    discount = [1 / math.log2(place + 2) for place in range(4)]
    best = 5 * discount[0] + 3 * discount[1] + 3 * discount[2] + discount[3]
    found = (5 + 3) * (discount[0] + discount[1]) / 2 + discount[2] + 3 * discount[3]
    assert ndcg(predicted, true) == pytest.approx(found / best)
    assert ndcg(true, true) == pytest.approx(1.0)
    assert ndcg({}, {}) is None
    assert score_variance(predicted) == pytest.approx(0.6875)
    assert score_variance({}) is None
