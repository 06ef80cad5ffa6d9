"""Choosing training rows by how well a model does on them: what `trl-rewards select` runs."""

from __future__ import annotations

import io
import json
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_rewards.commands.bon import Drawing, complete, draw_candidates, refused_names, save_rows, score_candidates
from trl_rewards.commands.score import is_group, policy_tokenizer, split_of, token_ids
from trl_rewards.data import load_splits, map_columns
from trl_rewards.errors import RecipeError, did_you_mean
from trl_rewards.loading import build
from trl_rewards.models.pretrained import Loading, load_tokenizer
from trl_rewards.models.sampling import Sampled
from trl_rewards.pairs import Sampling, or_none
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe, Spec
from trl_rewards.samples import as_completion, completion_text, content_text
from trl_rewards.schedules import Schedule

PLAIN_WEIGHT = Schedule("constant", 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Selecting(Drawing):
    """Which rows are chosen. By default answers are drawn as BLEUBERI's authors draw them."""

    selector: Spec
    count: int
    references: tuple[str, ...] = ()
    """Columns whose texts make the column `references`; of `messages` it is the first assistant message."""
    completions: str = ""
    """Column with a completion, or a list of them, per row; empty: a model writes them."""
    copy: tuple[str, ...] = ()
    """Other splits, written beside the chosen rows."""
    n: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9, max_new_tokens=512))
    seed: int = 42


def select_rows(recipe: Recipe, options: Selecting, loading: Loading, out: Path) -> str:
    """Write the chosen rows, JSONL or Parquet by the name, with a dataset card and a plot; a summary in lines.

    They are rows of the dataset with `<source>_score` for each source, and `total_score` where the total is not just
    that, each the mean over the row's completions. Rows that lack a prompt, a completion, or something in a column
    that a reward reads, are left out first. What an interrupted call sampled and scored is kept beside `out` until all
    is written; running statistics of shapers begin anew when scoring goes on.
    """
    path = "" if options.completions else loading.path or recipe.trl.get("model_name_or_path") or ""
    card, plot = out.with_suffix(".md"), out.with_suffix(".png")
    work = out.with_name(out.name + ".unfinished")
    copies = {split: out.with_name(split + out.suffix) for split in options.copy}
    selector, problems = build("selector", options.selector.use, options.selector.options, recipe.base_dir)
    problems = [f"--selector: {problem}" for problem in problems]
    # Beside work of an interrupted call, these files are its own.
    problems += refused_names(out, *([] if work.exists() else [out, card, plot, *copies.values()]))
    if not path and not options.completions:
        problems.append("--model: a model to write the answers is needed, or --completions with the column of them")
    if options.completions and (loading.path or options.n > 1):
        problems.append("--completions: the answers are the column's, so leave out --model and --n")
    for name, value in (("count", options.count), ("n", options.n), ("limit", options.limit)):
        if value is not None and value < 1:
            problems.append(f"--{name}: at least 1, got {value}")
    problems += [f"--copy: {split!r} would be written to {out} too" for split in copies if copies[split] == out]
    if options.references and "references" in recipe.dataset.columns:
        problems.append("--references: dataset.columns.references is given too; leave out one of them")
    if problems:
        raise RecipeError(problems, recipe.source)

    splits = load_splits(options.prompts, option="--data")
    if missing := [split for split in options.copy if split not in splits]:
        raise RecipeError([f"--copy: no split {missing[0]!r} (there is {', '.join(splits)})"], recipe.source)
    pipeline = Pipeline.from_recipe(recipe)
    found = split_of(splits, options.split, options.prompts, recipe.source)
    whole = with_prompt_and_references(found, options.references, recipe)
    copied = {
        file: with_prompt_and_references(splits[split], options.references, recipe) for split, file in copies.items()
    }
    mapped = map_columns(whole, recipe.dataset, recipe.source)
    metrics = metrics_of(recipe)
    _check_columns(whole.column_names, mapped.column_names, pipeline, metrics, options.completions, recipe.source)
    if out.suffix == ".jsonl":
        _check_json([whole, *copied.values()], recipe.source)
    kept, lacking = complete_rows(mapped, pipeline, options.completions)
    kept = kept[: options.limit]
    left_out = ", ".join(f"{count} without {name!r} left out" for name, count in lacking.items()) or "none left out"
    if not kept:
        raise RecipeError([f"no row is left of {len(whole)}: {left_out}"], recipe.source)
    rows = mapped.select(kept)

    if options.completions:
        tokenizer = policy_tokenizer(recipe)
        drawn = recorded(rows, options.completions, tokenizer, recipe.source)
        options, rows = replace(options, n=len(drawn[0])), rows.remove_columns(options.completions)
        author = f"column `{options.completions}`"
    else:
        loading = complete(loading, path, recipe.base_dir)
        tokenizer = load_tokenizer(loading)
        drawn = draw_candidates(rows, options, loading, work / "candidates.jsonl")
        author = f"{options.n} per prompt by {path}, {vars(options.sampling)}"
    groups = score_candidates(rows, drawn, pipeline, recipe, options, work / "scores.jsonl", tokenizer)

    scores = [mean(candidate.total for candidate in group.candidates) for group in groups]
    chosen = selector.select(scores, options.count, options.seed)
    if not chosen:
        raise RecipeError(["no row is chosen; none may have a score"], recipe.source)
    save_rows([whole[kept[row]] | score_columns(groups[row].candidates, metrics) for row in chosen], out)
    for file, dataset in copied.items():
        save_rows(dataset, file)
    pool = [score for score in scores if score is not None]
    picked = [score for row in chosen if (score := scores[row]) is not None]
    facts = [
        f"{len(whole)} rows of {options.prompts}, split {options.split}: {left_out}",
        f"{len(kept)} scored, {len(kept) - len(pool)} of them without a score",
        f"{metrics[-1]} of these: {spread(pool)}",
        f"{metrics[-1]} of {len(chosen)} chosen by {options.selector}: {spread(picked)}",
    ]
    plot.write_bytes(distribution(pool, picked, metrics[-1], str(options.selector)))
    made = f"Completions: {author}. Seed: {options.seed}."
    card.write_text(dataset_card(out, plot, facts, metrics, made, recipe.signature), encoding="utf-8")
    shutil.rmtree(work)
    return "\n".join([*facts, f"{len(chosen)} rows -> {out}", f"card {card}, plot {plot}", recipe.signature])


