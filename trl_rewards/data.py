"""Datasets of recipes: Hub names, local files, folders and bundled ones, with columns mapped to what rewards read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rewards import bundled
from trl_rewards.components import looked_in, resolve_path
from trl_rewards.errors import RecipeError, did_you_mean
from trl_rewards.recipe import DatasetSpec, Recipe

if TYPE_CHECKING:
    from datasets import Dataset

BUNDLED = "bundled:"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_recipe_data(recipe: Recipe, script: Any, mixture: Any) -> Any:
    """All splits of a recipe's dataset (a DatasetDict, or an iterable one), columns mapped.

    RecipeError if it is not there or has no rows. `script` and `mixture` are TRL's ScriptArguments and
    DatasetMixtureConfig.
    """
    if mixture is not None and mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
    elif script.dataset_name:
        splits = load_splits(script.dataset_name, recipe.base_dir, script.dataset_config, script.dataset_streaming)
    else:
        raise RecipeError(["dataset_name: a dataset is needed: a Hub name, a file or `bundled:tiny`"], recipe.source)
    problems = []
    for name, dataset in splits.items():
        if not script.dataset_streaming and len(dataset) == 0:
            problems.append(f"dataset_name: split {name!r} of {script.dataset_name!r} has no rows")
    if script.dataset_train_split not in splits:
        there = ", ".join(map(str, splits))
        problems.append(f"dataset_train_split: no split {script.dataset_train_split!r} (there is {there})")
    if problems:
        raise RecipeError(problems, recipe.source)
    mapped = {
        name: map_columns(dataset, recipe.dataset, recipe.source, _needed(recipe, dataset.column_names))
        for name, dataset in splits.items()
    }
    return type(splits)(mapped)


def _needed(recipe: Recipe, there: list[str] | None) -> tuple[str, ...]:
    pairs = ("chosen", "rejected")
    if recipe.trainer == "kto" and not set(pairs) <= set(there or ()):  # TRL makes labelled answers of pairs
        return ("prompt", "completion", "label")
    return ("prompt",) if recipe.trains_policy else pairs


def load_splits(
    name: str,
    base_dir: str = ".",
    config: str | None = None,
    streaming: bool = False,
    option: str = "dataset_name",
) -> Any:
    """`bundled:NAME`, a .json, .jsonl, .parquet or .csv file, a folder of them (one per split), or a Hub name.

    RecipeError if it is not there or cannot be read; `option` is where the user named it.
    """
    import datasets

    if name.startswith(BUNDLED):
        try:
            return bundled.load_data(name.removeprefix(BUNDLED), config)
        except ValueError as error:
            raise RecipeError([f"{'dataset_config' if config else option}: {error}"]) from None
    path = Path(resolve_path(name, base_dir))
    if path.is_file():
        return _read_files({"train": path}, streaming, option)
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _BUILDERS} if path.is_dir() else {}
    if files:
        return _read_files(files, streaming, option)
    if named_as_file(name):
        raise RecipeError([f"{option}: no file {name!r} in {looked_in(base_dir)}"])
    try:
        loaded = datasets.load_dataset(name, name=config, streaming=streaming)
    except (OSError, ValueError) as error:  # unreachable, unknown, or not a dataset
        raise RecipeError([f"{option}: {name!r} is no local file, and the Hub says: {error}"]) from error
    return loaded


def named_as_file(name: str) -> bool:
    """Whether the name of a dataset is that of a file or folder, there or not, and of none on the Hub."""
    return name.startswith((".", "/", "~")) or Path(name).suffix in _BUILDERS


def _read_files(files: dict[str, Path], streaming: bool, option: str) -> Any:
    """{split: file}, each with columns of its own."""
    import datasets

    splits: Any = {split: _read_file(file, streaming, option) for split, file in files.items()}
    return datasets.IterableDatasetDict(splits) if streaming else datasets.DatasetDict(splits)


def _read_file(file: Path, streaming: bool, option: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    builder = _builder(file, option)
    try:
        return datasets.load_dataset(builder, data_files=str(file), split="train", streaming=streaming)
    except (ValueError, DatasetGenerationError) as error:
        why = error.__cause__ or error
        raise RecipeError([f"{option}: {file} has no rows or cannot be read: {why}"]) from error


def _builder(path: Path, option: str) -> str:
    if path.suffix not in _BUILDERS:
        raise RecipeError([f"{option}: {path.name!r} is not one of {', '.join(_BUILDERS)}"])
    return _BUILDERS[path.suffix]


def map_columns(
    dataset: Dataset, spec: DatasetSpec, source: str = "recipe", needed: tuple[str, ...] = ("prompt",)
) -> Dataset:
    """Rename columns as `dataset.columns` says, and make chat prompts where the recipe asks for them.

    RecipeError if a column that is `needed` is not there afterwards.
    """
    names = list(dataset.column_names or [])
    there = ", ".join(names)
    problems = [
        f"dataset.columns.{new}: the dataset has no column {old!r}{did_you_mean(old, names)} (it has {there})"
        for new, old in spec.columns.items()
        if old not in names
    ]
    if len(set(spec.columns.values())) < len(spec.columns):
        problems.append(f"dataset.columns: two names for one column of the dataset: {spec.columns}")
    if problems:
        raise RecipeError(problems, source)
    taken = [
        new for new, old in spec.columns.items() if new in names and new != old and new not in spec.columns.values()
    ]
    dataset = dataset.remove_columns(taken)
    dataset = dataset.rename_columns({old: new for new, old in spec.columns.items() if new != old})
    problems = [
        f"the dataset has no column {name!r} but {there}; map one: dataset: {{columns: {{{name}: …}}}}"
        for name in needed
        if name not in (dataset.column_names or needed)
    ]
    if problems:
        raise RecipeError(problems, source)
    if spec.chat or spec.system_prompt:
        dataset = dataset.map(_to_chat, fn_kwargs={"system_prompt": spec.system_prompt})
    return dataset


def _to_chat(row: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return {"prompt": messages}


def model_path(name: str, base_dir: str = ".") -> str:
    """A policy's path: `bundled:NAME`, a folder beside the recipe, or a Hub name as it is."""
    if name.startswith(BUNDLED):
        return str(bundled.model_path(name.removeprefix(BUNDLED)))
    resolved = resolve_path(name, base_dir)
    return resolved if os.path.isdir(resolved) else name
