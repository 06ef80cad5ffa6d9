"""Judging by comparison: candidates against each other, against an anchor or against a reference."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "pairwise_rl": "trl_rewards_judges.pairwise_rl:PairwiseRL",
        "pairwise_win_rate": "trl_rewards_judges.pairwise_win_rate:PairwiseWinRate",
        "ruler": "trl_rewards_judges.ruler:Ruler",
    }