def metrics_of(recipe: Recipe) -> list[str]:
    """Names of the scores that are written: each source's, and `total` where that may be another number."""
    first, *others = recipe.rewards
    alone = not others and first.weight == PLAIN_WEIGHT and not first.shape and "on_missing" not in first.running
    if alone and not recipe.shape and recipe.combine == Spec("weighted_sum"):
        return [first.name]
    return [*(source.name for source in recipe.rewards), "total"]


def _check_json(datasets: Sequence[Any], source: str) -> None:
    """RecipeError if the first row of a dataset has something that JSON cannot say, such as a date or a picture."""
    problems = []
    for name, value in ((name, value) for dataset in datasets for name, value in next(iter(dataset), {}).items()):
        try:
            json.dumps(value)
        except TypeError:
            what = f"column {name!r} holds {type(value).__name__}"
            problems.append(f"--out: {what}, which JSON lines cannot; give a name that ends in .parquet")
    if problems:
        raise RecipeError(problems, source)


def _check_columns(
    written: Sequence[str],
    there: Sequence[str],
    pipeline: Pipeline,
    metrics: Sequence[str],
    completions: str,
    source: str,
) -> None:
    """`written`: columns of the rows that are written, `there`: as rewards read them, mapped."""
    problems = pipeline.missing_columns([name for name in there if name != completions])
    if completions and completions not in there:
        hint = did_you_mean(completions, there)
        problems.append(f"--completions: no column {completions!r}{hint} (there is {', '.join(there)})")
    problems += [
        f"the dataset has a column '{name}_score' already; rename it, or give the source another name with `as:`"
        for name in metrics
        if f"{name}_score" in written
    ]
    if problems:
        raise RecipeError(problems, source)


def with_prompt_and_references(dataset: Any, references: Sequence[str], recipe: Recipe) -> Any:
    """A dataset with the columns that GRPO wants, made as BLEUBERI's authors make them.

    Without a prompt it is the first user message of `messages`. `references` names the columns of a list of texts per
    row. `messages` is taken out, since TRL would take the rows for a language-modelling dataset.
    """
    names = dataset.column_names
    if missing := [name for name in references if name not in names]:
        hint = did_you_mean(missing[0], names)
        raise RecipeError(
            [f"--references: no column {missing[0]!r}{hint} (there is {', '.join(names)})"], recipe.source
        )
    if references:
        texts = [[text for name in references for text in _texts(name, row[name])] for row in dataset]
        dataset = dataset.remove_columns([name for name in names if name == "references"])
        dataset = dataset.add_column("references", texts)
    if "messages" in names:
        if "prompt" not in names and "prompt" not in recipe.dataset.columns:
            prompts = [[m for m in messages or [] if m["role"] == "user"][:1] for messages in dataset["messages"]]
            dataset = dataset.add_column("prompt", prompts)
        dataset = dataset.remove_columns("messages")
    return dataset


def _texts(name: str, value: Any) -> list[Any]:
    """What a column has to say as references: None where there should be one and is not."""
    if name == "messages":
        return [next((content_text(message) for message in value or [] if message["role"] == "assistant"), None)]
    return value if isinstance(value, list) else [value]


