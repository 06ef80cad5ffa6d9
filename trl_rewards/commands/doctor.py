"""A recipe's rewards before a run: scored on real answers and on probes. What `trl-rewards doctor` runs."""

from __future__ import annotations

import gc
import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trl_rewards.commands.bon import complete
from trl_rewards.commands.diagnosis import SEVERITIES, TOTAL, Answers, Finding, agreement, beaten, figures, findings
from trl_rewards.commands.probes import COPY, answers_in, probes, right_answers
from trl_rewards.commands.score import policy_loading, policy_tokenizer, set_up, split_of, token_ids
from trl_rewards.commands.select import recorded
from trl_rewards.components import RewardBatch
from trl_rewards.data import load_recipe_data, load_splits, map_columns, model_path
from trl_rewards.errors import RecipeError, RewardError
from trl_rewards.loading import build
from trl_rewards.models.pretrained import default_device, free_memory
from trl_rewards.models.sampling import load_sampler, sample_candidates, template_columns
from trl_rewards.pairs import Sampling
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe, Spec
from trl_rewards.samples import Samples, as_completion, completion_text
from trl_rewards.scoring import World, failures, score_sources
from trl_rewards.terminal import output_console
from trl_rewards.trl_keys import parse_trl

SMALL = 200 * 2**20
"""Bytes of weights up to which the policy is asked without being told: a CPU samples from it in seconds."""
STAND_INS = 4
"""Answers per prompt that are made of the dataset's."""
PROBED = 8
"""Prompts that the probes are tried on."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What is looked at."""

    data: str = ""
    """Dataset; empty: the recipe's."""
    split: str = ""
    """Empty: the recipe's training split, or `train` of `data`."""
    limit: int = 16
    """Prompts."""
    n: int | None = None
    """Answers per prompt that the policy writes. None: as many as in training, at most 8."""
    completion: str = ""
    """Column with answers, one or a list of them, to take in place of the policy's."""
    sample: bool | None = None
    """Whether the policy is asked. None: if its weights are here and small."""
    seed: int = 0


class Diagnosis(NamedTuple):
    """What was found."""

    signature: str
    answers: str
    prompts: int
    rows: int
    figures: dict[str, dict[str, Any]]
    """Per source, and of the total."""
    agreement: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    findings: list[Finding]
    """The gravest first."""

    def as_json(self) -> dict[str, Any]:
        return self._asdict() | {"findings": [finding._asdict() for finding in self.findings]}


def examine(recipe: Recipe, examination: Examination) -> Diagnosis:
    """Score real answers and probes with a recipe's rewards, which learn nothing from it.

    RecipeError if the recipe cannot be run, such as for columns that are not there, all of them at once.
    """
    problems = [] if recipe.trains_policy else [f"trainer {recipe.trainer!r} has no rewards to look at"]
    problems += [
        f"--{option}: at least {least}, got {value}"
        for option, value, least in (("limit", examination.limit, 1), ("n", examination.n, 2))
        if value is not None and value < least
    ]
    if examination.sample and examination.completion:
        problems.append("--sample and --completion: give one of the two")
    if problems:
        raise RecipeError(problems, recipe.source)
    looked_at, said = _without_those_of_rollouts(recipe)
    dataset = _rows(recipe, examination)
    pipeline = Pipeline.from_recipe(looked_at)
    if problems := pipeline.missing_columns([name for name in dataset.column_names if name != examination.completion]):
        raise RecipeError(problems, recipe.source)
    rows = list(dataset)
    texts, ids, answers = _answers(recipe, examination, dataset, rows)
    completions = [
        [as_completion(text, row["prompt"]) for text in group] for row, group in zip(rows, texts, strict=True)
    ]
    size = len(texts[0])
    logged: dict[str, list[float]] = defaultdict(list)
    tokenizer = policy_tokenizer(looked_at)
    device = set_up(pipeline, looked_at, tokenizer, lambda name, value: logged[name].append(value))
    limits = [(source.max_failures, source.on_missing) for source in pipeline.sources]
    for source in pipeline.sources:  # what would stop a run is to be a finding
        source.max_failures = 1.0
        source.on_missing = "renormalize" if source.on_missing == "fail" else source.on_missing
    samples = _samples(rows, completions, ids or [token_ids(tokenizer, group) for group in completions])
    seen = Diagnosis(looked_at.signature, answers.says, len(rows), len(samples), {}, [], [], said)
    try:
        with pipeline.frozen():
            try:
                batch = pipeline.score(samples, size, device=device)
            except RewardError as error:
                return seen._replace(findings=said + _broken(pipeline, samples, size, device, error))
        reasons = pipeline.reasons
        found = figures(batch, pipeline.sources, pipeline.metrics)
        told = {name: sum(values) / len(values) for name, values in logged.items()}
        for name, each in reasons.items():
            costs = logged.get(f"{name}/cost")
            found[name]["first_reason"] = each[0] if each else None
            found[name]["cost_per_1000"] = 1000 * sum(costs) / len(samples) if costs else None
        with pipeline.frozen():
            probed, more = _probe(pipeline, rows[:PROBED], completions, batch, tokenizer, device)
    finally:
        pipeline.close()
    for source, (max_failures, on_missing) in zip(pipeline.sources, limits, strict=True):
        source.max_failures, source.on_missing = max_failures, on_missing
    agreed = agreement(batch)
    compares = pipeline.advantage is None or pipeline.advantage.compares_groups
    said += more + findings(found, pipeline.sources, batch, reasons, agreed, probed, answers, compares, told)
    said.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    return seen._replace(figures=found, agreement=agreed, probes=probed)


