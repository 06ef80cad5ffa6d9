import json
import math
from pathlib import Path

import pytest
import torch
from trl_rewards_advantages import register_advantages
from trl_rewards_advantages.bnpo import BNPO, beta_density, beta_normalized, beta_parameters

from trl_rewards import RewardBatch, Samples, Scores, load_advantage

CASES = json.loads(Path(__file__).with_name("bnpo_cases.json").read_text(encoding="utf-8"))["bnpo"]
NAN = float("nan")
HALVES = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]  # p = 1/4, 3/4, 1/2; α = β = 1.5


def batch(*sources, weights=None, total=None, group_size=4):
    """A batch of the sources' scores, each a list of groups; the total is their weighted sum."""
    shaped = torch.tensor(sources, dtype=torch.float32).flatten(1).T  # (N, K)
    weights = torch.tensor([1.0] * len(sources) if weights is None else weights)
    rewards = shaped @ weights if total is None else torch.tensor(total, dtype=torch.float32)
    names = tuple(f"source{k}" for k in range(len(sources)))
    scores = Scores(names, shaped, torch.zeros_like(shaped, dtype=torch.uint8), weights, group_size)
    samples = Samples(["q"] * len(rewards), ["a"] * len(rewards))
    return RewardBatch(rewards, scores, samples, shaped=shaped)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_equals_the_authors_code(case):
    p = torch.tensor(case["groups"], dtype=torch.float64).mean(dim=1)
    assert [value.item() for value in beta_parameters(p)] == pytest.approx([case["alpha"], case["beta"]], abs=1e-6)
    advantages = BNPO()(batch(case["groups"]))
    torch.testing.assert_close(advantages.float(), torch.tensor(case["expected"]), rtol=1e-5, atol=1e-6)


def test_three_prompts_worked_by_hand():
    # p̄ = 0.5, v = 1/16, a = b = 1.5, α = β = 1.5: f(p) = 8/π · sqrt(p(1-p)).
    advantages = BNPO()(batch(HALVES))
    assert advantages[0].item() == pytest.approx(0.75 * math.pi / 8 / math.sqrt(3 / 16))
    assert advantages[8].item() == pytest.approx(0.5 * math.pi / 8 / 0.5)


def test_alpha_and_beta_of_three_halves_are_grpo_times_an_eighth_of_pi():
    rewards = torch.tensor(HALVES, dtype=torch.float64)
    grpo = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(BNPO()(batch(HALVES)), math.pi / 8 * grpo.flatten())


def test_density_is_that_of_torch():
    p, alpha, beta = torch.linspace(0.01, 0.99, 50).double(), torch.tensor(2.5).double(), torch.tensor(1.0).double()
    wanted = torch.distributions.Beta(alpha, beta).log_prob(p).exp()
    torch.testing.assert_close(beta_density(p, alpha, beta), wanted)


def test_equal_success_rates_leave_the_group_mean_as_baseline():
    advantages = BNPO()(batch([[1, 0, 0, 0], [0, 0, 0, 1]]))
    assert advantages.view(2, 4).tolist() == [[0.75, -0.25, -0.25, -0.25], [-0.25, -0.25, -0.25, 0.75]]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_equal_rewards_give_zero_advantage(value):
    constant = [[value] * 4] * 3
    assert BNPO()(batch(constant)).tolist() == [0.0] * 12
    assert BNPO()(batch([*constant, [1, 0, 0, 0]]))[:12].tolist() == [0.0] * 12


def test_one_completion_per_prompt_gives_zero_advantage():
    assert BNPO()(batch([[1], [0], [1]], group_size=1)).tolist() == [0.0, 0.0, 0.0]


def test_a_row_without_a_reward_gets_0_and_changes_nothing():
    with_hole = BNPO()(batch([[1, 0, 0, NAN], [1, 1, NAN, 0]]))
    assert with_hole[[3, 6]].tolist() == [0.0, 0.0]
    without = BNPO()(batch([[1, 0, 0], [1, 1, 0]], group_size=3))
    torch.testing.assert_close(with_hole[[0, 1, 2, 4, 5, 7]], without)


