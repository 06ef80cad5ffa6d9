"""PPO's formulae against numbers worked by hand, second implementations and float64."""

from __future__ import annotations

import math

import pytest
import torch

from trl_rewards.maths import gae, token_rewards, whiten_masked
from trl_rewards.trainers.critic import value_loss
from trl_rewards.trainers.kl import KLController, kl_per_token
from trl_rewards.trainers.ppo_config import PPOConfig


def test_gae_is_what_the_equation_gives_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    # δ = (0 + .9·1 - .5, 1 + .9·1.5 - 1, 2 - 1.5) = (.4, 1.35, .5); A3 = .5, A2 = 1.35 + .72·.5, A1 = .4 + .72·A2
    found = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    assert found.tolist() == [pytest.approx([0.4 + 0.72 * 1.71, 1.71, 0.5])]


def test_gae_with_lam_and_gamma_one_is_the_rest_of_the_reward_less_the_value():
    rewards, values = torch.tensor([[0.0, 0.0, 3.0, 9.0]]), torch.tensor([[1.0, 2.0, 0.5, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert gae(rewards, values, mask, 1.0, 1.0).tolist() == [[2.0, 1.0, 2.5, 0.0]]


def naive_gae(rewards, values, mask, gamma, lam):
    """The sum of the definition, row by row, over the row's own tokens only."""
    result = torch.zeros(rewards.shape, dtype=torch.float64)
    for row in range(len(rewards)):
        own = [t for t in range(rewards.shape[1]) if mask[row, t]]
        reward, value = rewards[row, own].double(), [*values[row, own].double(), torch.tensor(0.0)]
        deltas = [reward[k] + gamma * value[k + 1] - value[k] for k in range(len(own))]
        for k, t in enumerate(own):
            result[row, t] = sum(((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(own))), torch.tensor(0.0))
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.0), (0.9, 1.0), (0.99, 0.5)])
def test_gae_equals_a_second_implementation_with_padding_and_a_tools_words_between(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(12, 17, generator=generator), torch.randn(12, 17, generator=generator)
    mask = (torch.rand(12, 17, generator=generator) > 0.3).int()
    mask[0], mask[1] = 0, 1
    found = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(found, naive_gae(rewards, values, mask, gamma, lam), rtol=1e-12, atol=1e-12)


def test_whitening_takes_mean_and_sample_deviation_over_the_mask_only():
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, -100.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    deviation = math.sqrt(20 / 3)  # of 1, 3, 5, 7
    found = whiten_masked(values, mask)
    wanted = torch.tensor([[-3 / deviation, -1 / deviation, 0], [1 / deviation, 0, 3 / deviation]]).double()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)
    kept = whiten_masked(values, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask.bool()], found[mask.bool()] + 4)


@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]])])
def test_whitening_of_one_token_or_none_is_zero(mask):
    assert (whiten_masked(torch.randn(2, 3), mask) == 0).all()


def test_a_rows_token_rewards_sum_to_its_total_and_keep_their_places():
    totals = torch.tensor([2.0, -1.0, float("nan"), 0.5])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert token_rewards(totals, None, mask).tolist() == [[0, 0, 2.0], [0, -1.0, 0], [0, 0, 0], [0, 0, 0]]
    process = torch.tensor([[0.5, 0.25], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]])
    wanted = [[0.5, 0.25, 1.25], [0.5, -1.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert token_rewards(totals, process, mask).tolist() == wanted


def test_kl_estimators_are_what_they_estimate():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    true = (policy * (policy / reference).log()).sum()
    k1, k2, k3 = (kl_per_token(policy.log(), reference.log(), name).double() for name in ("k1", "k2", "k3"))
    assert (policy * k1).sum().item() == pytest.approx(true.item(), rel=1e-6)
    assert (policy * k3).sum().item() == pytest.approx(true.item(), rel=1e-6)
    assert (policy * k2).sum().item() == pytest.approx((policy * (policy / reference).log() ** 2).sum().item() / 2)
    assert k1.min() < 0
    assert k2.min() >= 0
    assert k3.min() >= 0


def test_the_kl_coefficient_moves_toward_its_target_at_most_a_fifth_at_a_time():
    kl = KLController(0.1, target=6.0, horizon=1000)
    kl.update(6.6, sequences=50)
    assert kl.coefficient == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    kl.update(60.0, sequences=100)
    assert kl.coefficient == pytest.approx(0.1 * 1.005 * 1.02)
    kl.update(0.0, sequences=100)
    assert kl.coefficient == pytest.approx(0.1 * 1.005 * 1.02 * 0.98)
    hasty = KLController(0.1, target=6.0, horizon=1)
    hasty.update(0.0, sequences=100)
    assert hasty.coefficient == 0.05
    fixed = KLController(0.1)
    fixed.update(60.0, 100)
    assert fixed.coefficient == 0.1


def test_the_value_loss_takes_the_worse_of_a_value_and_its_clipped_one():
    values, old = torch.tensor([1.0, 0.1, 2.0]), torch.tensor([0.0, 0.0, 0.0])
    targets = torch.tensor([1.5, 1.0, 0.0])
    # Held within 0.2: 0.2, 0.1, 0.2. Squares: (.25, 1.69), (.81, .81), (4, .04).
    assert value_loss(values, old, targets, 0.2).tolist() == pytest.approx([1.69 / 2, 0.405, 2.0])
    assert value_loss(values, old, targets, None).tolist() == pytest.approx([0.125, 0.405, 2.0])


def config(folder, **options):
    return PPOConfig(str(folder), bf16=False, use_cpu=True, report_to="none", **options)


def test_ppo_needs_no_group(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=5, num_mini_batches=2)
    assert (args.num_generations, args.generation_batch_size, args.steps_per_generation) == (1, 30, 10)
    assert (args.num_iterations, args.beta, args.epsilon) == (4, 0.05, 0.2)


def test_every_wrong_argument_is_named_at_once(tmp_path):
    wrong = {
        "num_iterations": 3,
        "beta": 0.1,
        "steps_per_generation": 7,
        "cliprange": 0.0,
        "kl_in": "advantage",
        "critic": "head",
        "loss_type": "cispo",
        "kl_coef": -1.0,
        "scale_rewards": "batch",
    }
    with pytest.raises(ValueError, match="num_ppo_epochs") as caught:
        config(tmp_path, **wrong)
    for word in (
        "kl_coef must not",
        "scale_rewards is GRPO's",
        "num_mini_batches",
        "cliprange must",
        "kl_in must",
        "critic must",
        "loss_type must",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["num_generations", "num_ppo_epochs", "num_mini_batches"])
def test_counts_below_one_are_refused(tmp_path, name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
            config(tmp_path, **{name: value})
