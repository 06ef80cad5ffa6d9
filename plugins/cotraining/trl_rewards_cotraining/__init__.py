"""Reward models that are trained while the policy is, so that it cannot get away with what they once believed."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "cooper": "trl_rewards_cotraining.cooper:Cooper",
        "adversarial": "trl_rewards_cotraining.adversarial:Adversarial",
    }
