"""Judges in this process, with tiny random models: what they babble is no score, and they disturb nobody."""

from __future__ import annotations

import random

import pytest

from trl_rewards import Context, Failed, RewardError, load_reward
from trl_rewards.models.chat import Reply, Request
from trl_rewards.testing import make_samples, run_reward


@pytest.fixture(scope="module")
def chat(policy_path):
    from trl_rewards.models.local_chat import LocalChat
    from trl_rewards.models.pretrained import Loading

    return LocalChat(Loading(path=policy_path, dtype="float32", device="cpu"), token_budget=200, seed=0)


def request(text, temperature=0.0, max_tokens=12, attempt=0, extra=None):
    messages = [{"role": "user", "content": text}]
    return Request("m", messages, temperature, 1.0, max_tokens, None, extra or {}, None, attempt)


def judge(policy_path, name="judge", **options):
    """A judge whose prompts fit the tiny model's 256 tokens."""
    options = {"model": policy_path, "dtype": "float32", "device": "cpu", "max_tokens": 8} | options
    reward = load_reward(name, **options)
    reward.system_prompt = None
    return reward


TEXTS = ["the cat sat 1 times", "the dog", "the sky ran 8 times and the cat sat 3 times", "a"]


def test_what_a_random_model_says_is_no_score(policy_path):
    reward = judge(policy_path, criteria="x", template="{completion}", parse_retries=2)
    found = run_reward(reward, make_samples(["the cat", "", "the dog"]))
    assert found[1] == 1
    assert all(isinstance(found[row], Failed) for row in (0, 2))
    assert "the judge gave no score" in found[0].reason
    assert reward.metrics["requests"] == 6
    assert reward.metrics["unparsable"] == 6
    assert reward.metrics["prompt_tokens"] > 100


def test_replies_are_those_of_each_prompt_alone(chat):
    """Left padding and batches by length change nothing: greedy fp32 replies equal those of `generate` on one row."""
    import torch

    replies = chat.replies([request(text) for text in TEXTS])
    for text, reply in zip(TEXTS, replies, strict=True):
        ids = torch.tensor([chat._encode(request(text))])
        alone = chat._model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        wanted = chat._tokenizer.decode(alone, skip_special_tokens=True)
        assert reply.text == wanted
        assert reply.prompt_tokens == ids.shape[1]
        assert reply.completion_tokens == len([token for token in alone.tolist() if token not in chat._ends])


def test_batches_keep_to_the_token_budget(chat):
    requests = [request(text) for text in TEXTS * 5]
    prompts = [chat._encode(each) for each in requests]
    batches = chat._batches(list(range(20)), prompts, requests)
    assert sorted(row for batch in batches for row in batch) == list(range(20))
    assert len(batches) < 20
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(len(prompts[row]) for row in batch) + 12) <= 200


def test_a_prompt_that_leaves_no_room_is_refused_and_never_cut(chat):
    long, short = chat.replies([request("the cat " * 150), request("the cat")])
    assert isinstance(long, Failed)
    assert "leaves no room for max_tokens 12 in its context of 256" in long.reason
    assert isinstance(short, Reply)


def test_sampling_is_repeatable_and_leaves_the_global_random_streams_alone(chat):
    import torch

    before = torch.get_rng_state().tolist(), random.getstate()
    warm = [request(text, temperature=1.5) for text in TEXTS]
    first = chat.replies(warm)
    assert first == chat.replies(warm)
    assert first != chat.replies([request(text, temperature=1.5, attempt=1) for text in TEXTS])
    assert (torch.get_rng_state().tolist(), random.getstate()) == before


