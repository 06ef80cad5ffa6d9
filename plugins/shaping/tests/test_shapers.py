"""Log-sigmoid centring, DLER's truncation penalty, HARMO's length term, DR-IRL's similarity and Ctrl-U's weight."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl_rewards_shaping.clause_similarity import coverage
from trl_rewards_shaping.ctrl_u import confidence, label_disagreement
from trl_rewards_shaping.dler import TruncationPenalty
from trl_rewards_shaping.harmo import HarmoLength
from trl_rewards_shaping.references import reference_level
from trl_rewards_shaping.transforming import LogSigmoidCentered, log_probability_good

from trl_rewards import (
    Context,
    Pipeline,
    Recipe,
    RecipeError,
    RewardError,
    Samples,
    Status,
    load_advantage,
    load_combiner,
    load_shaper,
)
from trl_rewards.testing import make_batch, make_samples, make_scores

CASES = json.loads(Path(__file__).with_name("shaping_cases.json").read_text(encoding="utf-8"))
NAN = math.nan


def case(paper, start=""):
    (found,) = [each for each in CASES[paper] if each["case"].startswith(start)]
    return found["inputs"], found["outputs"]


def shape(shaper, rewards, lengths=None, group_size=None, **columns):
    lengths = lengths or [1] * len(rewards)
    ids = [[5] * length for length in lengths]
    samples = Samples(["q"] * len(rewards), ["a"] * len(rewards), ids, columns, group_size)
    return shaper(torch.tensor(rewards), samples).tolist()


def test_the_level_of_references_by_mean_and_both_quantiles():
    references = torch.tensor([[0.0, 1.0, 2.0, NAN], [3.0, NAN, NAN, NAN]])
    assert reference_level(references, "mean").tolist() == [1.0, 3.0]
    # 0.85 of the way along 0, 1, 2, which is 1.7
    assert reference_level(references, "quantile_empirical").tolist() == pytest.approx([1.7, 3.0])
    assert reference_level(references, "quantile_normal", eps=0.0).tolist() == pytest.approx([2.0364334, 3.0])
    assert reference_level(references, "quantile_normal", quantile=0.5).tolist() == pytest.approx([1.0, 3.0])


def test_log_sigmoid_does_not_overflow_and_grows_with_the_reward():
    rewards = torch.tensor([-1000.0, -2.0, 0.0, 3.0, 1000.0])
    shaped = log_probability_good(rewards, torch.zeros(5))
    assert shaped[0] == -1000.0
    assert shaped[-1] == 0.0
    assert (shaped.diff() >= 0).all()
    assert shape(LogSigmoidCentered(constant=0.0, low=-5.0), [-1000.0, 0.0]) == pytest.approx([-5.0, math.log(0.5)])


def test_sums_of_log_sigmoids_prefer_what_is_good_in_every_way():
    one, other = (log_probability_good(torch.tensor(r), torch.zeros(2)) for r in ([-1.5, 1.0], [-0.5, -0.5]))
    assert one.sum().item() == pytest.approx(-2.01467, abs=1e-5)
    assert other.sum().item() == pytest.approx(-1.94815, abs=1e-5)  # and the sum of rewards is -1 against -0.5


def test_truncation_leaves_what_the_release_leaves_and_in_the_paper_nothing():
    given, wanted = case("04_DLER")
    rewards = [sum(tokens) for tokens in given["reward"]]
    lengths = [3 if finished else 9 for finished in given["stop_properly"]]
    release = shape(TruncationPenalty(target_length=5, compat="release"), rewards, lengths)
    assert release == pytest.approx([sum(tokens) for tokens in wanted["out"]])
    assert shape(TruncationPenalty(target_length=5), rewards, lengths) == [1.0, 0.0, 0.0, 0.0]
    assert shape(TruncationPenalty(target_length=5, factor=0.5), rewards, lengths) == [1.0, 0.5, 0.0, 0.0]


def test_a_completion_of_just_the_target_length_finished_if_it_ends_in_an_end_token():
    lengths = [4, 5, 6]
    assert shape(TruncationPenalty(target_length=5), [1.0, 1.0, NAN], lengths) == pytest.approx(
        [1.0, 0.0, NAN], nan_ok=True
    )
    assert shape(TruncationPenalty(target_length=5, end_tokens=[7, 5]), [1.0] * 3, lengths) == [1.0, 1.0, 0.0]
    of_the_policy = TruncationPenalty(target_length=5)
    of_the_policy.setup(Context(tokenizer=SimpleNamespace(eos_token_id=5)))
    assert shape(of_the_policy, [1.0] * 3, lengths) == [1.0, 1.0, 0.0]


def test_easy_prompts_have_a_shorter_target():
    shaper = load_shaper("truncation_penalty", target_length=8, difficulty="ratio", tiers={0.5: 4, 0.9: 2})
    assert shaper.reads() == ("ratio",)
    ratios = [0.4, 0.5, 0.95, None, 0.4]
    assert shape(shaper, [1.0] * 5, [6, 6, 3, 6, 9], ratio=ratios) == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_harmo_takes_off_what_is_shorter_than_the_right_answers_of_its_group():
    shaper = HarmoLength(max_penalty=0.5, tau=0.25)
    # right answers have 8 and 12 tokens, mean 10; 5 tokens lack half: 0.5 (1 - e^-2). The second group has none right
    rewards = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, NAN, 0.5]
    shaped = shape(shaper, rewards, [8, 12, 5, 20, 1, 2, 3, 4], group_size=4)
    wanted = [1 - 0.5 * (1 - math.exp(-0.8)), 1.0, -0.5 * (1 - math.exp(-2)), 0.0, 0.0, 0.0, NAN, 0.5]
    assert shaped == pytest.approx(wanted, nan_ok=True)


def test_harmo_adds_its_terms_and_divides_by_no_deviation():
    given, wanted = case("14_HARMO")
    scores = make_scores(
        [list(row) for row in zip(given["hybrid"], given["length"], given["format"], strict=True)], group_size=4
    )
    total = load_combiner("weighted_sum")(scores, make_samples(["t"] * 4))
    assert total.tolist() == pytest.approx(wanted["total"])
    assert load_advantage("center")(make_batch(total.tolist(), 4)).tolist() == pytest.approx(wanted["advantage"])


def routed(rows, names=("rule", "model", "form"), weights=(1.0, 1.0, 1.0), failed=(), **columns):
    """Totals of `hybrid_router`; `failed` are cells (row, source) of failures."""
    scores = make_scores(rows, weights=weights, group_size=2)._replace(names=names)
    for cell in failed:
        scores.status[cell] = Status.FAILED
    options = {"verifiable": "checked"} if columns else {}
    router = load_combiner("hybrid_router", rule="rule", model="model", **options)
    return router(scores, make_samples(["t"] * len(rows), **columns)).tolist()


def test_a_row_is_scored_by_the_rule_or_else_by_the_model_and_terms_are_added():
    given, wanted = case("14_HARMO")
    rule = [*given["hybrid"][:3], None]  # the last one cannot be verified
    model = [None, 0.9, None, given["hybrid"][3]]  # what it says of a verified row does not count
    terms = list(zip(given["length"], given["format"], strict=True))
    rows = [[r, m, *t] for r, m, t in zip(rule, model, terms, strict=True)]
    assert routed(rows, ("rule", "model", "length", "form"), [1.0] * 4) == pytest.approx(wanted["total"])
    assert routed([[1.0, None, 0.5], [None, 0.4, 0.5]], weights=[2.0, 0.5, 0.1]) == pytest.approx([2.05, 0.25])


def test_a_failed_rule_is_not_answered_by_the_model_nor_a_failed_model_by_the_terms():
    rows = [[None, 0.7, 0.5], [1.0, 0.7, None], [None, None, 0.5], [None, 0.5, 0.5]]
    # the second row has no form, and stands where its form would be on average: 1.0 + 0.5
    found = routed(rows, failed=[(0, 0), (2, 1)])
    assert found[0] != found[0]
    assert found[2] != found[2]
    assert [found[1], found[3]] == pytest.approx([1.5, 1.0])


def test_a_column_may_say_what_can_be_verified():
    rows = [[1.0, 0.7, 0.0], [0.0, 0.7, 0.0]]
    assert routed(rows, checked=[True, False]) == pytest.approx([1.0, 0.7])
    with pytest.raises(RewardError, match="column 'checked', row 1: wanted true or false, got 1"):
        routed(rows, checked=[True, 1])


def test_a_model_is_run_on_what_a_rule_says_nothing_of():
    recipe = {
        "rewards": [
            {"use": "exact_match", "as": "rule"},
            {
                "use": "length",
                "as": "model",
                "with": {"soft_limit": 0, "hard_limit": 10},
                "only_if": {"source": "rule", "missing": True},
            },
        ],
        "combine": {"use": "hybrid_router", "with": {"rule": "rule", "model": "model"}},
    }
    pipeline = Pipeline.from_recipe(Recipe.parse(recipe, check_trl=False))
    batch = pipeline.score(make_samples(["22", "23", "one two", "one"], answer=["22", "22", None, None]), group_size=2)
    assert batch.rewards.tolist() == pytest.approx([1.0, 0.0, -0.2, -0.1])
    assert pipeline.metrics["rewards/model/saved"] == 0.5
    with pytest.raises(RecipeError, match="combine: no source 'rm'; there is rule, model"):
        Pipeline.from_recipe(Recipe.parse(recipe, {"combine.with.model": "rm"}, check_trl=False))


def test_clauses_are_covered_as_in_the_notes():
    given, wanted = case("09_DRIRL", "W = ")
    found = coverage(torch.tensor(given["gen_clause_emb"]), torch.tensor(given["demo_clause_emb"]))
    assert found.item() == pytest.approx(wanted["W"])


def test_disagreement_of_labels_weights_as_the_authors_code():
    given, wanted = case("15_CtrlU", "u=KL")
    u = label_disagreement(torch.tensor(given["primary_logits"]), torch.tensor(given["aux_logits"]))
    assert u.tolist() == pytest.approx(wanted["u"], abs=1e-6)
    assert confidence(u).tolist() == pytest.approx(wanted["weight"], abs=1e-6)


def test_sources_that_disagree_count_less():
    given, wanted = case("15_CtrlU", "text-RL")
    rows = [list(row) for row in zip(given["r1"], given["r2"], strict=True)]
    scores = make_scores([*rows, [None, 0.7], [None, None]])
    logged = {}
    combiner = load_combiner("uncertainty_weight")
    combiner.setup(Context(log_metric=logged.__setitem__))
    samples = make_samples(["t"] * 4)
    total = combiner(scores, samples).tolist()
    assert total == pytest.approx([*wanted["shaped"], 0.7, NAN], nan_ok=True)
    assert logged == {"uncertainty_weight/disagreement": pytest.approx(1.6 / 3)}
    penalized = load_combiner("uncertainty_weight", mode="penalize", coefficient=0.5)(scores, samples)
    watched = load_combiner("uncertainty_weight")(scores._replace(weights=torch.tensor([1.0, 0.0])), samples)
    assert watched[0] == given["r1"][0]  # a source of weight 0 is no evaluation
    assert penalized[:3].tolist() == pytest.approx([1.0, 0.5, 0.7])


@pytest.mark.parametrize(
    ("kind", "name", "options", "says"),
    [
        (load_shaper, "logsigmoid_centered", {"quantile": 1.0}, "quantile must be between 0 and 1, got 1.0"),
        (load_shaper, "linear_length_penalty", {"free": -1}, "free and penalty must be at least 0, got -1"),
        (load_shaper, "truncation_penalty", {"factor": 2.0}, "factor must be in"),
        (load_shaper, "truncation_penalty", {"tiers": {0.5: 0}}, "lengths must be at least 1"),
        (load_shaper, "harmo_length", {"max_penalty": 1.0, "tau": 0.0}, "max_penalty and tau must be above 0"),
        (load_combiner, "uncertainty_weight", {"scale": -1.0}, "scale and coefficient must be at least 0"),
    ],
)
def test_wrong_options_are_refused(kind, name, options, says):
    with pytest.raises(RecipeError, match=says):
        kind(name, **options)
