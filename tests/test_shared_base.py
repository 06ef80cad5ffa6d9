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


def test_layers_inside_a_plain_model_are_switched_off_too(bases):
    policy = make_policy(bases["qwen2"])
    inner = policy.get_base_model()
    with using(policy, None):
        without = policy(IDS).logits
    before, adapted = state_of(policy), policy(IDS).logits
    with using(inner, None):
        torch.testing.assert_close(inner(IDS).logits, without)
    assert state_of(policy) == before
    assert not torch.allclose(adapted, without)


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


# --- what cannot share a base ----------------------------------------------------------------------------------------


def refusal(base: str, adapter) -> str:
    with pytest.raises(RewardError) as caught:
        SharedBase(loading(base)).add(str(adapter))
    return str(caught.value)


def rewrite_config(folder: str, **values) -> None:
    import json
    from pathlib import Path

    file = Path(folder, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_an_adapter_of_another_base_is_refused_before_the_base_is_loaded(bases, rewards, tmp_path):
    import shutil

    adapter = save_reward(tmp_path / "rm", bases["qwen2"], 1, **FULL)
    assert "was trained on" in (said := refusal(bases["llama"], adapter))
    assert "an adapter fits no other base than its own" in said
    elsewhere = shutil.copytree(bases["qwen2"], tmp_path / "elsewhere" / bases["qwen2"].rpartition("/")[2])
    SharedBase(loading(str(elsewhere))).add(adapter)  # the same model in another folder
    shutil.copy(f"{bases['llama']}/config.json", elsewhere / "config.json")
    assert "they differ in model_type" in refusal(str(elsewhere), adapter)
    rewrite_config(adapter, base_model_name_or_path=bases["llama"])
    assert "base_model_name_or_path" in refusal(bases["qwen2"], adapter)
    assert "nothing at" in refusal(bases["qwen2"], tmp_path / "absent")


def test_what_changes_more_than_layers_and_a_head_is_refused(bases, tmp_path):
    from transformers import AutoTokenizer

    base = bases["qwen2"]
    saved = save_reward(tmp_path / "embeddings", base, 1, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert "brings more than a head and LoRA in decoder layers: base_model.model.model.embed_tokens" in refusal(
        base, saved
    )
    saved = save_reward(tmp_path / "tokens", base, 1, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    assert "token embeddings of its own" in refusal(base, saved)
    saved = save_reward(tmp_path / "biases", base, 1, target_modules=["q_proj"], bias="all")
    assert "trains biases of the base" in refusal(base, saved)
    saved = save_reward(tmp_path / "begun", base, 1, target_modules=["q_proj"])
    rewrite_config(saved, init_lora_weights="pissa")
    assert "init_lora_weights='pissa'" in refusal(base, saved)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reward|>"]})
    saved = save_reward(tmp_path / "added", base, 1, tokenizer, target_modules=["q_proj"])
    assert "it has added tokens '<|reward|>'" in refusal(base, saved)
    policy = get_peft_model(load_base(base, False), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    policy.save_pretrained(tmp_path / "no-head")
    assert "has no head (`score` or `v_head`)" in refusal(base, tmp_path / "no-head")


def test_an_adapter_whose_weights_do_not_fit_names_one(bases, tmp_path):
    adapter = save_reward(tmp_path / "rm", bases["qwen2"], 1, target_modules=["q_proj"], r=4)
    rewrite_config(adapter, r=8)
    shared = SharedBase(loading(bases["qwen2"]))
    shared.add(adapter)
    with pytest.raises(RewardError, match=r"does not fit the base: .*lora_A.weight is .*\(4, 64\), wanted \(8, 64\)"):
        shared.bind(make_policy(bases["qwen2"]))


def test_a_policy_that_changes_the_base_is_refused(bases, rewards):
    def bind(policy) -> str:
        shared = SharedBase(loading(bases["qwen2"]))
        shared.add(rewards["qwen2", "late"])
        with pytest.raises(RewardError) as caught:
            shared.bind(policy)
        return str(caught.value)

    assert "trains weights of the base itself" in bind(load_base(bases["qwen2"], False))
    biased = get_peft_model(load_base(bases["qwen2"], False), LoraConfig(target_modules=["q_proj"], bias="all"))
    assert "trains weights of the base itself" in bind(biased)
    begun = get_peft_model(
        load_base(bases["qwen2"], False), LoraConfig(target_modules=["q_proj"], init_lora_weights="olora")
    )
    assert "init_lora_weights='olora' changes the base's own weights" in bind(begun)


def test_a_reward_without_path_says_where_it_runs(rewards):
    from trl_rewards import load_reward

    reward = load_reward("model", adapter=rewards["qwen2", "late"])
    with pytest.raises(RewardError, match="'model' has an adapter and no path: it runs on the policy's base"):
        reward(prompts=["the cat"], completions=[" sat"])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "share_base: true\nuse_peft: true\nrewards: [exact_match]",
            "share_base: no source runs on the policy's base; give one an adapter",
        ),
        ("share_base: true\nrewards: [{use: model, with: {adapter: rm}}]", "share_base: the base must stay as it is"),
        (
            "rewards: [{use: model, with: {adapter: rm}}]",
            "rewards[0].with: so it runs on the policy's base",
        ),
        (
            "share_base: true\nuse_peft: true\nrewards: [{use: model, timeout: 3, with: {adapter: rm}}]",
            "rewards[0].timeout: a source on the policy's base runs in turn with the policy",
        ),
        (
            "share_base: true\nuse_peft: true\nload_in_4bit: true\n"
            "rewards: [{use: model, with: {adapter: rm, load_in_4bit: true, load_in_8bit: false, dtype: float16}}]",
            "rewards[0].with.dtype: got 'float16', but the source runs on the policy's base, which has",
        ),
        (
            "share_base: true\nuse_peft: true\nrewards: [{use: model, with: {adapter: rm, device: cpu}}]",
            "rewards[0].with.device: got 'cpu', but the source runs on the policy's base",
        ),
        ("share_base: 1\nrewards: [exact_match]", "share_base: must be true or false, got 1"),
        ("share_base: true\ntrainer: reward", "share_base: trainer 'reward' does not take it"),
        ("rewards: [{use: model}]", "rewards[0].with: path is required (folder or Hub name); or an adapter"),
        ("rewards: [{use: model, with: {adapter: rm, head: 'yes'}}]", "rewards[0].with: head: an adapter on the"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_sharing(write, text, wanted):
    from trl_rewards import Recipe, RecipeError

    with pytest.raises(RecipeError) as caught:
        Recipe.load(write("recipe.yaml", text), check_trl=False)
    (problem,) = caught.value.problems
    assert problem.startswith(wanted)


def test_the_signature_names_the_base_that_scores_depend_on(write):
    from trl_rewards import Recipe

    text = (
        "share_base: true\nuse_peft: true\nmodel_name_or_path: some/base\nrewards: [{use: model, with: {adapter: rm}}]"
    )
    plain = Recipe.load(write("plain.yaml", text), check_trl=False)
    quantized = Recipe.load(write("quantized.yaml", f"load_in_4bit: true\n{text}"), check_trl=False)
    assert "  base:some/base  " in plain.signature
    assert "  base:some/base,load_in_4bit:true  " in quantized.signature


# --- training --------------------------------------------------------------------------------------------------------


def shared_pipeline(adapters: dict[str, str]):
    from trl_rewards import Pipeline
    from trl_rewards.plugins import component_class
    from trl_rewards.scoring import Source

    model = component_class("reward", "model")
    return Pipeline([Source(name, model(adapter=path)) for name, path in adapters.items()])


def make_trainer(base: str, folder, adapters: dict[str, str], quantized: bool = False, kind: str = "GRPO", **options):
    import trl
    from datasets import Dataset
    from transformers import BitsAndBytesConfig

    from trl_rewards import GRPOTrainer, PPOTrainer
    from trl_rewards.trainers.ppo_config import PPOConfig

    trainer_class, config_class = {"GRPO": (GRPOTrainer, trl.GRPOConfig), "PPO": (PPOTrainer, PPOConfig)}[kind]

    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantized else None
    return trainer_class(
        base,
        args=config_class(**(defaults | options)),
        train_dataset=Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(8)]}),
        quantization_config=quantization,
        peft_config=LoraConfig(r=4, target_modules=ALL_LINEAR, lora_dropout=0.1),
        pipeline=shared_pipeline(adapters),
    )


@pytest.mark.parametrize("option", ["timeout", "concurrency", "isolate"])
def test_a_source_that_would_outlive_its_turn_is_refused(bases, rewards, tmp_path, option):
    from trl_rewards.trainers.sharing import policy_base

    pipeline = shared_pipeline({"rm": rewards["qwen2", "late"]})
    setattr(pipeline.sources[0], option, 3)
    with pytest.raises(ValueError, match=f"{option}: 'rm' runs on the policy's base"):
        policy_base(pipeline, bases["qwen2"], None)


def test_zero3_and_fsdp_are_refused_before_anything_is_loaded(bases, rewards, monkeypatch):
    from types import SimpleNamespace

    from trl_rewards.trainers.sharing import policy_base

    pipeline = shared_pipeline({"rm": rewards["qwen2", "late"]})

    def arguments(stage: int | None = None, fsdp: bool = False):
        plugin = SimpleNamespace(zero_stage=stage) if stage else None
        return SimpleNamespace(deepspeed_plugin=plugin, fsdp=fsdp, model_init_kwargs=None, device="cpu")

    with pytest.raises(ValueError, match="ZeRO-3 splits it; use DDP or ZeRO-2"):
        policy_base(pipeline, bases["qwen2"], arguments(stage=3))
    with pytest.raises(ValueError, match="FSDP splits it"):
        policy_base(pipeline, bases["qwen2"], arguments(fsdp=True))
    assert policy_base(pipeline, bases["qwen2"], arguments(stage=2)).loading.path == bases["qwen2"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP splits it"):
        policy_base(pipeline, bases["qwen2"], arguments())


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "4bit"])
def test_grpo_trains_on_rewards_of_its_own_base(bases, rewards, tmp_path, quantized):
    """The policy moves and nothing else; scores equal those of models loaded apart; checkpoints hold it alone."""
    import os

    from trl.trainer.utils import use_adapter

    adapters = {kind: rewards["qwen2", kind] for kind in ("late", "full", "head")}
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": quantized, "beta": 0.1}
    trainer = make_trainer(bases["qwen2"], tmp_path, adapters, quantized, **options)
    policy = trainer.model
    start = {name: parameter.clone() for name, parameter in policy.named_parameters() if parameter.requires_grad}
    frozen = {name: parameter.clone() for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    assert {path.split(".")[-2] for path in start} == {"default"}
    trainer.train()
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in adapter_parameters(policy, "default").values()}
    assert any(
        (parameter - start[name]).abs().max() > 1e-4 for name, parameter in policy.named_parameters() if name in start
    )
    for name, parameter in policy.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    with use_adapter(policy, None), torch.no_grad():  # TRL's reference
        reference = load_base(bases["qwen2"], quantized).eval()
        torch.testing.assert_close(policy.eval()(IDS).logits, reference(IDS).logits, rtol=1e-3, atol=1e-3)
    batch = trainer.last_batch
    texts = [prompt + completion for prompt, completion in zip(*_texts(trainer), strict=True)]
    for column, kind in enumerate(("late", "full")):
        wanted = load_scorer(loading(bases["qwen2"], quantized, adapter=adapters[kind])).score_texts(texts, True)
        assert batch.scores.values[:, column].tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-3), kind
    checkpoint = tmp_path / "checkpoint-2"
    assert sorted(name for name in os.listdir(checkpoint) if (checkpoint / name).is_dir()) == []
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(os.listdir(checkpoint))
    assert list(policy.peft_config) == ["default", "reward0", "reward1"]
    more = make_trainer(bases["qwen2"], tmp_path, adapters, quantized, **options | {"max_steps": 3})
    more.train(resume_from_checkpoint=str(checkpoint))
    assert more.state.global_step == 3
    assert {path.split(".")[-2] for path, p in more.model.named_parameters() if p.requires_grad} == {"default"}


