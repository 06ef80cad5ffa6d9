"""Loading models for scoring: where they are, what is put on them, and what must not happen to them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations import deepspeed

from trl_rewards import RewardError
from trl_rewards.components import Context
from trl_rewards.defaults.model import Model
from trl_rewards.models import pretrained
from trl_rewards.models.pretrained import (
    Loading,
    at_work,
    default_device,
    device_of,
    keep_4bit_unpacked,
    load_config,
    load_pretrained,
    load_tokenizer,
    outside_deepspeed,
)
from trl_rewards.models.scorer import load_scorer


def on_cpu(path: str, **options) -> Loading:
    return Loading(**({"path": path, "dtype": "float32", "device": "cpu"} | options))


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_a_model_is_in_evaluation_mode_frozen_and_of_the_dtype_asked_for(reward_model_path):
    model, missing = load_pretrained(AutoModelForSequenceClassification, on_cpu(reward_model_path, dtype="bfloat16"))
    assert (missing, model.training, model.dtype) == ([], False, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_a_checkpoint_lacks_are_named(policy_path):
    _, missing = load_pretrained(AutoModelForSequenceClassification, on_cpu(policy_path), num_labels=1)
    assert missing == ["score.weight"]


def test_every_option_reaches_from_pretrained():
    given = {}

    class Auto:
        @staticmethod
        def from_pretrained(path, **options):
            given.update(options, path=path)
            return torch.nn.Linear(1, 1), {"missing_keys": set()}

    options = {"revision": "v2", "attn_implementation": "eager", "trust_remote_code": True}
    load_pretrained(Auto, on_cpu("hub/name", **options), num_labels=3)
    assert given == options | {
        "path": "hub/name",
        "dtype": torch.float32,
        "num_labels": 3,
        "output_loading_info": True,
    }


def test_attention_is_the_one_asked_for_or_an_error(reward_model_path):
    loading = on_cpu(reward_model_path, attn_implementation="eager")
    model, _ = load_pretrained(AutoModelForSequenceClassification, loading)
    assert model.config._attn_implementation == "eager"
    loading = on_cpu(reward_model_path, attn_implementation="flash_attention_2")
    with pytest.raises(RewardError, match=r"cannot be loaded: .*[Ff]lash"):
        load_pretrained(AutoModelForSequenceClassification, loading)


def test_what_is_not_there_is_an_error_that_names_it(tmp_path, reward_model_path):
    with pytest.raises(RewardError, match=f"no judge at '{tmp_path}': "):
        load_config(on_cpu(str(tmp_path)), "judge")
    load_config(on_cpu(reward_model_path)).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=f"'{tmp_path}' cannot be loaded: .*model.safetensors"):
        load_pretrained(AutoModelForSequenceClassification, on_cpu(str(tmp_path)))


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tmp_path, reward_model_path):
    tokenizer = load_tokenizer(on_cpu(reward_model_path))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(on_cpu(str(tmp_path)))
    assert again.pad_token_id is not None


# --- where it is -----------------------------------------------------------------------------------------------------


def test_the_default_device_is_the_ranks_accelerator_or_the_cpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert default_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_device() == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert device_of(on_cpu("m")) == torch.device("cpu")
    with pytest.raises(RewardError, match=r"device: 'cuda:1' is not there; this process sees cpu$"):
        device_of(on_cpu("m", device="cuda:1"))
    with pytest.raises(RewardError, match=r"device: 'gpu 1' is none; use 'same', 'cpu' or an accelerator such as"):
        device_of(on_cpu("m", device="gpu 1"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_of(on_cpu("m", device="cuda:1")) == torch.device("cuda:1")
    for name in ("cuda:2", "xpu:0"):
        with pytest.raises(RewardError, match=f"device: '{name}' is not there; this process sees cpu, cuda:0, cuda:1"):
            device_of(on_cpu("m", device=name))


def test_a_source_says_where_its_model_is():
    context = Context(device=torch.device("cuda:3"))
    assert Model(path="m").loading("m", context).device == torch.device("cuda:3")
    assert Model(path="m", device="cpu").loading("m", context).device == "cpu"
    assert Model(path="m", device="cuda:1", offload=True).loading("m", context).offload
    with pytest.raises(ValueError, match="bitsandbytes int8 weights cannot be moved"):
        Model(path="m", offload=True, load_in_8bit=True)


def test_an_offloaded_model_comes_and_goes(monkeypatch):
    monkeypatch.setattr(pretrained, "device_of", lambda loading: torch.device("meta"))
    freed = []
    monkeypatch.setattr(pretrained, "free_memory", freed.append)
    moves = []
    model = SimpleNamespace(to=moves.append)
    with at_work(model, on_cpu("m")) as device:
        assert device == torch.device("meta")
    assert moves == []

    def fail():
        with at_work(model, on_cpu("m", offload=True)) as device:
            assert moves == [device] == [torch.device("meta")]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert moves == [torch.device("meta"), "cpu"]
    assert freed == [torch.device("meta")]


def test_an_offloaded_model_scores_as_one_that_stays(reward_model_path):
    rows = [[5, 6, 7], [8, 9]]
    wanted = load_scorer(on_cpu(reward_model_path)).score_ids(rows)
    assert load_scorer(on_cpu(reward_model_path, offload=True)).score_ids(rows) == wanted


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(policy_path, tmp_path_factory):
    """Folder with `head` (LoRA and a trained score head), `layers` (LoRA alone) and `prompt` (a learned prompt)."""
    import peft

    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "head": peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False),
        "layers": peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    }
    for name, config in kinds.items():
        torch.manual_seed(4)
        model = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1, dtype=torch.float32)
        peft.get_peft_model(model, config).save_pretrained(folder / name)
    return folder


def test_a_head_that_the_adapter_brings_is_no_random_one(adapters, policy_path):
    import peft

    rows = [[5, 6, 7], [5, 6, 8, 9]]
    base = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, adapters / "head").eval()
    with torch.no_grad():
        wanted = [adapted(torch.tensor([row])).logits.item() for row in rows]
    for prefix_reuse in ("off", "on"):
        found = load_scorer(on_cpu(policy_path, adapter=str(adapters / "head")), prefix_reuse=prefix_reuse)
        assert found.score_ids(rows) == pytest.approx(wanted, abs=1e-5)


def test_an_adapter_without_a_head_leaves_it_random_and_is_refused(adapters, policy_path):
    with pytest.raises(RewardError, match=r"no weights for score.weight, which would be random numbers"):
        load_scorer(on_cpu(policy_path, adapter=str(adapters / "layers")))


def test_an_adapter_that_does_not_fit_is_refused(adapters, policy_path, reward_model_path, tmp_path):
    with pytest.raises(RewardError, match=f"adapter: '{tmp_path}' does not fit '{policy_path}': "):
        load_scorer(on_cpu(policy_path, adapter=str(tmp_path)))
    with pytest.raises(RewardError, match=r"learns prompts; only adapters inside the layers \(LoRA …\) are known"):
        load_scorer(on_cpu(policy_path, adapter=str(adapters / "prompt")))


def test_a_value_head_beside_an_adapter_is_found(adapters, policy_path, tmp_path):
    import peft

    base = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    torch.save(head, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        hidden = adapted(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states[-1][0, -1]
        wanted = (hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]).item()
    found = load_scorer(on_cpu(policy_path, adapter=str(tmp_path)))
    assert found.score_ids([[5, 6, 7]]) == pytest.approx([wanted], abs=1e-5)


# --- the policy's DeepSpeed and FSDP ---------------------------------------------------------------------------------


def test_a_model_is_loaded_outside_the_policys_zero3(reward_model_path):
    class Zero3:
        def is_zero3(self):
            return True

    policys = Zero3()
    deepspeed.set_hf_deepspeed_config(policys)
    try:
        with pytest.raises(Exception, match="deepspeed"):
            AutoModelForSequenceClassification.from_pretrained(reward_model_path)
        found = load_scorer(on_cpu(reward_model_path))
        assert len(found.score_ids([[5, 6]])) == 1
        assert deepspeed._hf_deepspeed_config_weak_ref() is policys
        with outside_deepspeed():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(RewardError):
            load_scorer(on_cpu(reward_model_path), head="v_head")
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_every_rank_loads_its_weights_where_the_policys_fsdp_loads_on_one(reward_model_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    wanted = load_scorer(on_cpu(reward_model_path)).score_ids([[5, 6]])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = load_scorer(on_cpu(reward_model_path))
    finally:
        torch.distributed.destroy_process_group()
    assert found.score_ids([[5, 6]]) == wanted
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING")
    with outside_deepspeed():
        pass
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def save_wide(kind: str, folder: str) -> None:
    """A random causal LM or classifier with hidden size 64: a block of nf4 is 64 weights. `llama` has no biases."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0} | sizes
    if kind == "llama":
        hf.LlamaForCausalLM(hf.LlamaConfig(**options)).save_pretrained(folder)
    elif kind == "qwen2":
        hf.Qwen2ForCausalLM(hf.Qwen2Config(**options)).save_pretrained(folder)
    else:
        hf.Qwen2ForSequenceClassification(hf.Qwen2Config(num_labels=1, **options)).save_pretrained(folder)


