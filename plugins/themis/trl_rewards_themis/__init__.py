"""Themis: a reward model that calls tools, says why, and then scores; and its tools."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {}
