"""Reference rewards: scores of a policy's own answers before training. `trl-rewards reference` writes the column."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl_rewards.commands.bon import Drawing, complete, draw_candidates, refused_names, save_rows, score_candidates
from trl_rewards.commands.score import split_of
from trl_rewards.commands.select import complete_rows
from trl_rewards.data import load_splits, map_columns
from trl_rewards.errors import RecipeError
from trl_rewards.models.pretrained import Loading, load_tokenizer
from trl_rewards.pairs import Group, Sampling, or_none
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe, Spec

COLUMN = "reference_rewards"


@dataclass(frozen=True, kw_only=True)
class Referencing(Drawing):
    """What is drawn. The defaults are PAR's, https://huggingface.co/papers/2502.18770."""

    prompts: str = ""
    """Dataset; empty: the recipe's `dataset_name`."""
    n: int = 10
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.9, top_p=0.9, top_k=50))


def unshaped(recipe: Recipe) -> Recipe:
    """A recipe with the same sources and nothing behind them: shapers may read the column that is to be written.

    Sources with an `only_if` score all rows: what others get instead is no score.
    """
    sources = [
        replace(source, shape=[], running={key: set_to for key, set_to in source.running.items() if key != "only_if"})
        for source in recipe.rewards
    ]
    bare = replace(recipe, rewards=sources, combine=Spec("weighted_sum"), shape=[])
    return replace(bare, advantage=None, pairs=None, filter=None)


def column_names(sources: Sequence[str]) -> dict[str, str]:
    """{source: its column}: `reference_rewards` of a single source, `<source>_reference_rewards` of several."""
    return {name: COLUMN if len(sources) == 1 else f"{name}_{COLUMN}" for name in sources}


def reference_rewards(recipe: Recipe, options: Referencing, loading: Loading, out: Path) -> str:
    """Write a dataset with the rewards of n answers of a policy per prompt, JSONL or Parquet by the name; a summary.

    The rewards are the sources' raw scores, before any shaping, None for one that could not be found. Rows that lack a
    prompt or something in a column that a source reads are left out, and so are rows of whose answers a source scored
    none. What an interrupted call sampled and scored is kept beside `out` until all is written.
    """
    path = loading.path or recipe.trl.get("model_name_or_path") or ""
    prompts = options.prompts or recipe.trl.get("dataset_name") or ""
    problems = refused_names(out, out)
    problems += [] if path else ["--model: a policy is needed, here or as model_name_or_path in the recipe"]
    problems += [] if prompts else ["--data: a dataset is needed, here or as dataset_name in the recipe"]
    for name, value in (("n", options.n), ("limit", options.limit)):
        if value is not None and value < 1:
            problems.append(f"--{name}: at least 1, got {value}")
    if problems:
        raise RecipeError(problems, recipe.source)
    bare = unshaped(recipe)
    base_dir, config = (".", None) if options.prompts else (recipe.base_dir, recipe.trl.get("dataset_config"))
    whole = split_of(load_splits(prompts, base_dir, config, option="--data"), options.split, prompts, recipe.source)
    mapped = map_columns(whole, recipe.dataset, recipe.source)
    pipeline = Pipeline.from_recipe(bare)
    columns = column_names(pipeline.names)
    problems = pipeline.missing_columns(mapped.column_names)
    problems += [
        f"the dataset has a column {column!r} already; leave it out, or rename it"
        for column in columns.values()
        if column in (*whole.column_names, *mapped.column_names)
    ]
    if problems:
        raise RecipeError(problems, recipe.source)
    kept, lacking = complete_rows(mapped, pipeline, "")
    kept = kept[: options.limit]
    if not kept:
        raise RecipeError([f"no row of {len(whole)} has all that is read: {dict(lacking)}"], recipe.source)

    work = out.with_name(out.name + ".unfinished")
    rows = mapped.select(kept)
    loading = complete(loading, path, recipe.base_dir)
    drawn = draw_candidates(rows, options, loading, work / "candidates.jsonl")
    groups = score_candidates(rows, drawn, pipeline, bare, options, work / "scores.jsonl", load_tokenizer(loading))
    found = [{column: rewards_of(group, name) for name, column in columns.items()} for group in groups]
    scored = [place for place, each in enumerate(found) if all(map(any_score, each.values()))]
    if not scored:
        raise RecipeError([f"no answer to any of {len(kept)} prompts has a reward"], recipe.source)
    save_rows([whole[kept[place]] | found[place] for place in scored], out)
    shutil.rmtree(work)
    said = [f"{len(whole)} rows of {prompts}, split {options.split}; {options.n} answers of {path} each"]
    said += [f"{count} rows without {name!r} left out" for name, count in lacking.items()]
    said += [f"{len(kept) - len(scored)} rows without a reference reward left out"] if len(scored) < len(kept) else []
    for name, column in columns.items():
        rewards = [reward for place in scored for reward in found[place][column] if reward is not None]
        spread = f"{statistics.fmean(rewards):.4g} and {statistics.pstdev(rewards):.4g}"
        said.append(f"{column}, of {name}: mean and deviation {spread}")
    return "\n".join([*said, f"{len(scored)} rows -> {out}", f"signature {bare.signature}"])


def rewards_of(group: Group, source: str) -> list[float | None]:
    """A source's raw scores of a group's candidates, None for holes."""
    return [or_none(candidate.scores[source]) for candidate in group.candidates]


def any_score(rewards: Sequence[float | None]) -> bool:
    """Whether there is one."""
    return any(reward is not None for reward in rewards)
