"""Answers that were paid for, kept on disk."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)


def open_shared(path: str, table: str) -> sqlite3.Connection:
    """An sqlite file that processes share, made with its folder and `table` where they are not there."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    connection = sqlite3.connect(path, timeout=60)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    return connection


class SharedFile:
    """A table in an sqlite file that processes share (not on a network file system).

    A file that is full, locked or broken costs its savings, not what they would have saved: a warning says so, once.
    """

    def __init__(self, path: str, table: str, option: str):
        """`option` is what the file's owner calls it, for the warning."""
        self._path = os.path.expanduser(path)
        self._table = table
        self._option = option
        self._warned = False

    def use(self, what: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What is done with the table, in one transaction, or what is had if that fails."""
        try:
            with closing(open_shared(self._path, self._table)) as connection, connection:
                return what(connection)
        except (sqlite3.Error, OSError) as error:
            self.warn(error)
            return otherwise

    def warn(self, error: Exception) -> None:
        """Say, the first time, that something is wrong with the file."""
        if not self._warned:
            self._warned = True
            logger.warning("%s %s cannot be used: %r", self._option, self._path, error)


class KeptAnswers(SharedFile):
    """Texts by key."""

    def __init__(self, path: str, option: str):
        super().__init__(path, "kept (key TEXT PRIMARY KEY, answer TEXT)", option)

    def find(self, key: str) -> str | None:
        """The answer that is kept under a key, if there is one."""
        row = self.use(lambda kept: kept.execute("SELECT answer FROM kept WHERE key = ?", (key,)).fetchone(), None)
        return row[0] if row else None

    def keep(self, key: str, answer: str) -> None:
        """Keep an answer."""
        self.use(lambda kept: kept.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, answer)), None)
