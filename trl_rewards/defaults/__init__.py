"""The core's own plugin, registered like any other. Components here are common practice or TRL's own formulae."""

from trl_rewards.hookspecs import hookimpl


@hookimpl
def register_rewards():
    return {
        "accuracy": "trl_rewards.defaults.accuracy:Accuracy",
        "code_tests": "trl_rewards.defaults.code:CodeTests",
        "exact_match": "trl_rewards.defaults.rules:ExactMatch",
        "function": "trl_rewards.loading:FunctionReward",
        "judge": "trl_rewards.defaults.judge:Judge",
        "length": "trl_rewards.defaults.rules:Length",
        "listwise_judge": "trl_rewards.defaults.judge:Listwise",
        "model": "trl_rewards.defaults.model:Model",
        "pairwise_judge": "trl_rewards.defaults.judge:Pairwise",
        "regex_format": "trl_rewards.defaults.rules:RegexFormat",
    }


@hookimpl
def register_combiners():
    return {
        "max": "trl_rewards.defaults.combiners:Max",
        "mean": "trl_rewards.defaults.combiners:Mean",
        "median": "trl_rewards.defaults.combiners:Median",
        "min": "trl_rewards.defaults.combiners:Min",
        "normalize_then_sum": "trl_rewards.defaults.combiners:NormalizeThenSum",
        "product": "trl_rewards.defaults.combiners:Product",
        "trimmed": "trl_rewards.defaults.combiners:Trimmed",
        "weighted_sum": "trl_rewards.defaults.combiners:WeightedSum",
    }


@hookimpl
def register_shapers():
    return {
        "calibrated": "trl_rewards.defaults.calibrated:Calibrated",
        "clip": "trl_rewards.defaults.shapers:Clip",
        "scale": "trl_rewards.defaults.shapers:Scale",
        "sigmoid": "trl_rewards.defaults.shapers:Sigmoid",
        "tanh": "trl_rewards.defaults.shapers:Tanh",
        "whiten": "trl_rewards.defaults.shapers:Whiten",
    }


@hookimpl
def register_advantages():
    return {
        "batch_norm": "trl_rewards.defaults.advantages:BatchNorm",
        "center": "trl_rewards.defaults.advantages:Center",
        "gae": "trl_rewards.defaults.advantages:Gae",
        "group_norm": "trl_rewards.defaults.advantages:GroupNorm",
        "leave_one_out": "trl_rewards.defaults.advantages:LeaveOneOut",
    }


@hookimpl
def register_objectives():
    return {
        "bradley_terry": "trl_rewards.defaults.objectives:BradleyTerry",
        "regression": "trl_rewards.defaults.objectives:Regression",
    }
