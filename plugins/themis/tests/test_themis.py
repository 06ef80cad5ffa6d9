"""The reward `themis`: trajectories of many rows at a time, their tools, their score, and what of them is shown."""

from __future__ import annotations

import json

import pytest
import torch
from trl_rewards_themis.trajectory import begin, cut
from trl_rewards_themis.writing import Writer

from trl_rewards import Failed, RewardError, Samples, Tool, Traced, load_reward
from trl_rewards.loading import build
from trl_rewards.models import Loading, load_pretrained, load_tokenizer
from trl_rewards.testing import check_reward, plugin_manager

OPTIONS = {"dtype": "float32", "max_new_tokens": 12, "max_length": 200}
PROMPTS = ["What is 3 plus 4?", "What is 1 plus 1?", "What is 5 plus 4? Do I need to use a tool?"]
ANSWERS = ["7", "They differ.", "9"]


def writer_of(path, **options):
    from transformers import AutoModelForCausalLM

    loading = Loading(path=path, dtype="float32", device="cpu")
    model, _ = load_pretrained(AutoModelForCausalLM, loading)
    given = {"max_new_tokens": 40, "temperature": 0.0, "max_length": 200, "token_budget": None} | options
    return Writer(model, load_tokenizer(loading), loading, **given)


def test_a_batch_writes_what_each_row_writes_alone(themis_path):
    texts = [begin(*row).prompt for row in zip(PROMPTS, ANSWERS, strict=True)]
    writer = writer_of(themis_path)
    together = writer.write(texts)
    assert together == [writer.write([text])[0] for text in texts]
    assert writer_of(themis_path, token_budget=1).write(texts) == together
    assert len(set(together)) == 3


def test_stopping_at_an_observation_writes_what_cutting_afterwards_leaves(themis_path, monkeypatch):
    """A model that asks for observations: its logits for that mark are raised."""
    writer = writer_of(themis_path, max_new_tokens=30)
    mark = writer._tokenizer.convert_tokens_to_ids("<start_observation>")
    with torch.no_grad():
        writer._model.lm_head.weight[mark] *= 3
    texts = [begin(*row).prompt for row in zip(PROMPTS, ANSWERS, strict=True)]
    lengths = []
    generate = writer._model.generate

    def counted(**given):
        found = generate(**given)
        lengths.append(found.shape[1])
        return found

    writer._model.generate = counted
    stopped = writer.write(texts)
    never = "trl_rewards_themis.writing.AtObservation.__call__"
    monkeypatch.setattr(never, lambda self, ids, scores, **_: ids[:, 0] < 0)
    whole = writer.write(texts)
    assert stopped == whole == [cut(text) for text in whole]
    assert lengths[0] < lengths[1], "no row asked for an observation, so nothing was tried here"


class Script:
    """Stands for the writer: says what a script has for each text, and notes what it was asked together."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def write(self, texts):
        self.asked.append(list(texts))
        return [next(word for start, word in self.said if start in text) for text in texts]


class Twice(Tool):
    """Says its input twice, and the dataset's column."""

    description = "twice"
    column: str = "note"

    def reads(self):
        return (self.column,)

    def call(self, input, call):
        if input == "bad":
            raise ValueError("no")
        return f"{input}{input} {call.row[self.column]} {call.question} {call.answer}"


@pytest.fixture
def tools():
    class Plugin:
        @staticmethod
        def register_tools():
            return {"twice": Twice}

    from trl_rewards import hookimpl

    Plugin.register_tools = staticmethod(hookimpl(Plugin.register_tools))
    with plugin_manager({"twice": Plugin}):
        yield