def test_a_group_with_one_scored_row_or_none_gets_0_and_enters_no_fit():
    padded = BNPO()(batch([*HALVES, [1, NAN, NAN, NAN], [NAN] * 4]))
    assert padded[12:].tolist() == [0.0] * 8
    torch.testing.assert_close(padded[:12], BNPO()(batch(HALVES)))


def test_advantages_follow_a_permutation_of_prompts_and_of_completions():
    rewards = torch.tensor(HALVES)
    for permuted, back in [
        (rewards[[2, 0, 1]], lambda advantages: advantages[[1, 2, 0]]),
        (rewards[:, [3, 1, 0, 2]], lambda advantages: advantages[:, [2, 1, 3, 0]]),
    ]:
        advantages = BNPO()(batch(permuted.tolist())).view(3, 4)
        torch.testing.assert_close(back(advantages), BNPO()(batch(HALVES)).view(3, 4))


def test_a_range_is_mapped_to_0_1():
    stretched = [[2 * reward - 1 for reward in group] for group in HALVES]
    torch.testing.assert_close(BNPO(low=-1.0)(batch(stretched)), BNPO()(batch(HALVES)))


def test_several_sources_give_the_mean_of_their_advantages():
    other = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    first, second = BNPO()(batch(HALVES)), BNPO()(batch(other))
    torch.testing.assert_close(BNPO()(batch(HALVES, other)), (first + second) / 2)
    weighted = BNPO()(batch(HALVES, other, weights=[3.0, -1.0]))
    torch.testing.assert_close(weighted, (3 * first - second) / 4)


def test_a_source_of_weight_0_is_watched_only():
    out_of_range = [[50.0] * 4] * 3
    watched = BNPO()(batch(HALVES, out_of_range, weights=[1.0, 0.0]))
    torch.testing.assert_close(watched, BNPO()(batch(HALVES)))


def test_decompose_off_uses_the_total():
    other = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    total = (torch.tensor(HALVES) + torch.tensor(other)) / 2
    combined = BNPO(decompose=False)(batch(HALVES, other, weights=[0.5, 0.5]))
    torch.testing.assert_close(combined, BNPO()(batch(total.tolist())))


def test_a_hole_of_one_source_leaves_the_row_to_the_others():
    holed = [[1, 0, NAN, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    total = torch.tensor(HALVES).flatten().tolist()
    advantages = BNPO()(batch(HALVES, holed, total=total))
    first, second = BNPO()(batch(HALVES)), BNPO()(batch(holed))
    assert advantages[2] == first[2]
    torch.testing.assert_close(advantages[3:], ((first + second) / 2)[3:])


def test_a_dropped_row_enters_no_source():
    total = [0.0, 0, 0, NAN, *[0.0] * 8]
    other = [[0, 0, 1, NAN], [0, 1, 0, 0], [1, 1, 1, 1]]
    holed = [[1, 0, 0, NAN], *HALVES[1:]]
    dropped = BNPO()(batch(HALVES, [[0, 0, 1, 1], *other[1:]], total=total))
    assert dropped[3] == 0
    torch.testing.assert_close(dropped, BNPO()(batch(holed, other)))


@pytest.mark.parametrize(("reward", "shown"), [(1.5, "1.5"), (-0.1, "-0.1")])
def test_a_reward_out_of_range_is_refused_with_what_to_do(reward, shown):
    with pytest.raises(ValueError, match=rf"rewards in \[0, 1\], but the total has {shown}; set its low and high"):
        BNPO()(batch([[reward, 0, 0, 0]]))
    with pytest.raises(ValueError, match="but source 'source1' has"):
        BNPO()(batch(HALVES, [[reward, 0, 0, 0]] * 3))


def test_round_off_beyond_the_range_is_no_error():
    assert BNPO()(batch([[1.0 + 1e-7, 0, 0, 0]])).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_low_must_be_below_high():
    with pytest.raises(ValueError, match="low must be below high, got low 1"):
        BNPO(low=1.0)


def test_random_batches_give_finite_advantages_that_sum_to_0_in_each_group():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rewards = torch.rand(24, generator=generator) ** 4
        advantages = beta_normalized(rewards, 8)
        assert advantages.isfinite().all()
        assert advantages.view(3, 8).sum(dim=1).abs().max() < 1e-6


def test_registered_name_loads():
    assert load_advantage(register_advantages()["bnpo"], low=-1.0).level == "sequence"