def complete_rows(dataset: Any, pipeline: Pipeline, completions: str) -> tuple[list[int], Counter[str]]:
    """Rows that have a prompt, a completion and all that rewards read; of the others, how many lack what first."""
    reads = {name for component in pipeline.components().values() for name in component.reads() if name != "*"}
    needed = ["prompt", *sorted(reads)]
    kept: list[int] = []
    lacking: Counter[str] = Counter()
    for index, row in enumerate(dataset):
        missing = [name for name in needed if lacks(row[name])]
        answers = row[completions] if completions else []
        if None in (answers if isinstance(answers, list) else [answers]):  # an empty answer is one, and a bad one
            missing.append(completions)
        if missing:
            lacking[missing[0]] += 1
        else:
            kept.append(index)
    return kept, lacking


def lacks(value: Any) -> bool:
    """Whether there is nothing: None, NaN, blank text, an empty list, or a list in which something is missing."""
    if isinstance(value, list):
        return not value or any(map(lacks, value))
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def recorded(dataset: Any, column: str, tokenizer: Any, source: str) -> list[list[Sampled]]:
    """The completions of a column, as if they had been sampled. RecipeError if rows have different numbers of them."""
    values = dataset[column]
    groups = [value if is_group(value) else [value] for value in values]
    sizes = {len(group) for group in groups}
    if len(sizes) > 1 or 0 in sizes:
        raise RecipeError(
            [f"--completions: every row of {column!r} must have as many; there are {sorted(sizes)}"], source
        )
    texts = [[completion_text(as_completion(value, "")) for value in group] for group in groups]
    ids = iter(token_ids(tokenizer, [text for group in texts for text in group]))
    return [[Sampled(text, next(ids, []), True) for text in group] for group in texts]


def score_columns(candidates: Sequence[Any], metrics: Sequence[str]) -> dict[str, float | None]:
    """`<metric>_score` of a row: means over its candidates, None without a score."""
    return {f"{name}_score": mean(each.scores.get(name, each.total) for each in candidates) for name in metrics}


def mean(values: Iterable[float]) -> float | None:
    """The mean of what is there; None where all is NaN."""
    there = [value for value in values if or_none(value) is not None]
    return statistics.fmean(there) if there else None


def spread(scores: Sequence[float]) -> str:
    """Range, quartiles and mean, in words."""
    if len(scores) < 2:
        return f"{scores[0]:.4g}" if scores else "no scores"
    low, middle, high = statistics.quantiles(scores, n=4, method="inclusive")
    return (
        f"{min(scores):.4g} to {max(scores):.4g}, quartiles {low:.4g}, {middle:.4g}, {high:.4g}, "
        f"mean {statistics.fmean(scores):.4g}"
    )


def thresholds(pool: Sequence[float], picked: Sequence[float]) -> list[float]:
    """Where the chosen scores end, if all scores between their lowest and highest are chosen; an end of the pool is no
    threshold."""
    if not picked:
        return []
    low, high = min(picked), max(picked)
    if sum(low < score < high for score in pool) > sum(low < score < high for score in picked):
        return []
    return [edge for edge, end in ((low, min(pool)), (high, max(pool))) if edge != end]


def distribution(pool: Sequence[float], picked: Sequence[float], metric: str, selector: str) -> bytes:
    """A histogram of all scores and of the chosen ones, with the thresholds, as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from trl_rewards.report.drawing import theme
    from trl_rewards.report.figures import COLOURS

    edges = [min(pool, default=0.0), max(pool, default=1.0)]
    width = (edges[1] - edges[0]) / 50 or 1.0
    bins = [edges[0] + width * place for place in range(51)]
    with rc_context(theme()):
        figure = Figure(figsize=(6.4, 3.1), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.hist(pool, color=COLOURS[0], alpha=0.35, bins=bins, label=f"all {len(pool)} rows")
        axes.hist(picked, color=COLOURS[1], alpha=0.8, bins=bins, label=f"{len(picked)} chosen: {selector}")
        for edge in thresholds(pool, picked):
            axes.axvline(edge, color=COLOURS[6], linestyle="--", linewidth=1.4, label=f"threshold {edge:.4g}")
        axes.set_xlabel(metric).set_parse_math(False)
        axes.set_ylabel("rows")
        for words in figure.legend(loc="outside upper right", ncols=4, fontsize=8).get_texts():
            words.set_parse_math(False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def dataset_card(
    out: Path, plot: Path, facts: Sequence[str], metrics: Sequence[str], made: str, signature: str
) -> str:
    """The README.md of the chosen rows: where they are from, and by what they were chosen."""
    said = "\n".join(f"- {fact}" for fact in facts)
    scores = "\n".join(
        f"| `{name}_score` | mean over the row's completions; null without a score |" for name in metrics
    )
    return f"""---
configs:
- config_name: default
  data_files: {out.name}
tags:
- trl-rewards
---

# {out.stem}

{said}

![distribution of scores]({plot.name})

{made}

    {signature}

| column | |
| --- | --- |
{scores}
| others | the dataset's own |
"""
