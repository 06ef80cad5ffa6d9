"""Shapers that bend a reward before it becomes an advantage, and terms of a reward."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "clause_similarity": "trl_rewards_shaping.clause_similarity:ClauseSimilarity",
        "language_consistency": "trl_rewards_shaping.language:LanguageConsistency",
        "r1_consistency": "trl_rewards_shaping.r1_reward:R1Consistency",
        "r1_format": "trl_rewards_shaping.r1_reward:R1Format",
        "relevance_r3": "trl_rewards_shaping.r3:RelevanceR3",
        "reward_fusion": "trl_rewards_shaping.reward_fusion:RewardFusion",
        "repetition": "trl_rewards_shaping.repetition:Repetition",
        "rlcr": "trl_rewards_shaping.rlcr:RLCR",
    }


@hookimpl
def register_combiners():
    return {
        "hybrid_router": "trl_rewards_shaping.harmo:HybridRouter",
        "r1_reward": "trl_rewards_shaping.r1_reward:R1Reward",
        "uncertainty_weight": "trl_rewards_shaping.ctrl_u:UncertaintyWeight",
    }


@hookimpl
def register_shapers():
    return {
        "centered": "trl_rewards_shaping.par:Centered",
        "fitted_polynomial": "trl_rewards_shaping.par:FittedPolynomial",
        "harmo_length": "trl_rewards_shaping.harmo:HarmoLength",
        "linear_length_penalty": "trl_rewards_shaping.par:LinearLengthPenalty",
        "logsigmoid_centered": "trl_rewards_shaping.transforming:LogSigmoidCentered",
        "par": "trl_rewards_shaping.par:PAR",
        "running_clip": "trl_rewards_shaping.par:RunningClip",
        "running_minmax": "trl_rewards_shaping.par:RunningMinMax",
        "tanh_ref": "trl_rewards_shaping.par:TanhRef",
        "truncation_penalty": "trl_rewards_shaping.dler:TruncationPenalty",
    }
