"""Tiny process reward models of the released shapes, with real tokenizers."""

from __future__ import annotations

import json

import pytest

from tests.conftest import make_sentencepiece_tokenizer, make_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # so that scores differ
}
REMOTE = """
from torch import nn
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class Steps(Qwen2PreTrainedModel):
    config_class = Qwen2Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        size = config.hidden_size
        self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.num_labels))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return TokenClassifierOutput(logits=self.score(hidden))
"""


def qwen_config(tokenizer, **options):
    from transformers import Qwen2Config

    return Qwen2Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES, **options)


@pytest.fixture(scope="session")
def qwen_prm(tmp_path_factory) -> str:
    """As Qwen2.5-Math-PRM: a head of two layers, code of its own, and a tag that is a special token."""
    import torch

    folder = tmp_path_factory.mktemp("qwen_prm")
    (folder / "modeling_steps.py").write_text(REMOTE)
    scope: dict = {}
    exec(REMOTE, scope)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    torch.manual_seed(2)
    scope["Steps"](qwen_config(tokenizer, num_labels=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_steps.Steps"}, "architectures": ["Steps"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def token_classifier(tmp_path_factory) -> str:
    """As TRL's PRMTrainer leaves it."""
    import torch
    from transformers import Qwen2ForTokenClassification

    folder = tmp_path_factory.mktemp("token_classifier")
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    Qwen2ForTokenClassification(qwen_config(tokenizer, num_labels=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shepherd(tmp_path_factory) -> str:
    """As Math-Shepherd: a causal language model and a tag of the vocabulary."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("shepherd")
    tokenizer = make_sentencepiece_tokenizer()
    torch.manual_seed(4)
    MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
