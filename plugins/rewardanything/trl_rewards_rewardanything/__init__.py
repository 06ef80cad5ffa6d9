"""RewardAnything: a judge that follows a principle written in plain words, and what its training needs."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "rewardanything": "trl_rewards_rewardanything.rewardanything:RewardAnything",
        "rewardanything_accuracy": "trl_rewards_rewardanything.training:RewardAnythingAccuracy",
        "rewardanything_format": "trl_rewards_rewardanything.training:RewardAnythingFormat",
    }
