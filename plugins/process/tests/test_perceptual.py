"""Perceptual rewards: formulas by hand and as recorded, and steps that look like milestones of demonstrations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from trl_rewards_process.perceptual import Milestone, combined, discrimination, likeness, milestone, segments

from trl_rewards import Context, Failed, RewardError, Samples, load_reward
from trl_rewards.testing import check_reward

FILE = Path(__file__).with_name("step_reward_cases.json")
FORMULA, SPLIT = json.loads(FILE.read_text(encoding="utf-8"))["cases"]["perceptual"]


def test_formulas_are_as_recorded():
    given, wanted = {k: torch.tensor(v) for k, v in FORMULA["inputs"].items()}, FORMULA["outputs"]
    z = discrimination(given["mu_pos"], given["sigma_pos"], given["mu_neg"], given["sigma_neg"], 5.0)
    assert z.tolist() == pytest.approx(wanted["z"], abs=1e-6)
    chosen = z.topk(2).indices
    assert chosen.tolist() == wanted["selected"]
    at = Milestone(chosen, given["mu_pos"][chosen], given["sigma_pos"][chosen])
    assert likeness(given["x"][None], at).item() == pytest.approx(wanted["R"], abs=1e-6)
    assert combined(given["stage_rewards_2_to_4"][:, None]).item() == wanted["combined"]


def test_two_segments_are_cut_as_recorded():
    signal = torch.tensor(SPLIT["inputs"]["signal"])[:, None]
    assert segments(signal, 2, SPLIT["inputs"]["min_size"]) == [0, SPLIT["outputs"]["split_at"]]
    parts = signal[:3], signal[3:]
    cost = sum(len(part) * part.std(correction=0) for part in parts) / len(signal)
    assert cost.item() == pytest.approx(SPLIT["outputs"]["cost"], abs=1e-6)


@pytest.mark.parametrize(("count", "least"), [(2, 1), (3, 1), (3, 2), (4, 1)])
def test_segments_are_the_best_of_all(count, least):
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(count))

    def cost(cuts):
        parts = features.double().tensor_split(cuts)
        return sum(len(part) * part.std(dim=0, correction=0).mean().item() for part in parts)

    every = itertools.combinations(range(1, 9), count - 1)
    ways = [cuts for cuts in every if min(map(len, features.tensor_split(cuts))) >= least]
    found = segments(features, count, least)
    assert found[0] == 0
    assert cost(tuple(found[1:])) == pytest.approx(min(map(cost, ways)), abs=1e-9)
    with pytest.raises(ValueError, match="9 steps do not make 5 segments of at least 2"):
        segments(features, 5, 2)


def test_equal_features_have_the_least_deviation():
    at = milestone(torch.ones(3, 2), torch.zeros(4, 2), 5.0, 32, 1e-3)
    assert at.deviation.tolist() == pytest.approx([1e-3] * 2)
    assert likeness(torch.ones(1, 2), at).tolist() == [0.0]


def demonstration(*numbers):
    return f"the cat sat {numbers[0]} times\n\nthe dog ran {numbers[1]} times\n\nthe sky{' the sky' * numbers[2]}"


DEMONSTRATIONS = [demonstration(1, 2, 3), demonstration(4, 5, 4), demonstration(7, 3, 5)]


@pytest.fixture
def from_file(policy_path, write):
    def load(**options):
        file = write("demonstrations.jsonl", "\n".join(json.dumps({"completion": one}) for one in DEMONSTRATIONS))
        return load_reward("perceptual", path=policy_path, demonstrations=file, **options)

    return load


def test_it_keeps_the_contract(from_file):
    check_reward(from_file(take="last"))


def test_steps_are_most_like_their_own_milestone_and_values_are_of_the_step_alone(from_file):
    steps = demonstration(2, 6, 4).split("\n\n")
    orders = [steps, steps[::-1]]
    samples = Samples(["?"] * 3, ["\n\n".join(order) for order in orders] + [""])
    reward = from_file()
    forward, backward, nothing = reward.score_steps(samples, reward.steps_of(samples))
    assert forward == pytest.approx(backward[::-1], rel=1e-3)  # a step is seen alone
    stages = [likeness(reward._features(steps), at) for at in reward._given]
    assert [stage.argmax().item() for stage in stages] == [1, 2]  # the first segment has no milestone
    assert forward == pytest.approx((2 * stages[0] + 4 * stages[1]).tolist(), rel=1e-4)
    assert all(value <= 0 for value in forward)
    assert nothing is None
    moved = from_file(differences=True)
    values = moved.score_steps(samples, moved.steps_of(samples))[0]
    assert sum(values) == pytest.approx(forward[-1], rel=1e-4)
    assert values[0] == pytest.approx(forward[0], rel=1e-4)


def test_rows_may_bring_demonstrations_of_their_own(policy_path, from_file):
    texts = [demonstration(2, 6, 4)] * 5
    column = [DEMONSTRATIONS, None, DEMONSTRATIONS[:1], ["a", "b\n\nc"], DEMONSTRATIONS]
    samples = Samples(["?"] * 5, texts, columns={"shown": column})
    reward = load_reward("perceptual", path=policy_path, demonstrations="column:shown")
    assert reward.reads() == ("shown",)
    found = reward.score(samples)
    assert found[0] == pytest.approx(from_file().score(samples)[0], rel=1e-4)
    assert found[4] == found[0]
    assert found[1] is None
    assert isinstance(found[2], Failed)
    assert "1 demonstration; two are needed" in found[2].reason
    assert "a demonstration of 1 steps, too few for 3 segments" in found[3].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a"\n', "1 demonstration; two are needed"),
        ('"a"\n"b"\n', "a demonstration of 1 steps, too few"),
        ('{"text": "a"}\n', "each line must be"),
        ("a\n", "Expecting value"),
    ],
)
def test_demonstrations_that_cannot_be_used_are_found_before_a_model_loads(write, text, message):
    with pytest.raises(RewardError, match=message):
        load_reward("perceptual", path="no/such/model", demonstrations=write("d.jsonl", text))


def test_missing_files_and_wrong_options_are_said(tmp_path):
    with pytest.raises(RewardError, match=r"demonstrations: 'none.jsonl'.*looked in"):
        load_reward("perceptual", path="x", demonstrations="none.jsonl").setup(Context(base_dir=str(tmp_path)))
    for options, message in (
        ({"segments": 1}, "segments must be at least 2"),
        ({"floor": 0}, "floor and alpha"),
        ({"demonstrations": "column:"}, "needs the name"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward("perceptual", **({"path": "x", "demonstrations": "y"} | options))
