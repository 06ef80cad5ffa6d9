"""The HTTP client against real servers in threads: what is tried again, what is not, and what never leaks."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_rewards.errors import RewardError
from trl_rewards.events import run_async
from trl_rewards.models.http import LONGEST_PAUSE, Breaker, HttpClient, HttpFailure, Pace, _retry_after

SOON = {"Retry-After": "0"}


class Server:
    """Answers the n-th request with `answer(n)`: (status, headers, body), or None to close without an answer."""

    def __init__(self, answer, port=0):
        self.seen, self.connections, self.busy, self.busiest = [], 0, 0, 0
        self.over, self.lock = threading.Event(), threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def setup(self):
                super().setup()
                server.connections += 1

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with server.lock:
                    number = len(server.seen)
                    server.seen.append((self.command, self.path, dict(self.headers), body))
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                try:
                    found = answer(number)
                finally:
                    with server.lock:
                        server.busy -= 1
                if found is None:
                    self.close_connection = True
                    return
                status, headers, content = found
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *args):
                pass

        self.server = Quiet(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def always(status=200, headers=None, body=None):
    return lambda number: (status, headers or {}, {"fine": True} if body is None else body)


def first_then_fine(*answers):
    return lambda number: answers[number] if number < len(answers) else (200, {}, {"fine": True})


def post(client, times=1, **options):
    """`times` posts at once; what came of each."""

    async def all_posts():
        posts = (client.post("/x", {"a": number}, **options) for number in range(times))
        return await asyncio.gather(*posts, return_exceptions=True)

    return run_async(all_posts())


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_post_sends_json_and_gives_the_parsed_answer():
    with Server(always(body={"text": "größe 山"})) as server:
        client = HttpClient(server.url + "/v1/")
        sent = {"text": "山 {} \ud800"}  # a lone surrogate, which no UTF-8 has
        assert run_async(client.post("/chat", sent)) == {"text": "größe 山"}
        assert run_async(client.get("/models")) == {"text": "größe 山"}
    (method, path, headers, body), (second, second_path, _, _) = server.seen
    assert (method, path, headers["Content-Type"]) == ("POST", "/v1/chat", "application/json")
    assert json.loads(body) == {"text": "山 {} ?"}
    assert (second, second_path) == ("GET", "/v1/models")
    assert "Authorization" not in headers


def test_connections_are_kept_and_shared():
    with Server(always()) as server:
        client = HttpClient(server.url, concurrency=3)
        for _ in range(5):
            assert post(client, times=6) == [{"fine": True}] * 6
        assert len(server.seen) == 30
        assert server.connections <= 3
        run_async(client.aclose())
        assert post(client) == [{"fine": True}]  # it can be used again


def test_no_more_than_concurrency_requests_are_under_way():
    def slowly(number):
        time.sleep(0.02)
        return 200, {}, {"fine": True}

    with Server(slowly) as server:
        assert post(HttpClient(server.url, concurrency=4), times=20) == [{"fine": True}] * 20
        assert server.busiest == 4


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    with Server(first_then_fine((status, SOON, {}), (status, SOON, {}))) as server:
        client = HttpClient(server.url, retries=2, first_pause=0.0)
        assert post(client) == [{"fine": True}]
        assert client.metrics() == {"requests": 3, "retries": 2, "failures": 0, "seconds_waited": 0}
        assert client.metrics()["requests"] == 0  # since the last call


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_what_will_not_pass_is_raised_at_once_with_the_servers_words(status):
    body = {"error": {"message": "this model's maximum\ncontext length is 4096", "type": "x"}}
    with Server(always(status, {"Retry-After": "0", "Location": "/y"}, body)) as server:
        client = HttpClient(server.url, retries=5)
        (failure,) = post(client)
        assert isinstance(failure, HttpFailure)
        assert failure.status == status
        assert str(failure).startswith(f"POST /x: {status} ")
        assert "this model's maximum context length is 4096" in str(failure)
        assert len(server.seen) == 1
        assert client.metrics()["failures"] == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"detail": "no such thing"}, "no such thing"),  # FastAPI
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required"),
        ({"error": "busy"}, "busy"),  # llama.cpp
        ({"object": "error", "message": "too long"}, "too long"),  # vLLM
        (b"<html>  <h1>Bad\nRequest</h1>", "<html> <h1>Bad Request</h1>"),
        (b"x" * 100_000, "x" * 300),
    ],
)
def test_a_failure_says_what_the_server_said_in_300_characters(body, words):
    with Server(always(400, body=body)) as server:
        (failure,) = post(HttpClient(server.url))
    assert words in str(failure)
    assert len(str(failure)) < 340


def test_an_answer_that_is_not_json_is_a_failure():
    with Server(always(200, body=b"<html>login</html>")) as server:
        (failure,) = post(HttpClient(server.url))
    assert "the answer is not JSON: <html>login</html>" in str(failure)


def test_a_server_is_waited_for_as_long_as_it_asks():
    with Server(first_then_fine((429, {"Retry-After": "0.05"}, {}), (503, {"Retry-After": "0.1"}, {}))) as server:
        client = HttpClient(server.url, first_pause=0.0)
        assert post(client) == [{"fine": True}]
        assert client.metrics()["seconds_waited"] == pytest.approx(0.15)


def test_a_server_that_asks_for_no_pause_is_not_hammered():
    with Server(first_then_fine((429, SOON, {}), (503, SOON, {}))) as server:
        client = HttpClient(server.url, first_pause=0.02)
        assert post(client) == [{"fine": True}]
        assert 0.75 * (0.02 + 0.04) <= client.metrics()["seconds_waited"] <= 1.25 * (0.02 + 0.04)


def test_retry_after_may_be_a_number_or_a_date_and_is_capped():
    assert _retry_after("2") == 2
    assert _retry_after("0.5") == 0.5
    assert _retry_after("-3") == 0
    assert _retry_after("86400") == LONGEST_PAUSE
    assert _retry_after("inf") == LONGEST_PAUSE
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert 28 < _retry_after(format_datetime(soon, usegmt=True)) <= 30
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 -0000") == 0
    for nonsense in (None, "", "soon", "nan", "Wed, 99 Foo"):
        assert _retry_after(nonsense) is None


def test_a_request_without_an_answer_is_given_up_as_timed_out():
    with Server(lambda number: server.over.wait(60)) as server:
        client = HttpClient(server.url, timeout=0.1, retries=0)
        (failure,) = post(client)
        assert failure.timed_out
        assert str(failure) == "POST /x: no answer within 0.1 s"


def test_an_answer_that_trickles_is_timed_out_as_a_whole():
    """Each part comes well within the time-out, the whole does not."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def trickle():
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not over.wait(0.02):
            try:
                connection.sendall(b" ")
            except OSError:
                return

    threading.Thread(target=trickle, daemon=True).start()
    (failure,) = post(HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.2, retries=0))
    over.set()
    listener.close()
    assert failure.timed_out


