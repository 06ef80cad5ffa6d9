"""`trl-rewards plan`: what it counts is what PyTorch, PEFT and bitsandbytes keep."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from typer.testing import CliRunner

from trl_rewards import RecipeError
from trl_rewards.cli import app
from trl_rewards.commands.footprint import Shape, optimiser, shape_of
from trl_rewards.commands.plan import GIB, Part, Plan, plan
from trl_rewards.models import InProcess
from trl_rewards.plugins import load_plugins

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
}


def kept_bytes(model, ids) -> int:
    """What a forward pass keeps for the backward, weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept, sizes = [], {}

    def keep(tensor):
        kept.append(tensor)  # or its memory would be used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return sum(sizes.values())


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_within_a_fifth_of_what_torch_keeps(config, dtype, lora):
    config = config(**WIDTHS)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
    model.train()
    found = kept_bytes(model, torch.randint(0, 500, (2, 64)))
    said = Shape.of(config, classifier=False).learning(2, 64, dtype, checkpointing=False)
    assert found == pytest.approx(said, rel=0.2)


def test_checkpointing_keeps_the_layers_inputs_and_one_layer():
    shape = Shape.of(Qwen2Config(**WIDTHS), classifier=False)
    whole, checkpointed = (shape.learning(2, 64, "bfloat16", flag) for flag in (False, True))
    assert whole == 3 * 2 * 64 * shape.layer(2)
    assert checkpointed == 2 * 64 * (3 * 2 * 256 + shape.layer(2))


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_weights_are_what_bitsandbytes_holds(tmp_path, nested):
    config = Qwen2Config(**WIDTHS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    found = 0
    for weight in model.parameters():
        found += weight.nbytes
        if state := getattr(weight, "quant_state", None):
            found += state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    said = Shape.of(config, classifier=False).weights("bfloat16", "4bit", nested)
    assert said == pytest.approx(found, rel=0.001)


def test_adapter_and_cache_are_counted_by_their_shapes():
    shape = Shape.of(Qwen2Config(**WIDTHS), classifier=False)
    # q: 256 x 256 and v: 256 x 64 in each of three layers, with r numbers for each row and column
    assert shape.adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"])) == 3 * 4 * (512 + 320)
    assert shape.cache(rows=5, tokens=7, dtype="bfloat16") == 5 * 7 * 3 * (2 * 64) * 2
    with pytest.raises(ValueError, match="no_proj"):
        shape.adapter(LoraConfig(r=4, target_modules=["no_proj"]))


def test_an_adapter_is_as_large_as_peft_makes_it():
    config = Qwen3MoeConfig(**WIDTHS, num_experts=4, moe_intermediate_size=64, mlp_only_layers=[2])
    lora = LoraConfig(r=4, target_modules="all-linear")
    said = Shape.of(config, classifier=False).adapter(lora)
    made = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    assert said == sum(weight.numel() for weight in made.parameters() if weight.requires_grad)


def test_optimisers_keep_two_moments_but_for_those_that_do_not():
    assert optimiser("adamw_torch_fused", 100, 4) == 800
    assert optimiser("adamw_torch", 100, 2) == 400
    assert optimiser("paged_adamw_8bit", 100, 4) == 200
    assert optimiser("lion_32bit", 100, 4) == 400
    assert optimiser("adafactor", 100, 4) == optimiser("sgd", 100, 4) == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as their model cards and checkpoints' indices have them
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-Embedding-0.6B", 595_776_512),
        ("lmsys/vicuna-7b-v1.3", 6_738_415_616),
        ("lmsys/vicuna-33b-v1.3", 32_528_943_616),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Skywork/Skywork-Reward-V2-Llama-3.1-8B", 7_504_928_768),
        ("internlm/POLAR-7B", 7_358_652_416),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr", 1_011_781_632),
        ("cleanrl/EleutherAI_pythia-6.9b-deduped__sft__tldr", 6_857_302_016),
    ],
)
def test_shapes_of_published_models_have_their_numbers_of_parameters(name, parameters):
    assert shape_of(name).parameters == parameters


def test_every_reward_with_a_model_in_this_process_says_what_it_holds():
    rewards = [entry.load() for entry in load_plugins().of_kind("reward")]
    silent = [cls.__name__ for cls in rewards if issubclass(cls, InProcess) and cls.held is InProcess.held]
    assert not silent


def test_plan_says_whether_a_recipe_fits_a_card(policy_path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"trainer: grpo\nmodel_name_or_path: {policy_path}\ndataset_name: bundled:tiny\noutput_dir: {tmp_path}/run\n"
        f"rewards: [exact_match, {{use: model, with: {{path: {policy_path}, device: 'cuda:1'}}}}]\n"
        "advantage: group_norm\nuse_cpu: true\n"
    )
    found = CliRunner().invoke(app, ["plan", str(recipe), "--json", "--card", "24"])
    assert found.exit_code == 0, found.output
    made = json.loads(found.output)
    assert made["card_gib"] == 16
    assert made["bytes"]["learn"] > made["bytes"]["score"] > 0
    assert made["notes"] == [f"model: {policy_path} is on cuda:1, not counted"]
    found = CliRunner().invoke(app, ["plan", str(recipe), "--card", "0.5"])
    assert found.exit_code == 1
    assert "does not fit a card of 0.5 GiB" in found.output
    assert "fits a card of 16 GiB" in found.output


def planned(policy_path, tmp_path, **options):
    recipe = {"trainer": "grpo", "model_name_or_path": policy_path, "dataset_name": "bundled:tiny", "use_cpu": True}
    recipe |= {"output_dir": str(tmp_path / "run"), "rewards": ["exact_match"], "advantage": "group_norm"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | options))
    return plan(str(file))


