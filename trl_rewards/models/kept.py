"""Answers that were paid for, kept on disk."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing

logger = logging.getLogger(__name__)


def open_shared(path: str, table: str) -> sqlite3.Connection:
    """An sqlite file that processes share, made with its folder and `table` where they are not there."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    connection = sqlite3.connect(path, timeout=60)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    return connection


class KeptAnswers:
    """Texts by key, in one sqlite file that processes share (not on a network file system).

    A file that is full, locked or broken costs its savings, not the answers: a warning says so, once.
    """

    def __init__(self, path: str, option: str):
        """`option` is what the file's owner calls it, for the warning."""
        self._path = os.path.expanduser(path)
        self._option = option
        self._warned = False

    def _connect(self) -> sqlite3.Connection:
        return open_shared(self._path, "kept (key TEXT PRIMARY KEY, answer TEXT)")

    def find(self, key: str) -> str | None:
        """The answer that is kept under a key, if there is one."""
        try:
            with closing(self._connect()) as connection:
                row = connection.execute("SELECT answer FROM kept WHERE key = ?", (key,)).fetchone()
            return row[0] if row else None
        except (sqlite3.Error, OSError) as error:
            self.warn(error)
            return None

    def keep(self, key: str, answer: str) -> None:
        """Keep an answer."""
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, answer))
        except (sqlite3.Error, OSError) as error:
            self.warn(error)

    def warn(self, error: Exception) -> None:
        """Say, the first time, that something is wrong with the file."""
        if not self._warned:
            self._warned = True
            logger.warning("%s %s cannot be used: %r", self._option, self._path, error)
