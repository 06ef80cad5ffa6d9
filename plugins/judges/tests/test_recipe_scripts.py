"""The script beside recipe flr/cpu: what it teaches is what the reward shows."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rewards import load_reward
from trl_rewards.bundled import make, model_path
from trl_rewards.testing import make_samples

RECIPE = Path(__file__).parents[3] / "recipes/flr"


@pytest.fixture(scope="module")
def questions():
    return make.more_questions(random.Random(0), 40, set())


def test_a_taught_model_says_it_in_words_that_are_tokens(tmp_path):
    make.fine_tune(tmp_path, [("what?", "yes")] * 320, random.Random(0), peak=0.03, words=("yes",))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = tokenizer("what?", return_tensors="pt").input_ids
    assert tokenizer.tokenize("yes, eyes")[0] == "yes"
    assert "yes" not in tokenizer.tokenize("eyes")  # a word of its own alone
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == "yes"


def test_flrs_user_reads_an_answer_as_the_reward_shows_it(questions):
    flr = SimpleNamespace(**runpy.run_path(str(RECIPE / "start.py")))
    given = yaml.safe_load((RECIPE / "cpu.yaml").read_text())["rewards"][0]["with"]
    assert given["utterances"] == {name: {"positive": [a], "negative": [b]} for name, (a, b) in flr.SAID.items()}
    reward = load_reward("flr", **(given | {"path": str(model_path()), "device": "cpu", "dtype": "float32"}))
    reward.score(make_samples(["a"], prompts=["b"]))
    reader, tokenizer = reward._reader, AutoTokenizer.from_pretrained(model_path())
    for question in questions:
        state = random.Random(question.text)
        chat, _ = flr.example(state, tokenizer, question)
        again = random.Random(question.text)
        kind = again.choice(["clean", make.flaw(again, question)])
        shown = reader._chat([{"role": "user", "content": question.text}], make.REPLIES[kind](again, question))
        before = reader._tails[0]
        assert tokenizer(chat)["input_ids"] == shown + before.ids[: before.start]
