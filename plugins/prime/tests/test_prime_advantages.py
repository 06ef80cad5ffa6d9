"""PRIME's advantages give the recorded numbers of the paper's equations and of both releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trl_rewards import load_advantage
from trl_rewards.testing import make_batch

CASES = {case["id"]: case for case in json.loads((Path(__file__).parent / "prime_cases.json").read_text())}


def batch_of(case, process_weight=1.0, outcome_weight=1.0):
    """The batch whose process rewards and outcomes a case has, holes and padding included."""
    mask = torch.tensor(case["response_mask"])
    rows, tokens = mask.shape
    process = torch.tensor(case["rm_scores"]) if case["rm_scores"] is not None else torch.zeros(rows, tokens)
    process = process_weight * process * mask
    total = outcome_weight * torch.tensor(case["acc"]) + process.sum(dim=1)
    return make_batch(total.tolist(), case["n_samples"], tokens)._replace(
        rewards=total, mask=mask, process_rewards=process
    )


def named(start):
    return [pytest.param(case, id=name) for name, case in CASES.items() if name.startswith(start)]


@pytest.mark.parametrize("case", named("prime_verl_rloo"))
def test_verls_recipe(case):
    batch = batch_of(case, case["reward_dpo_coef"], case["reward_gt_coef"])
    mask = batch.mask.bool()
    returns = load_advantage("prime_rloo", variant="verl", whiten=False)(batch)
    torch.testing.assert_close(returns, torch.tensor(case["expected"]["returns"]).double(), atol=2e-5, rtol=1e-5)
    advantages = load_advantage("prime_rloo", variant="verl")(batch)
    wanted = torch.tensor(case["expected"]["advantages"]).double()
    torch.testing.assert_close(advantages[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    assert (advantages[~mask] == 0).all()  # recorded: non-zero constants, which the loss masks


@pytest.mark.parametrize("case", named("prime_orig_rloo"))
def test_the_authors_code(case):
    batch = batch_of(case)
    options = {"gamma": case["reward_model_gamma"], "outcome_gamma": case["verifier_gamma"], "variant": "original"}
    returns = load_advantage("prime_rloo", whiten=False, **options)(batch)
    wanted = torch.tensor(case["expected"]["returns"]).double()
    torch.testing.assert_close(returns, wanted, atol=1e-5, rtol=1e-5)
    if "advantages" in case["expected"]:
        mask = batch.mask.bool()
        advantages = load_advantage("prime_rloo", **options)(batch)
        torch.testing.assert_close(
            advantages[mask], torch.tensor(case["expected"]["advantages"]).double()[mask], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("case", named("prime_paper"))
def test_the_papers_equations(case):
    name = "prime_" + case["id"].split("_")[2]
    found = load_advantage(name, gamma=case["gamma"], whiten=False)(batch_of(case))
    wanted = torch.tensor(case["expected"]["advantages_unwhitened"]).double()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_the_releases_differ_from_equation_5_inside_a_row_only():
    batch = batch_of(CASES["prime_verl_rloo_seed0_2x4x6"])
    paper, release = (load_advantage("prime_rloo", variant=v, whiten=False)(batch) for v in ("paper", "original"))
    torch.testing.assert_close(paper[:, 0], release[:, 0], atol=1e-6, rtol=0)
    assert (paper - release).abs().max() > 0.01


@pytest.mark.parametrize("name", ["prime_rloo", "prime_grpo"])
@pytest.mark.parametrize("variant", ["paper", "verl"])
def test_rows_without_a_score_or_tokens_are_in_no_baseline(name, variant):
    options = {"whiten": False} | ({"variant": variant} if name == "prime_rloo" else {})
    advantage = load_advantage(name, **options)
    batch = batch_of(CASES["prime_verl_rloo_seed0_2x4x6"])
    without = batch._replace(
        rewards=batch.rewards[:3].clone(), mask=batch.mask[:3], process_rewards=batch.process_rewards[:3]
    )
    without = without._replace(scores=without.scores._replace(group_size=3))
    hole = batch.rewards[:4].clone()
    hole[3] = float("nan")
    empty = batch.mask[:4].clone()
    empty[3] = 0
    four = batch._replace(mask=batch.mask[:4], process_rewards=batch.process_rewards[:4], rewards=batch.rewards[:4])
    for other in (
        four._replace(rewards=hole),
        four._replace(mask=empty, process_rewards=four.process_rewards * empty),
    ):
        found = advantage(other)
        torch.testing.assert_close(found[:3], advantage(without), atol=1e-6, rtol=1e-6)
        assert (found[3] == 0).all()


def test_a_tools_words_earn_nothing_and_no_time_passes_on_them():
    batch = make_batch([1.0, 0.0], 2, tokens=3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    process = torch.tensor([[0.5, 9.0, 0.25], [0.0, 0.0, 0.0]])
    batch = batch._replace(rewards=torch.tensor([1.75, 0.0]), mask=mask, process_rewards=process)
    found = load_advantage("prime_reinforce", gamma=0.5, whiten=False)(batch)
    assert found.tolist() == [[0.5 + 0.5 * 0.25 + 1, 0, 0.25 + 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 0.0}, "gamma must be"), ({"outcome_gamma": 1.5}, "outcome_gamma must be"),
     ({"variant": "verl", "gamma": 0.9}, "no discounts")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_advantage("prime_rloo", **options)
