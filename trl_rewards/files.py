"""Writing files so that a kill in between loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_whole(file: Path, text: str, errors: str = "strict") -> None:
    """Write a text file whole or not at all: what was there stays until the new text is on the disk.

    A link's target is written. What is no file, such as a pipe, is written to as it is.
    """
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8", errors=errors)
        return
    file = file.resolve()
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8", errors=errors)
    os.replace(unfinished, file)


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file, whole or not at all, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(file, text, errors="surrogatepass")
