"""The scripted judge follows its rules, speaks the protocol, has bad days on request; and training survives them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter

import pytest

from trl_rewards import Context, Pipeline, load_reward
from trl_rewards.components import Status
from trl_rewards.models.scripted_judge import ScriptedJudge, read_question, verdict, worth
from trl_rewards.scoring import Source, World, score_sources
from trl_rewards.testing import make_samples, run_reward


@pytest.mark.parametrize(
    ("criteria", "better", "worse"),
    [
        ("Be short.", "Yes.", "Yes, and here is why that is so, in many more words."),
        ("Be detailed.", "Yes, and here is why that is so, in many more words.", "Yes."),
        ("Prefer polite answers.", "Thank you, please come in.", "Come in."),
        ("Give numbers.", "There are 3 of 12.", "There are some."),
        ("Its sums are right.", "3 + 4 = 7, 7 - 2 = 5", "3 + 4 = 7, 7 - 2 = 4"),
        ("Its sums are right.", "The result is 7.", "3 + 4 = 8"),
        ("Use a bullet list.", "- one\n- two", "one, two"),
        ("Show enthusiasm with exclamation marks.", "Great!!", "Great."),
        ("Avoid exclamation marks.", "Great.", "Great!!"),
        ("Write in capitals.", "YES SIR", "yes sir"),
        ("Ask a question.", "Why?", "Because."),
        ("Do not be long, but polite.", "thanks", "word " * 50),
    ],
)
def test_the_judge_follows_the_words_in_the_criteria(criteria, better, worse):
    assert worth(better, criteria) > worth(worse, criteria)


def test_criteria_without_a_known_word_make_no_difference():
    assert worth("Yes.", "Be good.") == worth("No!", "Be good.") == 0.5
    assert worth(" ", "Be good.") == 0
    assert worth("the cat sat", "Be good.", "the cat sat") > worth("a dog", "Be good.", "the cat sat")


def test_rewardanythings_message_gets_rewardanythings_reply():
    """One JSON object in, as in https://huggingface.co/papers/2506.03637, scores and a ranking out."""
    asked = {
        "principle": "Judge by how short they are",
        "prompt": "What is the capital of France?",
        "responses": {
            "model-1": "I think it might be Lyon or Paris. " * 9,
            "model-2": "Paris.",
            "model-3": "P a r i s.",
        },
    }
    messages = [{"role": "system", "content": "…"}, {"role": "user", "content": json.dumps(asked, ensure_ascii=False)}]
    found = verdict(read_question(messages))
    assert found == {
        "scores": {"model-1": 2, "model-2": 5, "model-3": 4},
        "best-to-worst": ["model-2", "model-3", "model-1"],
    }
    with ScriptedJudge() as judge:
        answer = post(judge.url + "/chat/completions", {"model": "x", "messages": messages})
    content = answer["choices"][0]["message"]["content"]
    thought, _, body = content.partition("</think>\n")
    assert thought.startswith("<think>")
    assert json.loads(body) == found
    assert answer["usage"]["prompt_tokens"] == len(messages[1]["content"].split()) + 1
    assert answer["usage"]["completion_tokens"] == len(content.split())


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("3 + 4 = 7\n7 * 2 = 14\nThe answer is 14.", [1, 1, 1]),
        ("3 + 4 = 8\n8 * 2 = 16\nThe answer is 16.", [0, None, None]),
        ("3 + 4 = 7\n7 - 9 = -2, 7 * 2 = 15\nThe answer is 15.", [1, 0, None]),
        ("3 + 4 = 7\nThe answer is 14.", [1, 0]),
        ("easy\nThe answer is 14.", [1, 0]),
        ("I do not know.", [1]),
    ],
)
def test_the_first_wrong_step_has_a_wrong_sum_or_a_number_from_nowhere(completion, wanted):
    reward = load_reward("first_error", model="scripted", endpoint="bundled:judge", steps="line")
    reward.setup(Context())
    samples = make_samples([completion])
    assert reward.score_steps(samples, reward.steps_of(samples)) == [wanted]
    reward.close()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def test_the_protocol_is_openais():
    with ScriptedJudge() as judge:
        with urllib.request.urlopen(judge.url + "/models", timeout=20) as answer:
            assert json.loads(answer.read())["data"][0]["id"] == "scripted"
        asked = {
            "messages": [{"role": "user", "content": '{"principle": "x", "prompt": "y", "responses": {"a": "b"}}'}]
        }
        whole = post(judge.url + "/chat/completions", asked)["choices"][0]
        cut = post(judge.url + "/chat/completions", asked | {"max_tokens": 3})["choices"][0]
        assert (whole["finish_reason"], cut["finish_reason"]) == ("stop", "length")
        assert cut["message"]["content"] == "<think>I measure what"
        plain = post(judge.url + "/chat/completions", asked | {"response_format": {"type": "json_object"}})
        assert json.loads(plain["choices"][0]["message"]["content"])["scores"] == {"a": 3}
        for body in ({"messages": []}, {}, {"messages": [{"role": "user", "content": 4}]}):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                post(judge.url + "/chat/completions", body)


