"""Sampling and scoring without training: what `trl-rewards bon` runs."""

from __future__ import annotations

import gc
import hashlib
import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trl_rewards.commands.score import set_up, split_of
from trl_rewards.data import load_splits, map_columns, model_path
from trl_rewards.errors import RecipeError
from trl_rewards.files import write_rows
from trl_rewards.models.pretrained import Loading, default_device, free_memory, load_tokenizer, with_base
from trl_rewards.models.sampling import (
    TEMPLATE_COLUMNS,
    Sampled,
    WorkFile,
    load_sampler,
    sample_candidates,
    template_columns,
)
from trl_rewards.pairs import (
    Candidate,
    Counts,
    Group,
    Sampling,
    Selection,
    best_row,
    describe,
    groups_of,
    kto_rows,
    make_pairs,
    pair_rows,
    sft_row,
)
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe
from trl_rewards.samples import Samples, as_completion


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is sampled and scored."""

    prompts: str
    """Dataset: file, folder, `bundled:` or Hub name."""
    split: str = "train"
    limit: int | None = None
    """Prompts at most; None: all."""
    n: int = 8
    """Completions per prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    score_prompts: int = 128
    """Prompts whose candidates the rewards are given at a time."""
    backend: Literal["transformers", "vllm"] = "transformers"


@dataclass(frozen=True, kw_only=True)
class BestOf(Drawing):
    """What is written of the candidates."""

    format: Literal["bon", "pairs", "sft", "kto"] = "bon"
    selection: Selection = field(default_factory=Selection)
    """Of `pairs`."""
    minimum: float | None = None
    """Of `sft`: the lowest total that is kept."""
    threshold: float | None = None
    """Of `kto`: the lowest total with label True; None: the best and the worst."""


def best_of_n(config: str, overrides: Sequence[str], options: BestOf, loading: Loading, out: Path) -> str:
    """Write a dataset of scored answers, JSONL or Parquet by its name; a summary in lines.

    `loading.path` may be empty: then the policy is the recipe's. What an interrupted call sampled and scored is kept
    beside `out` until it is whole; running statistics of shapers begin anew when scoring goes on.
    """
    recipe = Recipe.load(config, overrides, check_trl=False)
    path = loading.path or recipe.trl.get("model_name_or_path") or ""
    problems = [] if recipe.trains_policy else [f"trainer {recipe.trainer!r} has no rewards to score with"]
    problems += [] if path else ["--model: a policy is needed, here or as model_name_or_path in the recipe"]
    problems += refused_names(out, out)
    if options.limit is not None and options.limit < 1:
        problems.append(f"--limit: at least 1, got {options.limit}")
    if options.n < 1 or (options.n < 2 and options.format == "pairs"):
        problems.append(f"--n: at least 1, and 2 for pairs; got {options.n}")
    if problems:
        raise RecipeError(problems, config)
    found = split_of(load_splits(options.prompts, option="--prompts"), options.split, options.prompts, config)
    dataset = map_columns(found, recipe.dataset, config)
    dataset = dataset.select(range(min(options.limit or len(dataset), len(dataset))))
    pipeline = Pipeline.from_recipe(recipe)
    if problems := pipeline.missing_columns(dataset.column_names):
        raise RecipeError(problems, config)

    work = out.with_name(out.name + ".unfinished")
    loading = complete(loading, path, recipe.base_dir)
    drawn = draw_candidates(dataset, options, loading, work / "candidates.jsonl")
    scores = work / "scores.jsonl"
    groups = score_candidates(dataset, drawn, pipeline, recipe, options, scores, load_tokenizer(loading))
    rows, said = _rows(groups, options)
    if not rows:
        raise RecipeError([f"no rows to write: {said}"], config)
    save_rows(rows, out)
    shutil.rmtree(work)
    return f"{said}\n{len(rows)} rows -> {out}\nsignature {recipe.signature}"


def refused_names(out: Path, *written: Path) -> list[str]:
    """Problems with the name of a file of rows, and with files that are there already."""
    problems = [f"--out: {file} exists; delete it, or give another name" for file in written if file.exists()]
    if out.suffix not in (".jsonl", ".parquet"):
        problems.append(f"--out: must end in .jsonl or .parquet, got {out.name!r}")
    return problems


def complete(loading: Loading, path: str, base_dir: str) -> Loading:
    """Names resolved; a folder with nothing but an adapter is its base model with the adapter on."""
    loading = replace(loading, path=model_path(path, base_dir))
    return with_base(loading, lambda base: model_path(base, base_dir))


