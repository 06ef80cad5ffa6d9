"""Process rewards: what steps are worth, and what is made of it."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "latent_reward": "trl_rewards_process.latent_reward:LatentReward",
        "perceptual": "trl_rewards_process.perceptual:Perceptual",
        "ppr": "trl_rewards_process.ppr:PPR",
    }


@hookimpl
def register_shapers():
    return {
        "prm_clip": "trl_rewards_process.clip_delta:PRMClip",
        "prm_delta": "trl_rewards_process.clip_delta:PRMDelta",
        "renorm": "trl_rewards_process.renorm:ReNorm",
    }
