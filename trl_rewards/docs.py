"""The generated pages: `python -m trl_rewards.docs` writes plugins/README.md and recipes/README.md of a checkout.

Their words come from docstrings and recipe headers, their figures from `recipes/results.json` and from the results
beside the claims, which `trl-rewards reproduce --save` writes. A test keeps files and registry together. Components'
own pages are made when the site is built.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from trl_rewards.commands.claims import claims, load_claim
from trl_rewards.commands.outcome import effects, kept, parts_reproduced, seeds_of
from trl_rewards.commands.show import description, paper_of, place, recipes_of
from trl_rewards.plugins import first_sentence, kinds, load_plugins
from trl_rewards.recipe_files import bundled_recipes, recipe_folders

if TYPE_CHECKING:
    from trl_rewards.commands.plan import Plan

SHOWN = 4
"""Recipes in a component's row; its own page has them all."""
_PLUGINS_HEAD = """# Components

Every component that comes with the project, by kind. `trl-rewards show NAME` prints its options and an example.
Written by `python -m trl_rewards.docs`; the words are the docstrings'.
"""
_RECIPES_HEAD = """# Recipes

    accelerate launch recipes/train.py --config recipes/NAME.yaml [--any_trl_flag value] [--rewards.0.weight 0.3]

From an installed wheel, bundled recipes go by name: `accelerate launch -m trl_rewards.train --config NAME`.
Written by `python -m trl_rewards.docs`, from the recipes' headers, the figures in `results.json` and the claims'
results.

"""
_CLAIMS_HEAD = """## Claims

What the papers say, in miniature ([how](../docs/claims.md)). A difference is that of two arms, seed by seed, with
its 95 % interval (Student's t). *Reproduced*: the whole interval is where the claim puts it; *direction only*: its
mean is; *not reproduced*: neither. A claim with several parts is as good as the worst of them. With two runs at a time
on two cores a claim took 0.57 to 0.71 of its CPU minutes here.

"""
_KNOWN_HEAD = """
What a reader must know of each:

"""
_CPU_HEAD = """
## On two CPU cores

Without a download, on the bundled policy.

"""
_GPU_HEAD = """
## At full size

Memory is that of one GPU by arithmetic, as `trl-rewards plan NAME` says it part by part ([how](../docs/memory.md)): at
the height of the phase in brackets, and the smallest usual card that it fits.

"""


def components_page() -> str:
    """plugins/README.md"""
    registry, results = load_plugins(), read_results()
    parts = [_PLUGINS_HEAD]
    for kind in kinds():
        rows = []
        for entry in registry.of_kind(kind):
            cls = entry.load()
            paper = paper_of(cls)
            recipes = of_the_paper(paper, recipes_of(entry.name, kind))
            names, measured = ", ".join(recipes), "; ".join(results[name] for name in recipes if name in results)
            if len(recipes) > SHOWN:  # in so many that none says much of it
                names, measured = f"{', '.join(recipes[:SHOWN])} and {len(recipes) - SHOWN} more", ""
            link = f"[{paper.rpartition('/')[2]}]({paper})" if paper else ""
            rows.append([f"`{entry.name}`", first_sentence(cls), link, entry.owner, names, measured])
        if rows:
            parts.append(f"## {kind.capitalize()}s\n")
            parts.append(_markdown(["`use:`", "what", "paper", "plugin", "recipe", "measured"], rows))
    return "\n".join(parts)


def of_the_paper(paper: str, recipes: list[str]) -> list[str]:
    """The recipes that reproduce a component's paper, or all that use it where none does."""
    files = bundled_recipes()
    return [name for name in recipes if paper and paper in files[name].read_text(encoding="utf-8")] or recipes


