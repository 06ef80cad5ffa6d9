"""Advantages of the literature, beyond those of TRL."""

from trl_rewards import hookimpl


@hookimpl
def register_advantages():
    return {
        "bnpo": "trl_rewards_advantages.bnpo:BNPO",
        "didi": "trl_rewards_advantages.didi:DiDi",
        "dler": "trl_rewards_advantages.dler:DLER",
        "grpo_s": "trl_rewards_advantages.grpo_s:GRPOS",
        "leave_one_out_norm": "trl_rewards_advantages.leave_one_out_norm:LeaveOneOutNorm",
        "optimal_baseline": "trl_rewards_advantages.optimal_baseline:OptimalBaseline",
        "pass_at_k": "trl_rewards_advantages.pass_at_k:PassAtK",
        "pref_grpo": "trl_rewards_advantages.pref_grpo:PrefGRPO",
        "reinforce_plus_plus": "trl_rewards_advantages.reinforce_plus_plus:ReinforcePlusPlus",
        "reinforce_plus_plus_baseline": "trl_rewards_advantages.reinforce_plus_plus:ReinforcePlusPlusBaseline",
        "stable_reinforce": "trl_rewards_advantages.stable_reinforce:StableReinforce",
    }
