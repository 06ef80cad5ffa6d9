"""Combiners against recorded numbers and numbers worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from trl_rewards_ensembles.armorm import debiased, gates, verbosity_penalties
from trl_rewards_ensembles.harmonic import harmonic
from trl_rewards_ensembles.lagrangian import descend, mixing_weights, multiplier
from trl_rewards_ensembles.mean_minus_std import mean_minus_std
from trl_rewards_ensembles.uwo import uwo

from trl_rewards import Pipeline, Recipe, RecipeError, load_combiner, load_reward
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples, make_scores

CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
NAN = float("nan")


def combine(name, values, weights=None, group_size=1, samples=None, **options):
    combiner = name if not isinstance(name, str) else load_combiner(name, **options)
    samples = samples or make_samples(completions=["a"] * len(values))
    return combiner(make_scores(values, weights, group_size), samples).tolist()


def close(wanted, **tolerance):
    return pytest.approx(wanted, nan_ok=True, **({"abs": 1e-6} | tolerance))


# --- members of an ensemble ------------------------------------------------------------------------------------------

MATRIX = CASES["01_ensemble.matrix"]


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("mean", {}, "mean"),
        ("median", {}, "median"),
        ("min", {}, "min"),
        ("max", {}, "max"),
        ("mean_minus_std", {}, "mean_minus_std0"),
        ("uwo", {}, "uwo0"),
    ],
)
def test_members_are_combined_as_recorded(name, options, key):
    values = MATRIX["inputs"]["scores[B,M]"]
    assert combine(name, values, **options) == close(MATRIX["outputs"][key])


def test_both_deviations_are_as_recorded():
    case = CASES["01_ensemble.aggregators"]
    row, wanted = torch.tensor([case["inputs"]["scores"]]), case["outputs"]
    assert mean_minus_std(row).item() == close(wanted["mean_minus_std_ddof0"])
    assert mean_minus_std(row, ddof=1).item() == close(wanted["mean_minus_std_ddof1"])
    assert uwo(row, 0.5, ddof=1).item() == close(wanted["UWO_0.5_ddof1(PPO code of tlc4418)"])


def test_the_worst_member_is_the_releases_wco():
    case = CASES["01_ensemble.get_ensemble_score"]
    first, second = (
        dict(zip(rows[0]["answers"], rows[0]["proxy_scores"], strict=True)) for rows in case["inputs"]["datasets"]
    )
    found = combine("min", [[first[answer], second[answer]] for answer in ("a", "b")])
    assert found == close(case["outputs"][0]["proxy_scores"])


def test_a_coefficient_of_0_is_the_mean_and_not_1():
    assert combine("uwo", [[1.0, 2.0, 4.0]], coef=0.0) == close([7 / 3])
    assert combine("mean_minus_std", [[1.0, 2.0, 4.0]], coef=0.0) == close([7 / 3])


@pytest.mark.parametrize("name", ["uwo", "mean_minus_std"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_one_member_disagrees_with_nobody(name, ddof):
    assert combine(name, [[1.5], [None]], ddof=ddof) == close([1.5, NAN])
    assert combine(name, [[1.5, None], [None, None]], ddof=ddof) == close([1.5, NAN])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("uwo", 2.0 - 0.5), ("mean_minus_std", 1.0), ("max", 3.0), ("trimmed", 2.0)],
)
def test_a_hole_is_not_a_zero(name, wanted):
    assert combine(name, [[1.0, None, 3.0]]) == close([wanted])


def test_trimmed_takes_the_outer_ones_of_what_is_there():
    rows = [[9.0, 1.0, 2.0, 3.0, -50.0], [9.0, None, 2.0, 3.0, 1.0], [None] * 5]
    assert combine("trimmed", rows, share=0.2) == close([2.0, 3.75, NAN])
    assert combine("trimmed", rows, share=0.4) == close([2.0, 2.5, NAN])  # floor(0.4 · 4) is 1
    assert combine("trimmed", rows, share=0.0) == close([-7.0, 3.75, NAN])


def test_members_have_no_weights_but_0_watches():
    assert combine("uwo", [[1.0, 2.0, 4.0, 99.0]], weights=[1, 1, 1, 0]) == close(MATRIX["outputs"]["uwo0"][:1])
    with pytest.raises(ValueError, match="'uwo' knows no negative weight"):
        load_combiner("uwo").check_weights([1.0, -1.0])


# --- log_and and harmonic --------------------------------------------------------------------------------------------


def test_log_and_prefers_the_balanced_answer_where_a_sum_does_not():
    margins = [[-1.5, 1.0], [-0.5, -0.5]]
    assert [sum(row) for row in margins] == [-0.5, -1.0]
    wanted = close([-2.0146749, -1.9481540])
    assert combine("log_and", margins, of="margins") == wanted
    logs = logsigmoid(torch.tensor(margins))
    assert combine("log_and", logs.tolist()) == wanted
    assert combine("log_and", logs.exp().tolist(), of="probabilities") == wanted


def test_log_and_of_a_hopeless_margin_is_finite():
    assert combine("log_and", [[-1000.0, 0.0]], of="margins") == close([-1000.0 - math.log(2)], abs=1e-3)


def test_log_and_does_not_take_a_hole_for_certain():
    # Both rows of a group stand at -1 in the one source; the other's hole must not make the second the better.
    assert combine("log_and", [[-1.0, -2.0], [-1.0, None]], group_size=2) == close([-3.0, -3.0])
    assert combine("log_and", [[-1.0, -2.0], [None, None]], group_size=2) == close([-3.0, NAN])


@pytest.mark.parametrize(
    ("of", "value", "wanted"),
    [
        ("log_probabilities", 0.5, "at most 0; with raw rewards set of: margins"),
        ("probabilities", -0.5, "from 0 to 1"),
        ("probabilities", 1.5, "from 0 to 1"),
    ],
)
def test_log_and_refuses_what_is_none_of_it(of, value, wanted):
    with pytest.raises(ValueError, match=f"source 'b' gives {value:g}, and log_and wants .*{wanted}"):
        combine("log_and", [[value, value]], weights=[0, 1], of=of)


def test_log_and_of_a_probability_that_underflowed_is_finite_and_lowest():
    tiny = math.log(torch.finfo(torch.float32).tiny)
    found = combine("log_and", [[0.0, 1.0], [1e-30, 1.0], [None, None]], group_size=3, of="probabilities")
    assert found == close([tiny, math.log(1e-30), NAN], abs=1e-4)


@pytest.mark.parametrize("case", CASES["18_rpo"], ids=lambda case: str(case["inputs"]["lambda"]))
def test_harmonic_equals_the_authors_code(case):
    inputs = case["inputs"]
    rows = list(zip(inputs["cos_image_image"], inputs["cos_text_image"], strict=True))
    share = inputs["lambda"]
    assert combine("harmonic", rows, weights=[share, 1 - share], low=-1.0) == close(case["outputs"]["reward"])
    tripled = combine("harmonic", rows, weights=[3 * share, 3 - 3 * share], low=-1.0)
    assert tripled == close(case["outputs"]["reward"])


def test_harmonic_rises_with_every_score_and_is_0_with_any():
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps)
    found = harmonic(grid, torch.tensor([0.3, 0.7])).view(21, 21)
    assert (found.diff(dim=0) >= 0).all()
    assert (found.diff(dim=1) >= 0).all()
    assert found[0].max() < 1e-7
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-7


def test_harmonic_leaves_holes_out_and_refuses_what_is_out_of_range():
    assert combine("harmonic", [[0.5, None], [None, None], [0.5, 0.25]]) == close([0.5, NAN, 1 / 3])
    with pytest.raises(ValueError, match=r"needs scores in \[0, 1\], but 'b' has -0.5"):
        combine("harmonic", [[0.5, -0.5]])


# --- lagrangian ------------------------------------------------------------------------------------------------------


def test_mixture_and_step_equal_the_recorded_ones():
    case = CASES["13_constrained"]
    inputs, wanted = case["inputs"], case["outputs"]
    found = [multiplier(raw, "mu") for raw in inputs["lambda_raw"]]
    assert found == close(wanted["lambda_squashed"])
    combiner = load_combiner("lagrangian", thresholds=dict(zip("ab", inputs["thresholds"], strict=True)), form="mu")
    state = {"raw": dict(zip("ab", inputs["lambda_raw"], strict=True)), "velocity": {"a": 0.0, "b": 0.0}}
    combiner.load_state_dict(state)
    rows = [[*row, kl] for row, kl in zip(inputs["constraint_adv"], inputs["kl_adv"], strict=True)]
    assert combine(combiner, rows) == close(wanted["mixed_adv"])
    excess = [mean - at for mean, at in zip(inputs["mean_return_to_go"], inputs["thresholds"], strict=True)]
    assert sum(s * over for s, over in zip(found, excess, strict=True)) == close(wanted["lagrange_loss"])
    raw, _ = descend(inputs["lambda_raw"], [0.0, 0.0], excess, "mu", lr=0.1, momentum=0.1, max_norm=0.5)
    assert raw == close(wanted["lambda_raw_next"])


def test_mixture_and_step_of_normalised_streams_equal_the_recorded_ones():
    case = CASES["31_constrained.mixed_advantage"]
    inputs, wanted = case["inputs"], case["outputs"]
    found = [multiplier(raw, "mu") for raw in inputs["lagrange_raw"]]
    assert found == close(wanted["sigmoid"])
    kl = torch.tensor(inputs["A_kl(normalised)"])[:, None]
    streams = torch.cat([torch.tensor(inputs["A_constraint(normalised)"]), kl], dim=1).double()
    total = (streams * mixing_weights(torch.ones(3), [0, 1], found)).sum(dim=1)
    assert total.tolist() == close(wanted["mixed"])
    excess = [mean - at for mean, at in zip(inputs["mean_reward_to_go"], inputs["thresholds"], strict=True)]
    assert sum(s * over for s, over in zip(found, excess, strict=True)) == close(wanted["lagrange_loss"])
    raw, velocity = descend(inputs["lagrange_raw"], [0.0] * 2, excess, "mu", lr=0.01, momentum=0.1, max_norm=0.5)
    assert velocity == close(wanted["grad_raw"])
    assert raw == close(wanted["after_sgd_step_lr.01(momentum buf=grad first step)"])


@pytest.mark.parametrize("form", ["mu", "xi", "plain"])
def test_a_multiplier_rises_below_its_threshold_and_falls_above(form):
    combiner = load_combiner("lagrangian", thresholds={"a": 0.5, "b": 0.5}, form=form)
    start = dict(combiner.raw)
    for _ in range(60):
        combine(combiner, [[0.0, 1.0], [0.2, 0.9]], group_size=2)
    assert combiner.raw["a"] > start["a"]
    assert combiner.raw["b"] < start["b"]
    low = multiplier(combiner.raw["b"], form)
    assert low < 0 if form == "xi" else low == 0 if form == "plain" else 0 < low < 0.5


def test_the_gradient_is_limited():
    _, velocity = descend([0.0], [0.0], [1000.0], "xi", lr=0.1, momentum=0.0, max_norm=0.5)
    assert velocity == close([0.5])


def test_total_is_worked_by_hand_and_the_objective_has_what_multipliers_leave():
    # a - group mean is (-0.5, 0.5, -1, 1), of deviation sqrt(2.5 / 3); c, the objective, is twice its reverse.
    rows = [[0.0, 1.0], [1.0, -1.0], [0.0, 2.0], [2.0, -2.0]]
    unit = [value / math.sqrt(2.5 / 3) for value in (-0.5, 0.5, -1.0, 1.0)]
    combiner = load_combiner("lagrangian", thresholds={"a": 10.0}, form="mu", lr=0.4, momentum=0.0)
    assert combine(combiner, rows, group_size=2) == close([0.0] * 4)  # σ(0) = 1 - σ(0)
    raw = 0.4 * 0.5  # the gradient's norm, 0.25 · 9.25, is limited to 0.5
    share = 1 / (1 + math.exp(-raw))
    assert combiner.raw["a"] == close(raw)
    assert combine(combiner, rows, group_size=2) == close([(share - (1 - share)) * value for value in unit])


def test_without_a_constrained_source_in_use_the_objective_has_its_own_weights():
    combiner = load_combiner("lagrangian", thresholds={"a": 1.0})
    found = combine(combiner, [[5.0, 0.0], [3.0, 1.0]], weights=[0, 2], group_size=2)
    assert found == close([-math.sqrt(2), math.sqrt(2)])  # ∓ 0.5 over a deviation of sqrt(0.5), twice
    assert combiner.raw == {"a": 0.0}


def test_constant_sources_move_multipliers_and_nothing_else():
    combiner = load_combiner("lagrangian", thresholds={"a": 1.0, "b": 0.0}, form="mu")
    assert combine(combiner, [[0.3, None]] * 4, group_size=2) == [0.0] * 4
    assert combiner.raw["a"] > 0
    assert combiner.raw["b"] == 0  # no score, no step


def test_groups_of_one_are_compared_over_the_batch():
    combiner = load_combiner("lagrangian", thresholds={"a": 1.0}, form="mu")
    found = combine(combiner, [[0.0], [1.0]])
    assert found == close([-0.5 * math.sqrt(0.5), 0.5 * math.sqrt(0.5)])


def test_multipliers_do_not_depend_on_how_rows_lie_and_resume_exactly():
    rows = torch.rand(24, 2, generator=torch.Generator().manual_seed(0)).tolist()
    options = {"thresholds": {"a": 0.4, "b": 0.6}}
    plain, permuted = load_combiner("lagrangian", **options), load_combiner("lagrangian", **options)
    order = [*range(12, 24), *range(12)]  # another rank's rows first
    for _ in range(3):
        combine(plain, rows, group_size=4)
        combine(permuted, [rows[row] for row in order], group_size=4)
    assert permuted.raw == close(plain.raw, abs=1e-12)
    resumed = load_combiner("lagrangian", **options)
    resumed.load_state_dict(json.loads(json.dumps(plain.state_dict())))
    assert combine(resumed, rows, group_size=4) == combine(plain, rows, group_size=4)
    assert resumed.state_dict() == plain.state_dict()
    with pytest.raises(ValueError, match=r"the checkpoint has multipliers of a, b, this recipe of a$"):
        load_combiner("lagrangian", thresholds={"a": 1.0}).load_state_dict(plain.state_dict())


def test_a_pipeline_learns_multipliers_while_training_only():
    sources = [Source(name, load_reward("length", soft_limit=2, hard_limit=5)) for name in ("a", "b")]
    pipeline = Pipeline(sources, load_combiner("lagrangian", thresholds={"a": 0.5}))
    samples = make_samples()
    with pipeline.frozen():
        pipeline.score(samples, group_size=2)
    assert pipeline.state_dict()["combine"]["raw"] == {"a": 0.0}
    pipeline.score(samples, group_size=2)
    assert pipeline.state_dict()["combine"]["raw"]["a"] > 0


@pytest.mark.parametrize(
    ("combiner", "message"),
    [
        (
            "{use: lagrangian, with: {thresholds: {helpful: 1.0}}}",
            "combine: thresholds: no source 'helpful'; there is l",
        ),
        ("{use: armorm, with: {verbosity: words}}", "combine: verbosity: no source 'words'; there is l"),
    ],
)
def test_a_source_that_is_not_there_is_named_before_a_model_loads(combiner, message, write):
    reward = "{use: length, as: l, with: {soft_limit: 2, hard_limit: 5}}"
    path = write("recipe.yaml", f"trainer: grpo\nrewards: [{reward}]\ncombine: {combiner}\n")
    with pytest.raises(RecipeError, match=message):
        Pipeline.from_recipe(Recipe.load(path, check_trl=False))


# --- armorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["0.028", "0.03"])
def test_penalties_equal_the_authors_code(threshold):
    case = CASES[f"09_armorm.verbosity_penalty_thr{threshold}"]
    inputs = case["inputs"]
    found = verbosity_penalties(torch.tensor(inputs["V"]), inputs["verbosity_dim"], inputs["corr_threshold"])
    assert found == case["outputs"]["penalty"]


def test_debiasing_and_gating_equal_the_recorded_ones():
    case = CASES["09_armorm.transform"]
    inputs, wanted = case["inputs"], case["outputs"]
    rows, place = torch.tensor(inputs["R"]), inputs["verbosity_dim"]
    assert debiased(rows, torch.tensor(inputs["penalty"]), place).tolist() == [close(wanted["R@T"][0])]
    penalties = dict(zip("abcd", inputs["penalty"], strict=True))
    found = combine("armorm", inputs["R"], weights=inputs["gate"], verbosity="d", penalties=penalties)
    assert found == close(wanted["score"])
    samples = make_samples(completions=["a"], gate=[inputs["gate"]])
    found = combine("armorm", inputs["R"], samples=samples, verbosity="d", penalties=penalties, gates="gate")
    assert found == close(wanted["score"])


def test_gates_equal_the_authors_network():
    case = CASES["09_armorm.gating"]
    inputs = case["inputs"]
    hidden = (torch.tensor(inputs["x"]) @ torch.tensor(inputs["W_hidden"]).T).relu()
    outputs = hidden @ torch.tensor(inputs["W_out"]).T
    assert gates(outputs, inputs["temperature"]).tolist() == [close(case["outputs"]["gate"][0])]


def test_a_column_of_a_gating_networks_outputs_is_a_softmax():
    samples = make_samples(completions=["a", "b"], gate=[{"a": 0.0, "b": 10.0}, [5.0, 5.0]])
    found = combine("armorm", [[1.0, 3.0], [1.0, 3.0]], samples=samples, gates="gate", temperature=10.0)
    assert found == close([1 + 2 * math.e / (1 + math.e), 2.0])
    with pytest.raises(ValueError, match="column 'gate', row 0: wanted a number for each of a, b, got"):
        combine("armorm", [[1.0, 3.0]], samples=make_samples(completions=["a"], gate=[[1.0]]), gates="gate")


def test_a_constant_attribute_goes_with_nothing():
    assert verbosity_penalties(torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), 1) == [0.0, 1.0]


def test_penalties_follow_the_first_rows_and_stay_and_resume():
    combiner = load_combiner("armorm", verbosity="b", rows=6)
    first, second = [[1.0, 1.0], [2.0, 2.0]], [[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0], [9.0, 9.0]]
    assert combine(combiner, first) == close([0.0, 0.0])  # a goes with b wholly: λ is 1
    resumed = load_combiner("armorm", verbosity="b", rows=6)
    resumed.load_state_dict(json.loads(json.dumps(combiner.state_dict())))
    assert combine(resumed, second) == combine(combiner, second)
    seen = torch.tensor(first + second[:4])
    assert combiner.state_dict() == {"seen": [], "found": verbosity_penalties(seen, 1)}
    kept = combiner.state_dict()
    combine(combiner, [[5.0, 5.0], [6.0, 6.0]])
    assert combiner.state_dict() == kept == resumed.state_dict()


def test_penalties_wait_for_a_batch_with_scores():
    combiner = load_combiner("armorm", verbosity="b", rows=2)
    assert combine(combiner, [[None, None]] * 2, group_size=2) == close([NAN, NAN])
    combine(combiner, [[1.0, 1.0], [2.0, 2.0]], group_size=2)
    assert combiner.state_dict()["found"] == [1.0, 1.0]


def test_without_a_verbosity_score_what_needs_it_is_a_hole():
    options = {"verbosity": "c", "penalties": {"a": 0.5}}
    rows = [[1.0, 1.0, 1.0], [1.0, 3.0, None], [1.0, None, None]]
    found = combine("armorm", rows, group_size=3, **options)
    assert found[0] == close(0.5 + 1.0)
    assert found[1] > found[0]  # b puts it higher
    assert math.isnan(found[2])


def test_bad_options_are_refused():
    for name, options, message in [
        ("uwo", {"coef": -1.0}, "coef must be at least 0"),
        ("mean_minus_std", {"coef": -1.0}, "coef must be at least 0"),
        ("trimmed", {"share": 0.5}, "share must be at least 0 and below 0.5"),
        ("harmonic", {"low": 1.0}, "low must be below high"),
        ("lagrangian", {"thresholds": {}}, "thresholds must name at least one source"),
        ("lagrangian", {"thresholds": {"a": 1.0}, "lr": 0.0}, "lr must be above 0"),
        ("armorm", {"penalties": {"a": 1.0}}, "name its source in verbosity"),
        ("armorm", {"temperature": 1.0}, "temperature must be above 0 and is that of gates"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_combiner(name, **options)
