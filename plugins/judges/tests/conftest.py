"""A tiny chat model that knows the words yes and no, in several spellings."""

from __future__ import annotations

import pytest

from tests.conftest import make_tokenizer

SPELLINGS = ["yes", "Yes", " YES", "no", " No"]


@pytest.fixture(scope="session")
def judge_path(tmp_path_factory) -> str:
    import torch
    from tokenizers import AddedToken
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("judge")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in SPELLINGS])
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.3,  # so that probabilities differ
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
