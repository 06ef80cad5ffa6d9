import copy
import json
import math
from pathlib import Path

import pytest
import torch
from trl_rewards_shaping import register_shapers
from trl_rewards_shaping.par import PAR, FittedPolynomial, RunningClip, RunningMinMax, TanhRef, fitted_sigmoid

from trl_rewards import Pipeline, Samples, load_reward, load_shaper
from trl_rewards.testing import make_samples

CASES = json.loads(Path(__file__).with_name("shaping_cases.json").read_text(encoding="utf-8"))["01_PAR"]
FLAGGED = [case for case in CASES if "flags" in case["inputs"]]
RUNNING = {"meanstd": "whiten", "clip": "running_clip", "minmax": "running_minmax"}


def shape(shaper, rewards, references=None, lengths=None):
    columns = {} if references is None else {"references": references}
    ids = [[0] * length for length in lengths or [0] * len(rewards)]
    rewards = torch.tensor(rewards, dtype=torch.float32)
    return shaper(rewards, Samples(["q"] * len(rewards), ["a"] * len(rewards), ids, columns=columns))


def chain(flags):
    """The shapers, in order, that a configuration of the authors' code is."""
    k, ceiling = flags.get("sigmoid_k", 1), flags.get("reward_ceil")
    against = {"references": "references"} if flags.get("reward_relative") else {"constant": 0.0}
    steps = [("clip", {"high": ceiling})] if ceiling is not None else []
    steps += [("linear_length_penalty", {})] if flags.get("reward_penalize_length", True) else []
    steps += [("centered", {"references": "references"})] if flags.get("reward_centered") else []
    steps += [("par", {"references": "references", "k": k, "shift": 3.0})] if flags.get("reward_sgfc") else []
    steps += [("whiten", {})] if flags.get("reward_meanstd") else []
    steps += [("running_clip", {})] if flags.get("reward_clipping") else []
    steps += [("clip", {"high": ceiling})] if ceiling is not None else []
    steps += [("running_minmax", {})] if flags.get("reward_minmax") else []
    if flags.get("reward_sigmoid"):
        relative = flags.get("reward_relative")
        steps += [("par", {"k": k} | against) if relative else ("sigmoid", {"scale": 1 / k})]
    if flags.get("reward_tanh"):
        steps += [("tanh_ref", against) if flags.get("reward_relative") else ("tanh", {})]
    steps += [("fitted_polynomial", against)] if flags.get("reward_fittedpoly") else []
    lsc = ("logsigmoid_centered", {"references": "references", "level": "quantile_normal"})
    return steps + ([lsc] if flags.get("reward_lsc") else [])


