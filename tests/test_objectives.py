"""The objectives that come with the core: their equations by hand, and Bradley-Terry against TRL's own."""

from __future__ import annotations

import math

import pytest
import torch

from trl_rewards import Preferences, RewardError, load_objective
from trl_rewards.defaults.objectives import bradley_terry, centring, squared_error
from trl_rewards.maths import shared_prefix

NAN = math.nan


def pairs(chosen, rejected, **columns) -> Preferences:
    """Pairs with these rewards, as leaves of a graph."""
    better, worse = (torch.tensor(rewards, requires_grad=True) for rewards in (chosen, rejected))
    found = {name: torch.tensor(values) for name, values in columns.items()}
    return Preferences(better, worse, torch.zeros(()), found)


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    # -log σ(0) = log 2, -log σ(-2) = log(1 + e²)
    wanted = (math.log(2) + math.log(1 + math.e**2)) / 2
    assert bradley_terry(chosen, rejected).item() == pytest.approx(wanted)
    # with margins 0 and -2 both differences are 0
    assert bradley_terry(chosen, rejected, torch.tensor([0.0, -2.0])).item() == pytest.approx(math.log(2))
    assert centring(chosen, rejected).item() == (2**2 + 2**2) / 2


def test_pairs_without_a_margin_enter_no_mean():
    chosen, rejected = torch.tensor([1.0, 5.0], requires_grad=True), torch.tensor([1.0, 2.0])
    loss = bradley_terry(chosen, rejected, torch.tensor([0.0, NAN]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.tolist() == [-0.5, 0.0]


def test_squared_error_is_over_the_ratings_there_are():
    rewards = torch.tensor([1.0, 2.0, 9.0], requires_grad=True)
    loss = squared_error(rewards, torch.tensor([3.0, 1.0, NAN]))
    loss.backward()
    assert loss.item() == (4 + 1) / 2
    assert rewards.grad.tolist() == [-2.0, 1.0, 0.0]


def test_a_batch_without_any_rating_gives_a_zero_loss_with_a_graph():
    batch = pairs([1.0, 2.0], [3.0, 4.0], chosen_rating=[NAN, NAN], rejected_rating=[NAN, NAN])
    loss = load_objective("regression").loss(batch)
    assert loss.item() == 0.0
    loss.backward()
    assert batch.chosen.grad.tolist() == batch.rejected.grad.tolist() == [0.0, 0.0]


def test_regression_maps_its_scale_to_0_and_1_and_adds_ranking():
    columns = {"good": [5.0, 3.0], "bad": [1.0, NAN]}
    options = {"chosen_rating": "good", "rejected_rating": "bad", "scale": [1.0, 5.0]}
    batch = pairs([1.0, 0.0], [0.5, 0.0], **columns)
    error = (0.0**2 + 0.5**2 + 0.5**2) / 3
    assert load_objective("regression", **options).loss(batch).item() == pytest.approx(error)
    ranking = (math.log(1 + math.exp(-0.5)) + math.log(2)) / 2
    mixed = load_objective("regression", rank=0.1, **options).loss(batch)
    assert mixed.item() == pytest.approx(error + 0.1 * ranking)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("bradley_terry", {"center": -1.0}, "center must not be negative"),
        ("regression", {"rank": -1.0}, "rank must not be negative"),
        ("regression", {"scale": [4.0, 0.0]}, "scale must be"),
        ("regression", {"scale": [4.0]}, "scale must be"),
    ],
)
def test_wrong_options_are_said(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        load_objective(name, **options)


def test_a_column_of_words_is_named():
    batch = pairs([1.0], [0.0])._replace(columns={"chosen_rating": ["good"], "rejected_rating": torch.zeros(1)})
    with pytest.raises(RewardError, match="'chosen_rating' must hold numbers"):
        load_objective("regression").loss(batch)


def test_rows_of_a_pair_share_tokens_up_to_where_they_differ():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0], [5, 5, 5, 5], [1, 2, 9, 4], [1, 2, 0, 0], [6, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]] * 2)
    assert shared_prefix(ids, mask).tolist() == [2, 2, 0]


ROWS = [
    {"prompt": f"the {noun} ", "chosen": f"sat {count} times", "rejected": f"ran {count}", "gap": gap}
    for noun in ("cat", "dog")
    for count, gap in enumerate([0.0, 0.5, -1.0])
]


def gradients(trainer_class, path, args, rows, **options):
    from datasets import Dataset

    trainer = trainer_class(model=path, args=args, train_dataset=Dataset.from_list(rows), **options)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.1])
def test_bradley_terry_equals_trl_in_loss_and_gradients(reward_model_path, tmp_path, margin, center):
    import trl

    from trl_rewards import RewardTrainer

    def args(**options):
        return trl.RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)

    rows = [{name: value for name, value in row.items() if margin or name != "gap"} for row in ROWS]
    stock = [{("margin" if name == "gap" else name): value for name, value in row.items()} for row in rows]
    wanted, theirs = gradients(trl.RewardTrainer, reward_model_path, args(center_rewards_coefficient=center), stock)
    objective = load_objective("bradley_terry", margin="gap" if margin else None, center=center or 0.0)
    loss, ours = gradients(RewardTrainer, reward_model_path, args(), rows, objective=objective)
    assert loss == pytest.approx(wanted, abs=1e-6)
    assert any(gradient.abs().max() > 1e-2 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=0)