def test_a_critic_of_its_own_is_counted_with_its_adapter():
    name = "Skywork/Skywork-Reward-V2-Qwen3-1.7B"
    made = plan("ppo/gpu-4bit", ["--critic", "model", "--critic_model_name_or_path", name])
    sizes = {part.what: part.size for part in made.parts}
    widths = 2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144)  # queries and output, keys and values, the MLP
    assert sizes["critic's adapter"] == pytest.approx(2 * 32 * 28 * widths, rel=0.01)  # rank 32, 28 layers, 16 bits
    assert 0.5 < sizes["critic"] / shape_of(name, classifier=True).parameters < 1.0  # in 4 bits, but for embeddings


def test_vllm_that_sleeps_takes_its_share_while_it_generates(policy_path, tmp_path):
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.9}
    for sleeps, generating, learning in [(False, False, False), (True, False, True)]:
        made = planned(policy_path, tmp_path, vllm_enable_sleep_mode=sleeps, **vllm)
        made.parts = [Part("weights", 3 * GIB)]  # and 0.8 GiB of CUDA: more than a tenth of 24
        assert made.fits(24) is generating
        made.parts = [Part("activations", 3 * GIB, ("learn",))]
        assert made.fits(24) is learning


def test_a_judges_server_on_the_card_counts_with_its_share(policy_path, tmp_path):
    recipe = (
        f"model_name_or_path: {policy_path}\ntrainer: grpo\ndataset_name: bundled:tiny\noutput_dir: {tmp_path}/run\n"
        "rewards: [exact_match]\nadvantage: group_norm\nuse_cpu: true\n"
    )
    file = tmp_path / "recipe.yaml"
    for share, beside in [("--gpu-memory-utilization 0.25", 20), ("# on another card", 0)]:
        file.write_text(f"# Title\n#   vllm serve a/judge --port 8000 {share}\n# One GPU of 80 GB.\n{recipe}")
        made = plan(str(file))
        assert made.beside == beside * GIB
        made.parts = [Part("weights", 55 * GIB / 1.1)]  # with 0.8 of CUDA's: more than what 20 leave of 75, not of 76
        assert made.fits(76)
        assert made.fits(75) is not bool(beside)
    made.beside = 20 * GIB
    assert made.brief == "55.8 GiB (generate) + 20.0 for a judge's server, fits 80 GB"


def test_mixed_precision_has_logits_in_fp32_and_copies_of_the_weights(policy_path, tmp_path):
    settings = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 16}
    shape = shape_of(policy_path)
    sizes = {}
    for mixed in (True, False):
        for checkpointing in (True, False):
            more = {"bf16": mixed, "gradient_checkpointing": checkpointing, "dtype": "float32"}
            parts = planned(policy_path, tmp_path, **settings, **more).parts
            sizes[mixed, checkpointing] = {part.what: part.size for part in parts}
    every = [size["logits of 8 rows of 16 tokens"] for size in sizes.values()]
    assert every == [16 * 8 * 16 * shape.vocab] * 4
    bf16 = planned(policy_path, tmp_path, **settings, bf16=True, dtype="bfloat16").parts
    assert {part.what: part.size for part in bf16}["logits of 8 rows of 16 tokens"] == every[0]
    copied = [what for what, size in sizes.items() if size.get("16-bit copies of the weights, by autocast")]
    assert copied == [(True, False)]


def test_autocast_keeps_copies_of_the_linear_layers():
    config = Qwen2Config(**WIDTHS)
    model = AutoModelForCausalLM.from_config(config)
    widths, kept, copies = {weight.numel() for weight in model.parameters() if weight.ndim == 2}, [], {}

    def keep(tensor):
        kept.append(tensor)
        if tensor.ndim == 2 and tensor.dtype == torch.bfloat16 and tensor.numel() in widths:
            copies[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.randint(0, 500, (1, 7)), use_cache=False)
    assert Shape.of(config, classifier=False).copies == sum(copies.values()) > 0


def test_auto_takes_the_numbers_of_the_checkpoint(policy_path, tmp_path):
    AutoModelForCausalLM.from_config(Qwen2Config(**WIDTHS), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    made = planned(str(tmp_path / "half"), tmp_path, dtype="auto")
    assert made.parts[0].what.endswith("bfloat16")
    assert made.parts[0].size == 2 * shape_of(str(tmp_path / "half")).parameters
    assert shape_of("Qwen/Qwen3-8B").published_in == "bfloat16"


def test_in_brief_a_plan_is_its_largest_phase():
    made = Plan("mine", [Part("weights", 10 * GIB), Part("activations", 5 * GIB, ("learn",))])
    assert made.brief == "17.3 GiB (learn), fits 24 GB"  # 15 and a tenth, and 0.8 of CUDA's
    made.add("keys and values", 1000 * GIB, ["generate"])
    assert made.brief == "1111.8 GiB (generate), fits no usual card"


def test_a_model_that_nobody_knows_is_an_error_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer: grpo\nmodel_name_or_path: nobody/nothing\ndataset_name: bundled:tiny\nrewards: [exact_match]\n"
        f"output_dir: {tmp_path}/run\nadvantage: group_norm\n"
    )
    with pytest.raises(RecipeError, match="model_name_or_path: no config of 'nobody/nothing'; without the Hub"):
        plan(str(recipe))
    with pytest.raises(RecipeError, match=r"no config of 'Qwen/Qwen2\.5-7BB', did you mean 'Qwen/Qwen2\.5-7B'"):
        plan(str(recipe), ["--model_name_or_path", "Qwen/Qwen2.5-7BB"])
    with pytest.raises(RecipeError, match=r"no folder '\./nothing'"):
        plan(str(recipe), ["--model_name_or_path", "./nothing"])
