"""The plugin author's kit: each check catches the fault it is there for, and lets good components pass."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from trl_rewards import Advantage, Combiner, Failed, Reward, Selector, Shaper
from trl_rewards.maths import centered
from trl_rewards.testing import (
    check_advantage,
    check_combiner,
    check_reward,
    check_selector,
    check_shaper,
    make_batch,
    make_samples,
    make_scores,
)

# --- samples out of nothing ------------------------------------------------------------------------------------------


def test_samples_out_of_nothing_have_six_varied_rows():
    samples = make_samples()
    assert len(samples) == 6
    assert "" in samples.completions
    assert any(ord(letter) > 0xFFFF for text in samples.completions for letter in text)
    assert samples.lengths == [len(text.split()) for text in samples.completions]


def test_samples_may_be_chat_and_have_columns_and_groups():
    samples = make_samples(["a b", "c"], chat=True, group_size=2, step=3, max_steps=9, answer=["x", "y"])
    assert samples.completions[0] == [{"role": "assistant", "content": "a b"}]
    assert samples.prompts[0] == samples.prompts[1]
    assert samples["answer"] == ["x", "y"]
    assert (samples.group_size, samples.step, samples.max_steps) == (2, 3, 9)


def test_scores_and_batches_out_of_lists():
    scores = make_scores([[1.0, None], [0.5, 2.0]], weights=[1.0, 0.5])
    assert scores.names == ("a", "b")
    assert scores.values[0].isnan().tolist() == [False, True]
    assert scores.status.tolist() == [[0, 1], [0, 0]]
    assert scores.weights.tolist() == [1.0, 0.5]
    batch = make_batch([1.0, None], tokens=4)
    assert batch.rewards.isnan().tolist() == [False, True]
    assert batch.mask.shape == (2, 4)


# --- rewards ---------------------------------------------------------------------------------------------------------


def lengths(samples) -> list[float]:
    return [float(len(text)) for text in samples.texts]


class Good(Reward):
    def score(self, samples):
        return [
            None if not text else Failed("too long") if len(text) > 60 else float(len(text)) for text in samples.texts
        ]


class GoodGroup(Reward):
    scope = "group"

    def score(self, samples):
        assert samples.group_size == 2
        values = lengths(samples)
        return [value - max(values[row // 2 * 2 : row // 2 * 2 + 2]) for row, value in enumerate(values)]


class GoodAsync(Reward):
    async def ascore(self, samples):
        return lengths(samples)


class GoodRandom(Reward):
    deterministic = False

    def score(self, samples):
        return [random.random() for _ in range(len(samples))]


class GoodWithColumn(Reward):
    columns = ("answer",)

    def score(self, samples):
        return [float(answer == "x") for answer in samples["answer"]]


class TooFew(Reward):
    def score(self, samples):
        return lengths(samples)[1:]


class Ranked(Reward):
    def score(self, samples):
        return [float(row) for row in range(len(samples))]


class FromBatch(Reward):
    def score(self, samples):
        return [value / (sum(lengths(samples)) or 1) for value in lengths(samples)]


class NaN(Reward):
    def score(self, samples):
        return [float("nan")] * len(samples)


class Texts(Reward):
    def score(self, samples):
        return ["1.0"] * len(samples)


class Infinite(Reward):
    def score(self, samples):
        return [float("inf")] * len(samples)


class Mutating(Reward):
    def score(self, samples):
        scores = lengths(samples)
        samples.completions.reverse()
        samples.completions.reverse()
        samples.completion_ids[0].append(7)
        return scores


class Drifting(Reward):
    def __post_init__(self):
        self.calls = itertools.count()

    def score(self, samples):
        return [float(next(self.calls))] * len(samples)


class NeedsChat(Reward):
    def score(self, samples):
        return [float(len(completion[0]["content"])) for completion in samples.completions]


class PlainOnly(Reward):
    def score(self, samples):
        return [float(len(completion.split())) for completion in samples.completions]


class BreaksOnNothing(Reward):
    def score(self, samples):
        longest = max(lengths(samples))
        return [value if longest else 0.0 for value in lengths(samples)]


class Unpicklable(Reward):
    def __post_init__(self):
        self.measure = lambda text: float(len(text))

    def score(self, samples):
        return [self.measure(text) for text in samples.texts]


class ForgetsWhenPickled(Reward):
    def __post_init__(self):
        self.factor = 1.0

    def __getstate__(self):
        return {"factor": 2.0}

    def score(self, samples):
        return [self.factor * value for value in lengths(samples)]


class BadState(Reward):
    def score(self, samples):
        return lengths(samples)

    def state_dict(self):
        return {"object": BadState}

    def load_state_dict(self, state):
        pass


class NoLoad(Reward):
    def score(self, samples):
        return lengths(samples)

    def state_dict(self):
        return {"count": 1}


@pytest.mark.parametrize("reward", [Good(), GoodGroup(), GoodAsync(), GoodRandom()], ids=lambda r: type(r).__name__)
def test_a_good_reward_passes(reward):
    check_reward(reward)


def test_a_reward_with_a_column_passes_when_it_is_given_and_names_it_when_not():
    check_reward(GoodWithColumn(), answer=list("xyxyxy"))
    with pytest.raises(AssertionError, match=r"it reads columns \['answer'\]: pass them"):
        check_reward(GoodWithColumn())


def test_a_reward_may_be_checked_on_samples_of_ones_own():
    check_reward(NeedsChat(), make_samples(chat=True))


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        (TooFew(), "5 scores for 6 rows; give exactly one per row"),
        (Ranked(), "a row scores differently in another batch"),
        (FromBatch(), "a row scores differently in another batch"),
        (NaN(), "nan is not a score"),
        (Texts(), "'1.0' is not a score"),
        (Infinite(), "inf is not a score"),
        (Mutating(), "it changes its samples"),
        (Drifting(), "scores the same rows differently the second time"),
        (ForgetsWhenPickled(), "scores differ after pickling"),
        (BadState(), "state_dict may hold tensors, numbers, strings, lists and dicts only"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reward) else "",
)
def test_a_broken_reward_is_caught(reward, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_reward(reward)


@pytest.mark.parametrize(
    "reward", [NeedsChat(), PlainOnly(), BreaksOnNothing(), Unpicklable(), NoLoad()], ids=lambda r: type(r).__name__
)
def test_a_reward_that_raises_is_caught_with_its_own_error(reward):
    with pytest.raises(Exception, match=r".+"):
        check_reward(reward)


def test_a_group_reward_that_depends_on_other_groups_is_caught():
    class Global(Reward):
        scope = "group"

        def score(self, samples):
            values = lengths(samples)
            return [value - max(values) for value in values]

    with pytest.raises(AssertionError, match="a group scores differently in another batch"):
        check_reward(Global())


# --- combiners -------------------------------------------------------------------------------------------------------


class GoodMean(Combiner):
    def __call__(self, scores, samples):
        return scores.values.masked_fill(scores.weights == 0, float("nan")).nanmean(dim=1)


class Listening(Combiner):
    def __call__(self, scores, samples):
        return scores.values.nanmean(dim=1)


class Zeros(Combiner):
    def __call__(self, scores, samples):
        return (scores.values.nan_to_num(nan=0.0) * scores.weights).sum(dim=1)


class Poisoned(Combiner):
    def __call__(self, scores, samples):
        return scores.values.sum(dim=1) * float("nan")


class Columns(Combiner):
    def __call__(self, scores, samples):
        return scores.values.nanmean(dim=1, keepdim=True)


class InPlace(Combiner):
    def __call__(self, scores, samples):
        scores.values.mul_(2)
        return scores.values.nanmean(dim=1)


class ByPlace(Combiner):
    def __call__(self, scores, samples):
        return scores.values.nanmean(dim=1) + torch.arange(len(samples))


class TwoOnly(Combiner):
    def __call__(self, scores, samples):
        total = scores.values.nanmean(dim=1)
        return total + 0 * scores.values[:, 1].nan_to_num()


def test_a_good_combiner_passes():
    check_combiner(GoodMean())


@pytest.mark.parametrize(
    ("combiner", "complaint"),
    [
        (Zeros(), "a row without any score must stay NaN"),
        (Poisoned(), "rows with every score must have a finite total"),
        (Columns(), r"got shape \(8, 1\), wanted \(8,\)"),
        (InPlace(), "it changes the scores it was given"),
        (ByPlace(), "totals depend on the order of groups"),
        (Listening(), "a source of weight 0 changes totals"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Combiner) else "",
)
def test_a_broken_combiner_is_caught(combiner, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_combiner(combiner)


class WithinGroup(Combiner):
    def __call__(self, scores, samples):
        return scores.values.nanmean(dim=1) + torch.arange(len(samples)) % scores.group_size


class Drawn(Combiner):
    def __call__(self, scores, samples):
        return scores.values.nanmean(dim=1) + torch.rand(len(samples))


class Negative(Combiner):
    def __call__(self, scores, samples):
        return -scores.values.nanmean(dim=1)


@pytest.mark.parametrize(
    ("combiner", "claims", "complaint"),
    [
        (WithinGroup(), {}, "totals depend on the order of rows within a group"),
        (Drawn(), {}, "combines the same scores differently the second time"),
        (Negative(), {"rises": True}, "fall while source 0 rises"),
        (Negative(), {"within": (0.0, 1.0)}, r"is not in \[0, 1\]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Combiner) else "",
)
def test_a_combiner_that_is_not_what_is_claimed_is_caught(combiner, claims, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_combiner(combiner, **claims)


def test_a_combiner_that_needs_two_sources_is_caught():
    with pytest.raises(IndexError):
        check_combiner(TwoOnly())


# --- shapers ---------------------------------------------------------------------------------------------------------


class GoodDouble(Shaper):
    def __call__(self, rewards, samples):
        return rewards * 2


class Running(Shaper):
    """A running maximum; `keep` says whether a checkpoint keeps it."""

    keep: bool = True

    def __post_init__(self):
        self.top = 1.0

    def __call__(self, rewards, samples):
        self.top = max(self.top, rewards.nan_to_num().max().item()) + 1
        return rewards / self.top

    def state_dict(self):
        return {"top": self.top} if self.keep else {}

    def load_state_dict(self, state):
        self.top = state.get("top", self.top)


class FillsHoles(Shaper):
    def __call__(self, rewards, samples):
        return rewards.nan_to_num(nan=0.0)


class MakesHoles(Shaper):
    def __call__(self, rewards, samples):
        return rewards.log()


class CountsHoles(Shaper):
    def __call__(self, rewards, samples):
        return rewards - rewards.nan_to_num(nan=0.0).mean()


class DividesByZero(Shaper):
    def __call__(self, rewards, samples):
        there = rewards[~rewards.isnan()]
        return (rewards - there.mean()) / there.std()


class ShapesInPlace(Shaper):
    def __call__(self, rewards, samples):
        return rewards.mul_(2)


class Shorter(Shaper):
    def __call__(self, rewards, samples):
        return rewards[1:]


@pytest.mark.parametrize("shaper", [GoodDouble(), Running()], ids=["stateless", "stateful"])
def test_a_good_shaper_passes(shaper):
    check_shaper(shaper)


@pytest.mark.parametrize(
    ("shaper", "complaint"),
    [
        (FillsHoles(), "NaN rows must stay NaN, and only they"),
        (MakesHoles(), "NaN rows must stay NaN, and only they"),
        (CountsHoles(), "a NaN row moves the others"),
        (DividesByZero(), "constant rewards of 0.0 give"),
        (ShapesInPlace(), "it changes the rewards it was given"),
        (Shorter(), r"got shape \(5,\), wanted \(6,\)"),
        (Running(keep=False), "state_dict does not hold all of its state"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Shaper) else "",
)
def test_a_broken_shaper_is_caught(shaper, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_shaper(shaper)


class PlacedShaper(Shaper):
    def __call__(self, rewards, samples):
        return rewards + torch.arange(len(rewards))


class DrawnShaper(Shaper):
    def __call__(self, rewards, samples):
        return rewards + torch.rand(len(rewards))


class FalselyAffine(Shaper):
    def affine(self):
        return True

    def __call__(self, rewards, samples):
        return rewards.tanh()


class Falling(FalselyAffine):
    def __call__(self, rewards, samples):
        return -rewards


@pytest.mark.parametrize(
    ("shaper", "claims", "complaint"),
    [
        (PlacedShaper(), {}, "rewards are shaped by their place"),
        (DrawnShaper(), {}, "shapes the same rewards differently the second time"),
        (FalselyAffine(), {}, "it says that it is affine, and steps of 1 differ"),
        (Falling(), {}, r"gives \[2.0, 1.0"),
        (GoodDouble(), {"within": (-1.0, 1.0)}, r"is not in \[-1, 1\]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Shaper) else "",
)
def test_a_shaper_that_is_not_what_is_claimed_is_caught(shaper, claims, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_shaper(shaper, **claims)


# --- advantages ------------------------------------------------------------------------------------------------------


class GoodCenter(Advantage):
    def __call__(self, batch):
        return centered(batch.rewards, batch.scores.group_size).nan_to_num(nan=0.0)


class GoodTokens(GoodCenter):
    level = "token"

    def __call__(self, batch):
        return super().__call__(batch)[:, None] * batch.mask


class CountsHoleRows(Advantage):
    """A hole is a reward of 0 to the mean of its group."""

    def __call__(self, batch):
        filled = batch.rewards.nan_to_num(nan=0.0)
        return centered(filled, batch.scores.group_size).masked_fill(batch.rewards.isnan(), 0.0)


class FalselyUndoing(GoodCenter):
    def undoes_affine(self):
        return True


class FillsRewards(GoodCenter):
    def __call__(self, batch):
        found = super().__call__(batch)
        batch.rewards.nan_to_num_(nan=0.0)
        return found


@pytest.mark.parametrize(
    ("advantage", "complaint"),
    [
        (CountsHoleRows(), "a row without a reward moves the others"),
        (FalselyUndoing(), r"it says that it undoes a · r \+ b, and gives others"),
        (FillsRewards(), "it changes the batch's rewards"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Advantage) else "",
)
def test_an_advantage_that_is_not_what_is_claimed_is_caught(advantage, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_advantage(advantage)


class Raw(Advantage):
    def __call__(self, batch):
        return batch.rewards.nan_to_num(nan=0.0)


class NaNs(Advantage):
    def __call__(self, batch):
        groups = batch.rewards.nan_to_num(nan=0.0).view(-1, batch.scores.group_size)
        return ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()


class KeepsHoles(GoodCenter):
    def __call__(self, batch):
        return centered(batch.rewards, batch.scores.group_size)


class HolesAsZero(Advantage):
    def __call__(self, batch):
        return centered(batch.rewards.nan_to_num(nan=0.0), batch.scores.group_size)


class Nothing(Advantage):
    def __call__(self, batch):
        return torch.zeros_like(batch.rewards)


class FirstRow(Advantage):
    def __call__(self, batch):
        groups = batch.rewards.view(-1, batch.scores.group_size)
        return (groups - groups[:, :1]).flatten().nan_to_num(nan=0.0)


class FirstGroup(GoodCenter):
    def __call__(self, batch):
        return super().__call__(batch) * (1 + torch.arange(len(batch.rewards)) // batch.scores.group_size)


class TokensForSequence(GoodTokens):
    level = "sequence"


@pytest.mark.parametrize("advantage", [GoodCenter(), GoodTokens()], ids=["sequence", "token"])
def test_a_good_advantage_passes(advantage):
    check_advantage(advantage)


@pytest.mark.parametrize(
    ("advantage", "complaint"),
    [
        (Raw(), "a group of equal rewards must give exactly 0"),
        (NaNs(), "rewards .* give"),
        (KeepsHoles(), "rewards .* give"),
        (HolesAsZero(), "a row without a reward must give exactly 0"),
        (Nothing(), "different rewards in a group must give a signal"),
        (FirstRow(), "advantages depend on the order within a group|must give a signal"),
        (FirstGroup(), "advantages depend on the order of groups"),
        (TokensForSequence(), r"got shape \(12, 3\), wanted \(12,\) \(sequence level\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Advantage) else "",
)
def test_a_broken_advantage_is_caught(advantage, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_advantage(advantage)


def test_rewards_of_another_range_may_be_asked_for():
    class UpToHalf(GoodCenter):
        def __call__(self, batch):
            if (batch.rewards > 0.5).any():
                raise ValueError("out of range")
            return super().__call__(batch)

    check_advantage(UpToHalf(), high=0.5)
    with pytest.raises(ValueError, match="out of range"):
        check_advantage(UpToHalf())


# --- selectors -------------------------------------------------------------------------------------------------------


class Lowest(Selector):
    """A good one."""

    def select(self, scores, count, seed=0):
        there = [row for row, score in enumerate(scores) if score is not None]
        return sorted(there, key=lambda row: scores[row])[:count]


class WithHoles(Selector):
    def select(self, scores, count, seed=0):
        return list(range(len(scores)))[:count]


class Twice(Lowest):
    def select(self, scores, count, seed=0):
        return super().select(scores, 1) * min(count, 2)


class TooMany(Lowest):
    def select(self, scores, count, seed=0):
        return super().select(scores, count + 1)


class Drifting(Lowest):
    def select(self, scores, count, seed=0):
        random.shuffle(there := super().select(scores, count))
        return there


class Draws(Lowest):
    def select(self, scores, count, seed=0):
        random.random()
        return super().select(scores, count)


class Sorts(Lowest):
    def select(self, scores, count, seed=0):
        chosen = super().select(scores, count)
        scores.reverse()
        return chosen


def test_a_good_selector_passes():
    check_selector(Lowest())
    check_selector(WithHoles(), holes=True)


@pytest.mark.parametrize(
    ("selector", "complaint"),
    [
        (WithHoles(), "a row without a score"),
        (Twice(), "a row twice"),
        (TooMany(), "too many"),
        (Drifting(), "other rows the second time"),
        (Draws(), "it draws from global random numbers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_bad_selector_is_caught(selector, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_selector(selector)


def test_a_selector_that_changes_the_scores_is_caught():
    with pytest.raises(AssertionError):
        check_selector(Sorts())
