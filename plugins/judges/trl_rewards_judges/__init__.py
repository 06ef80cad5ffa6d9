"""Judging by comparison: candidates against each other, against an anchor or against a reference."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {}
