"""Checking a recipe before a run: what `trl-rewards validate` says."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from trl_rewards.components import resolve_path
from trl_rewards.errors import RecipeError
from trl_rewards.recipe import Recipe
from trl_rewards.trl_keys import parse_trl


def validate(config: str, overrides: Sequence[str] = ()) -> list[str]:
    """Lines that say what was checked and what could not be. Raises RecipeError with every problem."""
    recipe = Recipe.load(config, overrides)
    from trl_rewards.data import BUNDLED, load_recipe_data

    script, _, model, mixture = parse_trl(recipe)
    if recipe.trains_policy:
        from trl_rewards.pipeline import Pipeline

        pipeline = Pipeline.from_recipe(recipe)
        what = f"{len(recipe.rewards)} sources ({', '.join(pipeline.names)})"
        missing_columns = pipeline.missing_columns
    else:
        from trl_rewards.trainers import objectives

        objective = objectives.objective_of(recipe)
        what = f"objective {recipe.objective or 'of TRL'}"
        what += f", {recipe.members.size} members" if recipe.members else ""
        missing_columns = functools.partial(objectives.missing_columns, objective)
    lines = [f"{config}: trainer {recipe.trainer}, {what}"]
    needed = "policy" if recipe.trains_policy else "model"
    problems = [] if model.model_name_or_path else [f"model_name_or_path: a {needed} is needed"]
    name = script.dataset_name or ""
    local = name.startswith((BUNDLED, ".", "/", "~")) or name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    local = local or os.path.isdir(resolve_path(name, recipe.base_dir))
    if not name or local:
        try:
            splits = load_recipe_data(recipe, script, mixture)
        except RecipeError as error:
            problems += error.problems
        else:
            names = splits[script.dataset_train_split].column_names
            problems += missing_columns(names)
            problems += recipe.pairs.missing_columns(names) if recipe.pairs else []
            sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in splits.items())
            lines.append(f"dataset {name}: {sizes} rows")
    else:
        there = "not there; no Hub name has two slashes" if name.count("/") > 1 else "not looked at (it is on the Hub)"
        lines.append(f"dataset {name}: {there}")
    if problems:
        raise RecipeError(problems, config)
    return [*lines, f"signature: {recipe.signature}", "ok"]