def component_page(name: str, kind: str) -> str:
    """One component's page of the site; its links start from docs/components/KIND/."""
    said = description(name, kind)
    owner = load_plugins().find(kind, name).owner
    parts = [f"# {name}\n", f"*{', '.join([kind, *said.traits])}; plugin {owner}*\n", _plain(said.doc) + "\n"]
    if said.told:
        parts.append(f"A model is told: {_plain(said.told)}\n")
    parts.append(f"{place(kind)}:\n\n```{'text' if kind == 'selector' else 'yaml'}\n{dedent(said.example)}\n```\n")
    if said.options:
        rows = [
            [f"`{o.name}`", f"`{o.type}`", "required" if o.default is None else f"`{o.default}`", _plain(o.doc)]
            for o in said.options
        ]
        parts += ["## Options\n", _markdown(["option", "type", "default", "what"], rows)]
    if said.columns:
        parts.append(f"Reads dataset columns: {said.columns}\n")
    if said.paper:
        parts.append(f"Paper: <{said.paper}>\n")
    if said.recipes:
        links = [f"[{recipe}](../../../recipes/{recipe}.yaml)" for recipe in said.recipes]
        parts.append(f"Recipes: {', '.join(links)}\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Words of a docstring as Markdown that shows them as they are: only code and addresses mean something."""

    def say(found: re.Match[str]) -> str:
        word = found.group()
        if word.startswith("`"):
            return word
        return f"<{word}>" if word.startswith("http") else f"\\{word}"

    return re.sub(r"`[^`]*`|https?://[^\s)]*[^\s).,;:]|[*_<\[]", say, text)


def recipes_page() -> str:
    """recipes/README.md"""
    results, plans = read_results(), gpu_plans()
    cpu, gpu = [], []
    for name, file in bundled_recipes().items():
        about = [f"`{name}`", header(file)]
        if name in plans:
            gpu.append([*about, plans[name].brief, results.get(name, "not run yet")])
        else:
            cpu.append([*about, results.get(name, "")])
    return "".join(
        [
            _RECIPES_HEAD,
            claims_table(),
            _CPU_HEAD,
            _markdown(["recipe", "what", "measured"], cpu),
            _GPU_HEAD,
            _markdown(["recipe", "what", "memory", "measured"], gpu),
        ]
    )


@functools.cache
def gpu_plans() -> dict[str, Plan]:
    """{recipe: what it needs of a GPU} of those that are for one, whose files are called gpu…."""
    from trl_rewards.commands.plan import plan  # it takes torch, which no other page needs

    return {name: plan(name) for name, file in bundled_recipes().items() if file.name.startswith("gpu")}


def claims_table() -> str:
    """What papers say, what came out here, and whether that agrees: from the claims and the results beside them."""
    rows, known = [], []
    for name in claims():
        claim, result = load_claim(name), kept(name)
        paper = f"{name} [{claim.paper.rpartition('/')[2]}]({claim.paper})"
        verdict, measured, minutes = "**not run yet**", "", ""
        if result is not None:
            verdict, minutes = f"**{result['verdict']}**{parts_reproduced(result)}", f"{result['cpu_minutes']:.0f}"
            measured = f"{'; '.join(effects(result))}; {seeds_of(result)}"
        command, full = f"`trl-rewards reproduce {name}`", f"`{claim.full}`" if claim.full else ""
        rows.append([paper, claim.claim, verdict, measured, claim.miniature, minutes, command, full])
        known += [f"- `{name}`: {claim.caveat}\n"] if claim.caveat else []
    titles = ["paper", "claim", "verdict", "measured", "miniature", "CPU minutes", "command", "full size"]
    return _CLAIMS_HEAD + _markdown(titles, rows) + _KNOWN_HEAD + "".join(known)


def header(file: Path) -> str:
    """The comment block at the top of a recipe up to its first empty comment line, as one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        lines.append(text)
    return " ".join(lines)


def read_results() -> dict[str, Any]:
    """{recipe: what was measured, in a line}"""
    for folder in recipe_folders():
        if (folder / "results.json").is_file():
            return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {}


def _markdown(titles: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def main() -> None:
    """Write both pages into the checkout this package runs from."""
    root = Path(__file__).parent.parent
    for file, text in {
        root / "plugins/README.md": components_page(),
        root / "recipes/README.md": recipes_page(),
    }.items():
        file.write_text(text, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
