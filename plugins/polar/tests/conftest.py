"""Tiny reward models with a real tokenizer that knows POLAR's marks."""

from __future__ import annotations

import pytest

SENTENCES = [
    f"What is the capital of {place}? {city}." for place in ("China", "France") for city in ("Beijing", "Paris")
]


def make_tokenizer(**options):
    """Byte-level BPE with a token that begins texts, and POLAR's marks: one registered as special, the other not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|reward|>"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken("[UNUSED_TOKEN_130]", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks | options)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def polar_path(tmp_path_factory, tokenizer) -> str:
    """A random InternLM2 reward model, its config written as the released ones are."""
    import json

    import torch
    from trl_rewards_polar.internlm2 import internlm2

    folder = tmp_path_factory.mktemp("polar")
    classes = internlm2()
    reward = tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]")
    settings = TINY | {"vocab_size": len(tokenizer), "reward_token_id": reward, "bias": False}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = classes.reward_model(classes.config(**settings))
        torch.nn.init.normal_(model.v_head.weight)
        for layer in model.model.layers:  # else two layers hardly move what the embedding says
            torch.nn.init.normal_(layer.attention.wqkv.weight, std=0.2)
            torch.nn.init.normal_(layer.attention.wo.weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    published = {
        "architectures": ["InternLM2ForRewardModel"],
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "hidden_act": "silu",
        "model_type": "internlm2",
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.49.0",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(settings | published))
    return str(folder)


@pytest.fixture(scope="session")
def classifier_path(tmp_path_factory, tokenizer) -> str:
    """A random Qwen2 sequence classifier with the same tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    settings = {name: value for name, value in TINY.items() if not name.startswith("rope")}
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = Qwen2ForSequenceClassification(Qwen2Config(**settings, vocab_size=len(tokenizer), num_labels=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
