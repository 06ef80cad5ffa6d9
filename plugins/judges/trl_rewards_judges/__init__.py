"""Judging by comparison: candidates against each other, against an anchor or against a reference."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "flr": "trl_rewards_judges.flr:FLR",
        "pairwise_rl": "trl_rewards_judges.pairwise_rl:PairwiseRL",
        "pairwise_win_rate": "trl_rewards_judges.pairwise_win_rate:PairwiseWinRate",
        "rm_r1": "trl_rewards_judges.rm_r1:RMR1",
        "rm_r1_reward": "trl_rewards_judges.rm_r1:RMR1Reward",
        "ruler": "trl_rewards_judges.ruler:Ruler",
        "yes_token": "trl_rewards_judges.yes_token:YesToken",
    }
