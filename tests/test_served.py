"""Scores from servers that speak each dialect, over real local HTTP."""

import asyncio
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trl_rewards import Context, Failed, RewardError
from trl_rewards.models.served import DIALECTS, ServedScorer
from trl_rewards.testing import make_samples, run_reward

CASES = json.loads(Path(__file__).with_name("served_cases.json").read_text(encoding="utf-8"))["cases"]
SECRET = "sk-secret"


class Server:
    """Answers every POST with what `answer(path, body)` gives: a reply, (status, reply), or text that is no JSON."""

    def __init__(self, answer):
        server = self
        self.requests: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []
        self.released = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body))
                server.keys.append(self.headers["Authorization"])
                found = answer(self.path, body)
                if found is None:  # hangs until the test is over
                    server.released.wait(30)
                    return
                status, reply = found if isinstance(found, tuple) else (200, found)
                text = reply if isinstance(reply, str) else json.dumps(reply)
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def value(item) -> float:
    """What the servers here score: the length of a text, the sum of token ids."""
    return float(len(item) if isinstance(item, str) else sum(item))


def entries(values):
    return {"object": "list", "data": [{"index": index, "data": data} for index, data in enumerate(values)]}


def per_token(item):
    return [[0.5]] * (len(item) - 1) + [[value(item)]]


REPLIES = {  # what each server answers
    "sglang": lambda body: [
        {"embedding": [value(text)], "meta_info": {"prompt_tokens": len(text)}} for text in body["text"]
    ],
    "vllm": lambda body: entries([per_token(item) for item in body["input"]]),
    "vllm_bare": lambda body: entries([per_token(item) for item in body["input"]]),
    "vllm_sequence": lambda body: entries([[value(item)] for item in body["input"]]),
    "vllm_classify": lambda body: {
        "data": [{"index": i, "probs": [value(item)], "label": None} for i, item in enumerate(body["input"])]
    },
    "lmdeploy": lambda body: entries([value(item) for item in body["input"]]),
}
REQUESTS = {  # and how it is asked
    "sglang": ("/classify", {"text": ["ab"]}),
    "vllm": ("/pooling", {"input": ["ab"], "task": "token_classify", "use_activation": False}),
    "vllm_bare": ("/pooling", {"input": ["ab"]}),
    "vllm_sequence": ("/pooling", {"input": ["ab"], "task": "classify", "use_activation": False}),
    "vllm_classify": ("/classify", {"input": ["ab"], "use_activation": False}),
    "lmdeploy": ("/pooling", {"input": ["ab"]}),
}


def scores(scorer, inputs):
    return asyncio.run(scorer.score(inputs))


def test_every_dialect_is_tried_here():
    assert set(REPLIES) == set(REQUESTS) == set(DIALECTS)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_asks_as_its_server_wants_and_reads_the_scores_in_order(serve, dialect):
    server = serve(lambda path, body: REPLIES[dialect](body))
    assert scores(ServedScorer(server.url, dialect), ["ab"]) == [2.0]
    assert server.requests == [REQUESTS[dialect]]
    named = ServedScorer(server.url, dialect, model="POLAR-7B", chunk_size=2)
    assert scores(named, ["abc", "a", "", "ab", "a"]) == [3.0, 1.0, 0.0, 2.0, 1.0]
    assert all(body["model"] == "POLAR-7B" for _, body in server.requests[1:])
    assert len(server.requests) == 4


