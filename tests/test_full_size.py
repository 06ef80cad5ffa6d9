"""`benchmarks/full_size.py`: stand-ins of the real shape, what is refused, and a whole run of a shrunk one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_rewards.commands.footprint import SHAPES
from trl_rewards.recipe import Recipe

BITS = "bitsandbytes"


@pytest.fixture
def full_size(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("full_size")


def test_a_stand_in_has_the_published_widths(full_size):
    published = json.loads(SHAPES.read_text(encoding="utf-8"))["Qwen/Qwen2.5-7B"]
    shape = full_size.stand_in("Qwen/Qwen2.5-7B", classifier=False, small=False)
    config = shape.model.config.to_dict()
    assert {name: config[name] for name in published} == published
    assert shape.parameters == 7_615_616_512
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    reward_model = full_size.stand_in("Skywork/Skywork-Reward-V2-Llama-3.1-8B", classifier=True, small=False)
    assert reward_model.parameters == 7_504_928_768  # 8.03 G less the head of 128,256 x 4,096, and one output
    assert reward_model.model.config.architectures == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("Qwen/Qwen2.5-7B", False),
        ("Qwen/Qwen2.5-3B", False),  # tied embeddings
        ("Qwen/Qwen3-8B", False),
        ("google/gemma-2-2b-it", False),
        ("cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr", False),
        ("Skywork/Skywork-Reward-V2-Llama-3.1-8B", True),
        ("cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr", True),
    ],
)
def test_the_shards_of_a_shrunk_stand_in_are_all_of_its_model(name, classifier, full_size, monkeypatch, tmp_path):
    monkeypatch.setattr(full_size, "SHARD", 300_000)
    shape = full_size.stand_in(name, classifier, small=True)
    full_size.write_stand_in(shape, tmp_path / "model")
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.num_parameters() == shape.parameters
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 2048
    assert model.get_input_embeddings().weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    shards = [load_file(file) for file in sorted((tmp_path / "model").glob("*.safetensors"))]
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in shard.values()} == {torch.bfloat16}
    assert all(len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 300_000 for shard in shards)


def test_every_word_that_a_policy_writes_is_one_token_to_a_reward_model(full_size, tmp_path):
    policy, reward_model = "Qwen/Qwen2.5-7B", "Skywork/Skywork-Reward-V2-Llama-3.1-8B"  # tokenizers of two classes
    for name, size in ((policy, 2048), (reward_model, 50_304)):
        folder = tmp_path / str(size)
        full_size.write_stand_in(full_size.stand_in(name, False, small=True), folder)
        full_size.write_tokenizer(folder, size, 4096)
    small, large = (AutoTokenizer.from_pretrained(tmp_path / size) for size in ("2048", "50304"))
    assert (len(small), len(large), small.model_max_length) == (2048, 50_304, 4096)
    assert (small.pad_token_id, small.eos_token_id) == (large.pad_token_id, large.eos_token_id) == (0, 2)
    written = torch.randint(300, 2048, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for reader in (small, large):
        assert reader.encode(small.decode(written)) == written
    assert large.encode(large.decode([50_303, 1024, 7_000])) == [50_303, 1024, 7_000]


def test_prompts_have_so_many_tokens_and_the_columns_that_are_read(full_size, tmp_path):
    full_size.write_stand_in(full_size.stand_in("Qwen/Qwen2.5-7B", False, small=True), tmp_path / "model0")
    full_size.write_prompts(tmp_path, ["references"], prompt=37, completion=11, rows=5)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model0")
    assert [len(tokenizer.encode(row["prompt"])) for row in rows] == [37] * 5
    assert [len(tokenizer.encode(row["references"][0])) for row in rows] == [11] * 5
    assert len({row["prompt"] for row in rows}) == 5
    assert all(row.keys() == {"prompt", "references"} for row in rows)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("dpo/gpu-4bit", "trainer: 'dpo' learns from pairs or labels"),
        ("rewardanything/gpu-grpo-4bit", "'rewardanything' asks a server or a judge"),
        ("polar/gpu-24gb", "'polar' needs a model of its own kind"),
        ("shared-base/gpu-4bit", "'helpful' needs an adapter that was trained before"),
        ("rm-r1/gpu-24gb", "nothing is known to put into column 'winner'"),
        ("bleuberi/gpu-7b-4bit", "use_vllm: not measured here"),
    ],
)
def test_what_has_no_stand_in_is_refused_with_the_reason(recipe, words, full_size, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    more = ["--use_vllm", "true"] if recipe.startswith("bleuberi") else []
    assert full_size.main([recipe, "--shrink", "--out", str(out), *more]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["bleuberi/gpu-7b-4bit", "rlcr/gpu-24gb", "dler/gpu-24gb", "ppo/gpu-4bit"])
def test_rules_and_reward_models_can_be_measured(name, full_size):
    assert full_size.obstacles(Recipe.load(name)) == []


def test_shrunk_recipes_do_without_bitsandbytes_where_there_is_none(full_size, monkeypatch, tmp_path):
    there = full_size.importlib.util.find_spec
    monkeypatch.setattr(full_size.importlib.util, "find_spec", lambda name: there(name) if name != BITS else None)
    monkeypatch.setattr(full_size, "write_stand_in", lambda shape, folder: None)
    recipe = full_size.with_stand_ins(Recipe.load("uncertainty/gpu-24gb"), tmp_path, small=True)
    assert recipe.trl["load_in_4bit"] is False
    assert [source.options["load_in_4bit"] for source in recipe.rewards] == [False, False]
    folders = [recipe.trl["model_name_or_path"], *(source.options["path"] for source in recipe.rewards)]
    assert folders == [str(tmp_path / f"model{index}") for index in range(3)]
    assert recipe.trl["generation_kwargs"] == {"min_new_tokens": 16}


@pytest.mark.slow
def test_a_shrunk_recipe_with_two_reward_models_is_measured(full_size, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = ["uncertainty/gpu-24gb", "--shrink", "--steps", "1", "--out", str(out)]
    assert full_size.main([*words, "--gradient_accumulation_steps", "2"]) == 0
    (line,) = out.read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    rows = 2 * Recipe.load("uncertainty/gpu-24gb").trl["per_device_train_batch_size"]
    assert found["steps"] == 1
    assert found["tokens"] == rows * 16  # none ends before
    assert found["tokens_per_second"] > 0
    assert set(found["seconds_per_step"]) == {"generate", "score", "learn"}
    assert all(seconds > 0 for seconds in found["seconds_per_step"].values())
    assert set(found["peak"]) == {"load", "generate", "score", "learn"}
    assert all(size > 0 for peak in found["peak"].values() for size in peak.values())
    assert all(found["planned"]["card"][phase] > size > 0 for phase, size in found["planned"]["allocated"].items())
    said = json.loads("{" + capsys.readouterr().out.splitlines()[-1] + "}")
    assert said == {"uncertainty/gpu-24gb": full_size.in_words(found)}
