"""A program's private folder: what it holds at most, and how it is removed, whatever a program made of it."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path

MOST_ENTRIES = 2000
"""Files and folders that a program may keep."""


def write_files(folder: str, files: Mapping[str, str]) -> None:
    """Put files into a folder. ValueError for a name that leads out of it."""
    for name, text in files.items():
        path = Path(folder, name)
        if not name or (path.is_absolute() and not path.is_relative_to(folder)) or ".." in Path(name).parts:
            raise ValueError(f"a program's file must lie in its folder, got {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def is_over(folder: str, most_bytes: int) -> bool:
    """Whether a folder holds more than so many bytes or MOST_ENTRIES, or hides what it holds. Follows no links."""
    used, entries, waiting = 0, 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as listing:
                for entry in listing:
                    entries += 1
                    try:
                        about = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    used += about.st_blocks * 512
                    if stat.S_ISDIR(about.st_mode) and about.st_mode & 0o300 == 0o300:  # others stay empty
                        waiting.append(entry.path)
                    if used > most_bytes or entries > MOST_ENTRIES:
                        return True
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone meanwhile
        except OSError:
            return True  # no permission to look, or deeper than a path may be long: what is in there has no end
    return False


def remove(folder: str) -> None:
    """Remove a folder and all in it, also while what was killed in it is still coming to its end."""
    for _ in range(100):
        try:
            return _lift_and_remove(folder)
        except OSError:
            time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _lift_and_remove(folder: str) -> None:
    """Deep trees are lifted level by level, since paths and recursion have an end."""
    names = (f".{time.monotonic_ns()}.{number}" for number in itertools.count())
    os.chmod(folder, 0o700)
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in os.scandir(entry.path):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # a folder without permissions cannot be moved
                    os.rename(inner.path, os.path.join(folder, next(names)))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
    os.rmdir(folder)