def lora_gradients(model) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(1, 21).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for name, parameter in model.named_parameters() if "lora_" in name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_qlora_gradients_after_an_evaluation_are_those_before(kind, tmp_path, monkeypatch):
    import bitsandbytes.nn.modules as layers
    import peft

    # What a CPU with AVX512-BF16 says. There the layers repack themselves in evaluation mode; the repacking itself
    # needs no such CPU.
    monkeypatch.setattr(layers, "has_avx512bf16", lambda: True)
    save_wide(kind, str(tmp_path))
    model, _ = load_pretrained(AutoModelForCausalLM, on_cpu(str(tmp_path), quantization="4bit"))
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    before = lora_gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(1, 21).view(2, 10))
    after = lora_gradients(model)
    assert len(before) == 28
    for one, other in zip(before, after, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one)


@pytest.mark.slow
def test_4_bit_layers_of_a_policy_can_be_kept_unpacked_too(tmp_path):
    from transformers import BitsAndBytesConfig

    save_wide("llama", str(tmp_path))
    config = BitsAndBytesConfig(load_in_4bit=True)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    assert keep_4bit_unpacked(policy) is policy
    layers = [module for module in policy.modules() if type(module).__name__ == "Linear4bit"]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 14
    plain = torch.nn.Linear(1, 1)
    assert keep_4bit_unpacked(plain) is plain


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "offload"), [("4bit", False), ("4bit", True), ("8bit", False)])
def test_quantised_scores_are_near_the_full_ones(bits, offload, tmp_path, policy_path):
    save_wide("classifier", str(tmp_path))
    load_tokenizer(on_cpu(policy_path)).save_pretrained(tmp_path)
    prefix = [1 + token % 60 for token in range(40)]
    rows = [prefix + [1 + row * 7 + token for token in range(row + 2)] for row in range(5)]
    wanted = torch.tensor(load_scorer(on_cpu(str(tmp_path))).score_ids(rows))
    loading = on_cpu(str(tmp_path), quantization=bits, offload=offload)
    off, on = (load_scorer(loading, prefix_reuse=choice) for choice in ("off", "on"))
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    assert type(off.head.model.model.layers[0].mlp.up_proj).__name__ == kind
    assert type(off.head.model.score) is torch.nn.Linear
    scores = torch.tensor(off.score_ids(rows))
    assert 0 < (scores - wanted).abs().max() < wanted.std()
    assert on.score_ids(rows) == pytest.approx(scores.tolist(), abs=0.05 * wanted.std().item())


def test_quantisation_without_bitsandbytes_says_what_to_install(reward_model_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RewardError, match="load_in_4bit needs bitsandbytes: pip install bitsandbytes"):
        load_pretrained(AutoModelForSequenceClassification, on_cpu(reward_model_path, quantization="4bit"))
