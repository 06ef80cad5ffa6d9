"""The estimators but bnpo, against recorded numbers, numbers worked by hand and brute force."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from trl_rewards_advantages import register_advantages
from trl_rewards_advantages.dler import mixed_groups
from trl_rewards_advantages.grpo_s import hardness_scale, responsiveness_scale
from trl_rewards_advantages.leave_one_out_norm import others_std
from trl_rewards_advantages.pass_at_k import best_of_k, pass_at_k
from trl_rewards_advantages.stable_reinforce import filtered

from trl_rewards import Pipeline, RecipeError, RewardBatch, Samples, load_advantage, load_reward
from trl_rewards.maths import less_others, zscore
from trl_rewards.scoring import Source
from trl_rewards.testing import make_scores

CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
NAN = float("nan")


def batch(rewards, group_size, lengths=None, sources=None, weights=None, **columns):
    """Totals (N,), None for a row without; `sources` (N, K) beside them, else the total is the one source."""
    rows = len(rewards)
    scores = make_scores(sources or [[reward] for reward in rewards], weights, group_size)
    ids = [[5] * length for length in lengths or [1] * rows]
    samples = Samples(["q"] * rows, ["a"] * rows, ids, columns, group_size)
    totals = torch.tensor([NAN if reward is None else reward for reward in rewards])
    return RewardBatch(totals, scores, samples, shaped=scores.values.clone())


def run(name, rewards, group_size, *, options=None, **more):
    advantage = load_advantage(name, **(options or {})) if isinstance(name, str) else name
    return advantage(batch(rewards, group_size, **more)).tolist()


def close(wanted, **tolerance):
    return pytest.approx(wanted, **({"rel": 1e-5, "abs": 1e-6} | tolerance))


SEQUENCE = {  # all but bnpo; with the columns that they read
    "didi": {},
    "dler": {},
    "grpo_s": {"hardness": "hardness", "demo_reward": "demo", "tau": 4.0},
    "leave_one_out_norm": {},
    "optimal_baseline": {},
    "pass_at_k": {"k": 2},
    "pref_grpo": {},
    "reinforce_plus_plus": {},
    "reinforce_plus_plus_baseline": {},
    "stable_reinforce": {"baseline": "group"},
}


def test_every_estimator_is_here():
    assert set(SEQUENCE) | {"bnpo"} == set(register_advantages())


@pytest.mark.parametrize("name", sorted(set(SEQUENCE) - {"reinforce_plus_plus"}))
def test_zero_variance_gives_exactly_0_and_a_row_alone_too(name):
    columns = {"hardness": [0.5] * 8, "demo": [1.0] * 8}
    options = SEQUENCE[name]
    for value in (0.3, 0.1, 1.0, 0.0):
        assert run(name, [value] * 8, 4, options=options, **columns) == [0.0] * 8
    mixed = [0.3] * 4 + [0.0, 1.0, 0.0, 0.0]
    assert run(name, mixed, 4, options=options, lengths=[3, 1, 4, 1, 5, 9, 2, 6], **columns)[:4] == [0.0] * 4
    assert run(name, [0.1, 0.9, 0.4, 0.2, None, 0.0, 1.0, 0.5], 1, options=options, **columns) == [0.0] * 8


@pytest.mark.parametrize("name", sorted(set(SEQUENCE) - {"grpo_s"}))
def test_a_row_without_a_reward_gets_0_and_changes_nothing(name):
    options = SEQUENCE[name]
    holed = run(name, [1.0, 0.0, 0.2, None, 0.5, None, 0.1, 0.0], 4, options=options, lengths=[3, 1, 4, 1, 5, 9, 2, 6])
    without = run(name, [1.0, 0.0, 0.2, 0.5, 0.1, 0.0], 3, options=options, lengths=[3, 1, 4, 5, 2, 6])
    assert [holed[row] for row in (3, 5)] == [0.0, 0.0]
    assert [holed[row] for row in (0, 1, 2, 4, 6, 7)] == close(without)


@pytest.mark.parametrize("name", sorted(SEQUENCE))
def test_permuted_prompts_and_completions_permute_advantages(name):
    generator = torch.Generator().manual_seed(1)
    rewards = (torch.rand(12, generator=generator) > 0.5).float().tolist()
    more = {"lengths": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], "hardness": torch.rand(12, generator=generator).tolist()}
    more |= {"demo": [1.0] * 12}
    plain = run(name, rewards, 4, options=SEQUENCE[name], **more)
    for order in ([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7], [3, 1, 0, 2, 4, 7, 5, 6, 8, 9, 11, 10]):
        moved = {key: [values[row] for row in order] for key, values in more.items()}
        found = run(name, [rewards[row] for row in order], 4, options=SEQUENCE[name], **moved)
        assert found == close([plain[row] for row in order])


# --- dler and reinforce++ --------------------------------------------------------------------------------------------

DLER = CASES["04_dler"]
ROWS = {
    "rewards": [reward for group in DLER["inputs"]["rewards"] for reward in group],
    "lengths": [length for group in DLER["inputs"]["lengths"] for length in group],
    "group_size": 4,
}


@pytest.mark.parametrize("name", ["dler", "reinforce_plus_plus_baseline"])
def test_token_weights_equal_the_release(name):
    found = run(name, **ROWS, options={"weighting": "token"})
    assert found == close(DLER["outputs"]["advantage_per_response"])


def test_dler_standardises_the_centred_and_trls_batch_norm_divides_by_the_raw():
    centred = torch.tensor(DLER["inputs"]["rewards"], dtype=torch.float64)
    raw = centred.std()
    centred = (centred - centred.mean(dim=1, keepdim=True)).flatten()
    found = run("dler", **ROWS)
    assert found == close(((centred - centred.mean()) / centred.std()).tolist())
    assert run("batch_norm", **ROWS, options={"eps": 1e-12}) == close((centred / raw).tolist())
    assert raw.item() != close(centred.std().item(), rel=1e-2)


def test_reinforce_plus_plus_is_a_z_score_of_the_batch_without_groups():
    # mean 0.5, sample deviation sqrt(1 / 3); with lengths 1, 1, 1, 5: 8 tokens, mean 0.25, squares 1.5, of 7.
    found = run("reinforce_plus_plus", [1.0, 1.0, 0.0, 0.0], 1)
    assert found == close([0.5 * math.sqrt(3)] * 2 + [-0.5 * math.sqrt(3)] * 2)
    found = run("reinforce_plus_plus", [1.0, 1.0, 0.0, 0.0], 2, lengths=[1, 1, 1, 5], options={"weighting": "token"})
    assert found == close([0.75 / math.sqrt(1.5 / 7)] * 2 + [-0.25 / math.sqrt(1.5 / 7)] * 2)
    assert run("reinforce_plus_plus", [0.3] * 8, 4) == [0.0] * 8
    assert run("reinforce_plus_plus", [None, 0.3], 1) == [0.0, 0.0]


def test_the_optional_boost_is_as_recorded():
    case = CASES["04_boost"]
    (high,), (low,) = case["inputs"]["advantages"]
    plain = run("dler", case["inputs"]["scores"], 2)
    boosted = run("dler", case["inputs"]["scores"], 2, options={"boost": 0.1})
    assert [b - p for b, p in zip(boosted, plain, strict=True)] == close(
        [new[0] - old for new, old in zip(case["outputs"]["out"], (high, low), strict=True)]
    )


def test_dynamic_sampling_keeps_the_recorded_prompts():
    case = CASES["04_sampling"]
    uid, reward = case["inputs"]["uid"], case["inputs"]["seq_reward"]
    assert uid[-1] == "d"  # a prompt with one completion, here with a hole beside it
    kept = mixed_groups(torch.tensor([*reward, NAN]), 2).tolist()
    assert [row for row in range(len(uid)) if kept[row]] == case["outputs"]["kept_rows"]


def test_the_filter_looks_at_raw_outcomes_and_not_at_penalties():
    # Both answers of the first prompt are wrong; the longer one is punished for its length.
    outcomes, penalties = [0.0, 0.0, 1.0, 0.0], [0.0, -0.5, 0.0, 0.0]
    sources = [[o, p] for o, p in zip(outcomes, penalties, strict=True)]
    total = [sum(row) for row in sources]
    found = run("dler", total, 2, options={"filter_by": "a"}, sources=sources)
    assert found[:2] == [0.0, 0.0]
    assert found[2:] == close([math.sqrt(0.5), -math.sqrt(0.5)])  # the moments are of the second prompt alone
    assert run("dler", total, 2, sources=sources)[1] < 0
    assert run("dler", total, 2, options={"filter_by": "total"}, sources=sources)[1] < 0


def test_a_batch_with_nothing_left_is_a_step_without_signal():
    sources = [[0.0, value] for value in (0.1, 0.2, 0.3, 0.4)]
    total = [sum(row) for row in sources]
    assert run("dler", total, 2, options={"filter_by": "a"}, sources=sources) == [0.0] * 4


def test_filtering_the_shaped_total_is_warned_of_with_what_to_do(caplog):
    with caplog.at_level(logging.WARNING):
        load_advantage("dler", filter_by="total")
        assert "name the source of the outcome in filter_by" in caplog.text
        caplog.clear()
        load_advantage("dler", filter_by="accuracy")
        assert not caplog.text


def test_a_filter_by_no_source_is_refused_early():
    source = Source("length", load_reward("length", soft_limit=2, hard_limit=5))
    with pytest.raises(ValueError, match="advantage: filter_by: no source 'accuracy'; there is length"):
        Pipeline([source], advantage=load_advantage("dler", filter_by="accuracy"))


# --- stable_reinforce, didi, grpo_s ----------------------------------------------------------------------------------


def test_the_filter_equals_the_recorded_ones():
    case = CASES["07_filter"]
    assert run("stable_reinforce", case["inputs"]["advantages"], 1) == close(case["outputs"]["out"])
    case = CASES["07_constant"]
    wanted = [row[0] for row in case["outputs"]["out"]]
    for compat in ("paper", "release"):
        found = run("stable_reinforce", case["inputs"]["advantages"], 2, options={"compat": compat})
        assert found == close(wanted)
        assert found == [0.0, 0.0]


def test_the_releases_band_is_moved_by_the_raw_mean():
    rewards = [1.0] * 10 + [-1.0] * 9 + [25.0]  # mean 1.3; z of the last is 4.29
    paper, release = (run("stable_reinforce", rewards, 1, options={"compat": c}) for c in ("paper", "release"))
    assert paper[-1] == 0.0
    assert release[-1] == close(23.7 / math.sqrt(30.51))
    assert release[:-1] == paper[:-1]
    far = filtered(torch.tensor([0.0] * 150 + [1000.0]), release=True)
    assert far[-1] == 0


def test_didi_is_a_z_score_of_limited_log_odds_with_either_deviation():
    rewards = [2.0, 0.0, -50.0, 50.0]
    limited = torch.tensor([2.0, 0.0, -10.0, 10.0], dtype=torch.float64)
    for ddof in (0, 1):
        wanted = ((limited - limited.mean()) / limited.std(correction=ddof)).tolist()
        assert run("didi", rewards, 4, options={"ddof": ddof}) == close(wanted)
    free = torch.tensor(rewards, dtype=torch.float64)
    assert run("didi", rewards, 4, options={"limit": None}) == close(((free - free.mean()) / free.std()).tolist())
    case = CASES["01_zscore"]
    found = run("didi", case["inputs"]["shaped_rewards"], case["inputs"]["group_size"])
    assert found == close(case["outputs"]["advantage"])


def test_scaled_advantages_are_as_recorded():
    case = CASES["09_scale"]
    inputs, wanted = case["inputs"], case["outputs"]
    hardness = [1 - value for value in inputs["similarity_W"]]
    delta = torch.tensor(hardness, dtype=torch.float64)
    assert delta.tolist() == close(wanted["delta"])
    assert hardness_scale(delta, delta.mean()).tolist() == close(wanted["alpha_D"])
    assert responsiveness_scale(torch.tensor(inputs["reward_gap"]), inputs["tau"]).item() == close(wanted["alpha_M"])
    rewards = inputs["group_rewards"]
    demo = [gap + reward for gap, reward in zip(inputs["reward_gap"], rewards, strict=True)]
    options = {"hardness": "hardness", "demo_reward": "demo", "tau": inputs["tau"], "eps": 0.0}
    found = run("grpo_s", rewards, 4, options=options, hardness=hardness, demo=demo)
    assert found == close(wanted["scaled_adv"])
    assert run("grpo_s", rewards, 4, options={"eps": 0.0}) == close(wanted["grpo_adv_std_ddof1"])


def test_scales_of_outliers_alone_or_of_nothing_are_1():
    assert responsiveness_scale(torch.tensor([-10.0, 10.0]), 1.0).item() == 1.0
    assert responsiveness_scale(torch.tensor([NAN, NAN]), 1.0).item() == 1.0
    rewards = [1.0, 0.0, 1.0, 0.0]
    plain = run("grpo_s", rewards, 2)
    assert run("grpo_s", rewards, 2, options={"hardness": "h"}, h=[None] * 4) == plain


def test_a_scale_leaves_signs_and_the_means_of_other_categories_alone():
    rewards, kinds = [1.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b"]
    options = {"hardness": "h", "category": "kind"}
    plain = run("grpo_s", rewards, 2)
    found = run("grpo_s", rewards, 2, options=options, h=[0.2, 0.2, 0.9, 0.9], kind=kinds)
    assert found == close(plain)  # each at the mean of its own category
    one = run("grpo_s", rewards, 2, options={"hardness": "h"}, h=[0.2, 0.2, 0.9, 0.9])
    assert [math.copysign(1, value) for value in one] == [math.copysign(1, value) for value in plain]
    assert abs(one[0]) < abs(plain[0]) < abs(one[2])


def test_mean_hardness_depends_on_the_rows_alone_and_resumes_exactly():
    generator = torch.Generator().manual_seed(0)
    hardness, rewards = torch.rand(12, generator=generator).tolist(), torch.rand(12, generator=generator).tolist()
    kinds = [["a", "b", "c"][row // 4] for row in range(12)]
    options = {"hardness": "h", "category": "kind"}
    plain, permuted = load_advantage("grpo_s", **options), load_advantage("grpo_s", **options)
    order = [*range(8, 12), *range(8)]  # another rank's rows first
    for _ in range(2):
        first = run(plain, rewards, 4, h=hardness, kind=kinds)
        moved = [[values[row] for row in order] for values in (rewards, hardness, kinds)]
        second = run(permuted, moved[0], 4, h=moved[1], kind=moved[2])
        assert second == close([first[row] for row in order], rel=1e-12)
    resumed = load_advantage("grpo_s", **options)
    resumed.load_state_dict(json.loads(json.dumps(plain.state_dict())))
    other = [value / 2 for value in hardness]
    assert run(resumed, rewards, 4, h=other, kind=kinds) == run(plain, rewards, 4, h=other, kind=kinds)
    assert resumed.state_dict() == plain.state_dict()


# --- leave_one_out_norm, optimal_baseline ----------------------------------------------------------------------------


def test_the_others_deviation_is_that_of_the_others():
    rewards = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = [rewards[[other for other in range(5) if other != row]].std().item() for row in range(5)]
    assert others_std(rewards, 5).tolist() == close(wanted)
    assert others_std(torch.tensor([1.0, 2.0]), 2).tolist() == [0.0, 0.0]


def test_one_among_equals_does_not_spike():
    found = run("leave_one_out_norm", [1.0] + [0.0] * 7, 8)
    assert found == close([math.sqrt(8)] + [-1 / 7 / math.sqrt(1 / 7)] + [-1 / 7 / math.sqrt(1 / 7)] * 6)
    nearly = run("leave_one_out_norm", [1.0] + [0.0] * 6 + [1e-6], 8)
    assert nearly[0] == close(math.sqrt(8), rel=1e-4)
    unguarded = (
        less_others(torch.tensor([1.0] + [0.0] * 6 + [1e-6]), 8)[0]
        / others_std(torch.tensor([1.0] + [0.0] * 6 + [1e-6]), 8)[0]
    )
    assert unguarded > 1e5  # what it would be


def test_where_the_others_vary_more_they_are_the_measure():
    rewards = [0.4, 0.0, 1.0, 0.5]
    others = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    found = run("leave_one_out_norm", rewards, 4)
    assert found[0] == close(((0.4 - others.mean()) / others.std()).item())


def test_its_size_is_at_most_the_root_of_the_group():
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        rewards = (torch.rand(24, generator=generator) ** 12).tolist()
        assert max(map(abs, run("leave_one_out_norm", rewards, 8))) <= math.sqrt(8) + 1e-5


def test_the_optimal_baseline_weights_rewards_by_length():
    # (1·2 + 0·6 + 1·2) / 10 = 0.4, a hole left out
    found = run("optimal_baseline", [1.0, 0.0, 1.0, None], 4, lengths=[2, 6, 2, 9])
    assert found == close([0.6, -0.4, 0.6, 0.0])
    weighted = [advantage * length for advantage, length in zip(found, [2, 6, 2, 9], strict=True)]
    assert sum(weighted) == close(0.0)


# --- pass_at_k -------------------------------------------------------------------------------------------------------


def by_hand(rewards, k):
    """All sets of k, one by one."""
    sets = [(rows, max(rewards[row] for row in rows)) for rows in itertools.combinations(range(len(rewards)), k)]
    best = torch.tensor([value for _, value in sets], dtype=torch.float64)
    deviation = best.std(correction=0)
    if deviation < 1e-12:
        return [0.0] * len(rewards)
    with_row = [
        sum(v for rows, v in sets if row in rows) / sum(row in rows for rows, _ in sets) for row in range(len(rewards))
    ]
    return [((value - best.mean()) / deviation).item() for value in with_row]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("rewards", [[1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0.5, 0.2, 0.9, 0.2, -1.0, 0.5]])
def test_counting_sets_equals_going_through_them(rewards, k):
    found = pass_at_k(torch.tensor(rewards, dtype=torch.float64), 6, k)
    assert found.tolist() == close(by_hand(rewards, k))
    moved = pass_at_k(1e6 + 3 * torch.tensor(rewards, dtype=torch.float64), 6, k)
    assert moved.tolist() == close(found.tolist(), abs=1e-5)


def test_pass_at_k_is_the_papers_closed_form():
    n, right, k = 16, 3, 4
    wrong = n - right
    rate = 1 - math.comb(wrong, k) / math.comb(n, k)
    sigma = math.sqrt(rate * (1 - rate))
    found = run("pass_at_k", [1.0] * right + [0.0] * wrong, n)
    assert found[0] == close((1 - rate) / sigma)
    assert found[-1] == close((1 - rate - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma)
    assert run("pass_at_k", [1.0] * 13 + [0.0] * 3, n) == [0.0] * n  # every set of 4 has a right one


def test_pass_at_1_is_the_population_z_score():
    rewards = torch.tensor([0.5, 0.2, 0.9, 0.2, 1.0, 0.0, 0.0, 0.0])
    assert pass_at_k(rewards, 4, 1).tolist() == close(zscore(rewards, 4, 0.0, ddof=0).tolist())


def test_groups_no_larger_than_k_give_no_signal_and_one_warning(caplog):
    advantage = load_advantage("pass_at_k", k=4)
    for _ in range(2):
        assert run(advantage, [1.0, 0.0, 0.0, 1.0], 4) == [0.0] * 4
    assert caplog.text.count("make num_generations larger or k smaller") == 1


# --- pref_grpo -------------------------------------------------------------------------------------------------------


def test_advantages_of_win_rates_equal_the_authors_code():
    recorded = CASES["12_win_rates"]["outputs"]
    assert run("pref_grpo", recorded["win_rate"], 4) == close(recorded["advantage"])


def test_two_rewards_equal_the_authors_code():
    case = CASES["12_two"]
    inputs = case["inputs"]
    sources = [list(row) for row in zip(inputs["pref"], inputs["clip"], strict=True)]
    options = {"renormalize": True}
    found = run("pref_grpo", [0.0] * 8, 4, options=options, sources=sources, weights=[0.4, 0.6])
    assert found == close(case["outputs"]["advantage"])


def test_pointwise_scores_that_hardly_differ_become_large_and_win_rates_do_not():
    assert max(run("pref_grpo", [0.7010, 0.7011, 0.7012, 0.7013], 4)) == close(1.16, rel=1e-2)
    assert run("pref_grpo", [0.5] * 4, 4) == [0.0] * 4


def test_pref_grpo_is_limited_and_leaves_holes_to_the_other_source():
    assert max(run("pref_grpo", [0.0] * 63 + [1.0], 64)) == 5.0
    assert max(run("pref_grpo", [0.0] * 63 + [1.0], 64, options={"clip": None})) > 7
    sources = [[1.0, None], [0.0, 1.0], [0.0, 0.0], [1.0, 0.5]]
    found = run("pref_grpo", [1.0] * 4, 4, sources=sources)
    alone = run("pref_grpo", [1.0, 0.0, 0.0, 1.0], 4)
    assert found[0] == close(2 * alone[0])


def test_bad_options_are_refused():
    for name, options, message in [
        ("dler", {"weighting": "tokens"}, "weighting"),
        ("didi", {"limit": 0.0}, "limit must be above 0"),
        ("grpo_s", {"tau": 1.0}, "demo_reward and tau go together"),
        ("grpo_s", {"category": "kind"}, "set hardness too"),
        ("leave_one_out_norm", {"floor": 0.0}, "floor must be above 0"),
        ("pass_at_k", {"k": 0}, "k must be at least 1"),
        ("pref_grpo", {"clip": -1.0}, "clip must be above 0"),
        ("stable_reinforce", {"k": 0.0}, "k must be above 0"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_advantage(name, **options)


# --- proofs: exact expectations over small policies ------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 1), (4, 2), (5, 3), (4, 4)])
def test_pass_at_k_follows_the_gradient_of_the_expected_best_of_k(n, k):
    """E Σ_i (best with row i - best) ∇log π(y_i) = (n - k) / k · ∇ E[best of k], over all outcomes of n answers.

    The policy has three answers of rewards 0, 0.3 and 1. With k = 1 this is what REINFORCE++ and GRPO centre: n - 1
    times the gradient of the mean.
    """
    logits = torch.tensor([0.2, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    probabilities, rewards = logits.softmax(dim=0), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    sets = torch.tensor(list(itertools.product(range(3), repeat=k)))  # (3^k, k)
    best = (probabilities[sets].prod(dim=1) * rewards[sets].amax(dim=1)).sum()
    (wanted,) = torch.autograd.grad(best, logits)
    outcomes = torch.tensor(list(itertools.product(range(3), repeat=n)))  # (3^n, n)
    probabilities = probabilities.detach()
    scores = torch.eye(3, dtype=torch.float64) - probabilities  # ∇log π of each answer
    mean, _, with_row = best_of_k(rewards[outcomes], k)
    found = ((with_row - mean)[:, :, None] * scores[outcomes]).sum(dim=1)  # (3^n, 3)
    found = (probabilities[outcomes].prod(dim=1)[:, None] * found).sum(dim=0)
    torch.testing.assert_close(found, wanted * (n - k) / k)


def test_the_optimal_baseline_has_the_least_variance_where_squared_gradients_grow_with_length():
    """All answers of a uniform policy over two words and an end, of at most three tokens: each token's ∇log π has the
    same square there."""
    answers = [(2,), (0, 2), (1, 2), *itertools.product((0, 1), (0, 1), range(3))]
    probabilities = torch.tensor([3.0 ** -len(answer) for answer in answers], dtype=torch.float64)
    assert probabilities.sum().item() == pytest.approx(1.0)
    rewards = torch.linspace(1, 0, len(answers), dtype=torch.float64)  # the short ones are better
    states = {text: state for state, text in enumerate([(), (0,), (1,), *itertools.product((0, 1), repeat=2)])}
    gradients = torch.zeros(len(answers), len(states), 3, dtype=torch.float64)  # of log π by a state's logits
    for row, answer in enumerate(answers):
        for t, token in enumerate(answer):
            gradients[row, states[answer[:t]]] = torch.eye(3, dtype=torch.float64)[token] - 1 / 3

    def variance(baseline):
        terms = (rewards - baseline)[:, None, None] * gradients
        mean = (probabilities[:, None, None] * terms).sum(dim=0)
        return (probabilities * (terms - mean).square().sum(dim=(1, 2))).sum().item()

    rows = [row for row, answer in enumerate(answers) for _ in range(3 ** (3 - len(answer)))]  # as often as likely
    group, lengths = rewards[rows].tolist(), [len(answers[row]) for row in rows]
    baseline = group[0] - run("optimal_baseline", group, len(rows), lengths=lengths)[0]
    assert baseline != pytest.approx(sum(group) / len(group), abs=1e-2)
    assert all(variance(baseline) < variance(baseline + step) for step in (-1, -0.1, -0.001, 0.001, 0.1, 1))
