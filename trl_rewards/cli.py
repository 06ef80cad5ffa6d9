"""The command line. `plugins`, `list`, `show` and `new` answer without importing torch."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl_rewards.errors import PluginError, RecipeError, RewardError, did_you_mean
from trl_rewards.terminal import ROW_A_LINE, output_console

if TYPE_CHECKING:
    from trl_rewards.commands.reproduce import Told
    from trl_rewards.models.pretrained import Loading
    from trl_rewards.pairs import Sampling

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reward sources, shaping, aggregation and advantages for TRL trainers, as plugins you compose in YAML.",
)
_REWARD = "a reward's name, or {use: …, with: {…}} as in a recipe; may be repeated"
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Entry point: our errors are one message and status 1, not a traceback."""
    try:
        app()
    except (RecipeError, PluginError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


@app.command(context_settings=_OVERRIDES)
def train(context: typer.Context, recipe: str) -> None:
    """Train a recipe in this process: a path, or a bundled name such as `quickstart`. Overrides follow: --key value.

    Several processes: accelerate launch -m trl_rewards.train --config RECIPE
    """
    from trl_rewards.train import main as run

    raise typer.Exit(run(["--config", recipe, *context.args]))


@app.command(context_settings=_OVERRIDES)
def validate(context: typer.Context, recipe: str) -> None:
    """Check a recipe without loading a model: components, options, TRL's keys, and the columns of a local dataset."""
    from trl_rewards.commands.validate import validate as check
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    print("\n".join(check(recipe, context.args)))


@app.command(context_settings=_OVERRIDES)
def plan(
    context: typer.Context,
    recipe: str,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the longest prompt, which only the data know")] = 512,
    card: Annotated[float | None, typer.Option(help="GiB of a GPU: exit status 1 if the recipe does not fit")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, in bytes")] = False,
) -> None:
    """What a recipe needs of a GPU's memory, by arithmetic, without loading a model. Overrides follow: --key value."""
    import json

    from trl_rewards.commands.plan import PHASES
    from trl_rewards.commands.plan import plan as estimate
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    made = estimate(recipe, context.args, prompt_tokens)
    if as_json:
        print(json.dumps(made.as_json(), indent=2))
    else:
        _table(("GiB", *PHASES), made.rows(), folds=0)
        print("".join(f"\n{note}" for note in made.notes))
        if card is not None:
            print(f"{'fits' if made.fits(card) else 'does not fit'} a card of {card:g} GiB")
        print(f"fits a card of {made.card} GiB" if made.card else "fits no usual card")
    if card is not None and not made.fits(card):
        raise typer.Exit(1)


@app.command()
def plugins() -> None:
    """What is installed: plugin, version, which hooks; broken ones with the reason."""
    from trl_rewards.plugins import load_plugins, why_none

    registry = load_plugins()
    if not registry.plugins:
        print(f"no plugins found; {why_none()}")
        raise typer.Exit(1)
    rows = []
    for plugin in registry.plugins:
        counts = [entry.kind for entry in registry.entries if entry.owner == plugin.name]
        what = ", ".join(
            f"{counts.count(kind)} {kind}{'s' * (counts.count(kind) > 1)}" for kind in dict.fromkeys(counts)
        )
        hooks = ", ".join(plugin.hooks)
        says = f"broken: {plugin.broken}" if plugin.broken else f"{what or 'no components'} ({hooks})"
        rows.append((plugin.name, f"{plugin.distribution} {plugin.version}".strip(), says))
    _table(("plugin", "from", "what"), rows)
    if registry.broken:
        raise typer.Exit(1)


@app.command(name="list")
def list_components(
    kind: Annotated[
        str | None, typer.Argument(help="reward, combiner, shaper, advantage, objective, selector or tool")
    ] = None,
) -> None:
    """Every component: kind, name, plugin, and what it is in a sentence."""
    from trl_rewards.plugins import first_sentence, kinds, load_plugins

    registry = load_plugins()
    wanted = [each for each in kinds() if kind in (None, each, f"{each}s")]
    if not wanted:
        raise PluginError(f"unknown kind {kind!r}; it is one of {', '.join(kinds())}")
    rows = []
    for each in wanted:
        for entry in registry.of_kind(each):
            try:
                rows.append((each, entry.name, entry.owner, first_sentence(entry.load())))
            except PluginError as error:
                rows.append((each, entry.name, entry.owner, f"broken: {error}"))
    _table(("kind", "name", "plugin", "what"), rows)


@app.command()
def show(
    name: str,
    kind: Annotated[str | None, typer.Option(help="where two kinds share a name")] = None,
) -> None:
    """One component: what it does, its options with types and defaults, columns, paper, and example YAML."""
    from trl_rewards.commands.show import describe

    print(describe(name, kind))


@app.command(context_settings=_OVERRIDES)
def score(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="recipe whose rewards to use")],
    data: Annotated[str, typer.Option(help="file, folder, bundled: or Hub dataset with prompts and completions")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; what it holds already is not scored again")],
    split: str = "train",
    completion: Annotated[str, typer.Option(help="column that holds the completion")] = "completion",
    batch_size: int = 64,
    trace: Annotated[
        Path | None, typer.Option(help="JSONL file for texts and how their scores came about, such as tool calls")
    ] = None,
) -> None:
    """Score completions offline with a recipe's rewards: one JSON line per row, with every source and the total."""
    from trl_rewards.commands.score import score_file
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    print(score_file(config, _overrides(context), data, out, split, completion, batch_size, trace))


# What `bon`, `select` and `reference` say alike of the model that answers.
_TopK = Annotated[int, typer.Option(help="0: every token")]
_BatchTokens = Annotated[int, typer.Option(help="tokens of a batch, prompts and completions")]
_Adapter = Annotated[str | None, typer.Option(help="LoRA adapter on the model")]
_In4bit = Annotated[bool, typer.Option(help="bitsandbytes nf4")]
_Backend = Annotated[str, typer.Option(help="transformers or vllm")]


def _loading(
    model: str, adapter: str | None, revision: str | None, dtype: str, in_4bit: bool, trust_remote_code: bool
) -> Loading:
    """How that model is loaded. RecipeError for a dtype that there is not."""
    from trl_rewards.models.pretrained import Loading

    return Loading(
        path=model,
        adapter=adapter,
        revision=revision,
        dtype=_one_of("dtype", dtype),
        quantization="4bit" if in_4bit else None,
        trust_remote_code=trust_remote_code,
    )


def _sampling(
    command: str, max_new_tokens: int, temperature: float, top_p: float, top_k: int, batch_tokens: int
) -> Sampling:
    """How it answers. RecipeError, of the command, for what cannot be."""
    from trl_rewards.pairs import Sampling

    try:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            batch_tokens=batch_tokens,
        )
    except ValueError as error:
        raise RecipeError([str(error)], f"trl-rewards {command}") from error


