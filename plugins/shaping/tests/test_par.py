import json
import math
from pathlib import Path

import pytest
import torch
from trl_rewards_shaping import register_shapers
from trl_rewards_shaping.par import PAR

from trl_rewards import Samples, load_shaper

CASES = json.loads(Path(__file__).with_name("par_cases.json").read_text(encoding="utf-8"))


def shape(shaper, rewards, references=None):
    columns = {} if references is None else {"references": references}
    rewards = torch.tensor(rewards, dtype=torch.float32)
    return shaper(rewards, Samples(["q"] * len(rewards), ["a"] * len(rewards), columns=columns))


def penalized(rewards, lengths):
    """The authors' length penalty, which their code applies before any shaping."""
    return [reward - 0.01 * max(length - 300, 0) for reward, length in zip(rewards, lengths, strict=True)]


@pytest.mark.parametrize("case", CASES["par"], ids=lambda case: case["case"])
def test_par_equals_the_authors_code(case):
    rewards = penalized(case["rewards"], case["lengths"])
    shaped = shape(PAR(k=case["k"], references="references"), rewards, case["references"])
    torch.testing.assert_close(shaped, torch.tensor(case["expected"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES["whiten"], ids=lambda case: case["case"])
def test_whiten_equals_their_meanstd_baseline(case):
    whiten = load_shaper("trl_rewards.defaults.shapers:Whiten")
    for rewards, expected in zip(case["batches"], case["expected"], strict=True):
        rewards = penalized(rewards, case["lengths"]) if case["lengths"] else rewards
        torch.testing.assert_close(shape(whiten, rewards), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_value_worked_by_hand():
    # σ(0) = 0.5 and σ(ln 3) = 0.75
    shaped = shape(PAR(references="references"), [0.0], [[0.0, -math.log(3)]])
    assert shaped.item() == pytest.approx(0.625)


def test_a_column_of_numbers_and_a_constant_are_one_reference():
    wanted = torch.tensor([1.0, -2.0]).sigmoid()
    assert shape(PAR(references="references"), [1.5, 1.0], [0.5, 3]).tolist() == pytest.approx(wanted.tolist())
    assert shape(PAR(constant=0.5), [1.5, -1.5]).tolist() == pytest.approx(wanted.tolist())


def test_max_references_takes_the_first():
    rows = [[0.0, 5.0, 5.0]]
    assert shape(PAR(references="references", max_references=1), [0.0], rows).item() == 0.5
    many = [[0.0] * 10 + [100.0]]
    assert shape(PAR(references="references"), [0.0], many).item() == 0.5
    assert shape(PAR(references="references", max_references=None), [0.0], many).item() == pytest.approx(5 / 11)


def test_rows_may_have_different_numbers_of_references_and_holes_in_them():
    rows = [[0.0], [None, 0.0, float("nan"), 0.0], 0.0]
    assert shape(PAR(references="references"), [0.0, 0.0, 0.0], rows).tolist() == [0.5, 0.5, 0.5]


def test_a_row_without_a_score_stays_nan():
    shaped = shape(PAR(constant=0.0), [0.0, float("nan")])
    assert shaped[0] == 0.5
    assert shaped[1].isnan()


def test_an_empty_batch_stays_empty():
    assert shape(PAR(references="references"), [], []).shape == (0,)


@pytest.mark.parametrize("value", [[], None, float("nan"), [None]])
def test_a_row_without_a_reference_is_named(value):
    with pytest.raises(ValueError, match="column 'references', row 1: par needs at least one reference score"):
        shape(PAR(references="references"), [0.0, 0.0], [[0.0], value])


def test_a_reference_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"column 'references', row 0: wanted a number .*, got 'good'"):
        shape(PAR(references="references"), [0.0], ["good"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": "r", "constant": 0.0}, "one of the two"),
        ({"constant": 0.0, "k": 0.0}, "k must be above 0"),
        ({"constant": 0.0, "max_references": 0}, "max_references must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PAR(**options)


def test_grows_with_the_reward_and_stays_between_0_and_1():
    rewards = torch.linspace(-8, 8, 41).tolist()
    shaped = shape(PAR(references="references"), rewards, [[-1.0, 2.0]] * 41)
    assert (shaped.diff() > 0).all()
    assert 0 < shaped.min() < shaped.max() < 1


def test_changes_a_group_z_score_which_an_affine_map_does_not():
    rewards = torch.tensor([0.0, 1.0, 2.0, 8.0])

    def z(values):
        return (values - values.mean()) / values.std()

    torch.testing.assert_close(z(3 * rewards + 1), z(rewards))
    assert not torch.allclose(z(shape(PAR(constant=0.0), rewards.tolist())), z(rewards), atol=0.1)


def test_registered_name_loads_and_reads_its_column():
    shaper = load_shaper(register_shapers()["par"], references="references")
    assert shaper.reads() == ("references",)
    assert load_shaper(register_shapers()["par"]).reads() == ("reference_rewards",)
    assert load_shaper(register_shapers()["par"], constant=1.0).reads() == ()
