"""Judging by comparison: candidates against each other, against an anchor or against a reference."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "flr": "trl_rewards_judges.flr:FLR",
        "rm_r1": "trl_rewards_judges.rm_r1:RMR1",
        "rm_r1_reward": "trl_rewards_judges.rm_r1:RMR1Reward",
        "yes_token": "trl_rewards_judges.yes_token:YesToken",
    }