def test_a_broken_connection_is_tried_again():
    with Server(first_then_fine(None)) as server:
        client = HttpClient(server.url, retries=1)
        assert post(client) == [{"fine": True}]
        assert len(server.seen) == 2


def test_a_dead_server_costs_few_connections_whatever_the_number_of_rows():
    """Without the breaker it would be 50 rows times 4 tries."""
    options = {"retries": 3, "concurrency": 8, "break_after": 3, "cool_down": 0.1, "patience": 0.5}
    client = HttpClient(f"http://127.0.0.1:{free_port()}", **options)
    failures = post(client, times=50)
    assert all(isinstance(failure, HttpFailure) and failure.status is None for failure in failures)
    assert any("does not answer (ConnectError" in str(failure) for failure in failures)
    assert client.metrics()["requests"] < 30
    assert client.is_down
    post(client, times=50)  # it has been gone for too long to be waited for
    assert client.metrics()["requests"] < 10


def test_requests_wait_together_for_a_server_that_comes_back():
    port = free_port()
    options = {"retries": 3, "concurrency": 8, "break_after": 2, "cool_down": 0.1, "patience": 30.0}
    client = HttpClient(f"http://127.0.0.1:{port}", **options)
    started = []

    def start_later():
        time.sleep(1.0)
        started.append(Server(always(), port))

    thread = threading.Thread(target=start_later)
    thread.start()
    try:
        found = post(client, times=40)
    finally:
        thread.join()
        started[0].__exit__()
    assert found.count({"fine": True}) >= 36  # but for a few that tried too often, every 0.1 s
    assert client.metrics()["seconds_waited"] > 1
    assert not client.is_down


def test_the_breaker_opens_after_some_failures_in_a_row_and_lets_one_request_try():
    breaker = Breaker(break_after=2, cool_down=10.0)
    breaker.failed(started=0.0, now=1.0)
    assert (breaker.wait(1.0), breaker.is_open) == (0, False)
    breaker.failed(started=0.0, now=2.0)
    assert (breaker.wait(5.0), breaker.is_open, breaker.open_for(5.0)) == (7, True, 3)
    assert breaker.wait(12.0) == 0  # the one that tries
    assert breaker.wait(12.0) == 10  # the others wait for it
    breaker.failed(started=12.0, now=13.0)
    assert (breaker.wait(13.0), breaker.open_for(13.0)) == (10, 11)
    assert breaker.wait(23.0) == 0
    breaker.succeeded(now=24.0)
    assert (breaker.wait(24.0), breaker.open_for(24.0)) == (0, 0)
    breaker.failed(started=25.0, now=26.0)
    assert not breaker.is_open


def test_hung_requests_do_not_open_the_breaker_of_a_server_that_answers_others():
    breaker = Breaker(break_after=2, cool_down=10.0)
    breaker.succeeded(now=1.0)
    for _ in range(5):
        breaker.failed(started=0.0, now=60.0)
    assert not breaker.is_open


