"""Checking a recipe before a run: what `trl-rewards validate` says."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from trl_rewards.components import resolve_path
from trl_rewards.errors import RecipeError
from trl_rewards.recipe import Recipe
from trl_rewards.recipe_files import apply_overrides, find_recipe, read_yaml
from trl_rewards.trl_keys import parse_trl


def validate(config: str, overrides: Sequence[str] = ()) -> list[str]:
    """Lines that say what was checked and what could not be. Raises RecipeError with every problem."""
    try:
        recipe = Recipe.load(config, overrides)
    except RecipeError as error:
        raise RecipeError([*error.problems, *_missing_dataset(config, overrides)], config) from None
    from trl_rewards.data import load_recipe_data

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
    if not name or _local(name, recipe.base_dir):
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


def _local(dataset: str, base_dir: str) -> bool:
    """Whether a dataset is looked for here, and not on the Hub."""
    from trl_rewards.data import BUNDLED, named_as_file

    named = dataset.startswith(BUNDLED) or named_as_file(dataset)
    return named or os.path.isdir(resolve_path(dataset, base_dir))


def _missing_dataset(config: str, overrides: Sequence[str]) -> list[str]:
    """What is wrong with the place of the dataset, where something else is wrong with the recipe besides."""
    from trl_rewards.data import load_splits

    try:
        file = find_recipe(config)
        raw = read_yaml(file, config)
    except RecipeError:
        return []
    apply_overrides(raw, overrides)
    name, folder = raw.get("dataset_name"), os.path.dirname(os.path.abspath(file))
    if not isinstance(name, str) or not _local(name, folder):
        return []
    try:
        load_splits(name, folder)
    except RecipeError as error:
        return error.problems
    return []
