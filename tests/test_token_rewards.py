"""Process rewards keep their tokens on the way through the pipeline."""

from __future__ import annotations

import pytest

from trl_rewards import Failed, Pipeline, Recipe, RecipeError, Reward, RewardError, Samples, TokenReward, load_combiner
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Source

SAMPLES = Samples(
    prompts=["p"] * 4,
    completions=[f"c{row}" for row in range(4)],
    completion_ids=[[1, 2, 3], [4], [5, 6], [7, 8]],
    columns={},
)


class Ids(TokenReward):
    """Each token earns a tenth of its id; ids 4 and 5 begin rows without an opinion."""

    def score_tokens(self, samples):
        rows = [[token / 10 for token in ids] for ids in samples.completion_ids]
        return [
            {4: None, 5: Failed("down")}.get(ids[0], row)
            for ids, row in zip(samples.completion_ids, rows, strict=True)
        ]


class One(Reward):
    def score(self, samples):
        return [1.0] * len(samples)


def scored(*sources: Source, **options):
    return Pipeline(list(sources), **options).score(SAMPLES, group_size=2)


def test_a_process_reward_counts_as_its_sum_and_keeps_its_tokens_weighted():
    batch = scored(Source("ids", Ids(), Schedule.parse(2.0)), Source("one", One(), Schedule.parse(0.5)))
    assert batch.scores.values[:, 0].tolist() == pytest.approx([0.6, float("nan"), float("nan"), 1.5], nan_ok=True)
    assert batch.scores.status[:, 0].tolist() == [0, 1, 2, 0]
    wanted = [[0.2, 0.4, 0.6], [0, 0, 0], [0, 0, 0], [1.4, 1.6, 0]]
    assert batch.process_rewards.tolist() == [pytest.approx(row) for row in wanted]


def test_several_process_rewards_add_up_token_by_token():
    batch = scored(Source("a", Ids(), Schedule.parse(1.0)), Source("b", Ids(), Schedule.parse(-0.5)))
    assert batch.process_rewards[3].tolist() == pytest.approx([0.35, 0.4, 0.0])


def test_without_a_process_reward_there_are_no_token_rewards():
    assert scored(Source("one", One())).process_rewards is None


def test_a_combiner_that_is_no_sum_sees_the_sum_of_the_tokens():
    batch = scored(Source("ids", Ids()), Source("one", One()), combine=load_combiner("min"))
    assert batch.rewards[0].item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0]] * 4, "2 token values for a completion of 3 tokens"),
        ([[1.0]], "1 rows of token values for 4 completions"),
        ([["a", "b", "c"], [1.0], [1.0, 1.0], [1.0, 1.0]], "returned 'a'"),
    ],
)
def test_token_values_that_do_not_fit_the_tokens_stop_the_run(rows, message):
    class Wrong(TokenReward):
        def score_tokens(self, samples):
            return rows

    with pytest.raises(RewardError, match=message):
        scored(Source("wrong", Wrong()))


def test_a_nan_among_the_tokens_is_a_hole_and_infinity_a_failure():
    class Odd(TokenReward):
        def score_tokens(self, samples):
            return [[1.0, float("nan"), 1.0], [float("inf")], [1.0, 1.0], [1.0, 1.0]]

    batch = scored(Source("odd", Odd()))
    assert batch.scores.status[:, 0].tolist() == [1, 2, 0, 0]
    assert batch.process_rewards[:2].abs().sum() == 0


PLUGIN = """
from trl_rewards import TokenReward

class Halves(TokenReward):
    def score_tokens(self, samples):
        return [[0.5] * len(ids) for ids in samples.completion_ids]
"""


@pytest.mark.slow
def test_tokens_come_back_from_isolated_processes(tmp_path):
    (tmp_path / "halves.py").write_text(PLUGIN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: ppo\nrewards: [{use: ./halves.py:Halves, isolate: true, timeout: 60}]\n")
    pipeline = Pipeline.from_recipe(Recipe.load(str(recipe), check_trl=False))
    batch = pipeline.score(SAMPLES, group_size=2)
    pipeline.close()
    assert batch.process_rewards.tolist() == [[0.5, 0.5, 0.5], [0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]


def test_a_cache_is_refused_for_token_scores(tmp_path):
    (tmp_path / "halves.py").write_text(PLUGIN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: ppo\nrewards: [{use: ./halves.py:Halves, cache: true}]\n")
    with pytest.raises(RecipeError, match=r"rewards\[0\].cache: 'Halves' scores tokens"):
        Recipe.load(str(recipe), check_trl=False)
