import statistics

import pytest
import torch

from trl_rewards import load_combiner
from trl_rewards.testing import make_samples, make_scores

BLEU = [0.1, 0.3, 0.2, 0.6]
RM = [4.0, -2.0, 1.0, 3.0]


def total(values, group_size=2, weights=None, **options):
    scores = make_scores(values, weights=weights, group_size=group_size)
    return load_combiner("bleu_rm", **options)(scores, make_samples(["x"] * len(values)))


def standardised(column):
    mean, deviation = statistics.fmean(column), statistics.stdev(column)
    return [(value - mean) / (deviation + 1e-6) for value in column]


def test_by_default_the_whole_batch_is_standardised():
    wanted = [(b + r) / 2 for b, r in zip(standardised(BLEU), standardised(RM), strict=True)]
    assert total(list(zip(BLEU, RM, strict=True))).tolist() == pytest.approx(wanted, abs=1e-5)


def test_over_groups_each_prompt_is_standardised_by_itself():
    bleu = standardised(BLEU[:2]) + standardised(BLEU[2:])
    rm = standardised(RM[:2]) + standardised(RM[2:])
    wanted = [(b + r) / 2 for b, r in zip(bleu, rm, strict=True)]
    assert total(list(zip(BLEU, RM, strict=True)), over="group").tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_row_with_a_hole_has_the_mean_of_its_other_scores():
    found = total([[0.1, 4.0], [0.3, None], [None, None], [0.6, 3.0]])
    bleu = standardised([0.1, 0.3, 0.6])
    assert found[1].item() == pytest.approx(bleu[1], abs=1e-5)
    assert found[2].isnan()


def test_weights_weigh():
    values = list(zip(BLEU, RM, strict=True))
    assert torch.allclose(total(values, weights=[1.0, 0.0]), torch.tensor(standardised(BLEU)), atol=1e-5)
    wanted = [(3 * b + r) / 4 for b, r in zip(standardised(BLEU), standardised(RM), strict=True)]
    assert total(values, weights=[3.0, 1.0]).tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_source_that_is_constant_says_nothing():
    found = total([[0.7, value] for value in RM])
    assert found.tolist() == pytest.approx([value / 2 for value in standardised(RM)], abs=1e-5)


def test_eps_must_be_above_0():
    with pytest.raises(ValueError, match="eps must be above 0, got 0"):
        load_combiner("bleu_rm", eps=0.0)