def test_faults_are_drawn_by_seed_request_and_repeat():
    shares = {"garbage": 0.2, "errors": 0.1, "hangs": 0.1}
    with ScriptedJudge(**shares) as one, ScriptedJudge(**shares) as same, ScriptedJudge(seed=1, **shares) as other:
        bodies = [str(number // 2).encode() for number in range(4000)]
        first = [one.fate(body) for body in bodies]
        assert first == [same.fate(body) for body in bodies]
        assert first != [other.fate(body) for body in bodies]
        assert one.fates["garbage"] / 4000 == pytest.approx(0.2, abs=0.03)
        assert one.fates["error"] / 4000 == pytest.approx(0.1, abs=0.03)
        assert one.fates["hang"] / 4000 == pytest.approx(0.1, abs=0.03)
        assert any(first[row] != first[row + 1] for row in range(0, 4000, 2))  # a repeat may meet something else


def test_it_runs_from_the_command_line():
    command = [sys.executable, "-m", "trl_rewards.models.scripted_judge", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            assert "rules, not a model" in said
            url = said.split(" at ")[1].partition(";")[0]
            with urllib.request.urlopen(url + "/models", timeout=20) as answer:
                assert answer.status == 200
        finally:
            process.terminate()


ROWS = 48
TEXTS = [" ".join(["word"] * (row % 40) + ["please"] * (row % 3)) or "x" for row in range(ROWS)]
JUDGE = {"model": "scripted", "criteria": "Be short and polite.", "scale": [0, 100]}


@pytest.mark.slow
def test_no_score_is_made_up_on_a_bad_day():
    """A fifth garbage, a tenth errors, a tenth hangs, and the server dies for a while: the run goes on, every number
    is what the healthy judge says, every hole has its reason, and the metrics tell what happened."""
    with ScriptedJudge() as healthy:
        truth = run_reward(load_reward("judge", endpoint=healthy.url, **JUDGE), make_samples(TEXTS))
    shares = {"garbage": 0.2, "errors": 0.1, "hangs": 0.1}
    logged: list[tuple[str, float]] = []
    with ScriptedJudge(down_after=60, down_for=1.0, **shares) as server:
        options = {"request_timeout": 0.5, "attempts": 5, "cool_down": 0.2, "parse_retries": 0, "in_flight": 16}
        reward = load_reward("judge", endpoint=server.url, **options, **JUDGE)
        pipeline = Pipeline([Source("judge", reward)])
        pipeline.setup(Context(log_metric=lambda name, value: logged.append((name, value))))
        holes = 0
        for step in range(2):
            batch = pipeline.score(make_samples(TEXTS, step=step))
            values, status = batch.scores.values[:, 0].tolist(), batch.scores.status[:, 0].tolist()
            for value, state, true in zip(values, status, truth, strict=True):
                assert (value == true) if state == Status.OK else (value != value)
            holes += sum(state != Status.OK for state in status)
        assert server.fates["down"] > 0
        reasons = score_sources(pipeline.sources, make_samples(TEXTS), 1, World()).reasons[0]
        pipeline.close()
    assert 0 < holes < ROWS
    assert reasons
    assert all("gave no score" in reason or reason.startswith("POST /chat/completions: ") for reason in reasons)
    sums: Counter[str] = Counter()
    for name, value in logged:
        sums[name.removeprefix("judge/")] += value
    assert sums["unparsable"] == server.fates["garbage"]
    assert sums["requests"] >= server.fates.total()
    assert sums["retries"] >= server.fates["error"] + server.fates["hang"] - sums["http_failures"]
    assert sums["unparsable"] + sums["http_failures"] == holes + len(reasons)
    assert sums["completion_tokens"] > 0


def test_a_judge_that_is_gone_stops_the_run_with_its_reason():
    with ScriptedJudge() as server:
        reward = load_reward("judge", endpoint=server.url, attempts=2, cool_down=0.1, patience=0.3, **JUDGE)
    with pytest.raises(RuntimeError, match=r"failed on 48 of 48 completions.*ConnectError"):
        Pipeline([Source("judge", reward)]).score(make_samples(TEXTS))
