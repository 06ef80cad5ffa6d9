"""Writing files so that a kill in between loses nothing."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str, errors: str = "strict") -> None:
    """Write a text file whole or not at all: what was there stays until the new text is on the disk."""
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8", errors=errors)
    os.replace(unfinished, file)