def _without_those_of_rollouts(recipe: Recipe) -> tuple[Recipe, list[Finding]]:
    """The recipe without the sources that ask the policy in training for log-probabilities, and a note on each.

    Without them there is no telling what the recipe makes of the rest, so that the total is their weighted sum.
    """
    asking = []
    for source in recipe.rewards:
        reward, _ = build("reward", source.use, source.options, recipe.base_dir)
        asking += [source.name] if reward.asks_logps() else []
    if not asking:
        return recipe, []
    kept = [source for source in recipe.rewards if source.name not in asking]
    says = "asks the policy in training for log-probabilities, and is not looked at"
    if not kept:
        raise RecipeError([f"{name} {says}" for name in asking], recipe.source)
    rest = replace(recipe, rewards=kept, combine=Spec("weighted_sum"), shape=[], advantage=None, filter=None)
    return rest, [Finding("note", name, "rollout", says) for name in asking]


def _rows(recipe: Recipe, examination: Examination) -> Any:
    """`limit` rows of the data, drawn by chance, with columns as the recipe maps them."""
    import datasets

    script, _, _, mixture = parse_trl(recipe)
    if examination.data:
        split = examination.split or "train"
        whole = split_of(load_splits(examination.data, option="--data"), split, examination.data, recipe.source)
        whole = map_columns(whole, recipe.dataset, recipe.source)
    else:
        name = examination.split or script.dataset_train_split
        whole = split_of(load_recipe_data(recipe, script, mixture), name, str(script.dataset_name), recipe.source)
    if isinstance(whole, datasets.IterableDataset):
        return datasets.Dataset.from_list(list(itertools.islice(whole, examination.limit)))
    size = min(examination.limit, len(whole))
    return whole.select(random.Random(examination.seed).sample(range(len(whole)), size))


def _answers(
    recipe: Recipe, examination: Examination, dataset: Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[list[Any]], list[list[list[int]]], Answers]:
    """As many answers to each row's prompt, their token ids where the policy wrote them, and where they are from."""
    path = recipe.trl.get("model_name_or_path") or ""
    here = model_path(path, recipe.base_dir) if path else ""
    if examination.completion:
        if examination.completion not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise RecipeError(
                [f"--completion: no column {examination.completion!r} (there is {there})"], recipe.source
            )
        groups = [
            [each.text for each in group] for group in recorded(dataset, examination.completion, None, recipe.source)
        ]
        return groups, [], Answers("column", f"those of column {examination.completion!r}", [])
    if examination.sample and not path:
        raise RecipeError(["--sample: the recipe names no policy (model_name_or_path)"], recipe.source)
    if examination.sample or (examination.sample is None and path and _weighs(here) <= SMALL):
        return _sampled(recipe, examination, dataset, path)
    return _stand_ins(recipe, rows)


