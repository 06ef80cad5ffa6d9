"""The reward `themis_served`, against a real server on this machine that plays a chat model."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path

import pytest
from trl_rewards_themis.served import yes_or_no
from trl_rewards_themis.tools.web_search import WebSearch

from trl_rewards import Failed, Samples, load_reward
from trl_rewards.loading import build
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.testing import check_reward, run_reward
from trl_rewards.toolbox import Toolbox


class Checker(ScriptedJudge):
    """Calls `arithmetic` with the question's sum, compares, and says yes or no; notes what it was asked."""

    def __init__(self, logprobs=True):
        self.asked, self.logprobs = [], logprobs
        super().__init__()

    def reply(self, request, fate):
        self.asked.append(request)
        messages = request["messages"]
        shown = dict(re.findall(r"^<(\w+)-[0-9a-f]{16}>\n(.*)\n</", messages[0]["content"], re.MULTILINE))
        question, answer = json.loads(shown["question"]), json.loads(shown["answer"])
        last = messages[-1]["content"]
        choice = {"finish_reason": "stop"}
        if "Reply with one word" in last:
            right = any(f"{answer} is right" in message["content"] for message in messages)
            said = "Yes" if right else "No"
            if self.logprobs:
                top = [{"token": said, "logprob": math.log(0.8)}, {"token": " yes", "logprob": math.log(0.1)}]
                top.append({"token": "no", "logprob": math.log(0.05)})
                choice["logprobs"] = {"content": [{"token": said, "top_logprobs": top}]}
        elif last.startswith("Observation: "):
            value = last.removeprefix("Observation: ")
            said = f"Work: {answer} is {'right' if value == answer else 'wrong'}."
        elif last.startswith("No tool is called"):
            said = "Work: I cannot know."
        else:
            tool = "arithmetic" if "+" in question else "oracle"
            said = f"Thought: I compute it.\nAction: {tool}\nAction Input: {question}"
        choice["message"] = {"content": said}
        return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


def test_a_chat_model_calls_tools_and_says_yes_or_no():
    with Checker() as server:
        reward = load_reward("themis_served", model="checker", endpoint=server.url, tools=["arithmetic"])
        prompts = ["3 + 4", "3 + 4", "why?"]
        scores = run_reward(reward, Samples(prompts, ["7", "9", "so"]))
        reward.close()
    yes, no = math.log(0.9 / 0.05), math.log(0.1 / 0.85)
    assert scores == [pytest.approx(yes), pytest.approx(no), pytest.approx(no)]
    assert scores[0].trace["rationale"] == "7 is right."
    assert scores[1].trace["steps"][0]["observation"] == "7"
    assert scores[2].trace["steps"][0] | {"seconds": 0} == {
        "thought": "I compute it.",
        "tool": "oracle",
        "input": "why?",
        "observation": None,
        "seconds": 0,
    }
    first = next(request for request in server.asked if len(request["messages"]) == 1)
    assert "arithmetic: Works out an expression" in first["messages"][0]["content"]
    assert "\nObservation:" in first["stop"]
    last = [request for request in server.asked if request.get("logprobs")]
    assert len(last) == 3
    assert {request["max_tokens"] for request in last} == {1}


def test_many_rows_may_ask_the_web_at_a_time(tmp_path, monkeypatch):
    class Search(WebSearch):
        display_name = "search"
        answers_to = ("arithmetic",)

        def call(self, input, call):
            everybody.wait(timeout=30)
            return self.look_up({"q": input})

        async def fetch(self, client, question):
            return str(sum(map(int, question["q"].split("+"))))

    rows = 12  # asyncio's own executor has fewer threads on a small machine, and the cache needs one
    everybody = threading.Barrier(rows)
    with Checker() as server:
        reward = load_reward("themis_served", model="checker", endpoint=server.url, tools=["arithmetic"])
        search = Search(api_key_env=None, timeout=60, cache=str(tmp_path / "kept.sqlite"))
        monkeypatch.setattr(reward, "_toolbox", Toolbox([search]))
        scores = run_reward(reward, Samples([f"{n} + 1" for n in range(rows)], [str(n + 1) for n in range(rows)]))
        reward.close()
    assert [score.trace["steps"][0]["observation"] for score in scores] == [str(n + 1) for n in range(rows)]


def test_a_server_without_logprobs_gives_holes_and_the_trajectory():
    with Checker(logprobs=False) as server:
        reward = load_reward("themis_served", model="checker", endpoint=server.url, tools=["arithmetic"])
        (score,) = run_reward(reward, Samples(["3 + 4"], ["7"]))
        reward.close()
    assert isinstance(score, Failed)
    assert "no logprobs" in score.reason
    assert score.trace["rationale"] == "7 is right."


def test_a_reward_model_may_read_what_the_server_writes(themis_path, tmp_path):
    from safetensors.torch import load_file, save_file

    from trl_rewards.models import Loading, load_scorer

    weights = load_file(f"{themis_path}/model.safetensors")
    weights["score.weight"] = weights.pop("v_head.weight")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = Path(themis_path, name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("ForCausalLM", "ForSequenceClassification"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checker() as server:
        options = {"model": "checker", "endpoint": server.url, "tools": ["arithmetic"], "dtype": "float32"}
        reward = load_reward("themis_served", scorer=str(tmp_path), **options)
        (score,) = run_reward(reward, Samples(["3 + 4"], ["7"]))
        reward.close()
    assert not any(request.get("logprobs") for request in server.asked)
    text = (
        "### USER:\nQuestion: 3 + 4\nAnswer: 7\n### ASSISTANT:\n<start_tool> Thought: I compute it.\n"
        "Action: arithmetic\nAction Input: 3 + 4\n<start_observation> Observation: 7\n"
        "<start_work> Work: 7 is right.</s>"
    )
    scorer = load_scorer(Loading(path=str(tmp_path), dtype="float32", device="cpu"))
    assert [score] == pytest.approx(scorer.score_texts([text], add_special_tokens=True))


def test_yes_and_no_are_added_up_over_their_spellings():
    assert yes_or_no({"Yes": math.log(0.5), " yes": math.log(0.25), "No": math.log(0.1)}, "Yes") == pytest.approx(
        math.log(7.5)
    )
    assert yes_or_no({"Yes": math.log(0.9), "Maybe": math.log(0.01)}, "Yes") == pytest.approx(math.log(90))
    assert isinstance(yes_or_no({"<think>": 0.0}, "<think>"), Failed)


def test_the_contract_is_kept():
    with Checker() as server:
        reward = load_reward("themis_served", model="checker", endpoint=server.url, tools=["arithmetic"])
        check_reward(reward)
        reward.close()


def test_a_server_is_required():
    _, (problem,) = build("reward", "themis_served", {"model": "m"})
    assert "endpoint is required" in problem
