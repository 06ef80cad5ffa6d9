"""BLEU against reference answers as a reward."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {"bleuberi": "trl_rewards_bleuberi.bleuberi:Bleuberi"}
