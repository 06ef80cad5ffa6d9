"""What over-optimisation shows in is measured right, over all ranks' rows, and watched sources change nothing."""

import dataclasses
import math

import pytest
import torch

from trl_rewards import Pipeline, Reward, load_combiner
from trl_rewards.maths import explained, repeated_share, weighted_sum
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples

NAN = math.nan


class Column(Reward):
    """Scores are a dataset column's."""

    columns = ("a",)
    of: str = "a"

    def reads(self):
        return (self.of,)

    def score(self, samples):
        return list(samples[self.of])


def pipeline(weights, **options):
    """Sources a, b, … of these weights, each the column of its name."""
    sources = [Source(n, Column(of=n), Schedule.parse(w), signature=n) for n, w in zip("abc", weights, strict=False)]
    return Pipeline(sources, **options)


def test_length_explains_all_of_a_reward_that_is_made_of_it():
    correlation, share = explained(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert (correlation, share) == (pytest.approx(1.0), pytest.approx(1.0))


def test_the_share_is_of_the_variance_within_groups_and_less_chance():
    # Deviations from group means (-1, 1, -1, 1) and (-3, 3, -1, 1) have the correlation 8 / √(4 · 20). Four rows in
    # two groups leave two degrees of freedom: 1 - (1 - 0.8) · 2 / 1 = 0.6. The means, far apart, do not matter.
    one = torch.tensor([1.0, 3.0, 101.0, 103.0])
    other = torch.tensor([47.0, 53.0, 4.0, 6.0])
    correlation, share = explained(one, other, group_size=2)
    assert correlation == pytest.approx(8 / math.sqrt(80))
    assert share == pytest.approx(0.6)


def test_nothing_is_said_of_constants_and_of_too_few_rows():
    constant = explained(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    few = explained(torch.tensor([1.0, 2.0, NAN, NAN]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert all(math.isnan(value) for value in (*constant, *few))


def test_a_hole_takes_no_part():
    found = explained(torch.tensor([1.0, 2.0, 9.0, NAN]), torch.tensor([1.0, 2.0, 9.0, -50.0]))
    assert found == (pytest.approx(1.0), pytest.approx(1.0))


def test_unrelated_columns_explain_nothing_on_average():
    generator = torch.Generator().manual_seed(0)
    shares = [explained(*torch.randn(2, 8, generator=generator), 4)[1] for _ in range(2000)]
    assert sum(shares) / len(shares) == pytest.approx(0.0, abs=0.02)


def test_repetition_is_the_share_of_ngrams_that_came_before():
    assert repeated_share([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21
    assert repeated_share([1, 2, 3], 4) == 0.0


def test_a_watched_source_changes_no_bit_of_a_sum():
    scores = torch.tensor([[0.1, 0.7, NAN], [0.3, NAN, 5.0], [0.9, 0.2, float("inf")], [NAN, NAN, 1.0]])
    watched = weighted_sum(scores, torch.tensor([0.3, 0.7, 0.0]), 4)
    alone = weighted_sum(scores[:, :2], torch.tensor([0.3, 0.7]), 4)
    assert torch.equal(watched.nan_to_num(-9.0), alone.nan_to_num(-9.0))


def test_a_batch_is_measured_with_its_scores():
    samples = make_samples(["x"] * 4, a=[1.0, 2.0, 2.0, 4.0], b=[3.0, 2.0, NAN, 8.0])
    samples = dataclasses.replace(samples, completion_ids=[[7], [7] * 5, [1, 2, 3], [7] * 8])
    made = pipeline([1.0, 1.0], combine=load_combiner("mean"))
    totals = made.score(samples, 2).rewards.tolist()
    assert totals == [2.0, 2.0, 2.0, 6.0]
    # Of five 7s one of two 4-grams came before, of eight 7s four of five; the others have no or one 4-gram.
    assert made.metrics["completions/repetition"] == pytest.approx((0 + 1 / 2 + 0 + 4 / 5) / 4)
    # Population deviations of (1, 3), (2, 2) and (4, 8); one member alone disagrees with nobody, and is left out.
    assert made.metrics["combine/disagreement"] == pytest.approx((1 + 0 + 2) / 3)
    # Deviations within groups: rewards (0, 0, -2, 2), lengths (-2, 2, -2.5, 2.5).
    assert made.metrics["rewards/total/length_correlation"] == pytest.approx(10 / math.sqrt(8 * 20.5))
    assert made.metrics["rewards/total/length_explained"] == pytest.approx(1 - (1 - 100 / 164) * 2 / 1)


def test_only_members_of_an_ensemble_disagree():
    samples = make_samples(["x"] * 2, a=[1.0, 2.0], b=[3.0, 2.0])
    for combiner in ("weighted_sum", "product"):
        made = pipeline([1.0, 1.0], combine=load_combiner(combiner))
        made.score(samples, 2)
        assert "combine/disagreement" not in made.metrics
    alone = pipeline([1.0, 0.0], combine=load_combiner("mean"))
    alone.score(samples, 2)
    assert "combine/disagreement" not in alone.metrics


@pytest.mark.parametrize("combiner", ["weighted_sum", "uwo", "min", "product", "lagrangian"])
def test_a_pipeline_with_a_watched_source_gives_the_totals_that_it_gives_without(combiner):
    columns = {"a": [0.5, 0.25, None, None], "b": [0.75, None, 0.5, None], "c": [0.1, None, 0.9, 0.4]}
    samples = make_samples(["x", "x", "x", "x"], **columns)
    options = {"thresholds": {"a": 0.5}} if combiner == "lagrangian" else {}
    watched = pipeline([1.0, 1.0, 0.0], combine=load_combiner(combiner, **options)).score(samples, 2).rewards
    alone = pipeline([1.0, 1.0], combine=load_combiner(combiner, **options)).score(samples, 2).rewards
    assert watched.nan_to_num(-9.0).tolist() == alone.nan_to_num(-9.0).tolist()
    assert alone[3].isnan()
