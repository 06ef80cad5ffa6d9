"""How much memory models take: weights, adapters, caches and activations, counted on models without weights.

A model of a config is built on the meta device, where it has shapes and no memory. What a forward pass keeps is
counted in units of its widths (after Korthikanti et al., https://huggingface.co/papers/2205.05198, for decoders with
gated MLPs and attention that keeps no scores); tests hold the sums against what PyTorch keeps for small models.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_rewards.errors import RewardError, did_you_mean
from trl_rewards.models.pretrained import Quantization

SHAPES = Path(__file__).parent.parent / "bundled/models.json"
"""Widths of published models, from the `config.json` of each at https://huggingface.co/NAME; `like` is another's."""
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' nf4, and scales that share one when they are quantised themselves."""


@dataclass(frozen=True)
class Shape:
    """A model on the meta device, and its widths."""

    model: Any
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    adapters: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Their sizes, by their configs."""

    @classmethod
    def of(cls, config: Any, classifier: bool) -> Shape:
        """`classifier`: a score head of one output in the place of the language model's."""
        text = config.get_text_config()
        auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        if classifier:
            config.num_labels = 1
        with torch.device("meta"):
            model = auto.from_config(config)
        heads = text.num_attention_heads
        return cls(
            model,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,  # absent where every head has its own
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab=text.vocab_size,
        )

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def published_in(self) -> str:
        """The numbers of its weights as its config has them."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def copies(self) -> int:
        """Bytes of what autocast keeps for the backward pass of weights in fp32: linear layers in 16 bits."""
        return sum(2 * module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Linear))

    def weights(self, dtype: str, quantization: Quantization, nested: bool = False) -> int:
        """Bytes of all weights. bitsandbytes quantises linear layers but the head; `nested`: their scales too."""
        head = self.model.get_output_embeddings()
        kept = {"score", "v_head"}
        linear = {
            id(module.weight)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] not in kept
        }
        total = 0.0
        for weight in self.model.parameters():
            if quantization and id(weight) in linear:
                total += quantised(weight, quantization, nested)
            else:
                total += weight.numel() * SIZES[dtype]
        return round(total)

    def adapter(self, config: Any) -> int:
        """Parameters that learn with a LoraConfig, those of whole layers that it trains too. ValueError if its targets
        are not in the model."""
        if (key := repr(config)) not in self.adapters:
            # PEFT writes what `all-linear` means into its config, and off the meta device it draws numbers.
            with torch.device("meta"):
                model = type(self.model)(copy.deepcopy(self.model.config))
                adapted: Any = get_peft_model(model, copy.deepcopy(config), autocast_adapter_dtype=False)
            self.adapters[key] = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        return self.adapters[key]

    def cache(self, rows: int, tokens: int, dtype: str) -> int:
        """Bytes of keys and values."""
        return rows * tokens * self.layers * 2 * self.kv_heads * self.head_dim * SIZES[dtype]

    def layer(self, size: int) -> int:
        """Bytes that one layer keeps of a token for the backward pass, in numbers of `size` bytes.

        Both norms: their input in fp32 (it is kept in it), and what they give. Attention: queries, keys and values
        before and after rotation, and what it gives. The MLP: gate, its activation, up, and their product.
        """
        attention = (3 * self.heads + 4 * self.kv_heads) * self.head_dim
        return 2 * (4 + size) * self.hidden + size * (self.hidden + attention + 4 * self.mlp)

    def learning(self, rows: int, tokens: int, dtype: str, checkpointing: bool) -> int:
        """Bytes of activations at the height of a backward pass, without the logits."""
        size = SIZES[dtype]
        if checkpointing:  # what goes into each layer, and the layer that is computed again
            return rows * tokens * (self.layers * size * self.hidden + self.layer(size))
        return rows * tokens * self.layers * self.layer(size)

    def working(self, tokens: int, dtype: str) -> int:
        """Bytes of a forward pass without gradients: two layers' worth of hidden states and an MLP."""
        return tokens * SIZES[dtype] * (6 * self.hidden + 3 * self.mlp)

    def logits(self, tokens: int, dtype: str) -> int:
        """Bytes of logits at the height of a backward pass of log-probabilities: four tensors in fp32, five in 16
        bits."""
        return (4 if dtype == "float32" else 5) * tokens * self.vocab * SIZES[dtype]


def quantised(weight: torch.Tensor, quantization: Quantization, nested: bool) -> float:
    """Bytes of a weight in bitsandbytes' nf4, or int8 with a scale per row."""
    if quantization == "8bit":
        return weight.numel() + 4 * weight.shape[0]
    scales = weight.numel() / BLOCK
    return weight.numel() / 2 + (scales + 4 * scales / NESTED_BLOCK if nested else 4 * scales)


def optimiser(name: str, parameters: int, size: int) -> int:
    """Bytes of an optimiser's state; two moments in the weights' own numbers where nothing else is known."""
    if "8bit" in name:
        return 2 * parameters
    if "4bit" in name:
        return parameters
    if name.startswith(("sgd", "adafactor")):
        return 0
    return (1 if "lion" in name else 2) * parameters * size


@functools.cache
def shape_of(path: str, classifier: bool = False, trust_remote_code: bool = False) -> Shape:
    """A model by folder or name; published ones are known without the Hub. RewardError if there is no such model.

    `classifier`: with a score head; a model that is published as one is, whatever is said.
    """
    known = json.loads(SHAPES.read_text(encoding="utf-8"))
    if path in known:
        classifier = classifier or known[path].get("classifier", False)
        if like := known[path].get("like"):
            return shape_of(like, classifier)
        fields = {name: value for name, value in known[path].items() if name != "classifier"}
        return Shape.of(AutoConfig.for_model(fields.pop("model_type"), dtype="bfloat16", **fields), classifier)
    if path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise RewardError(f"no folder {path!r}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        hint, said = did_you_mean(path, known), str(error).splitlines()[0]
        raise RewardError(
            f"no config of {path!r}{hint}; without the Hub only folders and {', '.join(known)} are known: {said}"
        ) from error
    named = (config.architectures or [""])[0]
    return Shape.of(config, classifier or named.endswith(("Classification", "RewardModel")))