@pytest.mark.parametrize("case", FLAGGED, ids=lambda case: case["case"])
def test_par_and_what_it_is_compared_with_equal_the_authors_code(case):
    given = case["inputs"]
    rewards = given["rewards"]
    for name, options in chain(given["flags"]):
        rewards = shape(
            load_shaper(name, **options), rewards, given["reference_rewards"], given["response_lengths"]
        ).tolist()
    torch.testing.assert_close(torch.tensor(rewards), torch.tensor(case["outputs"]["shaped"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["meanstd", "clip"])
def test_running_statistics_equal_the_authors_code_over_two_batches(name):
    (case,) = [case for case in CASES if case["case"] == f"running-{name} two sequential batches"]
    shaper = load_shaper(RUNNING[name])
    for number in ("1", "2"):
        got, wanted = shape(shaper, case["inputs"][f"batch{number}"]), torch.tensor(case["outputs"][f"out{number}"])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    state = shaper.state_dict()
    assert state["mean"] == pytest.approx(case["outputs"]["running_mean"])
    assert state["squares"] / state["count"] == pytest.approx(case["outputs"]["running_var_population"])


def test_equal_rewards_are_in_the_middle_where_the_authors_code_divides_0_by_0():
    (case,) = [case for case in CASES if "zero range" in case["case"]]
    shaper = RunningMinMax()
    assert shape(shaper, case["inputs"]["batch"]).tolist() == [0.5, 0.5]
    assert shape(shaper, [1.0, 3.0]).tolist() == [0.0, 1.0]
    assert shaper.state_dict() == {"low": 1.0, "high": 3.0}
    assert shape(RunningMinMax(), [math.nan]).isnan().all()
    assert shape(RunningClip(), [0.3] * 3).tolist() == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("name", ["running_clip", "running_minmax", "whiten"])
def test_running_statistics_leave_holes_out_and_go_on_from_their_state(name):
    whole, resumed, holed = load_shaper(name), load_shaper(name), load_shaper(name)
    first = shape(whole, [1.0, 2.0, 4.0])
    torch.testing.assert_close(shape(holed, [1.0, math.nan, 2.0, 4.0])[[0, 2, 3]], first)
    assert holed.state_dict() == whole.state_dict()
    resumed.load_state_dict(json.loads(json.dumps(copy.deepcopy(whole.state_dict()))))
    assert torch.equal(shape(resumed, [-3.0, 9.0, 2.0]), shape(whole, [-3.0, 9.0, 2.0]))


def test_an_evaluation_leaves_no_trace_in_running_statistics():
    stateful = [load_shaper(name) for name in ("running_clip", "running_minmax", "whiten")]
    pipeline = Pipeline([load_reward("length", soft_limit=1, hard_limit=9)], shape=stateful)
    samples = make_samples()
    pipeline.score(samples, 2)
    before = pipeline.state_dict()
    with pipeline.frozen():
        pipeline.score(samples.take([5, 4, 3, 3]), 2)
        assert pipeline.state_dict() != before
    assert pipeline.state_dict() == before


def test_the_fitted_polynomial_is_near_the_sigmoid_and_flat_beyond_5():
    margins = torch.linspace(-5, 5, 101)[1:-1]
    assert (fitted_sigmoid(margins) - margins.sigmoid()).abs().max() < 0.02
    assert fitted_sigmoid(torch.tensor([-5.0, -9.0, 5.0, 99.0])).tolist() == [0.0, 0.0, 1.0, 1.0]
    # 0.5 + 0.22878851 - 0.0101309121 + 0.00020266917 at 1, and the mean with 1
    shaped = shape(FittedPolynomial(references="references"), [1.0], [[0.0, -7.0]])
    assert shaped.item() == pytest.approx((0.71886103 + 1) / 2, abs=1e-6)


def test_log_sigmoid_of_the_normal_quantile_is_lsc():
    # references 0, 1, 2: mean 1, sample deviation 1; the normal's 85 % quantile is 1.0364334
    lsc = load_shaper("logsigmoid_centered", references="references", level="quantile_normal")
    wanted = [math.log(1 / (1 + math.exp(2.0364434 - r))) for r in (2.0364434, -1.0)]
    assert shape(lsc, [2.0364434, -1.0], [[0.0, 1.0, 2.0]] * 2).tolist() == pytest.approx(wanted, rel=1e-5)
    # of a single reference no deviation is known
    assert shape(lsc, [0.5], [[0.5]]).item() == pytest.approx(math.log(0.5), abs=2e-5)


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


def test_tanh_grows_with_the_reward_and_stays_between_1s():
    rewards = torch.linspace(-8, 8, 41).tolist()
    shaped = shape(TanhRef(references="references"), rewards, [[-1.0, 2.0]] * 41)
    assert (shaped.diff() > 0).all()
    assert -1 < shaped.min() < shaped.max() < 1


@pytest.mark.parametrize(
    ("name", "affine"),
    [
        *[(name, False) for name in ("par", "tanh_ref", "logsigmoid_centered", "fitted_polynomial", "running_clip")],
        *[(name, True) for name in ("centered", "running_minmax", "whiten")],
    ],
)
def test_an_affine_shaper_does_not_change_a_group_z_score_and_others_do(name, affine):
    rewards = torch.tensor([0.0, 1.0, 2.0, 8.0])
    shaper = load_shaper(name, **({} if name in RUNNING.values() else {"constant": 0.5}))

    def z(values):
        return (values - values.mean()) / values.std()

    assert shaper.affine() == affine
    shaped = shape(shaper, rewards.tolist())
    assert torch.allclose(z(shaped), z(rewards), atol=1e-3 if affine else 0.05) == affine


def test_registered_name_loads_and_reads_its_column():
    shaper = load_shaper(register_shapers()["par"], references="references")
    assert shaper.reads() == ("references",)
    assert load_shaper(register_shapers()["par"]).reads() == ("reference_rewards",)
    assert load_shaper(register_shapers()["par"], constant=1.0).reads() == ()