@app.command(context_settings=_OVERRIDES)
def bon(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="recipe whose rewards, and `dataset:`, to use")],
    prompts: Annotated[str, typer.Option(help="file, folder, bundled: or Hub dataset with prompts")],
    out: Annotated[Path, typer.Option(help=".jsonl or .parquet file to write")],
    model: Annotated[str, typer.Option(help="policy: folder, bundled: or Hub name; default: the recipe's")] = "",
    n: Annotated[int, typer.Option(help="candidates per prompt")] = 8,
    format: Annotated[str, typer.Option(help="bon, pairs, sft or kto")] = "bon",
    split: str = "train",
    limit: Annotated[int | None, typer.Option(help="prompts at most")] = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: _TopK = 0,
    max_new_tokens: int = 512,
    batch_tokens: _BatchTokens = 32768,
    seed: int = 0,
    select: Annotated[str, typer.Option(help="pairs: best_worst, best_random or all")] = "best_worst",
    min_margin: Annotated[float, typer.Option(help="pairs: the smallest difference of totals")] = 0.0,
    max_pairs: Annotated[int | None, typer.Option(help="pairs: per prompt, with --select all")] = None,
    length_ratio: Annotated[float | None, typer.Option(help="pairs: longer over shorter, at most")] = None,
    choose_truncated: Annotated[bool, typer.Option(help="pairs: cut completions may be chosen")] = False,
    minimum: Annotated[float | None, typer.Option(help="sft: the lowest total that is kept")] = None,
    threshold: Annotated[float | None, typer.Option(help="kto: the lowest total with label true")] = None,
    adapter: _Adapter = None,
    revision: str | None = None,
    dtype: str = "bfloat16",
    load_in_4bit: _In4bit = False,
    trust_remote_code: bool = False,
    backend: _Backend = "transformers",
) -> None:
    """Sample n answers per prompt and score them with a recipe's rewards: best of n, pairs, SFT or KTO data.

    Goes on where it stopped when the same command is given again.
    """
    from trl_rewards.commands.bon import BestOf, best_of_n
    from trl_rewards.pairs import Selection
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    words = {"format": format, "select": select, "backend": backend}
    found: Any = {name: _one_of(name, word) for name, word in words.items()}
    sampling = _sampling("bon", max_new_tokens, temperature, top_p, top_k, batch_tokens)
    try:
        options = BestOf(
            prompts=prompts,
            split=split,
            limit=limit,
            n=n,
            sampling=sampling,
            seed=seed,
            format=found["format"],
            selection=Selection(
                select=found["select"],
                min_margin=min_margin,
                max_pairs=max_pairs,
                length_ratio=length_ratio,
                choose_truncated=choose_truncated,
            ),
            minimum=minimum,
            threshold=threshold,
            backend=found["backend"],
        )
    except ValueError as error:
        raise RecipeError([str(error)], "trl-rewards bon") from error
    loading = _loading(model, adapter, revision, dtype, load_in_4bit, trust_remote_code)
    print(best_of_n(config, _overrides(context), options, loading, out))


