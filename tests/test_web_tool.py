"""Tools that ask a web API, against real servers: equal questions, kept answers, deadlines, keys."""

from __future__ import annotations

import logging
import pickle
import time

import pytest

from tests.test_http import Server, always, free_port
from trl_rewards import Context, RewardError, ToolCall
from trl_rewards.models import WebTool
from trl_rewards.toolbox import NO_RESULT, Toolbox


class Capital(WebTool):
    """Asks for capitals."""

    description = "Knows capitals."
    key_header = "X-API-KEY"

    def call(self, input, call):
        return self.look_up({"of": input})

    async def fetch(self, client, question):
        return (await client.get("/capital", question))["name"]


def ask(tool, *inputs):
    return Toolbox([tool]).run([(text, ToolCall(tool.display_name)) for text in inputs])


def slowly(server_answer):
    def answer(number):
        time.sleep(0.1)
        return server_answer(number)

    return answer


def test_equal_questions_are_asked_once_and_their_answers_kept(tmp_path):
    cache = str(tmp_path / "folder" / "tools.sqlite")
    with Server(slowly(always(body={"name": "Oslo"}))) as server:
        tool = Capital(endpoint=server.url, cache=cache)
        assert [found.text for found in ask(tool, *["Norway"] * 6, "a & b?")] == ["Oslo"] * 7
        assert sorted(path for _, path, _, _ in server.seen) == ["/capital?of=Norway", "/capital?of=a+%26+b%3F"]
        again = Capital(endpoint=server.url, cache=cache)
        assert [found.text for found in ask(again, "Norway")] == ["Oslo"]
        assert len(server.seen) == 2
        ask(Capital(endpoint=server.url, cache=None), "Norway")
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (always(500), "HttpFailure: GET /capital: 500"),
        (
            always(404, body={"message": "no such country"}),
            "HttpFailure: GET /capital: 404 Not Found: no such country",
        ),
        (always(body=b"<html>proxy</html>"), "the answer is not JSON"),
        (always(body=[1, 2]), "TypeError"),
        (always(body={"other": 1}), "KeyError: 'name'"),
        (always(body={"name": 7}), "TypeError: the API's answer is no text but 7"),
        (lambda number: None, "HttpFailure: GET /capital"),
    ],
)
def test_what_a_server_does_wrong_is_an_observation_and_is_not_kept(answer, problem, tmp_path):
    cache = str(tmp_path / "tools.sqlite")
    with Server(answer) as server:
        tool = Capital(endpoint=server.url, cache=cache, retries=0)
        for _ in range(2):
            (found,) = ask(tool, "Norway")
            assert (found.text, found.ok) == (NO_RESULT, False)
            assert problem in found.problem
        assert len(server.seen) == 2


def test_a_server_that_is_not_there_is_an_observation():
    tool = Capital(endpoint=f"http://127.0.0.1:{free_port()}", cache=None, retries=0)
    assert [found.text for found in ask(tool, "Norway")] == [NO_RESULT]


def test_a_busy_server_is_asked_again():
    answers = [(503, {"Retry-After": "0"}, {}), (200, {}, {"name": "Oslo"})]
    with Server(lambda number: answers[number]) as server:
        assert ask(Capital(endpoint=server.url, cache=None), "Norway")[0].text == "Oslo"


def test_a_server_that_hangs_costs_no_more_than_the_deadline():
    server = Server(lambda number: server.over.wait(30))
    with server:
        (found,) = ask(Capital(endpoint=server.url, cache=None, timeout=0.3), "Norway")
    assert (found.text, found.ok) == (NO_RESULT, False)


def test_the_key_goes_into_its_header_and_is_wanted_early(monkeypatch):
    with Server(always(body={"name": "Oslo"})) as server:
        tool = Capital(endpoint=server.url, api_key_env="CAPITAL_KEY", cache=None)
        with pytest.raises(RewardError, match="environment variable CAPITAL_KEY"):
            tool.setup(Context())
        monkeypatch.setenv("CAPITAL_KEY", "s3cret")
        tool.setup(Context())
        ask(tool, "Norway")
    (_, _, headers, _) = server.seen[0]
    assert headers["X-API-KEY"] == "s3cret"
    assert "Authorization" not in headers


def test_a_secret_in_a_query_is_in_no_message_and_no_log(caplog):
    class Leaky(Capital):
        async def fetch(self, client, question):
            return str(await client.get("/capital", {"key": "s3cret", **question}, secrets=["s3cret"]))

    caplog.set_level(logging.DEBUG)
    answers = [(200, {}, {"echo": "s3cret"}), (403, {}, {"error": "key s3cret is no key"})]
    with Server(lambda number: answers[number]) as server:
        tool = Leaky(endpoint=server.url, cache=None)
        fine, refused = ask(tool, "Norway")[0], ask(tool, "Sweden")[0]
    assert fine.text == "{'echo': '***'}"
    assert refused.problem.endswith("key *** is no key")
    assert "s3cret" in server.seen[0][1]
    for record in caplog.records:
        assert record.name.startswith("httpcore") or "s3cret" not in record.getMessage()


def test_a_tool_that_was_used_pickles(tmp_path):
    with Server(always(body={"name": "Oslo"})) as server:
        tool = Capital(endpoint=server.url, cache=str(tmp_path / "tools.sqlite"))
        ask(tool, "Norway")
        again = pickle.loads(pickle.dumps(tool))
        assert ask(again, "Sweden")[0].text == "Oslo"


def test_a_broken_cache_costs_no_answer(tmp_path, caplog):
    (tmp_path / "tools.sqlite").write_bytes(b"no database at all" * 100)
    with Server(always(body={"name": "Oslo"})) as server:
        tool = Capital(endpoint=server.url, cache=str(tmp_path / "tools.sqlite"))
        assert [found.text for found in ask(tool, "Norway", "Sweden")] == ["Oslo", "Oslo"]
    assert [record.message.startswith("cache ") for record in caplog.records if record.levelname == "WARNING"] == [
        True
    ]


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="retries must be 0 or more and concurrency 1 or more, got -1 and 8"):
        Capital(endpoint="http://x", retries=-1)
    with pytest.raises(ValueError, match="no user name or password"):
        Capital(endpoint="http://me:s3cret@x")
    with pytest.raises(ValueError, match="must be the name of an environment variable"):
        Capital(endpoint="http://x", api_key_env="s3cret")
