"""A scripted judge: an OpenAI-compatible server that follows simple rules, for tests and for trying recipes out.

It is not a model and understands nothing. It looks for some words in the criteria it is sent (short, long, polite,
digits, sums, list, exclamation, capitals, question, reference), measures each completion by what they name, and
answers in the form of the question: of this project's judges (also of single steps, and of pairs in one letter, with
log-probabilities), or of RewardAnything. Asked for the first wrong step of a solution, it checks its sums.

    python -m trl_rewards.models.scripted_judge --port 8765
    python -m trl_rewards.models.scripted_judge --port 8765 --garbage 0.2 --errors 0.1   # a bad day
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import operator
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean
from typing import Any, NamedTuple

POLITE = re.compile(r"\b(?:please|thanks?|thank you|sorry|welcome|kindly|glad|happy to|of course)\b", re.IGNORECASE)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SUM = re.compile(r"(?<![\w.])(\d+) ([-+*]) (\d+) = (-?\d+)\b")


def sums_of(text: str) -> list[tuple[int, bool]]:
    """Of each sum of a text, such as "3 + 4 = 7", the result that it states, and whether that is right."""
    return [
        (int(result), _OPERATORS[sign](int(left), int(right)) == int(result))
        for left, sign, right, result in _SUM.findall(text)
    ]


RULES: dict[str, Callable[[str], float]] = {  # words in the criteria -> share of what they ask for, in [0, 1]
    r"\b(?:short|concise|brief|succinct)": lambda text: 20 / (20 + len(text.split())),
    r"\b(?:long|detailed|thorough)": lambda text: len(text.split()) / (20 + len(text.split())),
    r"\b(?:polite|courteous|friendly|kind|warm)": lambda text: min(len(POLITE.findall(text)) / 3, 1.0),
    r"\b(?:digit|number)": lambda text: min(len(re.findall(r"\d+", text)) / 3, 1.0),
    r"\bsums?\b": lambda text: fmean([right for _, right in sums_of(text)] or [True]),
    r"\b(?:list|bullet)": lambda text: min(len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE)) / 3, 1.0),
    r"\b(?:exclamation|enthusias)": lambda text: min(text.count("!") / 3, 1.0),
    r"\b(?:upper-?case|capital)": lambda text: sum(map(str.isupper, text)) / max(sum(map(str.isalpha, text)), 1),
    r"\bquestion": lambda text: min(text.count("?") / 2, 1.0),
}
_NEGATED = re.compile(r"\b(?:no|not|avoid|without|never|fewer|less|few)\b[^.,;]{0,25}$", re.IGNORECASE)
_FENCED = re.compile(r"^<([\w-]+)-([0-9a-f]{16})>\n(.*)\n</\1-\2>$", re.MULTILINE)
STEP_POINTS = 6
"""The highest score of a step."""
_SCALE = re.compile(r"\bScale: (-?\d+(?:\.\d+)?) to (-?\d+(?:\.\d+)?)")


class Question(NamedTuple):
    """What the judge finds in a request."""

    criteria: str
    reference: str
    candidates: dict[str, str]
    """Completions by name; a single one is called "completion", a pair "A" and "B", and a solution's steps "step-0"
    and on."""
    scale: tuple[float, float]


def read_question(messages: list[dict[str, str]]) -> Question:
    """Criteria and candidates of a request: this project's tags, or RewardAnything's JSON object."""
    user = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    scale = _SCALE.search("\n".join(message["content"] for message in messages))
    low, high = (float(scale[1]), float(scale[2])) if scale else (1.0, 5.0)
    try:
        found = json.loads(user)
        return Question(str(found["principle"]), "", dict(found["responses"]), (low, high))
    except (ValueError, KeyError, TypeError):
        tags = {match[1]: json.loads(match[3]) for match in _FENCED.finditer(user)}
    criteria = user.partition("<prompt-")[0]
    reference = tags.pop("reference", "")
    for around in ("prompt", "so_far", "all"):
        tags.pop(around, None)
    return Question(criteria, reference, tags, (low, high))


def worth(text: str, criteria: str, reference: str = "") -> float:
    """How far a text does what the criteria's words name, in [0, 1]: the mean of their rules, 0.5 without any."""
    if not text.strip():
        return 0.0
    values = []
    for words, rule in RULES.items():
        for match in re.finditer(words, criteria, re.IGNORECASE):
            unwanted = _NEGATED.search(criteria[: match.start()])
            values.append(1 - rule(text) if unwanted else rule(text))
    if reference:
        values.append(_overlap(text, reference))
    return fmean(values) if values else 0.5


