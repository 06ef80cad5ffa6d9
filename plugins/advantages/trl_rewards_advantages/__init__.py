"""Advantages of the literature, beyond those of TRL."""

from trl_rewards import hookimpl


@hookimpl
def register_advantages():
    return {"bnpo": "trl_rewards_advantages.bnpo:BNPO"}
