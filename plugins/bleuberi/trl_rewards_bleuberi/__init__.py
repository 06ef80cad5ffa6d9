"""BLEU against reference answers as a reward, and the selection of training rows that goes with it."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {"bleuberi": "trl_rewards_bleuberi.bleuberi:Bleuberi"}


@hookimpl
def register_selectors():
    return {
        "easy": "trl_rewards_bleuberi.selection:Easy",
        "hard": "trl_rewards_bleuberi.selection:Hard",
        "medium": "trl_rewards_bleuberi.selection:Medium",
        "random": "trl_rewards_bleuberi.selection:Random",
    }
