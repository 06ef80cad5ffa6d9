"""The command line. `plugins`, `list`, `show` and `new` answer without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trl_rewards.errors import PluginError, RecipeError, RewardError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reward sources, shaping, aggregation and advantages for TRL trainers, as plugins you compose in YAML.",
)
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
    from trl_rewards.train import quieten_libraries
    from trl_rewards.validate import validate as check

    quieten_libraries()
    print("\n".join(check(recipe, context.args)))


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
    kind: Annotated[str | None, typer.Argument(help="reward, combiner, shaper, advantage or tool")] = None,
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
    from trl_rewards.describe import describe

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
) -> None:
    """Score completions offline with a recipe's rewards: one JSON line per row, with every source and the total."""
    from trl_rewards.offline import score_file
    from trl_rewards.train import quieten_libraries

    quieten_libraries()
    print(score_file(config, context.args, data, out, split, completion, batch_size))


@app.command()
def new(name: str, folder: Annotated[Path | None, typer.Option(help="where to write it")] = None) -> None:
    """Write a third-party plugin: one module with a reward, pyproject, test, README. Its test passes as it is."""
    from trl_rewards.scaffold import write_plugin

    target = write_plugin(name, folder or Path(name))
    component = name.replace("-", "_")
    print(f"wrote {target}\n\n  cd {target}\n  pip install -e . && pytest\n  trl-rewards show {component}")


@app.command()
def report(run_dir: Path) -> None:
    """Write (again) the report of a run: report.html and its plots."""
    from trl_rewards.report import write_report

    try:
        print(write_report(run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, overflow="fold", no_wrap=index < len(header) - 1)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console().print(table)


if __name__ == "__main__":
    main()