def _weighs(folder: str) -> float:
    """Bytes of the weights in a folder; infinite without any."""
    files = [file for file in Path(folder).glob("*") if file.suffix in (".safetensors", ".bin")]
    return sum(file.stat().st_size for file in files) or float("inf")


def _sampled(
    recipe: Recipe, examination: Examination, dataset: Any, path: str
) -> tuple[list[list[Any]], list[list[list[int]]], Answers]:
    """Answers of the policy, drawn as in training. It is gone from memory before the rewards are loaded."""
    n, sampling = _as_in_training(recipe)
    n = examination.n or n
    loading = complete(policy_loading(recipe, default_device()), path, recipe.base_dir)
    drawn = sample_candidates(
        load_sampler(loading),
        list(dataset["prompt"]),
        n,
        sampling,
        seed=examination.seed,
        **template_columns(dataset),
        progress=True,
    )
    gc.collect()
    free_memory(default_device())
    texts = [[each.text for each in group] for group in drawn]
    ids = [[each.ids for each in group] for group in drawn]
    drawn_as = f"at most {sampling.max_new_tokens} tokens at temperature {sampling.temperature:g}"
    says = f"{n} of {path} to each prompt, {drawn_as}"
    return texts, ids, Answers("policy", says, [each.ended for group in drawn for each in group])


def _as_in_training(recipe: Recipe) -> tuple[int, Sampling]:
    """Answers per prompt, at most 8, and how they are drawn."""
    if recipe.pairs is not None:
        return min(recipe.pairs.candidates, 8), recipe.pairs
    arguments = parse_trl(recipe)[1]
    sampling = Sampling(
        max_new_tokens=arguments.max_completion_length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k or 0,
    )
    return min(max(arguments.num_generations, 2), 8), sampling


