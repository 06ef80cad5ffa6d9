"""What `accelerate launch recipes/train.py --config RECIPE` runs: recipe -> data -> trainer -> report.

Everything that can be wrong is looked at before a model is loaded: recipe, TRL arguments, dataset columns.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_rewards.errors import AlarmStop, PluginError, RecipeError, RewardError
from trl_rewards.recipe import Recipe
from trl_rewards.trl_keys import parse_trl

logger = logging.getLogger(__name__)

STOPPED = 3
"""Exit status of a run that an alarm of its recipe ended."""


def main(words: Sequence[str] | None = None) -> int:
    """The command line: `--config RECIPE`, then overrides. Returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words or words.index("--config") + 1 >= len(words):
        print("usage: accelerate launch recipes/train.py --config RECIPE [--key value …]", file=sys.stderr)
        return 2
    at = words.index("--config")
    config, overrides = words[at + 1], words[:at] + words[at + 2 :]
    quieten_libraries()
    try:
        train(config, overrides)
    except (RecipeError, PluginError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except AlarmStop as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    return 0


def train(config: str, overrides: Sequence[str] = ()) -> Any:
    """Train a recipe and return the trainer; of a recipe with `members:`, the folders of the members.

    Raises RecipeError before any model is loaded if something is wrong, and AlarmStop where an alarm ended the run,
    after everything is saved; nothing is pushed to the Hub then.
    """
    recipe = Recipe.load(config, overrides)
    os.environ.update({str(name): str(value) for name, value in (recipe.trl.get("env") or {}).items()})
    if recipe.members:
        from trl_rewards.train_members import train_members

        return train_members(recipe, recipe.members)
    trainer = run(recipe)
    end(trainer)
    return trainer


def run(recipe: Recipe, prepare: Callable[[Any], None] = lambda trainer: None, save: bool = True) -> Any:
    """Train one model, save it in `output_dir`, and return its trainer, which `prepare` is called with first.

    The process group stays: `end` comes after the last run of a process.
    """
    training_args = parse_trl(recipe)[1]
    resume = (
        resume_rounds(training_args, recipe.source) if recipe.pairs else resume_point(training_args, recipe.source)
    )
    trainer, training_args = build_trainer(recipe)
    prepare(trainer)
    if trainer.accelerator.is_main_process:
        recipe.save(training_args.output_dir)
    trainer.accelerator.print(f"signature {recipe.signature}")
    try:
        trainer.train(resume_from_checkpoint=resume)
        if save:
            trainer.save_model(training_args.output_dir)
    finally:
        if trainer.pipeline is not None:
            trainer.pipeline.close()
    trainer.accelerator.print(
        *([f"model  {training_args.output_dir}"] if save else []),
        f"report {os.path.join(training_args.output_dir, 'report.html')}",
        sep="\n",
    )
    stopped = _stopped(trainer)
    if training_args.push_to_hub and not stopped:
        trainer.push_to_hub()
    if stopped:
        if recipe.pairs and trainer.accelerator.is_main_process:
            from trl_rewards.report import write_report

            write_report(training_args.output_dir)  # rounds write theirs before an alarm looks at their last log
        trainer.accelerator.wait_for_everyone()  # the first to exit with a status has its launcher end the others
        end(trainer)
        raise AlarmStop(
            f"{stopped}\n"
            f"The run ended there, as its recipe says; its last checkpoint and its model are in "
            f"{training_args.output_dir}. Look at report.html there, and go back to an earlier checkpoint if it shows "
            "harm. To go on, change or take out the alarm and add --resume_from_checkpoint true; with the alarm as it "
            "is, it counts from 0 again."
        )
    return trainer


def end(trainer: Any) -> None:
    """End trackers and the process group, where the trainer can (transformers >= 5.18)."""
    if hasattr(trainer, "end"):
        trainer.end()


def quieten_libraries() -> None:
    """Hide what a user of a recipe can do nothing about: the libraries' deprecations and their progress bars."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|torch")
    # bitsandbytes says at import that an optional CPU kernel package is absent; it falls back to its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # on a machine without accelerator
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_progress_bars()


def build_trainer(recipe: Recipe) -> tuple[Any, Any]:
    """The trainer of a recipe, ready to train, and TRL's training arguments."""
    script, training_args, model_args, mixture = parse_trl(recipe)
    splits = _load_data(recipe, script, mixture)
    train_data = splits[script.dataset_train_split]
    eval_data = None
    if recipe.pairs is not None:
        eval_data = splits.get(script.dataset_test_split) if recipe.pairs.held_out else None
    elif training_args.eval_strategy != "no" or training_args.eval_on_start:
        if script.dataset_test_split not in splits:
            there = ", ".join(splits)
            raise RecipeError(
                [f"dataset_test_split: no split {script.dataset_test_split!r} to evaluate on (there is {there})"],
                recipe.source,
            )
        eval_data = splits[script.dataset_test_split]
    what = "policy" if recipe.trains_policy else "model"
    if not model_args.model_name_or_path:
        raise RecipeError(
            [f"model_name_or_path: a {what} is needed: a Hub name, a folder or `bundled:tiny`"], recipe.source
        )

    from trl import get_quantization_config

    from trl_rewards import data, trainers
    from trl_rewards.plugins import load_plugins

    ours, missing_columns = _pipeline(recipe) if recipe.trains_policy else _objective(recipe)
    problems = {
        problem: None
        for dataset in (train_data, eval_data)
        if dataset is not None and dataset.column_names
        for problem in missing_columns(dataset.column_names)
    }
    if recipe.pairs is not None:
        problems |= dict.fromkeys(recipe.pairs.missing_columns(train_data.column_names))
    if problems:
        raise RecipeError(problems, recipe.source)

    # As TRL's own scripts do it (trl/scripts/grpo.py, reward.py).
    quantization = get_quantization_config(model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        # TRL makes a 4-bit reward model's score head bf16, which then meets hidden states of the model's dtype.
        "dtype": "bfloat16" if quantization and recipe.trainer == "reward" else model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    model = data.model_path(model_args.model_name_or_path, recipe.base_dir)
    if recipe.trainer == "ppo" and training_args.critic_model_name_or_path:
        critic = data.model_path(training_args.critic_model_name_or_path, recipe.base_dir)
        _check_model("critic_model_name_or_path", critic, None, training_args.trust_remote_code, recipe.source)
        training_args.critic_model_name_or_path = critic
    if recipe.trainer != "reward" or recipe.objective is None:  # one of pairs may bring an architecture of its own
        remote = training_args.trust_remote_code
        _check_model("model_name_or_path", model, model_args.model_revision, remote, recipe.source)
    try:
        trainer = trainers.trainer_class(recipe.trainer)(
            model=model,
            args=training_args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            quantization_config=quantization,
            peft_config=peft_config(model_args, recipe),
            **ours,
        )
    except ValueError as error:  # arguments that do not go together, in TRL's words or ours
        if isinstance(error, RecipeError):
            raise
        raise RecipeError([str(error)], recipe.source) from error
    _add_callbacks(trainer, recipe)
    load_plugins().tell("trainer_ready", trainer=trainer, recipe=recipe)
    return trainer, training_args


def _check_model(key: str, path: str, revision: str | None, trust_remote_code: bool, source: str) -> None:
    """RecipeError if there is no such model: sources should not be set up for nothing."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        problem = f"{key}: no model {path!r}: {said}"
        raise RecipeError([problem], source) from error


_MissingColumns = Callable[[Sequence[str]], list[str]]


def _pipeline(recipe: Recipe) -> tuple[dict[str, Any], _MissingColumns]:
    """The trainer's arguments of ours, and what finds columns that are missing."""
    from trl_rewards.pipeline import Pipeline

    pipeline = Pipeline.from_recipe(recipe)
    ours: dict[str, Any] = {"pipeline": pipeline}
    ours |= {"pairs": recipe.pairs} if recipe.pairs else {}
    ours |= {"pre_clip": recipe.pre_clip} if recipe.pre_clip else {}
    return ours, pipeline.missing_columns


def _objective(recipe: Recipe) -> tuple[dict[str, Any], _MissingColumns]:
    from trl_rewards.trainers.objectives import missing_columns, objective_of

    objective = objective_of(recipe)
    ours = {"objective": objective, "signature": recipe.signature, "base_dir": recipe.base_dir}
    return ours, lambda names: missing_columns(objective, names)


def peft_config(model_args: Any, recipe: Recipe) -> Any:
    """TRL's LoRA settings; a reward model's must train its score head too, which PEFT does for this task type."""
    from trl import get_peft_config

    if recipe.trainer == "reward" and "lora_task_type" not in recipe.trl:
        model_args.lora_task_type = "SEQ_CLS"
    return get_peft_config(model_args)


def _load_data(recipe: Recipe, script: Any, mixture: Any) -> Any:
    from trl_rewards.data import load_recipe_data

    try:
        return load_recipe_data(recipe, script, mixture)
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError([f"dataset_name: {error}"], recipe.source) from error


def _add_callbacks(trainer: Any, recipe: Recipe) -> None:
    from trl_rewards.console import tame_logging
    from trl_rewards.report import AlarmWatch, RoundRecorder, RunRecorder

    tame_logging(trainer)
    recorder = RoundRecorder(trainer) if recipe.pairs else RunRecorder(trainer)
    trainer.add_callback(recorder)
    if recipe.alarms:
        trainer.add_callback(AlarmWatch(recipe.alarms, recorder))


def _stopped(trainer: Any) -> str | None:
    """What an alarm said when it ended the run; None where none did."""
    from trl_rewards.report import AlarmWatch

    watches = [found for found in trainer.callback_handler.callbacks if isinstance(found, AlarmWatch)]
    return watches[0].stopped if watches else None


def resume_point(training_args: Any, source: str) -> str | None:
    """`resume_from_checkpoint: true` means the newest checkpoint in `output_dir`, if there is one."""
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not Path(str(wanted), "trainer_state.json").is_file():
            raise RecipeError([f"resume_from_checkpoint: {wanted!r} is not a checkpoint folder"], source)
        return str(wanted)
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(training_args.output_dir)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def resume_rounds(training_args: Any, source: str) -> bool:
    """Whether rounds go on where they stopped; which checkpoint that is follows from their folders."""
    wanted = str(training_args.resume_from_checkpoint or False).lower()
    if wanted not in ("true", "false"):
        problem = f"resume_from_checkpoint: rounds go on from their own folders; give true, got {wanted!r}"
        raise RecipeError([problem], source)
    return wanted == "true"


if __name__ == "__main__":
    sys.exit(main())