@app.command(context_settings=_OVERRIDES)
def select(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="file, folder, bundled: or Hub dataset with prompts")],
    count: Annotated[int, typer.Option(help="rows to choose")],
    out: Annotated[Path, typer.Option(help=".jsonl or .parquet file to write; a card and a plot go beside it")],
    reward: Annotated[list[str] | None, typer.Option(help=_REWARD)] = None,
    config: Annotated[str, typer.Option(help="recipe whose rewards, and `dataset:`, to use instead")] = "",
    selector: Annotated[str, typer.Option(help="hard, easy, medium, random, or {use: …, with: {…}}")] = "hard",
    model: Annotated[str, typer.Option(help="who answers: folder, bundled: or Hub name; default: the recipe's")] = "",
    completions: Annotated[str, typer.Option(help="column with answers, instead of a model")] = "",
    references: Annotated[
        list[str] | None, typer.Option(help="column that goes into `references`, may be repeated; messages: the reply")
    ] = None,
    split: str = "train",
    copy: Annotated[list[str] | None, typer.Option(help="another split to write beside, whole")] = None,
    limit: Annotated[int | None, typer.Option(help="rows to score at most")] = None,
    n: Annotated[int, typer.Option(help="answers per prompt; a row's score is their mean")] = 1,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: _TopK = 0,
    max_new_tokens: int = 512,
    batch_tokens: _BatchTokens = 32768,
    seed: int = 42,
    adapter: _Adapter = None,
    revision: str | None = None,
    dtype: str = "bfloat16",
    load_in_4bit: _In4bit = False,
    trust_remote_code: bool = False,
    backend: _Backend = "transformers",
) -> None:
    """Choose training rows by a model's score on them, such as the hardest half.

    Goes on where it stopped when the same command is given again. What it writes is a recipe's dataset_name.
    """
    from trl_rewards.commands.score import scoring_recipe
    from trl_rewards.commands.select import Selecting, select_rows
    from trl_rewards.recipe import spec_of_word
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    found: Any = _one_of("backend", backend)
    options = Selecting(
        prompts=data,
        split=split,
        limit=limit,
        n=n,
        sampling=_sampling("select", max_new_tokens, temperature, top_p, top_k, batch_tokens),
        seed=seed,
        backend=found,
        selector=spec_of_word(selector, "--selector"),
        count=count,
        references=tuple(references or ()),
        completions=completions,
        copy=tuple(copy or ()),
    )
    loading = _loading(model, adapter, revision, dtype, load_in_4bit, trust_remote_code)
    print(select_rows(scoring_recipe(config, reward or (), _overrides(context)), options, loading, out))