def _stand_ins(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[list[Any]], list[list[list[int]]], Answers]:
    """Answers of the dataset: each row's own as right ones, and those of other rows as wrong ones."""
    columns = {column: None for row in rows for column in right_answers(row, list(row))}
    if not columns:
        raise RecipeError(
            [
                "the dataset has no answers to stand in for the policy's: let it write some with --sample, or name a "
                "column that has answers with --completion"
            ],
            recipe.source,
        )
    # The column with the longest texts is nearest to what a policy writes.
    held = {column: [answers_in(row.get(column)) for row in rows] for column in columns}
    chosen = max(columns, key=lambda column: sum(len(text) for texts in held[column] for text in texts[:1]))
    texts = []
    for place, own in enumerate(held[chosen]):
        others = [held[chosen][(place + turn) % len(rows)] for turn in range(1, len(rows))]
        wrong = [each[0] for each in others if each and each[0] not in own]
        texts.append([*own[: STAND_INS // 2], *wrong][:STAND_INS])
    size = min(map(len, texts))
    if size < 2:
        raise RecipeError(
            [f"column {chosen!r} has too few different answers to stand in for the policy's; use --sample"],
            recipe.source,
        )
    says = (
        f"stand-ins: each prompt's own {chosen!r} and those of other prompts; --sample lets the policy answer, which "
        "shows more"
    )
    return [group[:size] for group in texts], [], Answers("stand-ins", says, [])


def _samples(
    rows: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[Any]], ids: Sequence[Sequence[list[int]]]
) -> Samples:
    """Groups as rows; those of one prompt follow each other."""
    repeated = [row for row, group in zip(rows, completions, strict=True) for _ in group]
    return Samples(
        prompts=[row["prompt"] for row in repeated],
        completions=[completion for group in completions for completion in group],
        completion_ids=[each for group in ids for each in group],
        columns={name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"},
    )


def _broken(pipeline: Pipeline, samples: Samples, group_size: int, device: Any, error: RewardError) -> list[Finding]:
    """Every source that breaks its contract, where scoring all of them stopped at the first with `error`."""
    found = []
    for source in pipeline.sources:
        try:
            score_sources([replace(source, only_if=None)], samples, group_size, World(), device, pipeline.seed)
        except RewardError as its_own:
            found.append(Finding("error", source.name, "broken", str(its_own)))
    return found or [Finding("error", TOTAL, "broken", str(error))]


def _probe(
    pipeline: Pipeline,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[Any]],
    batch: RewardBatch,
    tokenizer: Any,
    device: Any,
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """What the probes earn, each in a group with the real answers to its prompt; and what went wrong."""
    size = batch.scores.group_size
    totals = batch.rewards.view(-1, size).nan_to_num(nan=float("inf"))
    reads = {column for source in pipeline.sources for column in source.reward.reads()}
    names: list[str] = []
    members: list[Mapping[str, Any]] = []
    groups: list[list[Any]] = []
    for place, row in enumerate(rows):
        worst = completion_text(completions[place][int(totals[place].argmin())])
        right = right_answers(row, list(row) if "*" in reads else sorted(reads))
        for name, text in probes(row["prompt"], worst, right).items():
            names.append(name)
            members.append(row)
            groups.append([as_completion(text, row["prompt"]), *completions[place]])
    samples = _samples(members, groups, [token_ids(tokenizer, group) for group in groups])
    try:
        scored = pipeline.score(samples, size + 1, device=device)
    except RewardError as error:
        broken = _broken(pipeline, samples, size + 1, device, error)
        return [], [each._replace(says=f"on the probes: {each.says}") for each in broken]
    said = []
    for k, source in enumerate(pipeline.sources):
        if failures(batch.scores.status[:, k]).any():
            continue  # which is said already
        failing = failures(scored.scores.status[:, k])
        reasons = iter(pipeline.reasons[source.name])
        failed: dict[str, str] = {}
        for row in failing.nonzero().flatten().tolist():
            reason = next(reasons)
            if row % (size + 1) == 0:
                failed.setdefault(names[row // (size + 1)], reason)
        if failed:
            first = next(iter(failed))
            says = f"fails on {', '.join(f'`{name}`' for name in failed)}: {failed[first]}"
            said.append(Finding("warning", source.name, "holes", says))
    return beaten(scored, names), said


# --- in words --------------------------------------------------------------------------------------------------------


def show(diagnosis: Diagnosis) -> None:
    """Print it: tables where there are figures, and the findings."""
    from rich.text import Text

    console = output_console()
    console.print(Text(f"{diagnosis.rows} answers to {diagnosis.prompts} prompts: {diagnosis.answers}"))
    for table in _tables(diagnosis):
        console.print("")
        console.print(table)
    console.print("")
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for each in diagnosis.findings:
        says = Text(f"{each.severity:8} ", style=styles[each.severity])
        console.print(says.append(f"{each.source}: {each.says}", style="default"), soft_wrap=True)
    if not diagnosis.findings:
        console.print(Text("nothing to report", style="green"))
    console.print(Text(diagnosis.signature, style="dim"), soft_wrap=True)


def _tables(diagnosis: Diagnosis) -> list[Any]:
    tables = []
    if diagnosis.figures:
        heads = ("scores", "mean", "spread", "in groups", "lowest", "highest", "values", "groups tied", "with length")
        table = _table([*heads, "holes", "s per 1,000", "cost per 1,000"])
        for name, each in diagnosis.figures.items():
            holes = diagnosis.rows - each["scored"] - each.get("not_asked", 0)
            table.add_row(
                name,
                *(_number(each[key]) for key in ("mean", "std", "std_in_groups", "min", "max")),
                str(each["distinct"]),
                _share(each["tied_groups"]),
                f"{each['length_correlation']:+.2f}",
                str(holes),
                _number(each.get("seconds_per_1000")),
                _number(each.get("cost_per_1000")),
            )
        tables.append(table)
    if diagnosis.agreement:
        table = _table(["agreement", "Spearman, all answers", "Kendall, to a prompt"])
        for each in diagnosis.agreement:
            table.add_row(" and ".join(each["of"]), _number(each["spearman"]), _number(each["kendall"]))
        tables.append(table)
    if diagnosis.probes:
        names = [TOTAL, *(name for name in diagnosis.probes[0]["beats"] if name != TOTAL)]
        table = _table(["beats real answers by", *names])
        for each in sorted(diagnosis.probes, key=lambda probe: probe["probe"].startswith(COPY)):
            table.add_row(each["probe"], *(_share(each["beats"][name]) for name in names))
        tables.append(table)
    return tables


def _table(heads: Sequence[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if place else "left")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
