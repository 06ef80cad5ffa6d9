"""MORE: weights of kinds of preference, against recorded numbers, autograd and search."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import RewardConfig
from trl_rewards_ensembles.more import Task, added, head_gradients, min_norm_weights, normalised

from trl_rewards import Preferences, RewardError, RewardTrainer, load_objective

CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))


def batch(differences, tasks, hidden=None, training=True):
    chosen = torch.tensor(differences, requires_grad=True)
    hidden = torch.randn(2 * len(differences), 3) if hidden is None else hidden
    return Preferences(chosen, torch.zeros(len(chosen)), chosen.sum(), {"task": tasks}, hidden, training=training)


@pytest.mark.parametrize("how", ["none", "l2", "loss", "loss+"])
def test_gradients_are_normalised_as_recorded(how):
    case = CASES["11_more.gradnorm"]
    found = normalised(torch.tensor(case["inputs"]["grads"]), torch.tensor(case["inputs"]["loss"]), how)
    assert torch.allclose(found, torch.tensor(case["outputs"][how]))
    still = normalised(torch.zeros(2, 2), torch.zeros(2), how)
    assert still.isfinite().all()


def test_weights_of_two_kinds_are_as_recorded_and_by_hand():
    case = CASES["11_more.minnorm_2task_dominated"]
    found = min_norm_weights(torch.tensor(case["inputs"]["vecs"]))
    assert found.tolist() == pytest.approx(case["outputs"]["lambda"])
    assert min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist() == pytest.approx([0.8, 0.2])
    assert min_norm_weights(torch.tensor([[5.0, 1.0]])).tolist() == [1.0]


@pytest.mark.parametrize("seed", range(4))
def test_weights_of_three_kinds_make_the_shortest_mean(seed):
    vectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    weights = min_norm_weights(vectors)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights >= 0).all()
    steps = [step / 50 for step in range(51)]
    grid = torch.tensor([(a, b, 1 - a - b) for a, b in itertools.product(steps, steps) if a + b <= 1 + 1e-9])
    assert (weights @ vectors).norm() <= (grid @ vectors).norm(dim=1).min() + 1e-3


def test_the_heads_gradient_is_autograds():
    hidden, head = torch.randn(6, 4), torch.randn(4, requires_grad=True)
    chosen, rejected = (hidden @ head).chunk(2)
    (wanted,) = torch.autograd.grad(-logsigmoid(chosen - rejected).mean(), head)
    found = head_gradients((chosen - rejected).detach(), hidden).mean(dim=0)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_loss_is_the_recorded_one_with_the_recorded_weights(monkeypatch):
    case = CASES["11_more.more_ranking_loss"]
    objective = load_objective("more")
    weights = dict(zip(("a", "b"), case["inputs"]["lambda"], strict=True))
    monkeypatch.setattr(objective, "_weights", lambda found: weights)
    differences = [first - second for first, second in case["inputs"]["logits"]]
    found = objective.loss(batch(differences, ["a", "b"]))
    assert found.item() == pytest.approx(case["outputs"]["loss"], abs=1e-6)


def test_running_means_are_kept_and_absent_kinds_wait():
    objective, hidden = load_objective("more", momentum=0.75), torch.eye(4)[:, :3]
    objective.loss(batch([0.0, 0.0], ["a", "b"], hidden))
    # Of pair 0: -0.5 (e0 - e2), of pair 1: -0.5 (e1 - 0)
    assert objective.state_dict()["gradients"]["a"].tolist() == pytest.approx([-0.5, 0.0, 0.5])
    objective.loss(batch([0.0, 0.0], ["b", "b"], hidden))
    kept = objective.state_dict()["gradients"]
    assert kept["a"].tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert kept["b"].tolist() == pytest.approx([0.75 * -0.25, 0.25 * -0.5 + 0.75 * -0.25, 0.75 * 0.25])


def test_what_processes_say_of_kinds_is_added_up():
    whole = {"a": Task(torch.tensor([3.0]), 1.5, 3), "b": Task(torch.tensor([1.0]), 0.5, 1)}
    shares = [{"b": whole["b"], "a": Task(torch.tensor([1.0]), 0.5, 1)}, {"a": Task(torch.tensor([2.0]), 1.0, 2)}]
    assert added(shares) == whole
    assert list(added(shares)) == ["a", "b"]


def test_a_pair_of_no_kind_is_an_error_and_numbers_are_kinds():
    objective = load_objective("more")
    with pytest.raises(RewardError, match="'task' must say of every pair what kind it is"):
        objective.loss(batch([0.1, 0.2], ["a", None]))
    objective.loss(batch([0.1, 0.2], torch.tensor([1.0, 2.0])))
    assert set(objective.state_dict()["gradients"]) == {"1", "2"}


def test_a_reward_model_is_trained_on_two_kinds(reward_model_path, tmp_path):
    rows = [
        {"prompt": "the cat ", "chosen": f"sat {n} times", "rejected": f"ran {n}", "task": ("help", "harm")[n % 2]}
        for n in range(8)
    ]
    arguments = RewardConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
        report_to="none", save_strategy="no", learning_rate=1e-2, max_length=64,
    )  # fmt: skip
    objective = load_objective("more")
    trainer = RewardTrainer(
        model=reward_model_path, args=arguments, train_dataset=Dataset.from_list(rows), objective=objective
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["more/harm"] + logged["more/help"] == pytest.approx(1.0, abs=1e-5)
    assert set(objective.state_dict()["gradients"]) == {"harm", "help"}
