"""The maths of scripts beside the claims, worked by hand."""

import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from trl_rewards_shaping.rlcr import read_reply

CLAIMS = Path(__file__).parents[1] / "recipes" / "claims"


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))  # as for a script that is run: those beside it can be imported
    try:
        return runpy.run_path(str(CLAIMS / f"{name}.py"))
    finally:
        sys.modules.pop("ensembles", None)


def test_the_best_of_two_by_proxy_is_the_mean_over_all_twos(monkeypatch):
    ensembles = script("ensembles", monkeypatch)
    # of (1, 2), (1, 3), (2, 3) the right one, with the highest score, is in two
    assert ensembles["best_of"]([1.0, 2.0, 3.0], [0, 0, 1], 2) == pytest.approx(2 / 3)
    assert ensembles["best_of"]([3.0, 1.0, 2.0], [0, 0, 1], 1) == pytest.approx(1 / 3)
    assert ensembles["best_of"]([3.0, 1.0, 2.0], [0, 0, 1], 3) == 0


def test_pairs_in_the_right_order_count_ties_half_and_need_both_kinds(monkeypatch):
    in_order = script("ensembles", monkeypatch)["in_order"]
    assert in_order([2.0, 1.0, 2.0, 3.0], [1, 0, 0, 0]) == pytest.approx((1 + 0.5 + 0) / 3)
    assert in_order([2.0, 1.0], [1, 1]) is None


def test_methods_rank_by_what_they_are_named_after(monkeypatch):
    proxies = script("ensembles", monkeypatch)["proxies"]
    pool = [{"gold": [1, 0], "warm": [0.5, 0.7], "members": [[1.0, 3.0], [2.0, 2.0]]}]
    assert proxies(pool, "mean") == [[[2.0, 2.0]]]
    assert proxies(pool, "worst") == [[[1.0, 2.0]]]
    assert proxies(pool, "uwo") == [[[1.5, 2.0]]]
    assert proxies(pool, "warm") == [[[0.5, 0.7]]]
    assert proxies(pool, "single") == [[[1.0, 2.0]], [[3.0, 2.0]]]


def test_a_pair_that_the_model_cannot_tell_is_a_tie_of_win_rates(monkeypatch):
    import torch

    prefgrpo = script("prefgrpo", monkeypatch)
    # σ(0.4) is just below 0.6: the first two are tied, and the third beats both; the others are below all
    scores = torch.tensor([1.0, 1.4, 3.0, -9.0, -9.0, -9.0, -9.0, -9.0])
    assert prefgrpo["rates"](scores).tolist() == pytest.approx([5.5 / 7, 5.5 / 7, 1.0, *[2 / 7] * 5])


def test_the_claims_policy_is_taught_replies_that_can_be_read(monkeypatch):
    confident = script("confident", monkeypatch)
    asked = confident["replies"](random.Random(0), 200)
    read = [read_reply(row["completion"][0]["content"], analysis=False) for row in asked]
    assert None not in read
    assert {confidence for _, confidence in read} == set(confident["CONFIDENCES"])
    right = [
        int(answer) in {int(first) + int(second) for second in re.findall(r"\d+", rest)}
        for (answer, _), row in zip(read, asked, strict=True)
        for first, rest in re.findall(r"Compute (\d+) \+ (.*)", row["prompt"][0]["content"])
    ]
    assert 0.8 < sum(right) / 200 < 1
