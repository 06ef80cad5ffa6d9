"""TRL's side of a recipe: its trainers, and the flat keys that are fields of its own dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_rewards.errors import did_you_mean
from trl_rewards.loading import build
from trl_rewards.members import MemberOptions
from trl_rewards.pairs import refused_arguments
from trl_rewards.recipe_files import OWN_KEYS

if TYPE_CHECKING:
    from trl_rewards.recipe import Recipe


@dataclass(frozen=True)
class TrainerKind:
    """What a trainer takes of our keys, and what its advantages may be."""

    config: str  # "module:Class" of its training arguments
    keys: tuple[str, ...]
    levels: tuple[str, ...] = ()
    provides: frozenset[str] = frozenset()
    """Fields of RewardBatch that its advantages can have."""
    advantage: str | None = None
    """The advantage where the recipe names none; None: the trainer's own."""


_PIPELINE_KEYS = ("rewards", "combine", "shape", "advantage", "share_base", "alarms")
_WITH_TOKENS = frozenset({"mask", "process_rewards", "token_rewards"})
TRAINERS = {
    "grpo": TrainerKind(
        "trl:GRPOConfig", (*_PIPELINE_KEYS, "filter", "pre_clip"), ("sequence", "token"), _WITH_TOKENS
    ),
    "rloo": TrainerKind("trl:RLOOConfig", (*_PIPELINE_KEYS, "filter"), ("sequence",), _WITH_TOKENS),
    "ppo": TrainerKind(
        "trl_rewards.trainers.ppo_config:PPOConfig",
        _PIPELINE_KEYS,
        ("sequence", "token"),
        _WITH_TOKENS | {"values", "logps", "ref_logps"},
        advantage="gae",
    ),
    "dpo": TrainerKind("trl:DPOConfig", ("rewards", "combine", "shape", "pairs", "alarms")),
    "reward": TrainerKind("trl:RewardConfig", ("objective", "members", "alarms")),
    "kto": TrainerKind("trl:KTOConfig", ("objective", "alarms")),
}


PPO_NAMES = {  # GRPO's arguments that PPO has under another name
    "num_iterations": "num_ppo_epochs",
    "beta": "kl_coef",
    "epsilon": "cliprange",
    "steps_per_generation": "num_mini_batches",
    "generation_batch_size": "num_mini_batches",
}
OLD_PPO_KEYS = {  # what became of the arguments of TRL 1.12's PPOConfig and its script
    "gamma": "advantage: {use: gae, with: {gamma: …}}",
    "lam": "advantage: {use: gae, with: {lam: …}}",
    "vf_coef": "leave it out; the critic has its own optimiser, see critic_learning_rate",
    "reward_model_path": "rewards: [{use: model, with: {path: …}}]",
    "sft_model_path": "model_name_or_path",
    "response_length": "max_completion_length",
    "total_episodes": "max_steps or num_train_epochs",
    "local_rollout_forward_batch_size": "per_device_train_batch_size",
    "num_sample_generations": "log_completions",
    "stop_token": "leave it out; completions end at the model's own end tokens",
    "stop_token_id": "leave it out; completions end at the model's own end tokens (its generation_config)",
    "model_adapter_name": "leave it out; use_peft makes the adapter",
    "ref_adapter_name": "leave it out; the reference is the base without the adapter",
    "exp_name": "run_name",
    "batch_size": "per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches",
    "mini_batch_size": "num_mini_batches",
    "dataset_num_proc": "leave it out; prompts are tokenised as they are used",
}


