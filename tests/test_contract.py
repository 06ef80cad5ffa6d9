"""Every registered component keeps the contract of its kind, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_rewards import (
    RewardError,
    load_advantage,
    load_combiner,
    load_objective,
    load_plugins,
    load_reward,
    load_selector,
    load_shaper,
)
from trl_rewards.calibration import calibration, write_calibrations
from trl_rewards.sandbox import open_sandbox
from trl_rewards.testing import (
    check_advantage,
    check_combiner,
    check_objective,
    check_outcome_objective,
    check_reward,
    check_selector,
    check_shaper,
    check_token_shaper,
    make_samples,
)

# name -> (options it needs, dataset columns for the six rows of `make_samples`). A component that is not here fails
# `test_every_registered_component_is_checked`: add it.
ANSWERS = ["22", "hot", None, "cold", "", "22"]
REFERENCES = [["The sum is 22."], ["hot", "It is hot."], [], None, ["Tuesday"], ["x"]]
SCRIPTED = {"model": "scripted", "endpoint": "bundled:judge"}
REWARDS = {
    "accuracy": ({"seconds": 20.0}, {"answer": ["22", "23", None, "\\frac{1}{2}", "5", "#### 7"]}),
    "bleu_rouge_f1": ({}, {"references": REFERENCES}),
    "bleuberi": ({}, {"references": REFERENCES}),
    "code_tests": (
        {},
        {"tests": [["assert 1 + 1 == 2"], None, ["assert x == 1"], [], "x()", '[{"input": "1", "output": "1"}]']},
    ),
    "exact_match": ({}, {"answer": ANSWERS}),
    "function": ({"path": "trl.rewards:think_format_reward"}, {}),
    "judge": (SCRIPTED, {}),
    "language_consistency": ({}, {}),
    "latent_reward": ({}, {}),
    "length": ({"soft_limit": 2, "hard_limit": 5}, {}),
    "listwise_judge": (SCRIPTED, {}),
    "model": ({}, {}),  # its path is that of a fixture
    "pairwise_judge": (SCRIPTED, {}),
    "pairwise_rl": (SCRIPTED | {"anchor": "answer"}, {"answer": ANSWERS}),
    "pairwise_win_rate": (SCRIPTED | {"swaps": True, "tournament": 2}, {}),
    "r1_consistency": (SCRIPTED, {}),
    "r1_format": ({}, {}),
    "ppr": (SCRIPTED, {}),
    "regex_format": ({}, {}),
    "repetition": ({"ngram_size": 1}, {}),
    "rlcr": ({}, {"answer": ANSWERS}),
    "rm_r1_reward": ({}, {"winner": ["A", "model_b", None, "B", "", "A"]}),
    "rouge_l": ({}, {"references": REFERENCES}),
    "ruler": (SCRIPTED, {}),
    "think_answer_format": ({}, {}),
}
REFERENCED = ({"references": "scores"}, {"scores": [0.0, [1.0, 2.0], [0.5], [None, 1.0], 3.0, 0.25]})
SHAPERS = {
    "calibrated": ({}, {}),  # its path is that of a file that the test writes
    "centered": REFERENCED,
    "clip": ({"low": -1.0, "high": 1.0}, {}),
    "fitted_polynomial": REFERENCED,
    "harmo_length": ({"max_penalty": 0.5, "tau": 0.3}, {}),
    "linear_length_penalty": ({"free": 2}, {}),
    "logsigmoid_centered": REFERENCED,
    "par": REFERENCED,
    "running_clip": ({}, {}),
    "running_minmax": ({}, {}),
    "scale": ({"factor": 2.0, "offset": 1.0}, {}),
    "sigmoid": ({}, {}),
    "tanh": ({}, {}),
    "tanh_ref": REFERENCED,
    "truncation_penalty": (
        {"target_length": 5, "difficulty": "ratio", "tiers": {0.5: 2}},
        {"ratio": [0.0, 0.6, 1.0, None, 0.5, 0.2]},
    ),
    "whiten": ({}, {}),
}
TOKEN_SHAPERS = {"prime_norm": {}, "prm_clip": {"eta": 0.5}, "prm_delta": {}, "renorm": {"outcome": "a"}}
COMBINERS = {
    "armorm": {},
    "bleu_rm": {},
    "harmonic": {},
    "hybrid_router": {"rule": "a", "model": "b"},
    "lagrangian": {"thresholds": {"a": 0.5, "b": 0.25}},
    "log_and": {"of": "margins"},
    "max": {},
    "mean": {},
    "mean_minus_std": {},
    "median": {},
    "min": {},
    "normalize_then_sum": {},
    "product": {},
    "trimmed": {},
    "uwo": {},
    "r1_reward": {"accuracy": "a"},
    "uncertainty_weight": {},
    "weighted_sum": {},
}
UNIT, SIGNED, ANY = (0.0, 1.0), (-1.0, 1.0), None
RISING_SHAPERS = {  # those that never turn two rewards round, with the range of what they give
    "centered": ANY,
    "clip": SIGNED,
    "fitted_polynomial": UNIT,
    "linear_length_penalty": ANY,
    "logsigmoid_centered": (-float("inf"), 0.0),
    "par": UNIT,
    "running_clip": ANY,
    "running_minmax": UNIT,
    "scale": ANY,
    "sigmoid": UNIT,
    "tanh": SIGNED,
    "tanh_ref": SIGNED,
    "truncation_penalty": ANY,
    "whiten": ANY,
}
RISING_COMBINERS = {
    "harmonic": UNIT,
    "log_and": (-float("inf"), 0.0),
    "max": UNIT,
    "mean": UNIT,
    "median": UNIT,
    "min": UNIT,
    "product": UNIT,
    "trimmed": UNIT,
    "weighted_sum": ANY,
}
RANGES = {  # of rewards
    "accuracy": UNIT,
    "bleu_rouge_f1": UNIT,
    "bleuberi": UNIT,
    "exact_match": UNIT,
    "language_consistency": UNIT,
    "length": (-1.0, 0.0),
    "pairwise_judge": UNIT,
    "r1_format": UNIT,
    "regex_format": UNIT,
    "repetition": (-1.0, 0.0),
    "rlcr": SIGNED,
    "rouge_l": UNIT,
    "think_answer_format": UNIT,
}
ADVANTAGES = {
    "batch_norm": {},
    "bnpo": {},
    "center": {},
    "didi": {},
    "dler": {},
    "gae": {},
    "group_norm": {},
    "grpo_s": {},
    "leave_one_out": {},
    "leave_one_out_norm": {},
    "optimal_baseline": {},
    "pass_at_k": {"k": 2},
    "pref_grpo": {},
    "prime_grpo": {"whiten": False},  # whitening takes the mean of all tokens away, which is 0 but for the rounding
    "prime_reinforce": {},
    "prime_rloo": {"whiten": False},
    "reinforce_plus_plus": {},
    "reinforce_plus_plus_baseline": {},
    "stable_reinforce": {},
}
SELECTORS = {"easy": {}, "hard": {}, "medium": {}, "random": {}}
SLOW = {"accuracy", "model"}


OBJECTIVES = {
    "bradley_terry": ({"margin": "margin", "center": 0.01}, {"margin": [0.5, None, 1.0]}),
    "bradley_terry_heads": ({"heads": 3, "center": 0.01}, {}),
    "more": ({"task": "task"}, {"task": ["a", "b", "a"]}),
    "polar": ({}, {}),
    "themis": (
        {},
        {name: ["a", "b", "c"] for name in ("prompt", "chosen", "rejected", "chosen_trace", "rejected_trace")},
    ),
    "regression": (
        {"scale": [0.0, 4.0], "rank": 0.1},
        {"chosen_rating": [4.0, None, 3.0], "rejected_rating": [0.0, 1.0, None]},
    ),
}
OUTCOME_OBJECTIVES = {"implicit_prm_ce": {}}
ELSEWHERE = {
    "adversarial",
    "bertscore",
    "clause_similarity",
    "ensemble",
    "implicit_prm",
    "perceptual",
    "first_error",
    "flr",
    "cooper",
    "polar",
    "prime",
    "prm",
    "reasonflux_prm",
    "relevance_r3",
    "reward_fusion",
    "rewardanything",
    "rewardanything_accuracy",
    "rewardanything_format",
    "rm_r1",
    "themis",
    "themis_served",
    "yes_token",
}
"""Rewards whose plugins' own tests check the contract, with models, servers or columns of their own."""
TOOLS = {"arithmetic", "calculator", "calendar", "code", "translator", "weather", "web_search", "wiki_search"}
"""Tools, which are checked by their plugins' own tests."""


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("reward", REWARDS),
        ("shaper", SHAPERS | TOKEN_SHAPERS),
        ("combiner", COMBINERS),
        ("advantage", ADVANTAGES),
        ("objective", OBJECTIVES | OUTCOME_OBJECTIVES),
        ("selector", SELECTORS),
        ("tool", TOOLS),
    ],
)
def test_every_registered_component_is_checked(kind, table):
    elsewhere = ELSEWHERE if kind == "reward" else set()
    assert {entry.name for entry in load_plugins().of_kind(kind)} == set(table) | elsewhere