@app.command(context_settings=_OVERRIDES)
def reference(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="recipe whose sources, and `dataset:`, to use")],
    out: Annotated[Path, typer.Option(help=".jsonl or .parquet file to write")],
    data: Annotated[str, typer.Option(help="file, folder, bundled: or Hub dataset; default: the recipe's")] = "",
    model: Annotated[str, typer.Option(help="SFT policy: folder, bundled: or Hub name; default: the recipe's")] = "",
    n: Annotated[int, typer.Option(help="answers per prompt; PAR finds one to be enough")] = 10,
    split: str = "train",
    limit: Annotated[int | None, typer.Option(help="prompts at most")] = None,
    temperature: float = 0.9,
    top_p: float = 0.9,
    top_k: _TopK = 50,
    max_new_tokens: int = 512,
    batch_tokens: _BatchTokens = 32768,
    seed: int = 0,
    adapter: _Adapter = None,
    revision: str | None = None,
    dtype: str = "bfloat16",
    load_in_4bit: _In4bit = False,
    trust_remote_code: bool = False,
    backend: _Backend = "transformers",
) -> None:
    """Score answers of the policy before training, and write the dataset with these reference rewards as a column.

    That is what `par` and other shapers hold rewards against. Goes on where it stopped when the same command is given
    again. What it writes is a recipe's dataset_name.
    """
    from trl_rewards.commands.reference import Referencing, reference_rewards
    from trl_rewards.commands.score import scoring_recipe
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    found: Any = _one_of("backend", backend)
    options = Referencing(
        prompts=data,
        split=split,
        limit=limit,
        n=n,
        sampling=_sampling("reference", max_new_tokens, temperature, top_p, top_k, batch_tokens),
        seed=seed,
        backend=found,
    )
    loading = _loading(model, adapter, revision, dtype, load_in_4bit, trust_remote_code)
    print(reference_rewards(scoring_recipe(config, (), _overrides(context)), options, loading, out))


@app.command(context_settings=_OVERRIDES)
def agree(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="file, folder, bundled: or Hub dataset with preference pairs")],
    reward: Annotated[list[str] | None, typer.Option(help=_REWARD)] = None,
    config: Annotated[str, typer.Option(help="recipe whose whole pipeline to use instead")] = "",
    split: str = "train",
    answers: Annotated[tuple[str, str], typer.Option(help="columns of the two answers")] = ("chosen", "rejected"),
    label: Annotated[str, typer.Option(help="column that says which is preferred; none: always the first")] = "",
    label_values: Annotated[
        tuple[str, str, str], typer.Option(help="what the label says for the first answer, the second, a tie")
    ] = ("model_a", "model_b", "tie"),
    ties: Annotated[
        str, typer.Option(help="half: recorded ties are left out, the reward's count half; strict")
    ] = "half",
    by: Annotated[str, typer.Option(help="column of categories, for a row each")] = "",
    out: Annotated[Path | None, typer.Option(help="JSONL file that keeps the scores, to go on from")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    batch_size: Annotated[int, typer.Option(help="pairs that the rewards are given at a time")] = 64,
    seed: Annotated[int, typer.Option(help="of the order of the two answers, and of the bootstrap")] = 0,
) -> None:
    """How often a reward, or a recipe's pipeline, agrees with recorded preferences between two answers.

    Columns that rewards read are mapped by --dataset.columns.references NAME. Missing scores are counted apart.
    """
    import json

    from trl_rewards.commands.agree import Recorded, report
    from trl_rewards.commands.agree import agree as compare
    from trl_rewards.commands.score import scoring_recipe
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    found: Any = _one_of("ties", ties)
    recorded = Recorded(
        data=data,
        split=split,
        answers=answers,
        label=label,
        values=label_values,
        ties=found,
        by=by,
        seed=seed,
    )
    result = compare(scoring_recipe(config, reward or (), _overrides(context)), recorded, out, batch_size)
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else report(result))


