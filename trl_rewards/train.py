"""What `accelerate launch recipes/train.py --config RECIPE` runs: recipe -> data -> trainer -> report.

Everything that can be wrong is looked at before a model is loaded: recipe, TRL arguments, dataset columns.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_rewards.errors import PluginError, RecipeError, RewardError
from trl_rewards.recipe import Recipe, parse_trl

logger = logging.getLogger(__name__)


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
    return 0


def train(config: str, overrides: Sequence[str] = ()) -> Any:
    """Train a recipe and return the trainer. Raises RecipeError before any model is loaded if something is wrong."""
    recipe = Recipe.load(config, overrides)
    os.environ.update({str(name): str(value) for name, value in (recipe.trl.get("env") or {}).items()})
    resume = resume_point(parse_trl(recipe)[1], recipe.source)
    trainer, training_args = build_trainer(recipe)
    if trainer.accelerator.is_main_process:
        recipe.save(training_args.output_dir)
    trainer.accelerator.print(f"signature {recipe.signature}")
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(training_args.output_dir)
    finally:
        trainer.pipeline.close()
    trainer.accelerator.print(
        f"model  {training_args.output_dir}\nreport {os.path.join(training_args.output_dir, 'report.html')}"
    )
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if hasattr(trainer, "end"):  # transformers >= 5.18: ends trackers and the process group
        trainer.end()
    return trainer


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
    if training_args.eval_strategy != "no" or training_args.eval_on_start:
        if script.dataset_test_split not in splits:
            there = ", ".join(splits)
            raise RecipeError(
                [f"dataset_test_split: no split {script.dataset_test_split!r} to evaluate on (there is {there})"],
                recipe.source,
            )
        eval_data = splits[script.dataset_test_split]
    if not model_args.model_name_or_path:
        raise RecipeError(
            ["model_name_or_path: a policy is needed: a Hub name, a folder or `bundled:tiny`"], recipe.source
        )

    from transformers import AutoConfig
    from trl import get_peft_config, get_quantization_config

    from trl_rewards import data, trainers
    from trl_rewards.pipeline import Pipeline
    from trl_rewards.plugins import load_plugins

    pipeline = Pipeline.from_recipe(recipe)
    problems = {
        problem: None
        for dataset in (train_data, eval_data)
        if dataset is not None and dataset.column_names
        for problem in pipeline.missing_columns(dataset.column_names)
    }
    if problems:
        raise RecipeError(problems, recipe.source)

    # As TRL's own scripts do it (trl/scripts/grpo.py).
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    try:
        policy = data.model_path(model_args.model_name_or_path, recipe.base_dir)
        AutoConfig.from_pretrained(
            policy, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        problem = f"model_name_or_path: no model {model_args.model_name_or_path!r}: {said}"
        raise RecipeError([problem], recipe.source) from error
    trainer = trainers.trainer_class(recipe.trainer)(
        model=policy,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        pipeline=pipeline,
    )
    _add_callbacks(trainer)
    load_plugins().tell("trainer_ready", trainer=trainer, recipe=recipe)
    return trainer, training_args


def _load_data(recipe: Recipe, script: Any, mixture: Any) -> Any:
    from trl_rewards.data import load_recipe_data

    try:
        return load_recipe_data(recipe, script, mixture)
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError([f"dataset_name: {error}"], recipe.source) from error


def _add_callbacks(trainer: Any) -> None:
    from trl_rewards.console import tame_logging
    from trl_rewards.report import RunRecorder

    tame_logging(trainer)
    trainer.add_callback(RunRecorder(trainer))


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


if __name__ == "__main__":
    sys.exit(main())