def check_trl_keys(recipe: Recipe) -> list[str]:
    """Problems with TRL's flat keys: unknown, of the wrong type, refused here, or refused by TRL itself."""
    import pydantic

    fields = trl_fields(recipe.trainer)
    problems = []
    for key, value in recipe.trl.items():
        if key == "env":
            if not isinstance(value, dict | None):
                problems.append(f"env: must map names to values, got {value!r}")
        elif recipe.trainer == "ppo" and key in PPO_NAMES:
            problems.append(f"{key}: PPO has it under another name: {PPO_NAMES[key]}")
        elif key not in fields and recipe.trainer == "ppo" and key in OLD_PPO_KEYS:
            problems.append(f"{key}: a key of TRL's own PPO (until 1.12); here: {OLD_PPO_KEYS[key]}")
        elif key not in fields:
            problems.append(f"{key}: unknown key{did_you_mean(str(key), [*fields, *OWN_KEYS])}")
        elif value is not None and fields[key] is not None:
            try:
                # Strictly where it is a word like true, which would pass for the number 1.
                pydantic.TypeAdapter(fields[key]).validate_python(value, strict=isinstance(value, bool) or None)
            except pydantic.ValidationError:
                problems.append(f"{key}: must be {_type_text(fields[key])}, got {value!r}")
            except pydantic.PydanticSchemaGenerationError:
                pass  # a type of TRL's that pydantic does not know; TRL's own parser will look at it
    if recipe.trl.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        problems.append(
            "multi_objective_aggregation: TRL would see one column, the total; write `combine: "
            f"{{use: {recipe.trl['multi_objective_aggregation']}}}` instead"
        )
    if recipe.trl.get("save_strategy") == "best" and any(alarm.then == "stop" for alarm in recipe.alarms):
        problems.append("save_strategy: best keeps no checkpoint of the step at which an alarm stops; set steps or no")
    if recipe.pairs is not None:
        problems += refused_arguments(recipe.trl)
    if not problems:
        try:
            _, training, model, _ = parse_trl(recipe)
            if _needs_critic(recipe):
                training.check_critic(lora=bool(model.use_peft))
            if recipe.pre_clip:
                problems += recipe.pre_clip.problems(training)
        except (ValueError, TypeError, ImportError) as error:
            problems.append(f"these arguments are refused: {error}")
    if recipe.members and not problems:
        problems += _check_members(recipe, recipe.members)
    return problems


def _check_members(recipe: Recipe, members: MemberOptions) -> list[str]:
    """Problems with TRL's keys in which members, or the training of their head, differ from the recipe."""
    varied = [{key: values[index] for key, values in members.vary.items()} for index in range(members.size)]
    found = [
        f"members.{where}: {problem}"
        for where, keys in [*(("vary", keys) for keys in varied), ("probe", members.probe)]
        if keys
        for problem in check_trl_keys(dataclasses.replace(recipe, members=None, trl=recipe.trl | keys))
    ]
    return list(dict.fromkeys(found))


def _needs_critic(recipe: Recipe) -> bool:
    if recipe.trainer != "ppo" or recipe.advantage is None:
        return False
    advantage, _ = build("advantage", recipe.advantage.use, recipe.advantage.options, recipe.base_dir)
    return advantage is not None and "values" in advantage.needs


def _type_text(annotation: Any) -> str:
    name = getattr(annotation, "__name__", None) if not typing.get_args(annotation) else None
    return name or re.sub(r"<?class |'|>|typing\.|\w+\.(?=\w)", "", str(annotation))


@functools.cache
def _trl_classes(trainer: str) -> tuple[Any, ...]:
    import trl

    module, _, name = TRAINERS[trainer].config.partition(":")
    arguments = getattr(importlib.import_module(module), name)
    return (trl.ScriptArguments, arguments, trl.ModelConfig, trl.DatasetMixtureConfig)


def trl_fields(trainer: str) -> dict[str, Any]:
    """{key: type} of every flat key that TRL accepts; the type is None where it cannot be resolved."""
    found: dict[str, Any] = {}
    for cls in _trl_classes(trainer):
        try:
            hints = typing.get_type_hints(cls)
        except Exception:  # a name that TRL imports for type checkers only
            hints = {}
        found |= {option.name: hints.get(option.name) for option in dataclasses.fields(cls) if option.init}
    return found


def parse_trl(recipe: Recipe) -> tuple[Any, Any, Any, Any]:
    """TRL's own dataclasses, as `trl grpo --config` would make them: script, training, model, dataset mixture."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message):  # argparse would print its usage and exit
            raise ValueError(message)

    import torch

    parser = Parser(_trl_classes(recipe.trainer))
    flat = {key: value for key, value in recipe.trl.items() if key != "env"}
    if not torch.accelerator.is_available():
        # TRL's default is bf16 on a GPU, and it refuses a machine without one unless told; a laptop should do.
        flat.setdefault("use_cpu", True)
    parser.set_defaults_with_config(**flat)
    script, training, model, mixture = parser.parse_args_into_dataclasses(args=[])
    return script, training, model, mixture