@app.command(context_settings=_OVERRIDES)
def doctor(
    context: typer.Context,
    recipe: str,
    sample: Annotated[
        bool | None,
        typer.Option("--sample/--no-sample", help="let the policy answer; default: if here and small"),
    ] = None,
    completion: Annotated[str, typer.Option(help="column of the data with answers, one or a list, to take")] = "",
    data: Annotated[str, typer.Option(help="file, folder, bundled: or Hub dataset; default: the recipe's")] = "",
    split: Annotated[str, typer.Option(help="default: the one that is trained on")] = "",
    limit: Annotated[int, typer.Option(help="prompts")] = 16,
    n: Annotated[int | None, typer.Option(help="answers per prompt; default: as in training, at most 8")] = None,
    seed: int = 0,
    fail_on: Annotated[str, typer.Option(help="status 1 from which findings on: warning or error")] = "error",
    as_json: Annotated[Path | None, typer.Option("--json", help="file to write all of it to")] = None,
) -> None:
    """Look at a recipe's rewards before training: scores real answers, and some that no reward should like.

    Status 0: nothing grave; 1: findings; 2: the recipe cannot be run.
    """
    import json

    from trl_rewards.commands.diagnosis import SEVERITIES
    from trl_rewards.commands.doctor import Examination, examine, show
    from trl_rewards.recipe import Recipe
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    try:
        least = SEVERITIES.index(_one_of("fail-on", fail_on))
        examination = Examination(
            data=data, split=split, limit=limit, n=n, completion=completion, sample=sample, seed=seed
        )
        found = examine(Recipe.load(recipe, _overrides(context)), examination)
    except (RecipeError, PluginError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    show(found)
    if as_json:
        as_json.write_text(json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    raise typer.Exit(any(SEVERITIES.index(finding.severity) >= least for finding in found.findings))


@app.command(context_settings=_OVERRIDES)
def calibrate(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="whose sources to calibrate")],
    labelled: Annotated[str, typer.Argument(help="file, folder or Hub dataset: prompt, completion, label in [0, 1]")],
    method: Annotated[str, typer.Option(help="platt, isotonic or temperature")] = "platt",
    source: Annotated[list[str] | None, typer.Option(help="a source to calibrate, may be repeated; none: all")] = None,
    out: Annotated[
        Path | None, typer.Option(help=".json file to write; default: RECIPE.calibration.json beside the recipe")
    ] = None,
    split: str = "train",
    completion: Annotated[str, typer.Option(help="column of the answer, or of a list of answers")] = "completion",
    label: Annotated[str, typer.Option(help="column of the label, or of a list of labels")] = "label",
    batch_size: int = 64,
) -> None:
    """Fit each source's scores to labelled answers, so that they are probabilities and weights mean the same.

    Writes the curves as JSON and a diagram beside it; `shape: [{use: calibrated, with: {path: …}}]` uses them.
    """
    from trl_rewards.commands.calibrate import Labelled, default_file, describe
    from trl_rewards.commands.calibrate import calibrate as fit
    from trl_rewards.commands.score import scoring_recipe
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    found: Any = _one_of("method", method)
    file = out or default_file(recipe)
    if file.suffix != ".json":
        raise RecipeError([f"--out: must end in .json, got {file.name!r}"], recipe)
    checked = scoring_recipe(recipe, (), _overrides(context))
    options = Labelled(
        data=labelled, split=split, completion=completion, label=label, method=found, sources=tuple(source or ())
    )
    print(describe(fit(checked, options, file, batch_size), file, checked.base_dir))


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    members: Annotated[list[str], typer.Argument(help="reward models or LoRA adapters: folders or Hub names")],
    weight: Annotated[
        list[float] | None, typer.Option(help="a member's, in their order; divided by their sum. Default: all alike")
    ] = None,
    pairs: Annotated[str, typer.Option(help="preference pairs, to tell whether the average is as good as they")] = "",
    split: str = "train",
    answers: Annotated[tuple[str, str], typer.Option(help="columns of the two answers")] = ("chosen", "rejected"),
    points: Annotated[int, typer.Option(help="averages between the first member and each other one")] = 3,
    model: Annotated[str, typer.Option(help="options of `model` that score the pairs: {dtype: float32, …}")] = "{}",
    batch_size: Annotated[int, typer.Option(help="pairs that are scored at a time")] = 64,
) -> None:
    """Write the average of reward models' weights (WARM), LoRA merged first, as safetensors.

    With --pairs: how accurate the members, their average, and averages of two of them are.
    """
    from trl_rewards.commands.agree import Recorded
    from trl_rewards.commands.merge import Check, report
    from trl_rewards.commands.merge import merge as average
    from trl_rewards.recipe_files import word_value
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    options = word_value(model)
    if not isinstance(options, dict) or points < 0:
        raise RecipeError(
            [f"--model: must be a mapping, got {model!r}, and --points at least 0, got {points}"], "trl-rewards merge"
        )
    recorded = Recorded(data=pairs, split=split, answers=answers)
    check = Check(recorded=recorded, options=options, points=points, batch_size=batch_size) if pairs else None
    found = average(out, members, weight, check)
    print(f"average of {len(members)} -> {out}")
    if found:
        print(report(found))