@pytest.mark.slow
def test_ppos_critic_and_rewards_live_on_one_base(bases, rewards, tmp_path):
    """The critic learns and is saved as an adapter of its own; the rewards are neither."""
    import os

    adapters = {kind: rewards["qwen2", kind] for kind in ("late", "full")}
    options = {"kind": "PPO", "save_strategy": "steps", "save_steps": 2, "critic_learning_rate": 1e-2}
    trainer = make_trainer(bases["qwen2"], tmp_path, adapters, quantized=True, **options)
    names = {name: adapter_parameters(trainer.model, name) for name in ("default", "critic", "reward0", "reward1")}
    before = {name: [p.clone() for p in found.values()] for name, found in names.items()}
    trainer.train()
    for name, found in names.items():
        moved = any(not torch.equal(*pair) for pair in zip(found.values(), before[name], strict=True))
        assert moved == (name in ("default", "critic")), name
    checkpoint = tmp_path / "checkpoint-2"
    assert sorted(name for name in os.listdir(checkpoint) if (checkpoint / name).is_dir()) == []
    more = make_trainer(bases["qwen2"], tmp_path, adapters, quantized=True, **options | {"max_steps": 3})
    more.train(resume_from_checkpoint=str(checkpoint))
    assert more.state.global_step == 3


