import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaModel
from trl_rewards_polar.internlm2 import internlm2, last_attended, register, split_heads

RECORDED = json.loads(Path(__file__).with_name("polar_cases.json").read_text(encoding="utf-8"))["cases"]
(POOLING,) = (case for case in RECORDED if case["id"] == "polar-pool-01-position")

PUBLISHED = {  # config.json of POLAR-7B
    "vocab_size": 92544,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262144,
    "rope_theta": 50000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "pad_token_id": 2,
}
SMALLER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "pad_token_id": 2,
}
LLAMA_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny(heads=4, kv_heads=2, attention="sdpa", **settings):
    classes = internlm2()
    settings = TINY | settings | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    torch.manual_seed(0)
    model = classes.reward_model(classes.config(**settings, attn_implementation=attention)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def as_llama(model):
    """The same backbone as transformers' Llama, its fused matrices taken apart row by row."""
    config = model.config
    names = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    llama = LlamaModel(LlamaConfig(**names, attn_implementation=config._attn_implementation)).eval()
    groups, size = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    weights = {}
    for name, weight in model.model.state_dict().items():
        if "wqkv" not in name:
            for ours, theirs in LLAMA_NAMES.items():
                name = name.replace(ours, theirs)
            weights[name] = weight
            continue
        rows = {"q_proj": [], "k_proj": [], "v_proj": []}
        for head, block in enumerate(weight.split(size)):
            place = head % (groups + 2)
            rows["q_proj" if place < groups else "k_proj" if place == groups else "v_proj"].append(block)
        for part, blocks in rows.items():
            weights[name.replace("attention.wqkv", f"self_attn.{part}")] = torch.cat(blocks)
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize(
    ("settings", "parameters"), [(PUBLISHED, 7_358_652_416), (PUBLISHED | SMALLER, 1_699_581_952)], ids=["7B", "1.8B"]
)
def test_parameters_have_the_published_names_and_shapes(settings, parameters):
    classes = internlm2()
    with torch.device("meta"):
        model = classes.reward_model(classes.config(**settings))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    hidden, inner, layers = (settings[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    fused = hidden + 2 * 8 * 128  # heads of 128, 8 of keys and 8 of values
    wanted = {"model.tok_embeddings.weight": (92544, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        wanted |= {prefix + "attention.wqkv.weight": (fused, hidden), prefix + "attention.wo.weight": (hidden, hidden)}
        wanted |= {f"{prefix}feed_forward.w{index}.weight": (inner, hidden) for index in (1, 3)}
        wanted |= {prefix + "feed_forward.w2.weight": (hidden, inner)}
        wanted |= {prefix + "attention_norm.weight": (hidden,), prefix + "ffn_norm.weight": (hidden,)}
    assert shapes == wanted | {"v_head.weight": (1, hidden)}
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert not [name for name, _ in model.named_buffers() if name in model.state_dict()]


def test_heads_are_split_in_groups_of_queries_key_and_value():
    # 2 key/value heads of width 1, each with 3 query heads: q q q k v | q q q k v
    queries, keys, values = split_heads(torch.arange(10.0)[None, None], kv_heads=2, head_dim=1)
    assert queries.flatten().tolist() == [0, 1, 2, 5, 6, 7]
    assert (keys.flatten().tolist(), values.flatten().tolist()) == ([3, 8], [4, 9])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (8, 2)])
def test_hidden_states_are_llamas(heads, kv_heads, attention):
    model = tiny(heads, kv_heads, attention)
    llama = as_llama(model)
    ids = torch.randint(3, 50, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # padded on the left
    mask[2, -5:] = 0  # and on the right
    ours = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    theirs = llama(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)


def test_past_the_trained_length_the_rotary_base_grows_with_the_text():
    model, length = tiny(), 80
    ids = torch.randint(3, 50, (1, length))
    hidden = model.model(input_ids=ids).last_hidden_state
    assert torch.allclose(hidden, as_llama(model)(input_ids=ids).last_hidden_state, atol=1e-5)
    size = model.config.head_dim
    base = 1e4 * (2.0 * length / 32 - 1) ** (size / (size - 2))
    wanted = base ** -(torch.arange(0, size, 2) / size)
    assert torch.allclose(model.model.rotary_emb.inv_freq, wanted, rtol=1e-5)


def test_P12_the_score_is_read_at_the_last_attended_position():
    assert last_attended(torch.tensor(POOLING["input"])).tolist() == POOLING["output"]


def test_padding_on_either_side_gives_the_same_score():
    model = tiny()
    ids = torch.randint(3, 50, (1, 9))
    alone = model(input_ids=ids).logits
    pad = torch.full((1, 4), 2)
    for parts in ([ids, pad], [pad, ids]):
        padded = torch.cat(parts, dim=1)
        mask = torch.cat([(part is ids) * torch.ones_like(part) for part in parts], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        assert torch.allclose(found, alone, atol=1e-5)
    assert torch.allclose(alone, model.v_head(model.model(input_ids=ids).last_hidden_state[:, -1]))


def test_a_cached_prefix_gives_the_same_score():
    model = tiny()
    ids = torch.randint(3, 50, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    wanted = model(input_ids=ids, attention_mask=mask)
    cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    found = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-5)


def test_hidden_states_and_attentions_are_given_on_demand():
    outputs = tiny(attention="eager")(
        input_ids=torch.randint(3, 50, (1, 5)), output_hidden_states=True, output_attentions=True
    )
    assert len(outputs.hidden_states) == 4
    assert [weights.shape for weights in outputs.attentions] == [(1, 4, 5, 5)] * 3


def test_checkpointed_gradients_are_the_plain_ones():
    ids = torch.randint(3, 50, (2, 9))
    gradients = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_saving_keeps_names_and_weights(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    loaded, info = internlm2().reward_model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.config.rope_parameters == model.config.rope_parameters


def test_a_head_that_a_checkpoint_lacks_starts_at_zero_and_is_reported(tmp_path):
    model = tiny()
    model.model.save_pretrained(tmp_path)
    loaded, info = internlm2().reward_model.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"v_head.weight"}
    assert loaded.v_head.weight.abs().sum() == 0
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_once_registered_the_auto_classes_load_it(tmp_path):
    register()
    tiny().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), internlm2().config)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert isinstance(model, internlm2().reward_model)


def test_attention_is_sdpa_unless_asked_for_whatever_a_config_file_says(polar_path):
    config = json.loads(Path(polar_path, "config.json").read_text(encoding="utf-8"))
    assert config["attn_implementation"] == "flash_attention_2"
    register()
    for loader in (internlm2().reward_model, AutoModelForSequenceClassification):
        assert loader.from_pretrained(polar_path).config._attn_implementation == "sdpa"
        eager = loader.from_pretrained(polar_path, attn_implementation="eager")
        assert eager.config._attn_implementation == "eager"


@pytest.mark.slow
def test_linear_layers_are_quantised_but_not_embedding_and_head(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    model = internlm2().reward_model.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    quantised = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    parts = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert quantised == {f"model.layers.{layer}.{part}" for layer in range(3) for part in parts}
