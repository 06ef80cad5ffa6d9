"""ReasonFlux-PRM: steps and trajectory, and the labels it is trained on, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from trl_rewards_process.formats import LAYOUTS, encode_steps
from trl_rewards_process.reasonflux import (
    alignment,
    coherence,
    offline_score,
    online_reward,
    softmax_weighted,
    step_rewards,
    template_reward,
    training_loss,
)

from trl_rewards import Context, Failed, RewardError, Samples, load_reward

CASES = json.loads((Path(__file__).parent / "process_cases.json").read_text())
TEXT = "<think>the cat sat\n\nso 3</think>the answer\n\nis 3"
STEPS = ["the cat sat", "so 3", "the answer", "is 3"]


def test_the_authors_step_rewards_mix_and_score():
    case = CASES["16_reasonflux.make_step_rewards"]
    (found,) = step_rewards(torch.tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["mask"]))
    assert found == pytest.approx(case["outputs"]["step_rewards"][0])
    case = CASES["16_reasonflux.offline_score"]
    given = case["inputs"]
    assert offline_score(given["step"], given["final"], given["alpha"]) == pytest.approx(case["outputs"]["r_hat"])
    case = CASES["16_reasonflux.mix"]
    assert online_reward(case["inputs"]["rule"], case["inputs"]["prm"]) == pytest.approx(case["outputs"]["reward"])


def test_a_probability_that_underflows_keeps_its_place():
    assert step_rewards(torch.tensor([[[0.0, -200.0], [0.0, 0.0]]]), torch.ones(1, 2)) == [[0.0, 0.5]]


@pytest.fixture
def reward(qwen_prm):
    return load_reward("reasonflux_prm", path=qwen_prm, dtype="float32")


def test_thinking_and_answer_are_steps_and_the_trajectory_is_one_more(reward, qwen_prm):
    prm = load_reward("prm", path=qwen_prm, format="reasonflux", dtype="float32")
    samples = Samples(["how many"], [TEXT])
    assert reward.steps_of(samples) == [STEPS]
    (steps,), (whole,) = prm.score_steps(samples, [STEPS]), prm.score_steps(samples, [["\n\n".join(STEPS)]])
    assert reward.score(samples) == [pytest.approx(sum(steps) / 4 + whole[0], abs=1e-5)]
    light = load_reward("reasonflux_prm", path=qwen_prm, dtype="float32", alpha=0.0)
    assert light.score(samples) == [pytest.approx(sum(steps) / 4, abs=1e-5)]
    assert reward.score(Samples(["how many"], [""])) == [None]


def test_as_a_process_reward_the_trajectory_counts_at_the_last_step(qwen_prm, policy_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    reward = load_reward("reasonflux_prm", path=qwen_prm, dtype="float32", take="steps", alpha=2.0)
    samples = Samples(["how many"], [TEXT], completion_ids=[tokenizer(TEXT)["input_ids"]])
    reward.setup(Context(tokenizer=tokenizer))
    (tokens,) = reward.score_tokens(samples)
    said = [value for value in tokens if value is not None]
    (steps,), (whole,) = (reward.score_steps(samples, [each]) for each in (STEPS, ["\n\n".join(STEPS)]))
    assert said == pytest.approx([*steps[:3], steps[3] + 2 * whole[0]], abs=1e-5)
    assert tokens[-1] == pytest.approx(said[-1])


def test_a_trajectory_beyond_the_context_has_no_score(qwen_prm):
    tokenizer = AutoTokenizer.from_pretrained(qwen_prm)
    end = encode_steps(tokenizer, LAYOUTS["reasonflux"], "how many", ["\n\n".join(STEPS)]).places[0]
    reward = load_reward("reasonflux_prm", path=qwen_prm, dtype="float32", max_length=end, take="steps")
    assert reward.score(Samples(["how many"], [TEXT])) == [
        Failed(f"the question and the first step have more than {end} tokens")
    ]


def test_labels_of_steps_by_hand():
    thoughts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    answers = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(alignment(thoughts, answers), torch.tensor([1.0, 0.0, half]))
    negatives = torch.tensor([[[1.0, 0.0]] * 2, [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    found = coherence(thoughts, negatives, tau=0.5)
    # cos(s0, s1) = 0 against 1 and -1; cos(s1, s2) = √½ against 0 and 0
    wanted = [math.nan, -math.log(math.exp(2) + math.exp(-2)), 2 * half - math.log(2)]
    torch.testing.assert_close(found, torch.tensor(wanted), equal_nan=True)
    assert coherence(thoughts[:0], negatives[:0], tau=0.5).tolist() == []


def test_the_larger_part_counts_more():
    found = softmax_weighted(torch.tensor([[1.0, 0.0, math.nan], [0.5, 0.5, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([math.e / (math.e + 1), 0.5]))


def test_a_trajectorys_reward_is_the_share_of_right_answers_by_its_template():
    assert template_reward([1.0, 0.0, 1.0, 1.0]) == 0.75
    with pytest.raises(RewardError, match="there is none"):
        template_reward([])
    loss = training_loss(
        torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor(0.5), torch.tensor(1.0), 2, 4
    )
    assert loss.item() == pytest.approx(2 * 0.125 + 4 * 0.25)