def _overrides(context: typer.Context) -> list[str]:
    """The words that are not options of the command: overrides of the recipe. RecipeError on any that are neither."""
    from trl_rewards.recipe import SOURCE_KEYS_OF_TRL
    from trl_rewards.recipe_files import OWN_KEYS
    from trl_rewards.trl_keys import trl_fields

    names = [word[2:].partition("=")[0] for word in context.args if word.startswith("--")]
    if plain := [name for name in names if "." not in name and name not in (*OWN_KEYS, *SOURCE_KEYS_OF_TRL)]:
        keys = trl_fields("grpo")  # what scoring reads of TRL's keys is in every trainer's arguments
        options = [option.lstrip("-") for each in context.command.params for option in each.opts]
        problems = [
            f"--{name}: no option of this command and no key of a recipe{did_you_mean(name, options)}"
            for name in plain
            if name not in keys
        ]
        if problems:
            raise RecipeError(problems, f"trl-rewards {context.info_name}")
    return context.args


_WORDS = {
    "format": ("bon", "pairs", "sft", "kto"),
    "select": ("best_worst", "best_random", "all"),
    "backend": ("transformers", "vllm"),
    "ties": ("half", "strict"),
    "method": ("platt", "isotonic", "temperature"),
    "fail-on": ("warning", "error"),
    "dtype": ("float32", "bfloat16", "float16"),
}


def _one_of(option: str, word: str) -> str:
    if word not in _WORDS[option]:
        hint = did_you_mean(word, _WORDS[option])
        raise RecipeError([f"--{option}: must be one of {', '.join(_WORDS[option])}, got {word!r}{hint}"])
    return word


