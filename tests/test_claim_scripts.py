"""The scripts beside claims: what they measure."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from trl_rewards import load_advantage

CLAIMS = Path(__file__).parents[1] / "recipes" / "claims"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"claim_{name}", CLAIMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bnpo():
    return script("bnpo")


@pytest.fixture
def transforming(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))  # it imports a script beside it
    return script("transforming")


def test_advantages_are_read_as_weights_of_a_prompts_gradient(bnpo):
    rewards = torch.zeros(2, bnpo.GROUP)
    rewards[0, :8], rewards[1, :4] = 1.0, 1.0  # deviations 1/2 and sqrt(3)/4
    name, options, scale = bnpo.ADVANTAGES["grpo"]
    weights = bnpo.prompt_weights(load_advantage(name, **options), rewards) * scale
    assert weights.tolist() == pytest.approx([math.pi / 4, math.pi / 8 * 4 / math.sqrt(3)])
    with pytest.raises(ValueError, match="no multiple of R - p"):
        bnpo.prompt_weights(load_advantage("reinforce_plus_plus"), rewards)


@pytest.mark.parametrize(("spread", "variance"), [(0.0, 0.0), (1.0, 64 * 320 / 319 / 32 / 16**2)])
def test_variance_is_that_of_a_batchs_estimate(bnpo, tmp_path, monkeypatch, spread, variance):
    # Prompts' gradients are 8, or with the spread 16 and 0, in one dimension; a batch of 32 prompts with 16 answers
    # each estimates their mean over 16, with 1/32 of the prompts' sample variance.
    monkeypatch.setattr(bnpo, "SHUFFLES", 20)
    gradients = torch.full((bnpo.PROMPTS, 1), 8.0, dtype=torch.float64)
    gradients[::2] *= 1 + spread
    gradients[1::2] *= 1 - spread
    rewards = torch.zeros(bnpo.PROMPTS, bnpo.GROUP)
    rewards[:, ::2] = 1.0
    torch.save({"rewards": rewards, "products": gradients @ gradients.T}, tmp_path / "samples.pt")
    bnpo.measure(tmp_path, tmp_path, "reinforce")
    found = json.loads((tmp_path / "variance.json").read_text())
    assert found["right"] == 0.5
    assert found["variance"] == pytest.approx(variance, rel=0.1, abs=1e-9)
    assert found["noise"] == pytest.approx(found["variance"] / 0.25, rel=0.05, abs=1e-9)


def test_a_policy_that_is_best_for_a_reward_is_as_far_as_is_asked(transforming):
    utility = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]], dtype=torch.float64)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)  # of (1/4, 3/4) from (1/2, 1/2), which is γ = 1
    assert transforming.tilted(utility, kl).flatten().tolist() == pytest.approx([0.25, 0.75, 0.25, 0.75])


def test_the_worst_are_the_lowest_tenth_of_the_mass(transforming, tmp_path, monkeypatch):
    monkeypatch.setattr(transforming, "PROMPTS", 1)
    monkeypatch.setattr(transforming, "ANSWERS", 4)
    monkeypatch.setattr(transforming, "REFERENCES", 1)
    monkeypatch.setattr(transforming, "KLS", (1e-9,))  # the policy as it is: a quarter each
    scores = torch.tensor([[0.0, 1.0, 4.0, 2.0, 3.0]])  # a reference, and four answers
    torch.save({"scores": scores, "exact": (scores > 2).float()}, tmp_path / "answers.pt")
    monkeypatch.setattr(transforming, "WORST", 0.3)
    transforming.measure(tmp_path, tmp_path, "centered")
    found = json.loads((tmp_path / "worst.json").read_text())
    assert found["worst"] == pytest.approx((0.25 * 1.0 + 0.05 * 2.0) / 0.3, abs=1e-3)
    assert (found["reward"], found["exact"]) == pytest.approx((2.5, 0.5), abs=1e-3)
