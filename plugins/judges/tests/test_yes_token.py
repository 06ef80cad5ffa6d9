"""The reward `yes_token`: a model in this process against its own forward pass, and what servers tell of."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rewards_judges.yes_token import AGAINST_REFERENCE, ALONE, YesNo, read_yes, spellings, yes_probability

from tests.conftest import round_to_4_bits
from trl_rewards import Context, Failed, RewardError, load_reward
from trl_rewards.loading import build
from trl_rewards.models import fill
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.testing import check_reward, make_samples, run_reward

CASE = json.loads((Path(__file__).parent / "words_cases.json").read_text())["yes_token"]
WORDS = {"yes": ["yes", "Yes", " YES"], "no": ["no", " No"]}
TEXTS = ["the cat sat 3 times", "the dog ran", "the sky", "the cat sat 8 times and the dog ran"]
GOLD = ["the cat sat 5 times"] * 4
SHORT = "{prompt}\n{reference}\n{completion}\nbetter?"


def yes_token(path, **options):
    return load_reward("yes_token", model=path, dtype="float32", device="cpu", **options)


def forward(path, text, in_4bit=False):
    """Probabilities of all tokens after a user's message, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if in_4bit:
        round_to_4_bits(model)
    chat = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    return logits.softmax(dim=-1), tokenizer


def wanted(path, text, words=WORDS, in_4bit=False):
    """p(yes) and p(no) by a plain forward pass."""
    probabilities, tokenizer = forward(path, text, in_4bit)
    return [sum(probabilities[tokenizer.convert_tokens_to_ids(w)].item() for w in words[k]) for k in ("yes", "no")]


def test_the_recorded_case():
    logits = torch.tensor([[CASE["inputs"]["logit_yes"], CASE["inputs"]["logit_no"]]])
    logits = torch.cat([logits, torch.tensor([CASE["inputs"]["other_vocab_logits"]])], dim=1)
    ((yes, no),) = YesNo(lambda hidden: hidden, [0], [1])(logits).exp().tolist()
    assert yes_probability(yes, no) == pytest.approx(CASE["outputs"]["full_vocab"], abs=1e-6)
    assert yes_probability(yes, no, "binary") == pytest.approx(CASE["outputs"]["two_way"], abs=1e-6)


def test_the_score_is_the_probability_of_every_spelling_of_yes(judge_path, monkeypatch):
    asked = []
    reward = yes_token(judge_path, reference="gold", template=SHORT)
    binary = yes_token(judge_path, reference="gold", template=SHORT, norm="binary")
    monkeypatch.setattr("trl_rewards_judges.yes_token.YesModel._encode", _noting(asked))
    samples = make_samples(TEXTS, prompts=["how often sat the cat"] * 4, gold=GOLD)
    logged = {}
    reward.setup(Context(log_metric=logged.__setitem__))
    scores = run_reward(reward, samples)
    probabilities = [wanted(judge_path, text) for text in asked]
    assert scores == pytest.approx([yes for yes, _ in probabilities], abs=1e-5)
    assert max(scores) - min(scores) > 1e-3
    assert run_reward(binary, samples) == pytest.approx([yes / (yes + no) for yes, no in probabilities], abs=1e-5)
    assert logged["yes_token/yes_or_no"] == pytest.approx(sum(map(sum, probabilities)) / 4, abs=1e-5)
    assert reward._asker._model._scorer.metrics["prefix_saved"] > 0.3  # prompt and reference, once for the group


def _noting(asked):
    from trl_rewards_judges.yes_token import YesModel

    encode = YesModel._encode

    def note(self, request):
        asked.append(request.messages[-1]["content"])
        return encode(self, request)

    return note


def test_it_keeps_its_contract(judge_path):
    reward = yes_token(judge_path, reference="gold", template="{reference}{completion}?")
    check_reward(reward, gold=["the cat", None, "the dog", float("nan"), " ", "7"])
    samples = make_samples(["the cat"] * 3 + [""] * 2, gold=["a", None, " ", "a", None])
    scores = run_reward(reward, samples)
    assert isinstance(scores[0], float)
    assert scores[1:] == [None, None, 0.0, None]
    reward.close()


@pytest.mark.slow
def test_four_bits_are_read_as_the_quantised_model_has_them(judge_path, monkeypatch):
    asked = []
    monkeypatch.setattr("trl_rewards_judges.yes_token.YesModel._encode", _noting(asked))
    (exact,) = run_reward(yes_token(judge_path, template="{completion}"), make_samples(["the cat"]))
    (score,) = run_reward(yes_token(judge_path, template="{completion}", load_in_4bit=True), make_samples(["the cat"]))
    assert 0 < score < 1
    assert score != pytest.approx(exact, abs=1e-3)
    assert score == pytest.approx(wanted(judge_path, asked[-1], in_4bit=True)[0], abs=1e-4)


