"""Shapers of step rewards, against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from trl_rewards import Pipeline, Recipe, RecipeError, RewardError, Samples, TokenReward, load_shaper
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples, make_scores

NAN = float("nan")
STEPS = torch.tensor([[NAN, 0.9, 0.7, NAN, 0.4], [0.8, NAN, NAN, NAN, NAN], [NAN, NAN, NAN, NAN, NAN]])


def shaped(shaper, rewards=STEPS, outcomes=(1.0, 0.0, None)):
    scores = make_scores([[outcome] for outcome in outcomes], group_size=1)._replace(names=("exact",))
    return shaper.shape_tokens(rewards, scores, make_samples(completions=["a"] * len(rewards)))


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), equal_nan=True)


def test_clip_takes_what_is_above_eta():
    close(shaped(load_shaper("prm_clip", eta=0.8)), [[NAN, 0, -0.1, NAN, -0.4], [0, *[NAN] * 4], [NAN] * 5])


def test_delta_sums_to_the_first_step_and_what_is_to_come_is_the_steps_own_value():
    found = shaped(load_shaper("prm_delta"))
    close(found, [[NAN, 0.2, 0.7, NAN, 0.0], [0.0, *[NAN] * 4], [NAN] * 5])
    assert found[0].nansum().item() == pytest.approx(0.9)
    assert found[0, 2:].nansum().item() == pytest.approx(0.7)


@pytest.mark.parametrize(("options", "wanted"), [(["prm_delta"], 0.9), (["prm_clip"], 0.0), ([], None)])
def test_repeating_a_good_step_earns_nothing(options, wanted):
    sums = []
    for steps in (3, 10):
        rewards = torch.full((1, steps), 0.9)
        for name in options:
            rewards = shaped(load_shaper(name, **({"eta": 0.9} if name == "prm_clip" else {})), rewards, [1.0])
        sums.append(rewards.sum().item())
    if wanted is None:
        assert sums == [pytest.approx(2.7), pytest.approx(9.0)]  # the hack, unshaped
    else:
        assert sums == [pytest.approx(wanted)] * 2


def test_renorm_gives_steps_the_sign_of_their_outcome():
    close(
        shaped(load_shaper("renorm", outcome="exact"), torch.tensor([[0.75, 0.5, 1.0]] * 3)),
        [[0.75, 0.5, 1.0], [-0.25, -0.5, 0.0], [0.25, 0.0, 0.5]],
    )


@pytest.mark.parametrize(
    ("rewards", "outcomes", "name", "message"),
    [([[1.5]], [1.0], "exact", "process rewards must be in"), ([[0.5]], [2.0], "exact", "'exact' must be in"),
     ([[0.5]], [1.0], "exactly", "no source 'exactly'; there is exact")],
)  # fmt: skip
def test_renorm_refuses_what_is_not_between_0_and_1(rewards, outcomes, name, message):
    with pytest.raises(RewardError, match=message):
        shaped(load_shaper("renorm", outcome=name), torch.tensor(rewards), outcomes)


class Steps(TokenReward):
    """0.9 at the last token of every step; steps are two tokens long."""

    def score_tokens(self, samples):
        return [[None if place % 2 == 0 else 0.9 for place in range(len(ids))] for ids in samples.completion_ids]


def test_a_source_with_a_token_shaper_counts_as_what_it_makes_of_the_tokens():
    samples = Samples(prompts=["p"] * 2, completions=["a", "b"], completion_ids=[[1] * 4, [1] * 8], columns={})
    plain = Pipeline([Source("steps", Steps())]).score(samples, group_size=2)
    assert plain.rewards.tolist() == pytest.approx([1.8, 3.6])
    batch = Pipeline(
        [Source("steps", Steps(), shape=[load_shaper("prm_delta"), load_shaper("clip", high=0.5)])]
    ).score(samples, group_size=2)
    assert batch.scores.values[:, 0].tolist() == pytest.approx([1.8, 3.6])  # logged as the source gave it
    assert batch.rewards.tolist() == pytest.approx([0.5, 0.5])
    assert batch.process_rewards[0].tolist() == pytest.approx([0, 0.9, 0, 0, 0, 0, 0, 0])


def test_the_script_of_the_cpu_recipe_faults_wrong_sums_and_pays_for_all_else():
    pipeline = Pipeline.from_recipe(Recipe.load("clip-delta/cpu", {"rewards.1.shape": []}, check_trl=False))
    replies = ["<think>3 + 4 = 7\n7 - 2 = 6</think><answer>It is 6. I like it a lot.</answer>", "7"]
    samples = make_samples(replies, answer=["5", "7"])
    scores = pipeline.score(samples).scores.values
    assert scores[:, 1].tolist() == pytest.approx([0.9 + 0.1 + 0.9 + 0.9, 0.9])
    assert scores[:, 2].tolist() == [4, 1]


def test_a_shaper_of_tokens_is_refused_where_there_are_none(write):
    recipe = write(
        "recipe.yaml",
        "trainer: grpo\nrewards:\n  - use: exact_match\n    with: {answer: answer}\n"
        "    shape: [{use: prm_delta}]\nshape: [{use: prm_delta}]\n",
    )
    with pytest.raises(RecipeError) as caught:
        Pipeline.from_recipe(Recipe.load(recipe, check_trl=False))
    assert "rewards[0].shape[0]: 'prm_delta' shapes tokens, and 'exact_match' scores none" in str(caught.value)
    assert "shape[0]: 'prm_delta' shapes one source's tokens" in str(caught.value)
