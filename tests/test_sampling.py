"""Candidates follow from prompt, seed and number: not from batches, shards or interruptions."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch

from trl_rewards import RewardError
from trl_rewards.models import Loading, LocalSampler, load_sampler, sample_candidates
from trl_rewards.pairs import Sampling

PROMPTS = ["the cat ran", "the dog sat 3 times", "the sky", "it ran 4 times and", "the cat"]
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def sampler(policy_path):
    return load_sampler(Loading(path=policy_path, dtype="float32", device="cpu"), name="tiny")


def texts(groups) -> list[list[str]]:
    return [[each.text for each in group] for group in groups]


def test_candidates_are_the_same_in_any_batch_order_and_shard(sampler):
    whole = texts(sample_candidates(sampler, PROMPTS, 3, SHORT, seed=1))
    assert len({text for group in whole for text in group}) > 10
    one_by_one = Sampling(max_new_tokens=6, batch_size=1)
    assert texts(sample_candidates(sampler, PROMPTS, 3, one_by_one, seed=1)) == whole
    assert texts(sample_candidates(sampler, PROMPTS[::-1], 3, SHORT, seed=1)) == whole[::-1]
    assert texts(sample_candidates(sampler, PROMPTS, 3, SHORT, seed=1, rows=[3, 1])) == [whole[3], whole[1]]
    assert texts(sample_candidates(sampler, PROMPTS, 3, SHORT, seed=2)) != whole


def test_torch_s_stream_and_the_model_s_modes_and_defaults_are_left_alone(sampler):
    model = sampler.model
    model.train()
    model.model.layers[0].eval()  # part of it frozen, as trainers do
    defaults, state = model.generation_config, torch.get_rng_state()
    sample_candidates(sampler, PROMPTS, 2, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.generation_config is defaults
    model.eval()


def test_a_prompt_that_is_there_twice_gets_other_candidates(sampler):
    first, second = texts(sample_candidates(sampler, ["the cat"] * 2, 2, SHORT))
    assert first != second
    assert texts(sample_candidates(sampler, ["the cat"], 4, SHORT)) == [first + second]


def test_tokens_are_drawn_with_the_probabilities_of_the_model(sampler):
    """First tokens of 4000 candidates, against the softmax, and its nucleus; five standard deviations."""
    ids = sampler.encode("the cat")
    with torch.no_grad():
        logits = sampler.model(torch.tensor([ids])).logits[0, -1].double()
    wanted = (logits / 0.1).softmax(-1)  # the random model is nearly uniform at temperature 1
    n = 4000
    one = Sampling(max_new_tokens=1, temperature=0.1, batch_tokens=100_000)
    (drawn,) = sample_candidates(sampler, ["the cat"], n, one)
    counts = Counter(each.ids[0] for each in drawn)
    for token, share in enumerate(wanted.tolist()):
        assert abs(counts[token] / n - share) <= 5 * (share * (1 - share) / n) ** 0.5 + 1e-9, token
    top = wanted.argsort(descending=True)[:2].tolist()
    cut = Sampling(max_new_tokens=1, temperature=0.1, top_k=2, batch_tokens=100_000)
    assert {each.ids[0] for each in sample_candidates(sampler, ["the cat"], 200, cut)[0]} == set(top)


def test_greedy_is_the_model_s_argmax(sampler):
    ((answer,),) = sample_candidates(sampler, ["the cat ran"], 1, Sampling(max_new_tokens=1, temperature=0.0))
    with torch.no_grad():
        best = sampler.model(torch.tensor([sampler.encode("the cat ran")])).logits[0, -1].argmax()
    assert answer.ids == [int(best)]


def test_an_end_belongs_to_the_ids_and_not_to_the_text(sampler):
    end = sampler.tokenizer.eos_token_id
    word = sampler.tokenizer("cat")["input_ids"]
    assert sampler.read([5], [*word, end, 7]) == ("cat", [*word, end], True)
    assert sampler.read([5], word) == ("cat", word, False)


def test_an_interrupted_call_goes_on_and_samples_nothing_twice(sampler, tmp_path, monkeypatch):
    wanted = sample_candidates(sampler, PROMPTS, 2, SHORT)
    small, work, drawn, draw = Sampling(max_new_tokens=6, batch_size=3), tmp_path / "work.jsonl", [], sampler.draw

    def stops(prompts, *more):
        drawn.append(len(prompts))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(prompts, *more)

    monkeypatch.setattr(sampler, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        sample_candidates(sampler, PROMPTS, 2, small, work=work)
    work.write_bytes(work.read_bytes() + b'[[0, "torn')  # the process died within a line
    assert sample_candidates(sampler, PROMPTS, 2, small, work=work) == wanted
    assert drawn == [3, 3, 3, 3, 1]
    assert sample_candidates(sampler, PROMPTS, 2, small, work=work) == wanted
    assert len(drawn) == 5
    with pytest.raises(RewardError, match=r"holds candidates of another call; delete it"):
        sample_candidates(sampler, PROMPTS, 2, small, seed=5, work=work)


def test_a_chat_template_is_given_its_tools_and_variables(sampler):
    chat = [{"role": "user", "content": "the cat"}]
    template = "{{ messages[0]['content'] }} {{ mood }}{% for tool in tools or [] %} {{ tool.name }}{% endfor %}"
    tokenizer = sampler.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        ids = sampler.encode(chat, tools=[{"name": "sat"}], template={"mood": "ran"})
        assert tokenizer.decode(ids) == "the cat ran sat"
        assert sampler.encode(chat, tools='[{"name": "sat"}]', template={"mood": "ran"}) == ids  # TRL takes both
        tokenizer.chat_template = None
        with pytest.raises(RewardError, match="policy 'tiny' has no chat template"):
            sampler.encode(chat)
    finally:
        tokenizer.chat_template = kept


def test_a_prompt_without_room_goes_alone_and_shortens_no_other(sampler):
    lengths = {0: [1] * 10, 1: [1] * 252, 2: [1] * 11}
    assert sampler.batches(lengths, SHORT) == [[0, 2], [1]]
    with pytest.raises(RewardError, match="context of 256 tokens, and a prompt has 300"):
        sampler.encode("!" * 300)


def test_a_quantised_policy_in_training_gives_the_same_candidates_after_its_adapter_learns_nothing(policy_path):
    """LoRA layers inside the model; a 4-bit base is not repacked for inference."""
    from peft import LoraConfig, get_peft_model

    loading = Loading(path=policy_path, dtype="float32", device="cpu", quantization="4bit")
    plain = load_sampler(loading)
    wanted = texts(sample_candidates(plain, PROMPTS, 2, SHORT))
    model = get_peft_model(plain.model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    model.train()
    assert texts(sample_candidates(LocalSampler(model.get_base_model(), plain.tokenizer), PROMPTS, 2, SHORT)) == wanted
    assert model.training


def test_vllm_is_asked_for_when_it_is_not_there(policy_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RewardError, match=r'pip install "trl-rewards\[vllm\]"'):
        load_sampler(Loading(path=policy_path), "vllm")


def test_vllm_is_given_token_ids_settings_and_a_seed_for_each_candidate(policy_path, monkeypatch):
    """Against a stand-in with the interface of vLLM's offline engine: it answers with the prompt, reversed."""
    asked = []

    class LLM:
        def __init__(self, **options):
            asked.append(options)
            self.model_config = SimpleNamespace(max_model_len=64)

        def generate(self, inputs, settings, lora_request=None):
            asked.append((inputs, settings, lora_request))
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=each["prompt_token_ids"][::-1], finish_reason="stop")]
                )
                for each in inputs
            ]

    vllm, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)
    request.LoRARequest = lambda *words: words
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    loading = Loading(path=policy_path, adapter="lora", quantization="4bit", device="cpu")
    monkeypatch.setattr("trl_rewards.models.sampling.load_tokenizer", lambda _: make_tokenizer(policy_path))
    groups = sample_candidates(load_sampler(loading, "vllm"), ["the cat ran", "the sky"], 2, SHORT)
    ids = [make_tokenizer(policy_path)(prompt)["input_ids"] for prompt in ("the cat ran", "the sky")]
    assert [each.ids for group in groups for each in group] == [ids[0][::-1]] * 2 + [ids[1][::-1]] * 2
    assert asked[0]["quantization"] == "bitsandbytes"
    assert asked[0]["enable_lora"]
    inputs, settings, lora = asked[1]
    assert len({each.seed for each in settings}) == len(inputs) == 4
    assert all(each.max_tokens == 6 and each.seed < 2**31 for each in settings)
    assert lora == ("policy", 1, "lora")
    assert all(each.ended for group in groups for each in group)


def make_tokenizer(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_the_work_file_is_json_lines_under_a_header(sampler, tmp_path):
    work = tmp_path / "deep" / "work.jsonl"
    sample_candidates(sampler, PROMPTS[:1], 2, SHORT, work=work)
    header, line = work.read_text().splitlines()
    assert len(header) == 16
    assert [key for key, *_ in json.loads(line)] == [0, 1]
