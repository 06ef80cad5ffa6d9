"""One base model, many adapters and heads: switching leaves no trace, scores equal those of models loaded apart."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_rewards import RewardError
from trl_rewards.models.adapters import adapter_parameters, add_adapter, trunk_of, using

FAMILIES = ["qwen2", "llama"]
QUANTIZED = pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "4bit"])
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, policy_path):
    """Folders of tiny random causal LMs of four layers, with a tokenizer, by family."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(policy_path)
    folders = {}
    for family, config_class, model_class in (
        ("qwen2", hf.Qwen2Config, hf.Qwen2ForCausalLM),
        ("llama", hf.LlamaConfig, hf.LlamaForCausalLM),
    ):
        config = config_class(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(7)
        folders[family] = str(tmp_path_factory.mktemp(family))
        model_class(config).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def load_base(path: str, quantized: bool):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from trl_rewards.models import keep_4bit_unpacked

    options = {}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return keep_4bit_unpacked(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options))


def randomise(model, adapter: str, seed: int) -> None:
    """Weights of an adapter that does something: PEFT's B matrices begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def make_policy(path: str, quantized: bool = False, **options):
    """A policy with LoRA and a dropout of its own, and a second adapter on other layers."""
    policy = get_peft_model(load_base(path, quantized), LoraConfig(r=4, lora_dropout=0.3, target_modules=ALL_LINEAR))
    randomise(policy, "default", 1)
    add_adapter(policy, "critic", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    randomise(policy, "critic", 2)
    return policy


def state_of(model) -> dict:
    """Everything that a switch of adapters may change."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "_disable_adapters")}
    return {
        "active": (model.active_adapter, model.active_adapters, model.base_model.active_adapter),
        "enabled": model._adapters_disabled,
        "layers": {name: (layer.active_adapters, layer.disable_adapters) for name, layer in layers.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "dropout": {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
    }


# --- switching -------------------------------------------------------------------------------------------------------


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("adapter", ["default", "critic", None])
@pytest.mark.parametrize("training", [False, True])
def test_using_an_adapter_leaves_everything_as_it_was(bases, adapter, training):
    policy = make_policy(bases["qwen2"])
    policy.train()
    policy.get_submodule("base_model.model.model.layers.1").eval()  # a part that somebody set by hand
    before = state_of(policy)
    with using(policy, adapter, training):
        assert policy.training is training
        policy(IDS)
    assert state_of(policy) == before
    with pytest.raises(KeyError), using(policy, adapter, training):
        raise KeyError("a reward broke")
    assert state_of(policy) == before


def test_using_may_be_nested(bases):
    policy = make_policy(bases["qwen2"])
    before = state_of(policy)
    with using(policy, "critic", training=True):
        inside = state_of(policy)
        with using(policy, None), using(policy, "default"):
            assert policy.active_adapters == ["default"]
            assert not any(layer[1] for layer in state_of(policy)["layers"].values())
        assert state_of(policy) == inside
    assert state_of(policy) == before


def test_only_the_used_adapter_trains(bases):
    policy = make_policy(bases["qwen2"])
    for adapter, training, wanted in (
        ("critic", True, {"critic"}),
        ("default", True, {"default"}),
        ("critic", False, set()),
    ):
        with using(policy, adapter, training):
            trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert trained == {path for name in wanted for path in adapter_parameters(policy, name)}
    with using(policy, None, training=True):
        assert not any(parameter.requires_grad for parameter in policy.parameters())


def test_adding_an_adapter_freezes_it_and_leaves_the_active_one_trainable(bases):
    policy = get_peft_model(load_base(bases["qwen2"], False), LoraConfig(r=4, target_modules=["q_proj"]))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    add_adapter(policy, "judge", LoraConfig(r=2, target_modules=["v_proj"], inference_mode=True))
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    assert len(adapter_parameters(policy, "judge")) == 2 * 4
    assert policy.active_adapters == ["default"]
    with pytest.raises(RewardError, match=r"'judge' cannot be put beside default, judge: .*already exists"):
        add_adapter(policy, "judge", LoraConfig(target_modules=["v_proj"]))


def test_using_gives_each_adapters_own_outputs(bases):
    """Against PEFT's own ways, in evaluation mode."""
    policy = make_policy(bases["llama"]).eval()
    with torch.no_grad():
        wanted = {"default": policy(IDS).logits}
        policy.set_adapter("critic")
        wanted["critic"] = policy(IDS).logits
        policy.set_adapter("default")
        with policy.disable_adapter():
            wanted[None] = policy(IDS).logits
    policy.train()
    found = {}
    for adapter in wanted:
        with using(policy, adapter):
            found[adapter] = policy(IDS).logits
            assert not found[adapter].requires_grad
    for adapter, logits in wanted.items():
        torch.testing.assert_close(found[adapter], logits, rtol=0, atol=0)
    assert (wanted["default"] - wanted["critic"]).abs().max() > 0.1
    assert (wanted["default"] - wanted[None]).abs().max() > 0.1


@QUANTIZED
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_after_another_adapter_was_used_equal_those_before(bases, quantized, checkpointing):
    policy = make_policy(bases["qwen2"], quantized)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # dropout
        policy.train()
        policy(IDS, labels=IDS).loss.backward()
        found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad(set_to_none=True)
        return found

    before = gradients()
    assert before.keys() == adapter_parameters(policy, "default").keys()
    for adapter in ("critic", None):
        with using(policy, adapter):
            policy(IDS)
    with using(policy, "critic", training=True):
        trunk_of(policy)(IDS).last_hidden_state.sum().backward()
        assert {name for name, p in policy.named_parameters() if p.grad is not None} == set(
            adapter_parameters(policy, "critic")
        )
    policy.zero_grad(set_to_none=True)
    after = gradients()
    assert after.keys() == before.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0)


def test_a_wrong_or_a_merged_adapter_is_refused(bases):
    policy = make_policy(bases["qwen2"])
    with pytest.raises(RewardError, match="no adapter 'judge'; it has default, critic"), using(policy, "judge"):
        pass
    policy.merge_adapter()
    with pytest.raises(RewardError, match="adapter default is merged"), using(policy, "critic"):
        pass
    policy.unmerge_adapter()
    with using(policy, "critic"):
        pass


def test_the_trunk_is_the_decoder_with_the_adapters_in_it(bases):
    policy = make_policy(bases["qwen2"])
    assert trunk_of(policy) is policy.get_base_model().model
    assert trunk_of(policy.get_base_model()) is trunk_of(policy)
    with using(policy, "critic"):
        hidden = trunk_of(policy)(IDS).last_hidden_state
        torch.testing.assert_close(policy.get_base_model().lm_head(hidden), policy(IDS).logits, rtol=0, atol=1e-6)
    with pytest.raises(RewardError, match="Qwen2Model has no decoder apart"):
        trunk_of(trunk_of(policy))
