"""Replies on disk: a cassette, from which a run can be repeated without the judge, and a cache of equal requests."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter
from dataclasses import asdict
from typing import Literal

from trl_rewards.errors import RewardError
from trl_rewards.models.chat import Reply, Request
from trl_rewards.models.kept import KeptAnswers

logger = logging.getLogger(__name__)

DEFAULT_REPLY_CACHE = "~/.cache/trl_rewards/replies.sqlite"


class Cassette:
    """Requests and replies, one JSON line each, in a file of this rank.

    A line's place is its request's hash and how many equal requests came before it, so the n-th of equal questions
    gets the n-th answer whatever order answers come in. Lines are written in the order of questions, when a batch is
    done. API keys and addresses are in no line.
    """

    def __init__(self, path: str, mode: Literal["record", "replay", "auto"]):
        self.path = path_of_rank(path)
        self._mode = mode
        self._replies: dict[tuple[str, int], Reply] = {}
        self._asked: Counter[str] = Counter()
        self._unwritten: list[tuple[tuple[int, int], str]] = []
        self._lock = threading.Lock()
        exists = os.path.exists(self.path)
        if mode == "record" and exists:
            raise RewardError(
                f"cassette {self.path!r} exists, and cassette_mode record starts one; delete it, name another, or "
                "set cassette_mode to auto"
            )
        if mode == "replay" and not exists:
            raise RewardError(f"no cassette {self.path!r} to replay; record one with cassette_mode record or auto")
        if exists:
            self._read()

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            lines = file.readlines()
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line.decode("utf-8", "surrogatepass"))
                self._replies[entry["key"], entry["n"]] = Reply(**entry["reply"])
            except (ValueError, KeyError, TypeError) as error:
                torn = number == len(lines) and line.startswith(b"{") and not line.endswith(b"\n")
                if not torn or not isinstance(error, ValueError):
                    raise RewardError(f"cassette {self.path!r}, line {number} is no request and reply") from None
                logger.warning("cassette %s: its last line was not written to the end, and is left out", self.path)
                if not self.replays_only:  # what is recorded must begin a line of its own
                    os.truncate(self.path, sum(map(len, lines[:-1])))

    def place(self, request: Request) -> int:
        """How many requests equal to this one were placed before. Call it in the order of questions."""
        key = request.key()
        with self._lock:
            self._asked[key] += 1
            return self._asked[key] - 1

    @property
    def replays_only(self) -> bool:
        return self._mode == "replay"

    @property
    def holds_replies(self) -> bool:
        """Whether a run may be repeated from it, so that no judge need be there."""
        return bool(self._replies)

    def find(self, request: Request, place: int) -> Reply | None:
        """The recorded reply to a request, if there is one."""
        return self._replies.get((request.key(), place))

    def keep(self, request: Request, place: int, reply: Reply, order: int) -> None:
        """Record a reply; it is written at the next `write`, by `order` and attempt."""
        entry = {"key": request.key(), "n": place, "request": asdict(request), "reply": reply._asdict()}
        with self._lock:
            self._unwritten.append(((order, request.attempt), json.dumps(entry, ensure_ascii=False)))

    def write(self) -> None:
        """Put what was recorded into the file."""
        with self._lock:
            if not self._unwritten:
                return
            lines = [line for _, line in sorted(self._unwritten, key=lambda entry: entry[0])]
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="surrogatepass") as file:
                file.write("\n".join(lines) + "\n")
            self._unwritten.clear()


def path_of_rank(path: str) -> str:
    """The path itself on the first rank of a run, `name.rank1.ending` and so on for the others."""
    rank = int(os.environ.get("RANK", "0"))
    root, ending = os.path.splitext(os.path.expanduser(path))
    return f"{root}.rank{rank}{ending}" if rank else root + ending


class ReplyCache:
    """Replies to repeatable requests, in one sqlite file that processes share."""

    def __init__(self, path: str, judge: str):
        """`judge` says what answers, beside the model's name: replies of another are not used."""
        self._kept = KeptAnswers(path, "reply_cache")
        self._judge = judge

    def find(self, request: Request) -> Reply | None:
        """The kept reply to an equal request, if there is one."""
        kept = self._kept.find(self._key(request)) if request.repeatable else None
        try:
            return Reply(*json.loads(kept)) if kept else None
        except (ValueError, TypeError) as error:
            self._kept.warn(error)
            return None

    def keep(self, request: Request, reply: Reply) -> None:
        """Keep a reply, if the request is repeatable and the reply came to its end."""
        if request.repeatable and reply.finish == "stop":
            self._kept.keep(self._key(request), json.dumps(reply))

    def _key(self, request: Request) -> str:
        return json.dumps([self._judge, request.key()])
