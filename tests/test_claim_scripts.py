"""The scripts beside claims: their maths worked by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from trl_rewards_shaping.rlcr import read_reply

from trl_rewards import load_advantage

CLAIMS = Path(__file__).parents[1] / "recipes" / "claims"


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))  # as for a script that is run: those beside it can be imported
    spec = importlib.util.spec_from_file_location(f"claim_{name}", CLAIMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    for beside in {file.stem for file in CLAIMS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[beside]
    return module


def test_the_best_of_two_by_proxy_is_the_mean_over_all_twos(monkeypatch):
    ensembles = script("ensembles", monkeypatch)
    # of (1, 2), (1, 3), (2, 3) the right one, with the highest score, is in two
    assert ensembles.best_of([1.0, 2.0, 3.0], [0, 0, 1], 2) == pytest.approx(2 / 3)
    assert ensembles.best_of([3.0, 1.0, 2.0], [0, 0, 1], 1) == pytest.approx(1 / 3)
    assert ensembles.best_of([3.0, 1.0, 2.0], [0, 0, 1], 3) == 0


def test_pairs_in_the_right_order_count_ties_half_and_need_both_kinds(monkeypatch):
    in_order = script("ensembles", monkeypatch).in_order
    assert in_order([2.0, 1.0, 2.0, 3.0], [1, 0, 0, 0]) == pytest.approx((1 + 0.5 + 0) / 3)
    assert in_order([2.0, 1.0], [1, 1]) is None


def test_methods_rank_by_what_they_are_named_after(monkeypatch):
    proxies = script("ensembles", monkeypatch).proxies
    pool = [{"gold": [1, 0], "warm": [0.5, 0.7], "members": [[1.0, 3.0], [2.0, 2.0]]}]
    assert proxies(pool, "mean") == [[[2.0, 2.0]]]
    assert proxies(pool, "worst") == [[[1.0, 2.0]]]
    assert proxies(pool, "uwo") == [[[1.5, 2.0]]]
    assert proxies(pool, "warm") == [[[0.5, 0.7]]]
    assert proxies(pool, "single") == [[[1.0, 2.0]], [[3.0, 2.0]]]


def test_a_pair_that_the_model_cannot_tell_is_a_tie_of_win_rates(monkeypatch):
    prefgrpo = script("pref-grpo", monkeypatch)
    # σ(0.4) is just below 0.6: the first two are tied, and the third beats both; the others are below all
    scores = torch.tensor([1.0, 1.4, 3.0, -9.0, -9.0, -9.0, -9.0, -9.0])
    assert prefgrpo.rates(scores).tolist() == pytest.approx([5.5 / 7, 5.5 / 7, 1.0, *[2 / 7] * 5])


def test_the_claims_policy_is_taught_replies_that_can_be_read(monkeypatch):
    confident = script("confident", monkeypatch)
    asked = confident.replies(random.Random(0), 200)
    read = [read_reply(row["completion"][0]["content"], analysis=False) for row in asked]
    assert None not in read
    assert {confidence for _, confidence in read} == set(confident.CONFIDENCES)
    right = [
        int(answer) in {int(first) + int(second) for second in re.findall(r"\d+", rest)}
        for (answer, _), row in zip(read, asked, strict=True)
        for first, rest in re.findall(r"Compute (\d+) \+ (.*)", row["prompt"][0]["content"])
    ]
    assert 0.8 < sum(right) / 200 < 1


def test_slips_are_as_likely_in_every_step_and_carry_on(monkeypatch):
    slips = script("slips", monkeypatch)
    rng, taken = random.Random(0), set()
    asked = slips.quiz.more_questions(rng, 300, taken, slips.long_sum)
    assert {question.text for question in asked} == taken
    wrong = [0] * slips.STEPS
    for question in asked:
        said = slips.reply(rng, question)
        sums = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", said)
        assert [(sign, right) for _, sign, right, _ in sums] == re.findall(r" ([-+*]) (\d+) =", question.think)
        assert [left for left, *_ in sums[1:]] == [result for *_, result in sums[:-1]]
        assert said.endswith(f"{sums[-1][-1]}.</answer>")
        for place, (left, sign, right, result) in enumerate(sums):
            wrong[place] += slips.quiz.apply(sign, int(left), int(right)) != int(result)
    assert all(0.12 < each / 300 < 0.28 for each in wrong)


@pytest.fixture
def bnpo(monkeypatch):
    return script("bnpo", monkeypatch)


@pytest.fixture
def transforming(monkeypatch):
    return script("log-sigmoid", monkeypatch)


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
