"""The command line of a claim's script: the parts that it has, each with a folder that it writes into."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def run(doc: str | None, parts: Mapping[Callable[..., None], Mapping[str, Any]]) -> None:
    """Call the part that the words after the script name, with its folder and what else it takes.

    `parts`: {function: {argument, or `--option`: its type, or the words it may be}}; all of them are required.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for part, taken in parts.items():
        command = commands.add_parser(part.__name__, help=part.__doc__)
        command.set_defaults(part=part)
        command.add_argument("out", type=Path)
        for name, kind in taken.items():
            required = {"required": True} if name.startswith("--") else {}
            limits = {"type": kind} if isinstance(kind, type) else {"choices": list(kind)}
            command.add_argument(name, **limits, **required)
    given = vars(parser.parse_args())
    part = given.pop("part")
    given["out"].mkdir(parents=True, exist_ok=True)
    part(**given)
