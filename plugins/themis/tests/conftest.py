"""A tiny Themis with a real tokenizer, and a trained one for what cannot be seen on random weights."""

from __future__ import annotations

import pytest

WORDS = [
    "### USER:\nQuestion: What is 3 plus 4?\nAnswer: 7\n### ASSISTANT:\n<start_tool> Thought: I compute it.\n",
    "Action: arithmetic\nAction Input: 3+4\n<start_observation> Observation: 7\n<start_work> Work: They agree.</s>",
    "Context: Finished. It differs. Do I need to use a tool? No",
    " ".join(map(str, range(20))),
]


def make_tokenizer():
    """Words with the space before them, numbers and signs; `<start_tool>` and the like are tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s|[^\s\p{L}\d]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["<pad>", "<unk>", "</s>", "<start_tool>", "<start_observation>", "<start_work>"]
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(folder, tied=False):
    """A random causal language model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.2,
                tie_word_embeddings=tied,
                bos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> str:
    """A random causal language model without a head, whose embeddings are its output layer."""
    folder = tmp_path_factory.mktemp("themis-base")
    make_model(folder, tied=True)
    return str(folder)


@pytest.fixture(scope="session")
def themis_path(tmp_path_factory) -> str:
    """A random Themis as its authors release it: a causal LM with the weight `v_head.weight` in the same file."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("themis")
    make_model(folder)
    weights = load_file(folder / "model.safetensors")
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        weights["v_head.weight"] = torch.randn(1, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