@pytest.mark.parametrize(
    ("name", "check"), [(n, "check_reward") for n in sorted(ELSEWHERE)] + [(n, "check_tool") for n in sorted(TOOLS)]
)
def test_components_that_are_checked_elsewhere_are(name, check):
    tests = [file.read_text() for file in Path(__file__).parent.parent.glob("plugins/*/tests/test_*.py")]
    assert any(check in text and f'"{name}"' in text for text in tests)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objective_keeps_its_contract(name):
    options, columns = OBJECTIVES[name]
    check_objective(load_objective(name, **options), **columns)


@pytest.mark.parametrize("name", sorted(OUTCOME_OBJECTIVES))
def test_objective_of_outcomes_keeps_its_contract(name):
    check_outcome_objective(load_objective(name, **OUTCOME_OBJECTIVES[name]))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in sorted(REWARDS)]
)
def test_reward_keeps_its_contract(name, request):
    options, columns = REWARDS[name]
    if name == "model":
        options = {"path": request.getfixturevalue("reward_model_path"), "dtype": "float32"}
    if name == "code_tests":
        try:
            open_sandbox().close()
        except RewardError as error:
            pytest.skip(str(error))
    reward = load_reward(name, **options)
    samples = make_samples(chat=True) if name == "function" else None  # TRL's function reads chat completions only
    try:
        check_reward(reward, samples, RANGES.get(name), **columns)
    finally:
        reward.close()