def _texts(trainer) -> tuple[list[str], list[str]]:
    rows = len(trainer.last_batch.rewards)
    return tuple(list(trainer._logs[name])[-rows:] for name in ("prompt", "completion"))


def test_vllm_is_sent_the_policy_without_the_rewards(bases, rewards):
    """What TRL streams to vLLM: the base with the policy's adapter merged, under the base's own names."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    if not hasattr(VLLMGeneration, "_iter_named_params"):
        pytest.skip("this TRL streams weights in another way")
    from trl.distributed import DistributedBackend

    def sent(policy) -> dict[str, torch.Tensor]:
        generation = VLLMGeneration.__new__(VLLMGeneration)  # vLLM itself needs a GPU
        generation.model, generation._dist = policy, DistributedBackend(Accelerator(cpu=True))
        return {name: tensor.clone() for name, tensor in generation._iter_named_params()}

    def policy():
        made = get_peft_model(load_base(bases["qwen2"], False), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        randomise(made, "default", 1)
        return made

    alone, shared, beside = policy(), SharedBase(loading(bases["qwen2"])), policy()
    member = shared.add(rewards["qwen2", "full"])  # on more layers than the policy's
    shared.bind(beside)
    before = member.scorer.score_texts(TEXTS, True)
    wanted, found = sent(alone), sent(beside)
    assert list(found) == list(wanted)
    assert found.keys() <= load_base(bases["qwen2"], False).state_dict().keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    member.scorer.group.known.clear()
    assert member.scorer.score_texts(TEXTS, True) == pytest.approx(before, abs=1e-4)  # unmerging rounds


def test_score_loads_the_base_by_itself(bases, rewards, write, tmp_path):
    import json

    from trl_rewards.commands.score import score_file

    adapter = rewards["llama", "late"]
    recipe = write(
        "recipe.yaml",
        f"share_base: true\nuse_peft: true\nmodel_name_or_path: {bases['llama']}\nload_in_4bit: true\n"
        f"rewards:\n  - {{use: model, as: late, with: {{adapter: {adapter}}}}}\n"
        f"  - {{use: model, as: full, with: {{adapter: {rewards['llama', 'full']}}}}}\n",
    )
    rows = [{"prompt": "the cat", "completion": [text, f"{text} times"]} for text in (" sat", " ran 3")]
    data = write("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    score_file(recipe, [], data, tmp_path / "scores.jsonl", "train", "completion", 8)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()[1:]]
    texts = [row["prompt"] + text for row in rows for text in row["completion"]]
    apart = load_scorer(loading(bases["llama"], quantized=True, adapter=adapter))
    assert [line["scores"]["late"] for line in lines] == pytest.approx(apart.score_texts(texts, True), abs=1e-4)


def test_candidates_of_bon_are_scored_on_the_shared_base(bases, rewards, write, tmp_path):
    from datasets import Dataset

    from trl_rewards import Pipeline, Recipe
    from trl_rewards.commands.bon import Drawing, score_candidates
    from trl_rewards.models.sampling import Sampled

    adapter = rewards["llama", "late"]
    file = write(
        "recipe.yaml",
        f"share_base: true\nuse_peft: true\nmodel_name_or_path: {bases['llama']}\n"
        f"rewards: [{{use: model, with: {{adapter: {adapter}}}}}]\n",
    )
    recipe = Recipe.load(file, check_trl=False)
    drawn = [[Sampled(text, [], True) for text in (" sat", " ran 3")]]
    data, options = Dataset.from_list([{"prompt": "the cat"}]), Drawing(prompts="here", n=2)
    pipeline = Pipeline.from_recipe(recipe)
    (group,) = score_candidates(data, drawn, pipeline, recipe, options, tmp_path / "scores.jsonl", None)
    apart = load_scorer(loading(bases["llama"], adapter=adapter)).score_texts(["the cat sat", "the cat ran 3"], True)
    assert [candidate.total for candidate in group.candidates] == pytest.approx(apart, abs=1e-4)


RANKS = """
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_shared_base import make_trainer