def _overlap(text: str, reference: str) -> float:
    """F1 of the words of two texts."""
    mine, theirs = Counter(text.lower().split()), Counter(reference.lower().split())
    return 2 * (mine & theirs).total() / max(mine.total() + theirs.total(), 1)


def verdict(question: Question) -> dict[str, Any]:
    """The judge's reply as an object, in the form that the candidates' names ask for."""
    values = {name: worth(text, question.criteria, question.reference) for name, text in question.candidates.items()}
    low, high = question.scale
    digits = None if high - low >= 2 else 2
    scores = {name: round(low + value * (high - low), digits) for name, value in values.items()}
    if set(values) == {"completion"}:
        return {"reason": "by the rules", "score": scores["completion"]}
    if set(values) == {"A", "B"}:
        better = "tie" if values["A"] == values["B"] else max(values, key=values.__getitem__)
        return {"reason": "by the rules", "winner": better}
    return {"scores": scores, "best-to-worst": sorted(values, key=lambda name: -values[name])}


def first_wrong(steps: Iterable[str]) -> int:
    """Number of the first step, from 0, with a wrong sum such as "3 + 4 = 8" or, where it has no sum, with a number
    that was the result of none before; -1 without one."""
    results: set[int] = set()
    for number, step in enumerate(steps):
        sums = sums_of(step)
        if not all(right for _, right in sums):
            return number
        if not sums and not {int(stated) for stated in re.findall(r"-?\d+", step)} <= results:
            return number
        results |= {result for result, _ in sums}
    return -1


def letters(question: Question) -> dict[str, float]:
    """Log-probabilities of a reply in one letter about a pair: P(A) = 1 / (1 + exp(8 (worth of B - worth of A)))."""
    first, second = (worth(question.candidates[name], question.criteria, question.reference) for name in "AB")
    surplus = 8 * (second - first)
    return {"A": -math.log1p(math.exp(surplus)), "B": -math.log1p(math.exp(-surplus))}


def said(question: Question) -> str:
    """The judge's reply: a verdict as JSON, points where it is asked about a step of a trajectory, or the number of
    the first wrong step."""
    if set(question.candidates) == {"step"}:
        points = round(STEP_POINTS * worth(question.candidates["step"], question.criteria))
        return f"By the rules: <final_score>{points},{STEP_POINTS}</final_score>"
    if "step-0" in question.candidates:
        return json.dumps({"reason": "by its sums", "first_wrong": first_wrong(question.candidates.values())})
    return json.dumps(verdict(question), ensure_ascii=False)