@pytest.mark.parametrize("dialect", [name for name, dialect in DIALECTS.items() if dialect.takes_ids])
def test_token_ids_are_sent_as_they_are(serve, dialect):
    server = serve(lambda path, body: REPLIES[dialect](body))
    assert scores(ServedScorer(server.url, dialect), [[1, 5], [1, 5, 6]]) == [6.0, 12.0]
    assert server.requests[0][1]["input"] == [[1, 5], [1, 5, 6]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_requests_and_scores_are_those_of_polars_client_and_what_it_misread_fails(serve, case):
    server = serve(lambda path, body: case["reply"])
    found = scores(ServedScorer(server.url, case["dialect"], attempts=2), case["request"]["body"]["input"])
    path, body = server.requests[0]
    assert (path, body) == (case["request"]["path"], case["request"]["body"])
    if case["scores"] is None:
        assert all(isinstance(score, Failed) for score in found)
    else:
        assert found == case["scores"]


def test_no_inputs_make_no_request(serve):
    server = serve(lambda path, body: {"data": []})
    assert scores(ServedScorer(server.url, "lmdeploy"), []) == []
    assert server.requests == []


def test_entries_of_a_reply_are_put_in_the_order_of_their_index(serve):
    server = serve(lambda path, body: {"data": [{"index": 1, "data": 2.0}, {"index": 0, "data": 1.0}]})
    assert scores(ServedScorer(server.url, "lmdeploy"), ["a", "b"]) == [1.0, 2.0]


def test_a_failed_chunk_fails_its_own_rows_alone(serve):
    def answer(path, body):
        return (500, "boom") if "bad" in body["input"] else REPLIES["lmdeploy"](body)

    server = serve(answer)
    found = scores(
        ServedScorer(server.url, "lmdeploy", chunk_size=2, attempts=2, first_pause=0.0), ["a", "ab", "bad", "b", "abc"]
    )
    assert [found[0], found[1], found[4]] == [1.0, 2.0, 3.0]
    assert all(isinstance(score, Failed) and "500" in score.reason for score in found[2:4])


def test_a_server_that_always_fails_is_asked_8_times_and_gives_no_score(serve):
    server = serve(lambda path, body: (503, "loading"))
    (found,) = scores(ServedScorer(server.url, "sglang", first_pause=0.0), ["a"])
    assert isinstance(found, Failed)
    assert "503" in found.reason
    assert len(server.requests) == 8


def test_a_refused_request_is_not_sent_again(serve):
    server = serve(lambda path, body: (400, {"message": "input is too long"}))
    (found,) = scores(ServedScorer(server.url, "lmdeploy"), ["a"])
    assert isinstance(found, Failed)
    assert "input is too long" in found.reason
    assert len(server.requests) == 1


def test_a_null_is_a_hole_of_its_own_row(serve):
    server = serve(lambda path, body: entries([1.0, None, 3.0]))
    found = scores(ServedScorer(server.url, "lmdeploy"), ["a", "b", "c"])
    assert found[0::2] == [1.0, 3.0]
    assert isinstance(found[1], Failed)


def test_one_input_that_is_refused_costs_no_other_its_score(serve):
    def answer(path, body):
        return (400, "too long") if "bad" in body["input"] else REPLIES["lmdeploy"](body)

    server = serve(answer)
    found = scores(ServedScorer(server.url, "lmdeploy"), ["a", "ab", "bad", "b", "abc"])
    assert [found[0], found[1], found[3], found[4]] == [1.0, 2.0, 1.0, 3.0]
    assert isinstance(found[2], Failed)
    assert "too long" in found[2].reason


def test_a_server_that_hangs_times_out(serve):
    server = serve(lambda path, body: None)
    (found,) = scores(ServedScorer(server.url, "lmdeploy", timeout=0.2, attempts=1), ["a"])
    assert isinstance(found, Failed)
    assert found.status == "timeout"


def test_a_server_that_is_not_there_gives_failures():
    (found,) = scores(ServedScorer("http://127.0.0.1:9", "lmdeploy", attempts=1), ["a"])
    assert isinstance(found, Failed)


@pytest.mark.parametrize(
    ("dialect", "reply"),
    [
        ("sglang", {"data": []}),
        ("sglang", [{"embedding": [1.0, 2.0]}]),  # an embedding model
        ("sglang", [{"embedding": 1.0}]),
        ("sglang", []),
        ("vllm", entries([[[1.0, 2.0]]])),  # two classes
        ("vllm", entries([[0.25, 0.5]])),  # an embedding, or classes
        ("vllm", entries([0.25])),  # LMDeploy's
        ("vllm", entries([[]])),
        ("vllm", entries(["AACAPw=="])),  # base64
        ("vllm_sequence", entries([[[1.0], [2.0]]])),  # a score of each token
        ("vllm_classify", {"data": [{"probs": [0.1, 0.9]}]}),
        ("lmdeploy", entries([[[1.0], [2.0]]])),  # vLLM's
        ("lmdeploy", entries([1.0, 2.0])),
        ("lmdeploy", entries([None])),
        ("lmdeploy", entries([True])),
        ("lmdeploy", {"error": "no such model"}),
        ("lmdeploy", "plain text"),
    ],
)
def test_a_reply_of_another_shape_fails_and_says_so(serve, dialect, reply):
    server = serve(lambda path, body: reply)
    (found,) = scores(ServedScorer(server.url, dialect, attempts=1), ["a"])
    assert isinstance(found, Failed)
    assert DIALECTS[dialect].path in found.reason


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_score_that_is_no_finite_number_fails_alone(serve, number):
    server = serve(lambda path, body: f'{{"data": [{{"data": {number}}}, {{"data": 1.5}}]}}')
    bad, good = scores(ServedScorer(server.url, "lmdeploy"), ["a", "b"])
    assert isinstance(bad, Failed)
    assert good == 1.5


def test_the_api_key_is_sent_and_never_said(serve, monkeypatch):
    monkeypatch.setenv("SCORER_KEY", SECRET)
    server = serve(lambda path, body: (401, f"bad key {SECRET}"))
    (found,) = scores(ServedScorer(server.url, "lmdeploy", api_key_env="SCORER_KEY"), ["a"])
    assert server.keys == [f"Bearer {SECRET}"]
    assert SECRET not in found.reason


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("localhost:30000", "vllm"), "must start with http"),
        (("http://localhost:30000/v1", "vllm"), "without /v1"),
        (("http://localhost:30000", "tgi"), "no dialect 'tgi'; there is sglang"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ServedScorer(*arguments)


# What the self-test finds


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_sound_server_passes(serve, dialect):
    server = serve(lambda path, body: REPLIES[dialect](body))
    ServedScorer(server.url, dialect).check("one text", "another text", tokens=8)


def test_metrics_count_requests_since_the_last_call(serve):
    server = serve(lambda path, body: REPLIES["lmdeploy"](body))
    scorer = ServedScorer(server.url, "lmdeploy", chunk_size=1)
    scores(scorer, ["a", "b"])
    assert scorer.metrics()["requests"] == 2
    assert scorer.metrics()["requests"] == 0


@pytest.mark.parametrize(
    ("dialect", "answer", "said"),
    [
        ("lmdeploy", lambda body: (500, "boom"), "500"),
        ("lmdeploy", lambda body: REPLIES["vllm"](body), "another shape"),
        ("lmdeploy", lambda body: entries([math.nan for _ in body["input"]]), "scored nan"),
        ("vllm_classify", lambda body: {"data": [{"probs": [1.0]} for _ in body["input"]]}, "for different inputs"),
    ],
)
def test_a_server_that_cannot_be_right_is_refused(serve, dialect, answer, said):
    server = serve(lambda path, body: answer(body))
    with pytest.raises(RewardError, match=said):
        ServedScorer(server.url, dialect, attempts=1).check("one text", "another text")


@pytest.mark.parametrize(("off", "refused"), [(1.0, False), (9.0, True)])
def test_a_server_may_be_off_by_a_twentieth_of_what_tells_inputs_apart(serve, off, refused):
    """Scores of 10 and 110: 5 % of the difference is 5, and 1 % of the score a tenth."""
    server = serve(
        lambda path, body: entries(
            [(10.0 if item == "one" else 110.0) + off * (len(body["input"]) == 1) for item in body["input"]]
        )
    )
    scorer = ServedScorer(server.url, "lmdeploy")
    if refused:
        with pytest.raises(RewardError, match="different scores for the same input"):
            scorer.check("one", "other")
    else:
        scorer.check("one", "other")


def test_a_deadline_keeps_the_chunks_that_are_finished(serve):
    server = serve(lambda path, body: None if "slow" in body["input"] else REPLIES["lmdeploy"](body))
    scorer = ServedScorer(server.url, "lmdeploy", chunk_size=1)

    async def until(others):
        task = asyncio.ensure_future(scorer.score(["a", "slow", "abc"] if others else ["slow"]))
        while len(server.requests) < (3 if others else 4) or scorer._client._breaker._last_success < 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # for the answers to be read
        task.cancel()
        return await task

    first, late, third = asyncio.run(until(others=True))
    assert [first, third] == [1.0, 3.0]
    assert isinstance(late, Failed)
    assert late.status == "timeout"
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(until(others=False))


def test_a_server_that_changes_its_mind_is_refused(serve):
    server = serve(lambda path, body: entries([value(item) + len(server.requests) for item in body["input"]]))
    with pytest.raises(RewardError, match="different scores for the same input"):
        ServedScorer(server.url, "lmdeploy").check("one text", "another text")


def test_a_server_that_splits_the_reward_token_is_refused(serve):
    server = serve(lambda path, body: REPLIES["sglang"](body))  # counts characters
    with pytest.raises(RewardError, match="reads 8 tokens in a text of 3"):
        ServedScorer(server.url, "sglang").check("one text", "another text", tokens=3)


def test_a_server_that_does_not_count_tokens_is_warned_of(serve, caplog):
    server = serve(lambda path, body: [{"embedding": [value(text)]} for text in body["text"]])
    ServedScorer(server.url, "sglang").check("one text", "another text", tokens=3)
    assert "does not say how many tokens" in caplog.text


def test_the_guides_source_asks_a_server_and_reads_its_scores(serve, policy_path):
    guide = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    scope: dict = {"__name__": "serving"}
    exec(compile(block, "serving.md", "exec"), scope)
    server = serve(lambda path, body: REPLIES["vllm_sequence"](body))
    served = scope["Served"](path=policy_path, endpoint=server.url)
    served.setup(Context())
    samples = make_samples(completions=["5", "five"], prompts=["2 + 3? "] * 2)
    assert run_reward(served, samples) == [8.0, 11.0]  # the length of prompt and completion
    assert server.requests[-1] == (
        "/pooling",
        {
            "model": policy_path,
            "input": ["2 + 3? 5", "2 + 3? five"],
            "task": "classify",
            "use_activation": False,
        },
    )
    served.close()