def test_rows_at_different_steps_are_written_together_and_tools_see_their_row(tools, themis_path):
    reward = load_reward("themis", path=themis_path, tools=[{"use": "twice", "with": {"column": "id"}}], **OPTIONS)
    assert reward.reads() == ("id",)
    said = [
        ("aa 1 q1 a1", "<start_work> Work: It is twice."),
        ("An error occurred", "<start_work> Work: It cannot be."),
        ("Question: q1", " Thought: t\nAction: twice\nAction Input: a\n"),
        ("Question: q2", " Thought: u\nAction: twice\nAction Input: bad\n"),
        ("Finished", " Work: No need."),
        ("Question: q3", " Thought: Do I need to use a tool? No\nFinished."),
        ("q4", " Thought: v\nAction: nothing\nAction Input: x"),
        ("q5", Failed("too long")),
    ]
    _, scorer = reward._running
    script = Script(said)
    reward._running = script, scorer
    samples = Samples([f"q{i}" for i in range(1, 6)], [f"a{i}" for i in range(1, 6)], columns={"id": [1, 2, 3, 4, 5]})
    scores = reward.score(samples)
    assert [len(asked) for asked in script.asked] == [5, 4, 1]  # q4 asks for a tool that is not there, three times
    assert [score.trace["rationale"] for score in scores[:4]] == ["It is twice.", "It cannot be.", "No need.", None]
    (step,) = scores[0].trace["steps"]
    assert step | {"seconds": 0} == {
        "thought": "t",
        "tool": "twice",
        "input": "a",
        "observation": "aa 1 q1 a1",
        "seconds": 0,
    }
    assert scores[1].trace["steps"][0]["observation"].startswith("An error occurred")
    assert scores[3].trace["finished"] is False
    assert [step["observation"] for step in scores[3].trace["steps"]] == [None] * 3
    assert isinstance(scores[4], Failed)
    assert scores[4].reason == "too long"
    # What is scored is the whole text and its end.
    text = (
        "### USER:\nQuestion: q3\nAnswer: a3\n### ASSISTANT:\n<start_tool> Thought: Do I need to use a tool? No\n"
        "Finished.\n<start_work> Work: No need.</s>"
    )
    (wanted,) = scorer.score_texts([text], add_special_tokens=True)
    assert scores[2] == pytest.approx(wanted, abs=1e-5)


def test_the_score_is_the_heads_at_the_last_token_or_at_the_mean(themis_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(themis_path), load_tokenizer(Loading(path=themis_path))
    head = load_file(f"{themis_path}/model.safetensors")["v_head.weight"][0]
    samples = Samples(PROMPTS, ANSWERS)
    for pooling in ("last", "mean"):
        reward = load_reward("themis", path=themis_path, pooling=pooling, max_iterations=1, **OPTIONS)
        scores = reward.score(samples)
        for row, score in enumerate(scores):
            run = begin(PROMPTS[row], ANSWERS[row])
            writer, _ = reward._running
            run.take(writer.write([run.prompt])[0])
            ids = tokenizer(run.prompt + "</s>", return_tensors="pt")["input_ids"]
            hidden = model.model(ids).last_hidden_state[0]
            at = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
            assert score == pytest.approx((at @ head).item(), abs=1e-4)


def test_a_reward_in_any_batch_and_order_is_the_same(themis_path):
    check_reward(load_reward("themis", path=themis_path, max_iterations=2, **OPTIONS))


def test_a_row_that_does_not_fit_fails_and_the_others_do_not(themis_path):
    reward = load_reward("themis", path=themis_path, **{**OPTIONS, "max_length": 60})
    scores = reward.score(Samples(["What is 3 plus 4? " * 20, "What is 3"], ["7", "7"]))
    assert isinstance(scores[0], Failed)
    assert "leaves no room in 60" in scores[0].reason
    assert isinstance(scores[1], Traced)


def test_wrong_options_are_told_together(themis_path):
    _, (problem,) = build("reward", "themis", {"path": themis_path, "tools": ["calculato", {"with": {}}, "calendar"]})
    assert "tools[0]" in problem
    assert "did you mean 'calculator'" in problem
    assert "tools[1]: wanted a name, or {use: name" in problem
    _, (problem,) = build("reward", "themis", {"path": themis_path, "max_iterations": 0})
    assert "max_iterations must be at least 1, got 0" in problem


def test_a_model_without_a_head_is_refused(base_path):
    with pytest.raises(RewardError, match="has no scalar head"):
        load_reward("themis", path=base_path, **OPTIONS)


def test_trajectories_are_written_beside_the_scores(themis_path, write, tmp_path):
    from typer.testing import CliRunner

    from trl_rewards.cli import app

    options = json.dumps({"path": themis_path} | OPTIONS)
    recipe = write("recipe.yaml", f"trainer: grpo\nrewards:\n  - use: themis\n    with: {options}\n")
    rows = [{"prompt": p, "completion": [a, "7"]} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    data = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    trace = tmp_path / "trace.jsonl"
    arguments = ["score", "--config", recipe, "--data", data, "--out", str(tmp_path / "out.jsonl")]
    arguments += ["--trace", str(trace), "--batch-size", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[1:]]
    told = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [(line["row"], line["completion"], line["total"]) for line in told] == [
        (line["row"], line["completion"], line["total"]) for line in scored
    ]
    assert [line["text"] for line in told] == [text for row in rows for text in row["completion"]]
    assert all({"steps", "rationale", "finished"} == set(line["traces"]["themis"]) for line in told)
    # Interrupted in the second batch: its rows are told of once.
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:-1]))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [json.loads(line) for line in trace.read_text().splitlines()] == told
