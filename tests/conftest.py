"""Fixtures: tiny real models and tokenizers, made here, and helpers to run several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is printed must not hang on the machine: pytest imports readline, which gives child processes COLUMNS=80.
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    f"the {noun} {verb} {count} times"
    for noun in ("cat", "dog", "sky")
    for verb in ("sat", "ran")
    for count in range(9)
]


def make_tokenizer():
    """A byte-level BPE tokenizer trained on a few sentences, with chat template, pad and end-of-turn tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_sentencepiece_tokenizer():
    """Shaped like Mistral's: white space belongs to the word after it, and unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzSABC0123456789.:=+-*\n<>/ки"
    merges = [("t", "h"), ("▁", "t"), ("▁", "+"), ("▁", "-"), ("к", "и"), ("▁", "ки"), ("▁", "S")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", bos_token="<s>")


def round_to_4_bits(model) -> None:
    """Round the weights of a float32 model's layers, not of its head, as bitsandbytes' nf4 does."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for part in model.model.modules():
        if isinstance(part, torch.nn.Linear):
            part.weight.data = dequantize_4bit(*quantize_4bit(part.weight.data, quant_type="nf4"))


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory) -> str:
    """A random one-layer Qwen3 policy with its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reward_model_path(tmp_path_factory) -> str:
    """A random one-layer Qwen2 sequence classifier with one output."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_ranks(tmp_path):
    """Runs a Python script in several gloo processes and returns their combined output."""

    def run(script: str, ranks: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        file = tmp_path / "ranks.py"
        # Threads of gloo's may outlive the group, and then the interpreter, which they abort: so without its end.
        end = (
            "\nimport os, sys\nimport torch.distributed as d\nif d.is_initialized():\n    d.destroy_process_group()\n"
        )
        end += "sys.stdout.flush()\nos._exit(0)\n"
        file.write_text(script + end)
        # Not `accelerate launch --cpu`, which runs one process whatever it is told.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(file), *arguments], capture_output=True, text=True, timeout=600, env=environment
        )
        if check and done.returncode:
            raise AssertionError(f"{ranks} ranks failed:\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture
def write(tmp_path):
    """Writes a file into the test's folder and returns its path."""

    def write_file(name: str, text: str) -> str:
        file = Path(tmp_path, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write_file