def test_a_word_that_is_no_token_and_a_model_without_a_template_are_refused(judge_path, tmp_path):
    with pytest.raises(RewardError, match="yes: 'indeed' is no token of"):
        yes_token(judge_path, yes=["yes", "indeed"])
    tokenizer = AutoTokenizer.from_pretrained(judge_path)
    found = spellings(tokenizer, ["Yes", "no"])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found.values()] == [WORDS["yes"], WORDS["no"]]
    AutoModelForCausalLM.from_pretrained(judge_path).save_pretrained(tmp_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="has no chat template"):
        yes_token(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": 0.5}, "temperature and top_p must be 1"),
        ({"yes": ["Yes"], "no": ["yes "]}, "lists of different words"),
        ({"no": []}, "lists of different words"),
        ({"slack": -1}, "slack must not be negative"),
        ({"template": "{prompt}"}, "no {completion}"),
        ({"template": "{completion}{answer}"}, "has {answer}"),
        ({"template": "{completion}{reference}"}, "if, and only if"),
        ({"template": "{completion}", "reference": "gold"}, "if, and only if"),
    ],
)
def test_options_that_cannot_be_are_refused(options, problem):
    _, problems = build("reward", "yes_token", {"model": "m"} | options)
    assert problem in problems[0]


def test_our_words_have_the_places_that_they_fill():
    values = {name: f"<{name}>" for name in ("criteria", "prompt", "reference", "completion")}
    for template in (AGAINST_REFERENCE, ALONE):
        shown = fill(template, values)
        assert ("<reference>" in shown) == (template is AGAINST_REFERENCE)
        assert shown.index("<prompt>") < shown.index("<completion>")
        assert "{" not in shown


LIKELY = {"Yes": 0.6, " yes": 0.1, "No": 0.25, "The": 0.045}


@pytest.mark.parametrize(
    ("told", "norm", "score"),
    [
        (LIKELY, "full", 0.7),
        (LIKELY, "binary", 0.7 / 0.95),
        ({"No": 0.98, "Well": 0.019}, "full", 0.0),  # of yes there can be 0.001 at most
        ({"No": 0.98, "Well": 0.019}, "binary", 0.0),
        ({"YES": 0.9, "yes": 0.05, "A": 0.049}, "binary", 1.0),
    ],
)
def test_a_servers_candidates_are_added_up(told, norm, score):
    logprobs = {token: math.log(p) for token, p in told.items()}
    assert read_yes(logprobs, ["yes"], ["no"], norm, slack=0.02) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(
    ("told", "norm", "reason"),
    [
        # Two of six spellings are listed: the other four are below 0.1 each, and below 0.2 together.
        ({"Yes": 0.4, "yes": 0.1, "The": 0.3}, "full", "yes is between 0.5 and 0.7 by the 3 tokens"),
        ({"The": 0.5, "A": 0.001}, "full", "yes is between 0 and 0.006"),
        ({"Yes": 0.001, "The": 0.9}, "binary", "yes is between 0.143 and 1"),
        ({"The": 0.5, "A": 0.1}, "binary", "neither yes nor no"),
    ],
)
def test_what_a_server_does_not_tell_of_is_a_hole_where_it_matters(told, norm, reason):
    logprobs = {token: math.log(p) for token, p in told.items()}
    found = read_yes(logprobs, ["yes"], ["no"], norm, slack=0.005)
    assert isinstance(found, Failed)
    assert reason in found.reason


def test_a_reference_cannot_hold_tokens_that_mean_something_to_the_judge(judge_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(judge_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[VERDICT]"]})
    AutoModelForCausalLM.from_pretrained(judge_path).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    reward = yes_token(str(tmp_path / "judge"), reference="gold")
    reward.setup(Context())
    (ask,) = reward.asks(make_samples(["the dog [VERDICT] ran"], gold=["the [VERDICT] cat"]))
    assert "[VERDICT]" not in ask.messages[0]["content"]
    assert '"the   cat"' in ask.messages[0]["content"]


class Tells(ScriptedJudge):
    """Says how probable yes and no are, by whether the answer names the reference's number."""

    def __init__(self, told):
        self.told, self.asked = told, []
        super().__init__()

    def reply(self, request, fate):
        self.asked.append(request)
        choice = {"message": {"content": "?"}, "finish_reason": "length"}
        if told := self.told(request["messages"][-1]["content"]):
            top = [{"token": token, "logprob": math.log(p)} for token, p in told.items()]
            choice["logprobs"] = {"content": [{"token": "?", "top_logprobs": top}]}
        return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}


def test_a_server_tells_of_its_likeliest_tokens(caplog):
    def told(text):
        if '"lost"' in text:
            return None
        return LIKELY if '"the cat sat 5 times"\n</answer-' in text else {"think": 0.99999}

    with Tells(told) as server:
        reward = load_reward("yes_token", model="m", endpoint=server.url, reference="gold")
        found = run_reward(reward, make_samples(["the cat sat 5 times", "lost", "b"], gold=GOLD[:3]))
        with caplog.at_level(logging.WARNING):
            run_reward(reward, make_samples(["b"], gold=GOLD[:1]))
        reward.close()
    assert found[0] == pytest.approx(0.7)
    assert "gives no logprobs" in found[1].reason
    assert found[2] == 0.0
    assert "says neither yes nor no" in caplog.text
    request = server.asked[0]
    assert {name: request[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 1,
        "seed": 0,
    }
    assert (request["logprobs"], request["top_logprobs"]) == (True, 20)
    assert len(server.asked) == 4  # nothing is asked again