class ScriptedJudge:
    """The server, running in a thread from its creation to `close`. Faults are drawn by `seed`, request and repeat."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        delay: float = 0.0,
        garbage: float = 0.0,
        errors: float = 0.0,
        hangs: float = 0.0,
        down_after: int = 0,
        down_for: float = 0.0,
        refuse_formats: bool = False,
        seed: int = 0,
    ):
        """`delay` seconds per reply; shares of replies that are garbage, errors (500) or never come; for `down_for`
        seconds after `down_after` requests every connection is closed without an answer; 400 for a response_format."""
        self.delay, self.shares = delay, {"garbage": garbage, "error": errors, "hang": hangs}
        self.down_after, self.down_for, self.refuse_formats, self.seed = down_after, down_for, refuse_formats, seed
        self.requests: deque[dict[str, Any]] = deque(maxlen=1000)
        """Bodies of the last requests for a reply."""
        self.fates: Counter[str] = Counter()
        """How many requests met what: ok, garbage, error, hang, down."""
        self._seen: Counter[bytes] = Counter()
        self._down_since: float | None = None
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server((host, port), functools.partial(_Handler, self))
        self.url = f"http://{host}:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="scripted-judge").start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> ScriptedJudge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fate(self, body: bytes) -> str:
        """What becomes of a request: the same for the n-th repeat of the same body, whatever comes between."""
        with self._lock:
            digest = hashlib.blake2b(body, digest_size=16).digest()
            repeat = self._seen[digest]
            self._seen[digest] += 1
            fate = self._draw(f"{self.seed} {digest.hex()} {repeat}")
            if self.down_for and self.fates.total() >= self.down_after:
                self._down_since = self._down_since or time.monotonic()
                fate = "down" if time.monotonic() - self._down_since < self.down_for else fate
            self.fates[fate] += 1
            return fate

    def _draw(self, seed: str) -> str:
        point = random.Random(seed).random()
        for fate, share in self.shares.items():
            if point < share:
                return fate
            point -= share
        return "ok"

    def reply(self, request: dict[str, Any], fate: str) -> dict[str, Any]:
        """The body of an answer: a chat completion with its usage, counted in words."""
        question = read_question(request["messages"])
        likely: dict[str, float] | None = None
        if request.get("logprobs") and set(question.candidates) == {"A", "B"}:
            likely = letters(question)
        text = max(likely, key=likely.__getitem__) if likely else said(question)
        if fate == "garbage":
            text = "I would rather talk about the weather. It is 100 degrees outside {and} 5 [people"
            likely = None
        elif "response_format" not in request and not likely:
            text = f"<think>I measure what the criteria name.</think>\n{text}"
        pieces = re.findall(r"\s*\S+", text)
        kept = pieces[: request.get("max_tokens") or len(pieces)]
        asked = sum(len(message["content"].split()) for message in request["messages"])
        message = {"role": "assistant", "content": "".join(kept)}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if len(kept) == len(pieces) else "length"}
        if likely:
            top = [{"token": token, "logprob": logprob} for token, logprob in likely.items()]
            choice["logprobs"] = {"content": [{"token": text, "logprob": likely[text], "top_logprobs": top}]}
        return {
            "object": "chat.completion",
            "model": request.get("model", "scripted"),
            "choices": [choice],
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": len(kept),
                "total_tokens": asked + len(kept),
            },
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # head and body in one packet: two would wait for each other's acknowledgement

    def __init__(self, judge: ScriptedJudge, *connection: Any):
        self.judge = judge
        super().__init__(*connection)

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            self._answer(
                200, {"object": "list", "data": [{"id": "scripted", "object": "model", "owned_by": "trl-rewards"}]}
            )
        else:
            self._answer(404, {"error": {"message": f"no {self.path}; there is /v1/models"}})

    def do_POST(self) -> None:
        judge = self.judge
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self._answer(404, {"error": {"message": f"no {self.path}; there is /v1/chat/completions"}})
            return
        try:
            request = json.loads(body)
            answer = judge.reply(request, "ok")
        except (ValueError, KeyError, TypeError, StopIteration, AttributeError) as error:
            self._answer(400, {"error": {"message": f"this is no request for a verdict: {error!r}"}})
            return
        judge.requests.append(request)
        if judge.refuse_formats and "response_format" in request:
            self._answer(400, {"error": {"message": "response_format is not supported"}})
            return
        fate = judge.fate(body)
        if fate == "down":
            self.close_connection = True
            return
        if judge.closing.wait(3600 if fate == "hang" else judge.delay):
            self.close_connection = True
        elif fate == "error":
            self._answer(500, {"error": {"message": "the judge has a bad day"}})
        else:
            self._answer(200, answer if fate == "ok" else judge.reply(request, fate))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A judge that follows rules, OpenAI-compatible. It is not a model.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds per reply")
    parser.add_argument("--garbage", type=float, default=0.0, help="share of replies that nobody can read")
    parser.add_argument("--errors", type=float, default=0.0, help="share of requests that meet a 500")
    parser.add_argument("--hangs", type=float, default=0.0, help="share of requests that never get an answer")
    parser.add_argument("--down-after", type=int, default=0, help="requests before the server goes down")
    parser.add_argument("--down-for", type=float, default=0.0, help="seconds that it stays down")
    parser.add_argument("--seed", type=int, default=0)
    with ScriptedJudge(**vars(parser.parse_args())) as judge:
        print(f"a judge of rules, not a model, at {judge.url}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