@pytest.mark.parametrize("name", sorted(SHAPERS))
def test_shaper_keeps_its_contract(name, tmp_path):
    options, columns = SHAPERS[name]
    if name == "calibrated":
        options = {"path": str(tmp_path / "c.json")}
        found = calibration(load_reward("repetition"), "platt", [-1.0, 0.0, 1.0] * 4, [0.0, 1.0, 1.0] * 4)
        write_calibrations(tmp_path / "c.json", {"repetition": found})
    rises, within = name in RISING_SHAPERS, RISING_SHAPERS.get(name)
    check_shaper(load_shaper(name, **options), rises=rises, within=within, **columns)


@pytest.mark.parametrize("name", sorted(TOKEN_SHAPERS))
def test_shaper_of_tokens_keeps_its_contract(name):
    check_token_shaper(load_shaper(name, **TOKEN_SHAPERS[name]))


@pytest.mark.parametrize("name", sorted(COMBINERS))
def test_combiner_keeps_its_contract(name):
    rises, within = name in RISING_COMBINERS, RISING_COMBINERS.get(name)
    check_combiner(load_combiner(name, **COMBINERS[name]), rises, within)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_advantage_keeps_its_contract(name):
    check_advantage(load_advantage(name, **ADVANTAGES[name]))


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_selector_keeps_its_contract(name):
    check_selector(load_selector(name, **SELECTORS[name]))
    check_selector(load_selector(name, holes=True), holes=True)


@pytest.mark.parametrize("kind", ["reward", "shaper", "combiner", "advantage", "objective", "selector", "tool"])
def test_every_component_says_what_it_is_in_a_sentence(kind):
    from trl_rewards.plugins import first_sentence

    for entry in load_plugins().of_kind(kind):
        assert len(first_sentence(entry.load())) > 15, entry.name
