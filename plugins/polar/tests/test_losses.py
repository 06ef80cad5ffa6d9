import json
from pathlib import Path

import pytest
import torch
from trl_rewards_polar.losses import focal_loss, ranking_loss

RECORDED = json.loads(Path(__file__).with_name("polar_cases.json").read_text(encoding="utf-8"))["cases"]
(CASE,) = (case for case in RECORDED if case["id"] == "polar-loss-01-ranking")
CHOSEN, REJECTED = torch.tensor(CASE["input"]["chosen"]), torch.tensor(CASE["input"]["rejected"])


def test_P13_losses_are_those_of_the_authors_code():
    output = CASE["output"]
    assert ranking_loss(CHOSEN, REJECTED).tolist() == pytest.approx(output["ranking_per_pair"], abs=1e-6)
    assert ranking_loss(CHOSEN, REJECTED).mean().item() == pytest.approx(output["ranking_mean"], abs=1e-6)
    assert focal_loss(CHOSEN, REJECTED).mean().item() == pytest.approx(output["focal_mean"], abs=1e-6)


def test_focal_leaves_pairs_that_are_ordered_wrongly_as_they_are():
    assert torch.equal(focal_loss(REJECTED, CHOSEN)[:1], ranking_loss(REJECTED, CHOSEN)[:1])


def test_bfloat16_scores_are_compared_in_float32():
    scores = torch.tensor([8.0]).bfloat16()
    assert ranking_loss(scores, scores - 0.0625).dtype == torch.float32


def test_far_apart_scores_have_finite_gradients():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    (ranking_loss(chosen, torch.zeros(2)) + focal_loss(chosen, torch.zeros(2))).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()
