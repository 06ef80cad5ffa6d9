import torch
from trl_rewards_example import Negate, Vowels

from trl_rewards import Samples


def test_vowels_are_counted_among_letters_only():
    samples = Samples(["q"] * 3, ["Ada!", "Yes", "..."])
    assert Vowels().score(samples) == [2 / 3, 1 / 3, None]
    assert Vowels(vowels="aeiouy").score(samples) == [2 / 3, 2 / 3, None]


def test_a_negated_hole_stays_a_hole():
    shaped = Negate()(torch.tensor([1.0, float("nan")]), Samples(["q", "q"], ["a", "b"]))
    assert shaped[0] == -1.0
    assert shaped[1].isnan()
