"""One base model, many adapters and heads: switching leaves no trace, scores equal those of models loaded apart."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_rewards import RewardError
from trl_rewards.models.adapters import adapter_parameters, add_adapter, trunk_of, using
from trl_rewards.models.pretrained import Loading
from trl_rewards.models.scorer import load_scorer
from trl_rewards.models.shared_base import SharedBase

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


# --- rewards on one base ---------------------------------------------------------------------------------------------


LATE = {"target_modules": ALL_LINEAR, "layers_to_transform": [2, 3]}
LAST = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [3], "r": 2, "lora_alpha": 16}
FULL = {"target_modules": ALL_LINEAR}
TEXTS = [
    f"{prompt} {completion}"
    for prompt in ("the cat sat on the mat and the dog ran to the sky " * 4, "the sky sat")
    for completion in ("the dog ran 3 times", "the cat sat", "sky", "the dog sat 8 times and the cat ran 2 times")
]


def save_reward(folder, base: str, seed: int, tokenizer=None, outputs: int = 1, **lora) -> str:
    """A reward adapter as `trainer: reward` with LoRA leaves it: PEFT on a sequence classifier, with its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **lora))
    randomise(adapted, "default", seed)
    adapted.save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(base)).save_pretrained(folder)
    return str(folder)


def save_head(folder, size: int, seed: int) -> str:
    """A head alone, in the file that LlamaFactory writes."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    save_file({"v_head.summary.weight": torch.randn(1, size, generator=generator)}, folder / "value_head.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def rewards(bases, tmp_path_factory):
    """Folders of reward adapters, by family and kind."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(f"{family}-rewards")
        kinds = {"late": LATE, "late2": LATE, "last": LAST, "full": FULL, "full2": FULL | {"r": 2}}
        for seed, (kind, lora) in enumerate(kinds.items()):
            found[family, kind] = save_reward(folder / kind, bases[family], seed, **lora)
        found[family, "head"] = save_head(folder / "head", 64, 11)
        found[family, "head2"] = save_head(folder / "head2", 64, 12)
    return found


def loading(path: str, quantized: bool = False, **options) -> Loading:
    return Loading(path=path, dtype="float32", quantization="4bit" if quantized else None, device="cpu", **options)


def scores_apart(base: str, adapter: str, quantized: bool, prefix_reuse: str = "off") -> list[float]:
    return load_scorer(loading(base, quantized, adapter=adapter), prefix_reuse=prefix_reuse).score_texts(TEXTS, True)


@pytest.mark.parametrize(
    ("family", "quantized", "prefix_reuse"),
    [("qwen2", False, "off"), ("qwen2", True, "on"), ("llama", False, "on"), ("llama", True, "off")],
)
def test_rewards_on_the_policys_base_score_as_models_loaded_apart(bases, rewards, family, quantized, prefix_reuse):
    kinds = ["full", "late", "last", "full2", "late2"]
    shared = SharedBase(loading(bases[family]))
    members = {kind: shared.add(rewards[family, kind], prefix_reuse=prefix_reuse) for kind in kinds}
    policy = make_policy(bases[family], quantized).train()
    before = state_of(policy)
    shared.bind(policy)
    found = {kind: member.scorer.score_texts(TEXTS, True) for kind, member in members.items()}
    after = state_of(policy)
    for part in ("requires_grad", "training", "parameters"):
        assert {name: after[part][name] for name in before[part] if name in after[part]}.items() <= before[
            part
        ].items()
    assert {name for name, required in after["requires_grad"].items() if required} == {
        name for name, required in before["requires_grad"].items() if required
    }
    assert (after["active"], after["enabled"]) == (before["active"], before["enabled"])
    for kind in kinds:
        wanted = scores_apart(bases[family], rewards[family, kind], quantized)
        assert found[kind] == pytest.approx(wanted, rel=1e-4, abs=1e-4), kind
        assert max(wanted) - min(wanted) > 0.1, kind
    saved = members["late"].scorer.group.scorer.metrics["prefix_saved"]
    assert saved > 0.3 if prefix_reuse == "on" else saved == 0


