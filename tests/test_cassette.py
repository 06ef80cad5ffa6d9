"""Recording and replaying judges, and the cache of their replies: the same scores without the judge."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from trl_rewards import Context, Failed, RewardError, load_reward
from trl_rewards.models.cassette import path_of_rank
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.testing import make_samples, run_reward

JUDGE = {"model": "scripted", "criteria": "Be short."}


class Counting(ScriptedJudge):
    """Says 1 to the first request, 2 to the second, … : equal questions get different answers."""

    def reply(self, request, fate):
        said = super().reply(request, fate)
        said["choices"][0]["message"]["content"] = json.dumps({"score": len(self.requests) + 1})
        return said


def scores(texts, name="judge", step=0, **options):
    reward = load_reward(name, **JUDGE, **options)
    try:
        group_size = len(texts) if reward.scope == "group" else None
        samples = make_samples(texts, prompts=["Q"] * len(texts), step=step, group_size=group_size)
        return run_reward(reward, samples), reward.metrics
    finally:
        reward.close()


@pytest.mark.parametrize("name", ["judge", "pairwise_judge", "listwise_judge"])
def test_a_recorded_run_is_repeated_without_the_server(name, tmp_path):
    tape = str(tmp_path / "tape.jsonl")
    texts = ["a", "a b c", "größe 山 \ud800", "a", ""]
    with ScriptedJudge(garbage=0.3, seed=1) as server:
        recorded, metrics = scores(texts, name, endpoint=server.url, cassette=tape, cassette_mode="record")
        assert metrics["unparsable"] > 0 or name == "listwise_judge"
        url = server.url
    before = Path(tape).read_bytes()
    for endpoint in (url, "http://elsewhere:1/v1", None):  # None: the model would run here, but is not even loaded
        replayed, metrics = scores(texts, name, endpoint=endpoint, cassette=tape, cassette_mode="replay")
        assert [str(score) for score in replayed] == [str(score) for score in recorded]
        assert metrics["requests"] == metrics["prompt_tokens"] == metrics["cost"] == 0
        assert metrics["cache_hits"] == len(before.splitlines())
    assert Path(tape).read_bytes() == before


def test_equal_questions_get_their_answers_in_order(tmp_path):
    tape = str(tmp_path / "tape.jsonl")
    with Counting() as server:
        recorded, _ = scores(["a", "b", "a", "a"], endpoint=server.url, cassette=tape, in_flight=1)
    assert sorted(recorded) == [1, 2, 3, 4]
    replayed, _ = scores(["a", "b", "a", "a"], endpoint="http://x", cassette=tape, cassette_mode="replay")
    assert replayed == recorded


class Backwards(ScriptedJudge):
    """Takes longer for earlier questions, and reads nothing of the first try."""

    def reply(self, request, fate):
        number = int(re.search(r'"text (\d+)"', request["messages"][-1]["content"])[1])
        time.sleep(0.01 * (20 - number))
        return super().reply(request, "garbage" if request["temperature"] == 0 else "ok")


def test_lines_stand_in_the_order_of_questions_whatever_order_answers_come_in(tmp_path):
    tape = tmp_path / "tape.jsonl"
    with Backwards() as server:
        scores([f"text {row}" for row in range(20)], endpoint=server.url, cassette=str(tape), in_flight=40)
    requests = [json.loads(line)["request"] for line in tape.read_text().splitlines()]
    shown = [(f"text {row}", attempt) for row in range(20) for attempt in (0, 1)]
    assert len(requests) == 40
    for request, (text, attempt) in zip(requests, shown, strict=True):
        assert request["attempt"] == attempt
        assert f'"{text}"' in request["messages"][-1]["content"]


def test_auto_replays_what_is_there_and_records_the_rest(tmp_path):
    tape = tmp_path / "tape.jsonl"
    with Counting() as server:
        assert scores(["a", "b"], endpoint=server.url, cassette=str(tape), in_flight=1)[0] == [1, 2]
        found, metrics = scores(["b", "c", "a"], endpoint=server.url, cassette=str(tape), in_flight=1)
    assert found == [2, 3, 1]
    assert metrics["requests"] == 1
    assert metrics["cache_hits"] == 2
    assert len(tape.read_text().splitlines()) == 3


def test_a_last_line_that_was_torn_off_is_left_out_and_asked_again(tmp_path):
    tape = tmp_path / "tape.jsonl"
    with Counting() as server:
        options = {"endpoint": server.url, "cassette": str(tape), "in_flight": 1}
        assert scores(["a", "b", "größe"], **options)[0] == [1, 2, 3]
        whole = tape.read_bytes()
        lines = whole.splitlines(keepends=True)
        torn = whole[: -len(lines[-1]) // 2]
        tape.write_bytes(torn)
        found, _ = scores(["a", "b", "größe"], cassette=str(tape), cassette_mode="replay")
        assert found[:2] == [1, 2]
        assert isinstance(found[2], Failed)
        assert tape.read_bytes() == torn  # what is only replayed stays as it is
        assert scores(["a", "b", "größe"], **options)[0] == [1, 2, 4]
    assert tape.read_bytes().splitlines(keepends=True)[:2] == lines[:2]
    assert len([json.loads(line) for line in tape.read_text().splitlines()]) == 3


@pytest.mark.parametrize(
    ("line", "number"), [(b'{"key": 1}', 2), (b'{"key"\n', 2), (b"words", 2), (b'{"key"\n{}\n', 2)]
)
def test_any_other_line_that_is_none_is_refused(tmp_path, line, number):
    tape = tmp_path / "tape.jsonl"
    with Counting() as server:
        scores(["a"], endpoint=server.url, cassette=str(tape))
    before = tape.read_bytes() + line
    tape.write_bytes(before)
    with pytest.raises(RewardError, match=f"line {number} is no request and reply"):
        scores(["a"], cassette=str(tape))
    assert tape.read_bytes() == before


def test_what_is_not_on_the_cassette_is_a_hole(tmp_path):
    tape = str(tmp_path / "tape.jsonl")
    with ScriptedJudge() as server:
        scores(["a"], endpoint=server.url, cassette=tape)
    (found, missing), _ = scores(["a", "b"], endpoint="http://x", cassette=tape, cassette_mode="replay")
    assert found == 10
    assert missing == Failed(f"cassette {tape!r} has no reply to this request, and is only replayed")
    (again,), _ = scores(["a"], endpoint="http://x", cassette=tape, cassette_mode="replay", max_tokens=7)
    assert isinstance(again, Failed)  # another request


def test_modes_that_cannot_work_are_refused(tmp_path):
    tape = str(tmp_path / "tape.jsonl")
    with pytest.raises(RewardError, match=r"no cassette .* to replay"):
        load_reward("judge", **JUDGE, endpoint="http://x", cassette=tape, cassette_mode="replay")
    Path(tape).write_text("not json\n", encoding="utf-8")
    with pytest.raises(RewardError, match="exists, and cassette_mode record starts one"):
        load_reward("judge", **JUDGE, endpoint="http://x", cassette=tape, cassette_mode="record")
    with pytest.raises(RewardError, match="line 1 is no request and reply"):
        load_reward("judge", **JUDGE, endpoint="http://x", cassette=tape)


def test_a_relative_cassette_lies_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ScriptedJudge() as server:
        scores(["a"], endpoint=server.url, cassette="tape.jsonl")
    monkeypatch.chdir("/")
    from trl_rewards.loading import build

    reward, _ = build("reward", "judge", {**JUDGE, "cassette": "tape.jsonl", "cassette_mode": "replay"})
    reward.setup(Context(base_dir=str(tmp_path)))
    assert run_reward(reward, make_samples(["a"], prompts=["Q"])) == [10]


def test_each_rank_has_its_own_cassette(monkeypatch):
    assert path_of_rank("tapes/judge.jsonl") == "tapes/judge.jsonl"
    monkeypatch.setenv("RANK", "0")
    assert path_of_rank("tapes/judge.jsonl") == "tapes/judge.jsonl"
    monkeypatch.setenv("RANK", "3")
    assert path_of_rank("tapes/judge.jsonl") == "tapes/judge.rank3.jsonl"


@pytest.mark.parametrize(
    ("options", "asked"), [({}, 2), ({"temperature": 0.5}, 4), ({"temperature": 0.5, "seed": 1}, 2)]
)
def test_replies_to_repeatable_requests_are_kept(options, asked, tmp_path):
    cache = str(tmp_path / "folder" / "replies.sqlite")
    with ScriptedJudge() as server:
        first, _ = scores(["a", "b c"], endpoint=server.url, reply_cache=cache, **options)
        second, metrics = scores(["b c", "a"], endpoint=server.url, reply_cache=cache, **options)
        assert second == first[::-1]
        assert len(server.requests) == asked
        assert metrics["cache_hits"] == 4 - asked


def test_replies_of_another_judge_and_cut_ones_are_not_taken(tmp_path):
    cache = str(tmp_path / "replies.sqlite")
    with ScriptedJudge() as server, ScriptedJudge() as other:
        scores(["a"], endpoint=server.url, reply_cache=cache)
        scores(["a"], endpoint=other.url, reply_cache=cache)
        assert len(other.requests) == 1
        for _ in range(2):
            scores(["a"], endpoint=other.url, reply_cache=cache, max_tokens=1, parse_retries=0)
        assert len(other.requests) == 3


def test_a_cached_reply_goes_on_the_cassette_too(tmp_path):
    cache, tape = str(tmp_path / "replies.sqlite"), str(tmp_path / "tape.jsonl")
    with ScriptedJudge() as server:
        scores(["a"], endpoint=server.url, reply_cache=cache)
        scores(["a"], endpoint=server.url, reply_cache=cache, cassette=tape)
        assert len(server.requests) == 1
    assert scores(["a"], endpoint="http://x", cassette=tape, cassette_mode="replay")[0] == [10]