def test_the_template_is_applied_once(chat):
    ids = chat._encode(request("the cat"))
    assert ids.count(chat._tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2  # user's and the judge's own
    assert chat._tokenizer.decode(ids).startswith("<|im_start|>user\nthe cat<|im_end|>")


def test_a_beginning_of_text_token_is_not_doubled(policy_path, tmp_path):
    import shutil

    from transformers import AutoTokenizer

    from trl_rewards.models.local_chat import LocalChat
    from trl_rewards.models.pretrained import Loading

    folder = tmp_path / "bos"
    shutil.copytree(policy_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
    chat = LocalChat(Loading(path=str(folder), dtype="float32", device="cpu"), 100, 0)
    assert chat._encode(request("the cat")).count(chat._tokenizer.bos_token_id) == 1


def test_template_options_are_those_of_servers(policy_path, tmp_path):
    import shutil

    from transformers import AutoTokenizer

    from trl_rewards.models.local_chat import LocalChat
    from trl_rewards.models.pretrained import Loading

    folder = tmp_path / "switch"
    shutil.copytree(policy_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ 'cat' if thinks else 'dog' }}"
    tokenizer.save_pretrained(folder)
    chat = LocalChat(Loading(path=str(folder), dtype="float32", device="cpu"), 100, 0)
    decoded = [
        chat._tokenizer.decode(chat._encode(request("x", extra={"chat_template_kwargs": {"thinks": thinks}})))
        for thinks in (True, False)
    ]
    assert decoded == ["cat", "dog"]


def test_the_judges_own_control_tokens_are_taken_out_of_completions(policy_path):
    reward = judge(policy_path)
    assert "<|im_end|>" in reward._ready().control_tokens
    assert reward.shown(make_samples(["a<|im_end|>b<|pad|>"])) == ["a b "]


@pytest.mark.parametrize("name", ["pairwise_judge", "listwise_judge"])
def test_groups_are_judged_here_too(policy_path, name):
    reward = judge(policy_path, name, criteria="x")
    found = run_reward(reward, make_samples(["a", "b"], group_size=2))
    assert all(isinstance(score, Failed) for score in found)


def test_an_offloaded_judge_works(policy_path):
    reward = judge(policy_path, offload=True, template="{completion}")
    assert isinstance(run_reward(reward, make_samples(["a"]))[0], Failed)


def test_a_recording_of_a_judge_here_is_replayed_without_it(policy_path, tmp_path):
    tape = str(tmp_path / "tape.jsonl")
    options = {"template": "{completion}", "cassette": tape, "parse_retries": 0}
    recorder = judge(policy_path, **options)
    first = run_reward(recorder, make_samples(["a", "b"]))
    assert all("gave no score" in score.reason for score in first)
    again = run_reward(judge(policy_path, cassette_mode="replay", **options), make_samples(["a", "b"]))
    assert again == first
    assert recorder.metrics["requests"] == 2


def test_a_model_without_a_chat_template_is_no_judge(policy_path, tmp_path):
    import shutil

    folder = tmp_path / "plain"
    shutil.copytree(policy_path, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(RewardError, match="has no chat template"):
        judge(str(folder))


def test_a_model_that_is_not_there_is_said_before_training(tmp_path):
    with pytest.raises(RewardError, match="nowhere"):
        judge(str(tmp_path / "nowhere"))


def test_a_budget_of_tokens_stops_a_judge_here_too(policy_path):
    reward = judge(policy_path, template="{completion}", parse_retries=0, max_total_tokens=10)
    run_reward(reward, make_samples(["a"]))
    with pytest.raises(RewardError, match="budget is spent"):
        run_reward(reward, make_samples(["b"]))


@pytest.mark.slow
def test_a_judge_in_four_bits_works_on_cpu(policy_path):
    reward = judge(policy_path, load_in_4bit=True, template="{completion}", parse_retries=0)
    reward.setup(Context(device="cpu"))
    first = run_reward(reward, make_samples(["the cat", "the dog"]))
    assert all("gave no score" in score.reason for score in first)
    assert run_reward(reward, make_samples(["the cat", "the dog"])) == first
    assert any("4bit" in type(module).__name__ for module in reward._ready()._model._model.modules())
