"""What a z-score within groups undoes: shapers that only scale and shift, and properness. A trainer warns of it."""

import logging

import pytest
from trl import GRPOConfig, RLOOConfig

from trl_rewards import GRPOTrainer, Pipeline, Recipe, RLOOTrainer

SHAPE = [{"use": "tanh"}, {"use": "scale", "with": {"factor": 2.0}}, {"use": "whiten"}]


def warned(recipe, caplog, cls=GRPOTrainer, scale="group") -> list[str]:
    """Paths of the shapers that the trainer warns of; `source` are the shapers of the first source."""
    source = {"use": "length", "with": {"soft_limit": 1, "hard_limit": 2}, "shape": recipe.pop("source", [])}
    others = [{"use": "regex_format"}] * recipe.pop("others", 0)
    pipeline = Pipeline.from_recipe(Recipe.parse({"rewards": [source, *others], **recipe}, check_trl=False))
    if cls is GRPOTrainer:
        args = GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", scale_rewards=scale)
    else:
        args = RLOOConfig("out", use_cpu=True, bf16=False, report_to="none", beta=0.0, num_generations=8)
    with caplog.at_level(logging.WARNING, logger="trl_rewards.pipeline"):
        cls._check_arguments(args, pipeline)
    return [record.getMessage().split()[0] for record in caplog.records if "changes nothing" in record.getMessage()]


@pytest.mark.parametrize(
    ("recipe", "undone"),
    [
        ({"shape": SHAPE}, ["shape.2", "shape.1"]),
        ({"shape": SHAPE, "advantage": {"use": "group_norm"}}, ["shape.2", "shape.1"]),
        ({"shape": SHAPE, "advantage": {"use": "center"}}, []),
        ({"shape": [*SHAPE, {"use": "sigmoid"}]}, []),
        ({"shape": [{"use": "scale", "with": {"factor": -1.0}}]}, []),
        ({"source": SHAPE}, ["rewards.length.shape.2", "rewards.length.shape.1"]),
        ({"source": SHAPE, "shape": [{"use": "tanh"}]}, []),
        ({"source": SHAPE, "others": 1}, []),  # there it says how much the source weighs
    ],
)
def test_affine_shapers_that_no_other_follows_are_warned_of(recipe, undone, caplog):
    assert warned(recipe, caplog) == undone


def test_other_advantages_of_trls_are_not_z_scores_of_groups(caplog):
    assert warned({"shape": SHAPE}, caplog, scale="none") == []
    assert warned({"shape": SHAPE}, caplog, scale="batch") == []
    assert warned({"shape": SHAPE}, caplog, RLOOTrainer) == []
    assert warned({"shape": SHAPE, "advantage": {"use": "group_norm"}}, caplog, RLOOTrainer) != []


@pytest.mark.parametrize(
    ("source", "recipe", "warned"),
    [
        ({}, {}, True),
        ({"with": {"measure": "brier"}}, {}, True),
        ({"with": {"measure": "accuracy"}}, {}, False),
        ({"weight": 0.0}, {}, False),  # watched
        ({}, {"advantage": {"use": "center"}}, False),
        ({}, {"advantage": {"use": "batch_norm"}}, False),  # one scale for all groups
        ({}, {"advantage": {"use": "group_norm"}}, True),
        ({}, {"advantage": {"use": "didi"}}, True),
        ({}, {"advantage": {"use": "pref_grpo"}}, True),
    ],
)
def test_a_proper_scoring_rule_is_warned_of_where_it_is_none(source, recipe, warned, caplog):
    pipeline = Pipeline.from_recipe(Recipe.parse({"rewards": [{"use": "rlcr", **source}], **recipe}, check_trl=False))
    for scale in ("group", "none"):
        caplog.clear()
        args = GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", scale_rewards=scale)
        with caplog.at_level(logging.WARNING, logger="trl_rewards.pipeline"):
            GRPOTrainer._check_arguments(args, pipeline)
        said = "rewards.rlcr pays best for an honest report" in caplog.text
        assert said == (warned and (scale == "group" or "advantage" in recipe))
