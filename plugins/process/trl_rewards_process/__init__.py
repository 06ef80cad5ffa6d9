"""Process rewards: what steps are worth, and what is made of it."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "first_error": "trl_rewards_process.first_error:FirstError",
        "latent_reward": "trl_rewards_process.latent_reward:LatentReward",
        "perceptual": "trl_rewards_process.perceptual:Perceptual",
        "ppr": "trl_rewards_process.ppr:PPR",
        "prm": "trl_rewards_process.prm:PRM",
        "reasonflux_prm": "trl_rewards_process.reasonflux:ReasonFluxPRM",
    }


@hookimpl
def register_shapers():
    return {
        "prm_clip": "trl_rewards_process.clip_delta:PRMClip",
        "prm_delta": "trl_rewards_process.clip_delta:PRMDelta",
        "renorm": "trl_rewards_process.renorm:ReNorm",
    }