base, folder, *adapters = sys.argv[2:]
trainer = make_trainer(base, folder, dict(zip("ab", adapters)), max_steps=3, save_strategy="steps", save_steps=2,
                       per_device_train_batch_size=2)
assert trainer.accelerator.num_processes == 2
trainer.train()
world = trainer.accelerator
from accelerate.utils import gather_object
sums = {name: parameter.double().sum().item() for name, parameter in trainer.model.named_parameters()}
first, second = gather_object([sums])
assert first == second, "ranks hold different weights"
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
losses = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
scores = gather_object([trainer.last_batch.scores.values.tolist()])
assert scores[0] == scores[1]
if world.is_main_process:
    files = sorted(str(file.relative_to(folder)) for file in Path(folder, "checkpoint-2").rglob("*adapter*"))
    print("RESULT" + json.dumps({"grad_norms": losses, "files": files}))
trainer.end() if hasattr(trainer, "end") else None
"""


@pytest.mark.slow
def test_two_processes_train_on_rewards_of_their_own_base(bases, rewards, tmp_path, run_ranks):
    import json
    import re
    from pathlib import Path

    folders = [str(Path(__file__).parent), bases["qwen2"], str(tmp_path / "out")]
    done = run_ranks(RANKS, 2, *folders, rewards["qwen2", "late"], rewards["qwen2", "full"])
    result = json.loads(re.search(r"RESULT(.*)", done.stdout).group(1))
    assert len(result["grad_norms"]) == 3
    assert min(result["grad_norms"]) > 0
    assert result["files"] == [f"checkpoint-2/adapter_{name}" for name in ("config.json", "model.safetensors")]


@pytest.mark.slow
def test_what_the_reward_trainer_leaves_scores_the_same_on_the_policys_base(bases, tmp_path):
    import trl
    from datasets import Dataset

    from trl_rewards import RewardTrainer, load_objective

    options = {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "report_to": "none"}
    rows = {"prompt": ["the cat"] * 8, "chosen": [" sat 3 times"] * 8, "rejected": [" ran"] * 8}
    trainer = RewardTrainer(
        bases["qwen2"],
        args=trl.RewardConfig(str(tmp_path), save_strategy="no", disable_tqdm=True, **options),
        train_dataset=Dataset.from_dict(rows),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules=ALL_LINEAR, layers_to_transform=[3]),
        objective=load_objective("bradley_terry"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    shared = SharedBase(loading(bases["qwen2"]))
    member = shared.add(str(tmp_path))
    assert member.adapter.first_layer == 3
    shared.bind(make_policy(bases["qwen2"]))
    wanted = scores_apart(bases["qwen2"], str(tmp_path), quantized=False)
    assert member.scorer.score_texts(TEXTS, True) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
