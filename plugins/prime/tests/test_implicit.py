"""Implicit process rewards and their losses give the recorded numbers of verl's recipe and of the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trl_rewards_prime.implicit import (
    batch_normed,
    best_of_n_weights,
    ce_loss,
    dpo_loss,
    others,
    token_scores,
)

CASES = {case["id"]: case for case in json.loads((Path(__file__).parent / "prime_cases.json").read_text())}


def close(found, wanted, **tolerance):
    torch.testing.assert_close(found, torch.tensor(wanted), **({"atol": 1e-5, "rtol": 1e-5} | tolerance))


def inputs_of(case):
    given = {name: torch.tensor(values) for name, values in case["input"].items()}
    return given["logp"] - given["ref_logp"], given["mask"], given


@pytest.mark.parametrize("name", ["prime_verl_implicit_token_bn", "prime_verl_implicit_token_lambda"])
def test_verls_token_rewards(name):
    case = CASES[name]
    q, mask, _ = inputs_of(case)
    scores = token_scores(q, mask, case["beta"], "verl", lam=case["lambda_"])
    close(scores, case["expected"]["token_score"])
    close(batch_normed(scores), case["expected"]["normed"])


@pytest.mark.parametrize("name", ["prime_orig_implicit_token", "prime_orig_implicit_whole"])
def test_the_authors_token_rewards(name):
    case = CASES[name]
    q, mask, given = inputs_of(case)
    scores = token_scores(q, mask, case["beta"], "original", whole=case["granularity"] == "whole")
    close(scores, case["expected"]["token_score"])
    close(batch_normed(scores), case["expected"]["normed"])
    assert ce_loss(0.05 * (q * mask).sum(dim=1), given["acc"]).mean().item() == pytest.approx(
        case["expected"]["ce_loss"], abs=1e-5
    )


def test_the_papers_token_rewards_are_beta_times_the_log_ratio_of_every_token():
    q, mask = torch.tensor([[1.0, -2.0, 9.0]]), torch.tensor([[1, 1, 0]])
    close(token_scores(q, mask, 0.5), [[0.5, -1.0, 0.0]])
    close(token_scores(q, mask, 0.5, whole=True), [[0.0, -0.5, 0.0]])
    close(token_scores(q, mask, 0.5, "verl", whole=True), [[0.0, -0.5, 0.0]])


def test_verls_losses():
    case = CASES["prime_verl_implicit_token_bn"]
    q, mask, _ = inputs_of(case)
    wanted = case["expected"]
    outcomes, sums = torch.tensor(wanted["acc"]), case["beta"] * (q * mask).sum(dim=1)
    size = wanted["n_samples_for_pairs"]
    against = others(sums, outcomes, size)
    assert ce_loss(sums, outcomes).mean().item() == pytest.approx(wanted["ce_loss"], abs=1e-5)
    assert dpo_loss(sums, outcomes, against).mean().item() == pytest.approx(wanted["dpo_loss"], abs=1e-5)
    for name, values in (("bon_acc_loss", outcomes), ("bon_rm_loss", sums)):
        found = (dpo_loss(sums, outcomes, against) * best_of_n_weights(values, size)).sum().item()
        assert found == pytest.approx(wanted[name], abs=1e-4), name


def test_opponents_are_worse_for_the_right_and_better_for_the_wrong():
    sums, outcomes = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1.0, 0.5, 0.0, 0.0])
    close(others(sums, outcomes, 4), [14 / 3, 6, 1.5, 1.5])
    assert others(sums, torch.ones(4), 4).tolist() == [0.0] * 4
