"""How wide a line is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 140
"""Characters of a line when stdout is no terminal and COLUMNS is not set."""
ROW_A_LINE = 1000
"""As many as no row of a table has: a row is a line then, as grep wants it."""


def output_console(width: int = PLAIN_WIDTH) -> Console:
    """A console for stdout, as wide as its terminal or as COLUMNS says; `width` characters where there is neither.

    FORCE_COLOR and TTY_COMPATIBLE, which CI services set, ask rich for colours; it would fold lines at 80 then.
    """
    from rich.console import Console

    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return Console(highlight=False)
    return Console(highlight=False, width=width, height=100)  # without a height rich takes 80 on a dumb terminal