def test_members_share_the_layers_below_their_own(bases, rewards):
    """Layers 0 and 1 run once for five members, 2 and 3 once for the base and once for each that changes them."""
    shared = SharedBase(loading(bases["qwen2"]))
    members = [shared.add(rewards["qwen2", kind]) for kind in ("head", "late", "last", "late2", "head2")]
    shared.bind(make_policy(bases["qwen2"]))
    passes = [0, 0, 0, 0]
    for index, layer in enumerate(trunk_of(shared.model).layers):
        layer.register_forward_hook(lambda *_, index=index: passes.__setitem__(index, passes[index] + 1))
    scores = [member.scorer.score_ids([[5, 6, 7], [8, 9, 10, 11]]) for member in members]
    assert passes == [1, 1, 3, 4]
    assert len({tuple(found) for found in scores}) == 5
    members[0].scorer.score_ids([[8, 9, 10, 11]])
    assert passes == [1, 1, 3, 4]  # it is known
    members[0].scorer.score_ids([[8, 9, 10, 12]])
    assert passes == [2, 2, 6, 8]


@pytest.mark.parametrize("with_policy", [True, False])
def test_heads_alone_read_the_base_without_the_policys_adapter(bases, rewards, with_policy):
    from safetensors.torch import load_file

    shared = SharedBase(loading(bases["llama"]))
    members = [shared.add(rewards["llama", kind]) for kind in ("head", "head2")]
    if with_policy:
        shared.bind(make_policy(bases["llama"]))
    else:
        shared.load()
    with torch.no_grad():
        hidden = load_base(bases["llama"], False).model(IDS).last_hidden_state[0, -1]
    for member, kind in zip(members, ("head", "head2"), strict=True):
        weight = load_file(f"{rewards['llama', kind]}/value_head.safetensors")["v_head.summary.weight"]
        assert member.scorer.score_ids(IDS.tolist()) == pytest.approx((weight @ hidden).tolist(), rel=1e-4)


def test_a_base_loaded_for_rewards_alone_gives_the_same_scores(bases, rewards):
    shared = SharedBase(loading(bases["qwen2"], quantized=True))
    members = {kind: shared.add(rewards["qwen2", kind]) for kind in ("late", "full")}
    shared.load()
    for kind, member in members.items():
        wanted = scores_apart(bases["qwen2"], rewards["qwen2", kind], quantized=True)
        assert member.scorer.score_texts(TEXTS, True) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_one_of_several_outputs_is_the_score(bases, tmp_path):
    path = save_reward(tmp_path / "two", bases["qwen2"], 3, outputs=2, **FULL)
    shared = SharedBase(loading(bases["qwen2"]))
    with pytest.raises(RewardError, match="has 2 outputs"):
        shared.add(path)
    second, mixed = shared.add(path, output=1), shared.add(path, output={0: 0.5, 1: 2.0})
    shared.load()
    apart = load_scorer(loading(bases["qwen2"], adapter=path), output={0: 0.5, 1: 2.0}).score_texts(TEXTS, True)
    assert mixed.scorer.score_texts(TEXTS, True) == pytest.approx(apart, rel=1e-4, abs=1e-4)
    assert second.scorer.score_texts(TEXTS, True) != pytest.approx(apart, rel=1e-2)


@QUANTIZED
def test_gradients_after_scoring_equal_those_before(bases, rewards, quantized):
    policy = make_policy(bases["qwen2"], quantized).train()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        policy(IDS, labels=IDS).loss.backward()
        found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad(set_to_none=True)
        return found

    before = gradients()
    shared = SharedBase(loading(bases["qwen2"]))
    members = [shared.add(rewards["qwen2", kind]) for kind in ("full", "late")]
    shared.bind(policy)
    for member in members:
        member.scorer.score_texts(TEXTS, True)
    after = gradients()
    assert after.keys() == before.keys() != set()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0)


def test_an_architecture_that_is_not_layers_and_a_norm_takes_a_pass_per_member(bases, rewards):
    shared = SharedBase(loading(bases["qwen2"]))
    members = {kind: shared.add(rewards["qwen2", kind]) for kind in ("late", "last")}
    policy = make_policy(bases["qwen2"])
    trunk = trunk_of(policy)
    forward = trunk.forward

    def scaled(*arguments, **options):
        output = forward(*arguments, **options)
        output.last_hidden_state = output.last_hidden_state * 2  # after the norm, where a replay does not come by
        return output

    trunk.forward = scaled
    shared.bind(policy)
    assert members["late"].scorer.head.backbone.layers == []
    for kind, member in members.items():
        wanted = [2 * score for score in scores_apart(bases["qwen2"], rewards["qwen2", kind], False)]
        assert member.scorer.score_texts(TEXTS, True) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
