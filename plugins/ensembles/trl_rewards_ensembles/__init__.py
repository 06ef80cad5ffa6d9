"""Ensembles of reward models, and combiners: what several rewards, or several members, say together."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {"ensemble": "trl_rewards_ensembles.ensemble:Ensemble"}


@hookimpl
def register_combiners():
    return {
        "armorm": "trl_rewards_ensembles.armorm:ArmoRM",
        "harmonic": "trl_rewards_ensembles.harmonic:Harmonic",
        "lagrangian": "trl_rewards_ensembles.lagrangian:Lagrangian",
        "log_and": "trl_rewards_ensembles.log_and:LogAnd",
        "mean_minus_std": "trl_rewards_ensembles.mean_minus_std:MeanMinusStd",
        "uwo": "trl_rewards_ensembles.uwo:UWO",
    }


@hookimpl
def register_objectives():
    return {
        "bradley_terry_heads": "trl_rewards_ensembles.heads:BradleyTerryHeads",
        "more": "trl_rewards_ensembles.more:MORE",
    }