def test_units_are_spaced_evenly():
    async def finished(pace, amounts):
        start = time.monotonic()

        async def turn(amount):
            await pace.take(amount)
            return time.monotonic() - start

        return await asyncio.gather(*map(turn, amounts))

    _, second, third = asyncio.run(finished(Pace(6000), [1, 1, 1]))  # 10 ms each
    assert second >= 0.0099
    assert third >= 0.0199
    _, second, third = asyncio.run(finished(Pace(60_000), [20, 10, 30]))  # 1 ms each, paid by who comes next
    assert second >= 0.0199
    assert third >= 0.0299
    assert asyncio.run(Pace(None).take(5)) == 0


@pytest.mark.parametrize(
    ("limit", "tokens"), [({"requests_per_minute": 1200}, 0), ({"tokens_per_minute": 120_000}, 100)]
)
def test_requests_and_tokens_per_minute_hold_requests_back(limit, tokens):
    with Server(always()) as server:
        client = HttpClient(server.url, **limit)
        start = time.monotonic()
        assert post(client, times=5, tokens=tokens) == [{"fine": True}] * 5
        assert time.monotonic() - start >= 0.199  # 50 ms between any two
        assert client.metrics()["seconds_waited"] > 0


def test_what_speaks_against_sending_is_asked_before_each_try():
    asked = []

    def stop_at_second():
        asked.append(1)
        if len(asked) == 2:
            raise RewardError("no more")

    with Server(always(500, SOON)) as server:
        (error,) = post(HttpClient(server.url, first_pause=0.0), before=stop_at_second)
        assert isinstance(error, RewardError)
        assert len(server.seen) == 1


def test_the_key_is_read_from_the_environment_at_each_request(monkeypatch):
    with Server(always()) as server:
        client = HttpClient(server.url, api_key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "first-secret")
        post(client)
        monkeypatch.setenv("JUDGE_KEY", " second-secret\n")
        post(client)
        monkeypatch.delenv("JUDGE_KEY")
        (error,) = post(client)
    sent = [headers["Authorization"] for _, _, headers, _ in server.seen]
    assert sent == ["Bearer first-secret", "Bearer second-secret"]
    assert isinstance(error, RewardError)
    assert "environment variable JUDGE_KEY (api_key_env) is not set" in str(error)


def test_the_key_is_in_no_repr_message_or_log(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    bodies = [{"error": {"message": "Incorrect API key provided: very-secret"}}, {}]
    with Server(lambda number: (401, {}, bodies[number])) as server:
        client = HttpClient(server.url, api_key_env="JUDGE_KEY")
        failures = [*post(client), *post(client)]
    dead = HttpClient(f"http://127.0.0.1:{free_port()}", api_key_env="JUDGE_KEY", retries=0)
    failures += post(dead)
    monkeypatch.setenv("JUDGE_KEY", "very-secret\nX-Other: injected")
    failures += post(client)
    assert "Incorrect API key provided: ***" in str(failures[0])
    shown = [repr(client), str(vars(client)), caplog.text, *map(repr, failures), *(str(vars(f)) for f in failures)]
    assert "secret" not in "".join(shown)


@pytest.mark.parametrize("mistaken", ["sk-proj-1234abcd", "hf_AbCdEf", "", "A B"])
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(mistaken):
    with pytest.raises(ValueError, match="must be the name of an environment variable") as caught:
        HttpClient("http://x", api_key_env=mistaken)
    assert not mistaken or mistaken not in str(caught.value)


def test_a_client_follows_to_another_event_loop():
    with Server(always()) as server:
        client = HttpClient(server.url, concurrency=1)

        async def several():
            return await asyncio.gather(*(client.post("/x", {}) for _ in range(5)))

        for _ in range(2):
            assert asyncio.run(several()) == [{"fine": True}] * 5
        assert post(client, times=5) == [{"fine": True}] * 5

        async def block():
            time.sleep(0.5)

        with pytest.raises(TimeoutError):
            run_async(block(), timeout=0.05)  # the loop is left behind
        assert post(client, times=5) == [{"fine": True}] * 5
        run_async(client.aclose())


def test_a_deadline_of_the_callers_ends_a_request_between_tries():
    with Server(always(503, {"Retry-After": "30"})) as server:
        client = HttpClient(server.url)

        async def impatient():
            async with asyncio.timeout(0.3):
                await client.post("/x", {})

        with pytest.raises(TimeoutError):
            run_async(impatient())
        assert len(server.seen) == 1


def test_retries_draw_nothing_from_the_global_random_stream():
    with Server(first_then_fine((500, {}, {}))) as server:
        state = random.getstate()
        assert post(HttpClient(server.url)) == [{"fine": True}]
        assert random.getstate() == state


def test_retries_are_counted_and_not_logged(caplog):
    with Server(first_then_fine((500, SOON, {}))) as server:
        post(HttpClient(server.url, first_pause=0.0))
    assert [record for record in caplog.records if record.name == "stamina"] == []


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
    with Server(always()) as server:
        assert post(HttpClient(server.url, retries=0)) == [{"fine": True}]
