"""POLAR: a reward model that measures how far a policy is from a reference."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {"polar": "trl_rewards_polar.polar:Polar"}


@hookimpl
def register_objectives():
    return {"polar": "trl_rewards_polar.objective:PolarObjective"}
