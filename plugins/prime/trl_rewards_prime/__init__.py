"""PRIME: process rewards that a language model implies, and the advantages that are made of them."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "implicit_prm": "trl_rewards_prime.implicit_prm:ImplicitPRM",
        "prime": "trl_rewards_prime.prime:Prime",
    }


@hookimpl
def register_shapers():
    return {"prime_norm": "trl_rewards_prime.prime:PrimeNorm"}


@hookimpl
def register_advantages():
    return {
        "prime_rloo": "trl_rewards_prime.advantages:PrimeRLOO",
        "prime_grpo": "trl_rewards_prime.advantages:PrimeGRPO",
        "prime_reinforce": "trl_rewards_prime.advantages:PrimeReinforce",
    }


@hookimpl
def register_objectives():
    return {"implicit_prm_ce": "trl_rewards_prime.implicit_prm:ImplicitPRMCE"}
