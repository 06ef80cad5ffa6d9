"""A search over passages of text in one SQLite file (FTS5, ranked by BM25), for tools that look things up offline."""

from __future__ import annotations

import gzip
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple
from urllib.parse import quote

from trl_rewards.errors import RewardError

_WORD = re.compile(r"\w+")
_COMMON = frozenset(
    "a an the of in on at by for to from with and or is are was were be been do does did has have had what which "  # noqa: SIM905
    "who whom whose when where why how that this these those it its as than into about".split()
)
"""Words that say nothing of what is looked for, and would make every passage of a large corpus a candidate."""


class Passage(NamedTuple):
    title: str
    text: str


class PassageIndex:
    """Passages of a file that `build_index` wrote. It may be used from any thread, and pickles."""

    def __init__(self, path: str):
        """RewardError if the file is none or not there."""
        self.path = path
        if not os.path.isfile(path):
            raise RewardError(f"no index {path!r}; write one with: trl-rewards index CORPUS.jsonl --out {path}")
        try:
            with closing(self._connect()) as connection:
                connection.execute("SELECT title, text FROM passages LIMIT 1")
        except sqlite3.Error as error:
            raise RewardError(f"{path!r} is no index that trl-rewards index wrote: {error}") from None

    def search(self, query: str, k: int = 1) -> list[Passage]:
        """The k passages that fit best, best first; fewer where fewer have any of the words."""
        words = [word for word in dict.fromkeys(_WORD.findall(query.lower())) if word != "_"]
        wanted = [word for word in words if word not in _COMMON] or words
        if not wanted:
            return []
        match = " OR ".join(f'"{word}"' for word in wanted[:64])
        with closing(self._connect()) as connection:
            rows = connection.execute(
                "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?", (match, k)
            )
            return [Passage(*row) for row in rows]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(os.path.abspath(self.path))}?mode=ro", uri=True)


def build_index(corpora: Iterable[str], out: str, title: str = "title", text: str = "text", words: int = 0) -> int:
    """Write an index of JSONL files (also .gz) with a title and a text per line, and return how many passages it has.

    With `words`, texts are cut into passages of so many. RewardError, and no file, where something is wrong.
    """
    if os.path.exists(out):
        raise RewardError(f"{out} exists; delete it, or name another with --out")
    if words < 0:
        raise RewardError(f"--words must be 0 (texts stay whole) or more, got {words}")
    unfinished = f"{out}.unfinished"
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    if os.path.exists(unfinished):
        os.remove(unfinished)
    try:
        with closing(sqlite3.connect(unfinished)) as connection, connection:
            # Nothing is lost with a file that is written anew if the machine stops.
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            tokenizer = "porter unicode61 remove_diacritics 2"
            connection.execute(f"CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize='{tokenizer}')")
            rows = (passage for corpus in corpora for passage in read_passages(corpus, title, text, words))
            count = connection.executemany("INSERT INTO passages VALUES (?, ?)", rows).rowcount
            connection.execute("INSERT INTO passages(passages) VALUES ('optimize')")
        if count < 1:
            raise RewardError(f"no passages in {', '.join(corpora)}")
        os.replace(unfinished, out)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    return count


def read_passages(corpus: str, title: str = "title", text: str = "text", words: int = 0) -> Iterator[Passage]:
    """The passages of a JSONL file. RewardError with the line that is none."""
    if not os.path.isfile(corpus):
        raise RewardError(f"no file {corpus!r}")
    with (
        gzip.open(corpus, "rt", encoding="utf-8") if corpus.endswith(".gz") else open(corpus, encoding="utf-8") as file
    ):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found = Passage(str(row.get(title) or ""), row[text])
                if not isinstance(found.text, str):
                    raise TypeError
            except (ValueError, KeyError, AttributeError, TypeError):
                said = f"no object with text under {text!r}: {line.strip()[:80]}"
                raise RewardError(f"{corpus}, line {number}: {said}") from None
            yield from _cut(found, words) if words else [found]


def _cut(passage: Passage, words: int) -> Iterator[Passage]:
    parts = passage.text.split()
    for start in range(0, len(parts), words):
        yield Passage(passage.title, " ".join(parts[start : start + words]))