@app.command()
def index(
    corpora: Annotated[list[str], typer.Argument(help="JSONL files, also .gz: title and text per line")],
    out: Annotated[str, typer.Option(help="SQLite file to write")],
    title: Annotated[str, typer.Option(help="key of the title; lines may lack it")] = "title",
    text: Annotated[str, typer.Option(help="key of the text")] = "text",
    words: Annotated[int, typer.Option(help="cut texts into passages of so many words; 0: leave them whole")] = 0,
) -> None:
    """Make passages of text searchable, for tools such as `wiki_search`: full text, ranked by BM25."""
    from trl_rewards.passages import build_index

    print(f"{out}: {build_index(corpora, out, title, text, words)} passages")


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="claims, by bundled name or path")] = None,
    every: Annotated[bool, typer.Option("--all", help="all bundled claims")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each arm")] = 5,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time; as many as there are cores")] = None,
    out: Annotated[Path, typer.Option(help="folder of the runs; what is there is not run again")] = Path(
        "runs/claims"
    ),
    save: Annotated[bool, typer.Option(help="keep the result beside the claim, for the table of claims")] = False,
) -> None:
    """Run a paper's claim in miniature: arms over seeds, a table, a verdict and a plot. Without a name: list them."""
    from trl_rewards.commands.claims import claims, load_claim
    from trl_rewards.commands.outcome import effects, keep, kept, parts_reproduced, place_of, table

    loaded = [load_claim(name) for name in (claims() if every or not names else names)]
    if not names and not every:
        rows = []
        for claim in loaded:
            result = kept(claim.name)
            verdict = result["verdict"] if result else "not run yet"
            minutes = f"{result['cpu_minutes']:.0f}" if result else ""
            what = re.sub(r"\[(\w+)\]\([^)]*\)", r"\1", claim.claim)  # without the addresses of links
            rows.append((claim.name, claim.paper.rpartition("/")[2], verdict, minutes, what))
        _table(("claim", "of", "verdict", "CPU minutes", "what"), rows)
        return
    from trl_rewards.commands.claim_page import PAGE, PLOT
    from trl_rewards.commands.reproduce import reproduce as run
    from trl_rewards.train import quieten_libraries

    quieten_libraries()

    for claim in loaded if save else ():
        place_of(claim)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its runs end with it, as with Ctrl-C
    failed = []
    for claim in loaded:
        folder = out / claim.name
        print(f"{claim.name}: {claim.claim}\n{claim.paper}\n{claim.miniature}\n")
        try:
            with _progress() as tell:
                result = run(claim, folder, seeds, jobs, tell)
            if save:
                keep(claim, result)
        except RewardError as error:  # the other claims' runs are not lost to it
            failed.append(f"{claim.name}: {error}")
            continue
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with the runs that are not done", file=sys.stderr)
            raise typer.Exit(130) from None
        print()
        _table(*table(claim, result), folds=0)
        verdict = f"{result['verdict']}{parts_reproduced(result)}, {result['cpu_minutes']:.0f} CPU minutes"
        print("", *effects(result), verdict, sep="\n")
        print(f"plot   {folder / PLOT}\nreport {folder / PAGE}\n")
    if failed:
        raise RewardError("; ".join(failed))


@contextmanager
def _progress() -> Generator[Callable[[Told], None]]:
    """A bar under the lines of runs that ended; without a terminal, lines of those that begin too."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}")) as progress:
        bar = progress.add_task("", total=None)

        def tell(told: Told) -> None:
            progress.update(bar, completed=told.done, total=told.total, description="; ".join(told.running))
            if told.ended:
                progress.console.print(f"{told.done}/{told.total} {told.ended}", highlight=False)
            elif not progress.console.is_terminal:
                progress.console.print(f"{told.done}/{told.total} {told.running[-1]} begins", highlight=False)

        yield tell


@app.command()
def new(
    name: str,
    folder: Annotated[Path | None, typer.Option(help="where to write it")] = None,
    kind: Annotated[str, typer.Option(help="reward, selector or tool")] = "reward",
) -> None:
    """Write a third-party plugin: one module with a component, pyproject, test, README. Its test passes."""
    from trl_rewards.commands.new import write_plugin

    target = write_plugin(name, folder or Path(name), kind)
    component = name.replace("-", "_")
    print(f"wrote {target}\n\n  cd {target}\n  pip install -e . pytest && python -m pytest")
    print(f"  trl-rewards show {component}")


@app.command()
def report(run_dir: Path) -> None:
    """Write (again) the report of a run: report.html and its plots."""
    from trl_rewards.report import write_report

    try:
        print(write_report(run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], folds: int | None = None) -> None:
    """`folds`: the column that gives way where the terminal is narrow; the last one, if nobody says."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, overflow="fold", no_wrap=index != (len(header) - 1 if folds is None else folds))
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    output_console(ROW_A_LINE).print(table)


if __name__ == "__main__":
    main()
