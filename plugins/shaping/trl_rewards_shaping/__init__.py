"""Shapers that bend a reward before it becomes an advantage."""

from trl_rewards import hookimpl


@hookimpl
def register_shapers():
    return {"par": "trl_rewards_shaping.par:PAR"}
