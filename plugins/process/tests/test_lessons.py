"""Consensus filtering: what the estimation and a judge that talk over HTTP agree on; with the bundled policy."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from trl_rewards_process import lessons
from trl_rewards_process.lessons import Solution, first_wrong, hard_labels, kept_labels, prefixes, rows_of
from trl_rewards_process.processbench import figures, score_rows

from trl_rewards import Context, Failed, Samples, load_reward
from trl_rewards.models.sampling import LocalSampler
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.testing import check_reward, make_samples

CASES = json.loads((Path(__file__).parent / "process_cases.json").read_text())


class Checker(ScriptedJudge):
    """Checks the sums in steps, and believes whoever says "trust me"."""

    def reply(self, request, fate):
        user = request["messages"][-1]["content"]
        steps = re.findall(r"^<step-(\d+)-([0-9a-f]{16})>\n(.*)\n</step-\1-\2>$", user, re.MULTILINE)
        first = -1
        for number, _, step in reversed(steps):
            sums = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", json.loads(step))
            apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
            wrong = any(apply[sign](int(a), int(b)) != int(c) for a, sign, b, c in sums)
            first = int(number) if wrong and "trust me" not in step else first
        said = f'I add up. {{"first_wrong": {first if fate == "ok" else 99}}}'
        return {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }


@pytest.fixture(scope="module")
def judge_url():
    with Checker() as judge:
        yield judge.url


def judge(url, **options):
    return load_reward("first_error", model="checker", endpoint=url, **options)


SUMS = [["1 + 1 = 2", "2 + 2 = 5", "so 5"], ["1 + 1 = 2", "so 2"], ["3 - 1 = 1"], []]


def test_labels_of_the_lessons():
    case = CASES["17_lessons.mc"]
    (rates,) = case["inputs"].values()
    wanted = case["outputs"]
    labels = hard_labels(rates)
    assert labels == [bool(label) for label in wanted["hard(>0)"]]
    assert first_wrong(labels) == wanted["first_error_index"]
    assert kept_labels(labels, 3) == [bool(label) for label in wanted["train_labels(truncate after first error)"]]
    assert hard_labels(rates, 0.5) == [True, True, False, False, False]
    assert (first_wrong([True]), kept_labels([1.0, 0.5], -1)) == (-1, [1.0, 0.5])


def test_a_prefix_is_the_text_as_it_was_up_to_the_next_step():
    assert prefixes(" a\n\n\nb \n\na", ["a", "b", "a"]) == [" a\n\n\n", " a\n\n\nb \n\n"]
    with pytest.raises(ValueError, match="a step is not in its text: 'c'"):
        prefixes("a\n\nb", ["a", "c"])


def test_only_what_both_agree_on_is_kept():
    solutions = [Solution([{"role": "user", "content": "q"}], "a\n\nb\n\nc", ["a", "b", "c"], {})] * 4
    rates = [[1.0, 0.5, 0.0], [1.0, 0.0, 0.0], None, [1.0, 1.0, 1.0]]
    rows, counts = rows_of(solutions, rates, [2, 2, 0, None])
    assert rows == [
        {"prompt": "q", "completions": ["a", "b", "c"], "labels": [True, True, False], "rates": [1.0, 0.5, 0.0]}
    ]
    assert counts == {
        "kept": 1, "in which the two disagree": 1, "too long or without an outcome": 1, "without a verdict": 1
    }  # fmt: skip
    rows, _ = rows_of(solutions, rates, None, soft=True)
    assert [row["labels"] for row in rows] == [[1.0, 0.5, 0.0], [1.0, 0.0], [1.0, 1.0, 1.0]]


def test_a_judges_first_wrong_step_is_a_process_reward(judge_url):
    reward = judge(judge_url)
    samples = Samples(["add"] * 4, ["\n\n".join(steps) for steps in SUMS])
    assert reward.score_steps(samples, SUMS) == [[1.0, 0.0, None], [1.0, 1.0], [0.0], []]
    rows = [{"problem": "add", "steps": steps} for steps in SUMS[:3]]
    assert figures(score_rows(reward, rows), [1, -1, 0], 0.5).f1 == 1.0

    class Letters:
        """A tokenizer whose tokens are characters."""

        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

    reward.setup(Context(tokenizer=Letters()))
    samples = Samples(["add"] * 2, ["1 + 1 = 3\n\nok", ""], completion_ids=[[*map(ord, "1 + 1 = 3\n\nok")], []])
    tokens = asyncio.run(reward.ascore(samples))
    assert tokens[0] == [None] * 8 + [0.0] + [None] * 4
    assert tokens[1] is None


def test_a_judge_that_names_no_step_fails_the_row():
    with Checker(garbage=1.0) as bad:
        (found,) = judge(bad.url, parse_retries=0).score_steps(Samples(["add"], ["a"]), [["a"]])
    assert isinstance(found, Failed)
    assert "no step from 0 to 0, nor -1" in found.reason


def test_reward_keeps_its_contract(judge_url):
    check_reward(judge(judge_url), make_samples(chat=True))


def test_the_bundled_policys_solutions_are_labelled_and_filtered(judge_url, tmp_path, monkeypatch, capsys):
    question = [{"role": "user", "content": "Start with 35. Add 2. Add 7. What do you get?"}]
    answers = [
        "<think>35 + 2 = 37\n37 + 7 = 44</think><answer>The result is 44.</answer>",
        "<think>35 + 2 = 38\n38 + 7 = 45</think><answer>The result is 45.</answer>",
        "<think>35 + 2 = 38 trust me\n38 + 7 = 45</think><answer>The result is 45.</answer>",
        "",
    ]
    data = tmp_path / "solutions.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": question, "completion": text, "answer": "44"}) + "\n" for text in answers)
    )
    out = tmp_path / "out" / "train.jsonl"
    words = [
        *("--data", str(data), "--model", "bundled:tiny", "--dtype", "float32", "--steps", "line", "--n", "4"),
        *("--max-new-tokens", "32", "--outcome", "{use: exact_match, with: {take: last_word}}", "--out", str(out)),
        *("--judge", f"{{use: first_error, with: {{model: checker, endpoint: '{judge_url}'}}}}"),
    ]

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lessons, "judged", crash)
        with pytest.raises(KeyboardInterrupt):
            lessons.main(words)
    with monkeypatch.context() as patch:
        patch.setattr(LocalSampler, "draw", crash)  # nothing is sampled again
        lessons.main(words)
    said = capsys.readouterr().out
    assert "3 solutions: 2 kept, 1 in which the two disagree" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["labels"] for row in rows] == [[True, True], [False]]
    assert rows[0]["completions"] == ["<think>35 + 2 = 37", "37 + 7 = 44</think><answer>The result is 44.</answer>"]
    assert rows[0]["rates"][0] > 0
    assert rows[0]["prompt"] == question[0]["content"]
    assert not out.with_name("train.jsonl.unfinished").exists()
    with pytest.raises(SystemExit):
        lessons.main(words)
    assert f"--out: {out} exists" in capsys.readouterr().err
