"""The scripts beside recipes flr/cpu, rewarddance/cpu and rm-r1/cpu: what they teach is what rewards show."""

from __future__ import annotations

import random
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rewards_judges.rm_r1 import winner

from trl_rewards import load_reward
from trl_rewards.bundled import model_path, quiz, teach
from trl_rewards.testing import make_samples

RECIPES = Path(__file__).parents[3] / "recipes"


def script(recipe):
    return SimpleNamespace(**runpy.run_path(str(RECIPES / recipe / "start.py")))


def options(recipe):
    return yaml.safe_load((RECIPES / recipe / "cpu.yaml").read_text())["rewards"][0]["with"]


@pytest.fixture(scope="module")
def questions():
    return quiz.more_questions(random.Random(0), 40, set())


def test_a_taught_model_says_it_in_words_that_are_tokens(tmp_path):
    teach.fine_tune(tmp_path, [("what?", "yes")] * 320, random.Random(0), peak=0.03, words=("yes",))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = tokenizer("what?", return_tensors="pt").input_ids
    assert tokenizer.tokenize("yes, eyes")[0] == "yes"
    assert "yes" not in tokenizer.tokenize("eyes")  # a word of its own alone
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == "yes"


def test_flrs_user_reads_an_answer_as_the_reward_shows_it(questions):
    flr, given = script("flr"), options("flr")
    assert given["utterances"] == {name: {"positive": [a], "negative": [b]} for name, (a, b) in flr.SAID.items()}
    reward = load_reward("flr", **(given | {"path": str(model_path()), "device": "cpu", "dtype": "float32"}))
    reward.score(make_samples(["a"], prompts=["b"]))
    reader, tokenizer = reward._reader, AutoTokenizer.from_pretrained(model_path())
    for question in questions:
        state = random.Random(question.text)
        chat, _ = flr.example(state, tokenizer, question)
        again = random.Random(question.text)
        kind = again.choice(["clean", quiz.flaw(again, question)])
        shown = reader._chat([{"role": "user", "content": question.text}], quiz.REPLIES[kind](again, question))
        before = reader._tails[0]
        assert tokenizer(chat)["input_ids"] == shown + before.ids[: before.start]


def test_rewarddances_judge_is_asked_as_the_reward_asks(questions):
    dance, given = script("rewarddance"), options("rewarddance")
    words = {"model": str(model_path()), "device": "cpu", "yes": ["true"], "no": ["false"]}
    reward = load_reward("yes_token", **(given | words))
    rng = random.Random(0)
    for question in questions:
        reply, kind = dance.answer(rng, question)
        assert dance.OPINIONS[kind].split(",")[0] == ("yes" if kind == "clean" else "no")
        gold = dance.reference(rng, question)
        (ask,) = reward.asks(make_samples([reply], prompts=[question.text], reference=[gold]))
        text = dance.asked(given["template"], rng, gold, reply)
        assert _without_numbers(text) == _without_numbers(ask.messages[0]["content"])


def _without_numbers(text):
    return re.sub(r"-[0-9a-f]{16}>", ">", text)


def test_rm_r1s_careless_judge_is_right_where_it_looks():
    judge = script("rm-r1")
    rng = random.Random(0)
    right = {True: [], False: []}
    for question in quiz.more_questions(rng, 600, set()):
        best = rng.choice("AB")
        said = judge.verdict(rng, judge.pair(rng, question)["does"], best)
        right["<rubric>" in said].append(winner(said) == best)
    assert all(right[True])
    assert len(right[True]) == pytest.approx(600 * judge.CAREFUL, rel=0.2)
    assert sum(right[False]) / len(right[False]) == pytest.approx(0.5, abs=0.08)