def draw_candidates(dataset: Any, options: Drawing, loading: Loading, work: Path) -> list[list[Sampled]]:
    """n candidates per prompt; the policy is gone from memory before the rewards are loaded."""
    drawn = sample_candidates(
        load_sampler(loading, options.backend),
        list(dataset["prompt"]),
        options.n,
        options.sampling,
        seed=options.seed,
        **template_columns(dataset),
        work=work,
        signature=f"{options.backend} {loading}",
        progress=True,
    )
    gc.collect()
    free_memory(default_device())
    return drawn


def score_candidates(
    dataset: Any,
    drawn: Sequence[Sequence[Sampled]],
    pipeline: Pipeline,
    recipe: Recipe,
    options: Drawing,
    work: Path,
    tokenizer: Any,
) -> list[Group]:
    """Every prompt with its scored candidates, n each. Each chunk that is scored is a line of `work`.

    `tokenizer`: the one of their token ids; None where they have none.
    """
    from rich.progress import track

    held = [recipe.signature, [source.signature for source in pipeline.sources], options.score_prompts, drawn]
    digest = hashlib.blake2b(repr(held).encode("utf-8", "surrogatepass"), digest_size=8)
    for row in dataset:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    keeper = WorkFile(work, digest.hexdigest(), "scores of another recipe, of other candidates or of other data")
    size = options.score_prompts
    chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    names = [name for name in dataset.column_names if name != "prompt"]
    kept = [name for name in names if name in TEMPLATE_COLUMNS]
    groups: list[Group] = []
    try:
        # Where an interrupted run has scored all, nothing is loaded.
        device = set_up(pipeline, recipe, tokenizer) if len(keeper.lines) < len(chunks) else None
        for number, chunk in enumerate(track(chunks, description="scoring", transient=True)):
            rows = [dataset[row] for row in chunk]
            ended = [each.ended for row in chunk for each in drawn[row]]
            samples = Samples(
                prompts=[row["prompt"] for row in rows for _ in range(options.n)],
                completions=[
                    as_completion(each.text, row["prompt"])
                    for row, index in zip(rows, chunk, strict=True)
                    for each in drawn[index]
                ],
                completion_ids=[each.ids for row in chunk for each in drawn[row]] if tokenizer is not None else [],
                columns={name: [row[name] for row in rows for _ in range(options.n)] for name in names},
            )
            columns = [{name: row[name] for name in kept} for row in rows]
            if number < len(keeper.lines):
                groups += [
                    Group(row["prompt"], [Candidate(*candidate) for candidate in candidates], extra)
                    for row, candidates, extra in zip(rows, keeper.lines[number], columns, strict=True)
                ]
                continue
            scored = groups_of(pipeline.score(samples, options.n, device=device), columns, ended)
            keeper.append([group.candidates for group in scored])
            groups += scored
    finally:
        pipeline.close()
    return groups


def _rows(groups: Sequence[Group], options: BestOf) -> tuple[list[dict[str, Any]], str]:
    """The rows of the format, and what became of the candidates."""
    totals = [candidate.total for group in groups for candidate in group.candidates]
    there = [total for total in totals if not math.isnan(total)]
    best = [row["total"] for group in groups if (row := best_row(group))]
    said = f"{len(groups)} prompts x {options.n}: "
    said += (
        f"mean total {statistics.fmean(there):.4f}, best of {options.n} {statistics.fmean(best):.4f}, "
        f"{len(totals) - len(there)} candidates without a score"
        if there
        else "no candidate has a score"
    )
    if options.format == "pairs":
        rows, counts = [], Counts()
        for group in groups:
            pairs, counted = make_pairs(group, options.selection, options.seed)
            rows += pair_rows(group, pairs)
            counts += counted
        return rows, f"{said}\n{describe(counts)}"
    if options.format == "kto":
        return [row for group in groups for row in kto_rows(group, options.threshold)], said
    made = [sft_row(group, options.minimum) if options.format == "sft" else best_row(group) for group in groups]
    return [row for row in made if row], said


def save_rows(rows: Iterable[dict[str, Any]], out: Path) -> None:
    """Write JSONL or Parquet, by the name."""
    if out.suffix == ".parquet":
        from datasets import Dataset

        out.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(list(rows)).to_parquet(out)
    else:
        write_rows(out, rows)
