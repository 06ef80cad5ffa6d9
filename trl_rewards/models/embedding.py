"""Encoders: the hidden states of all tokens of a text, in micro-batches that fit into memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel

from trl_rewards.errors import RewardError
from trl_rewards.models.batching import batches
from trl_rewards.models.pretrained import Loading, at_work, load_config, load_pretrained, load_tokenizer
from trl_rewards.models.scorer import default_budget, longest_text, padded

logger = logging.getLogger(__name__)

_TURN = threading.RLock()  # sources may run in threads, and an offloaded model must not move while another needs it


@dataclass(kw_only=True)
class Embedder:
    """Hidden states of texts, in float32. They depend on the text's own tokens alone, up to rounding."""

    model: Any
    loading: Loading
    tokenizer: Any
    max_length: int
    """Tokens that `encode` cuts a text to, special ones included."""
    token_budget: int
    """Padded tokens of one forward pass; halved for good when memory runs out."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included; the end of a text that is too long goes."""
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]

    def states(self, ids: Sequence[list[int]]) -> list[torch.Tensor]:
        """(T, H) float32 on the model's device, for each row of T token ids. The caller bounds how many it holds.

        RewardError where memory is not enough for one row.
        """
        found: dict[int, torch.Tensor] = {}
        with _TURN, at_work(self.model, self.loading) as device, torch.inference_mode():
            while rest := [row for row in range(len(ids)) if row not in found]:
                try:
                    for batch in batches([len(ids[row]) for row in rest], self.token_budget):
                        rows = [rest[index] for index in batch]
                        tokens, mask = padded([ids[row] for row in rows], self.tokenizer.pad_token_id or 0, device)
                        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
                        found |= {row: hidden[place, : len(ids[row])].float() for place, row in enumerate(rows)}
                except torch.OutOfMemoryError:
                    shortest = min(len(ids[row]) for row in rest if row not in found)
                    if self.token_budget <= shortest:
                        raise RewardError(
                            f"{self.loading.path!r}: out of memory for a single row of {shortest} tokens; use another "
                            "device, offload or load_in_4bit"
                        ) from None
                    self.token_budget //= 2
                    logger.warning("%s: out of memory; token_budget is now %d", self.loading.path, self.token_budget)
        return [found[row] for row in range(len(ids))]


def load_embedder(loading: Loading, *, layer: int | None = None, token_budget: int | None = None) -> Embedder:
    """An encoder from a folder or the Hub, cut off after `layer` of its layers (None: all).

    RewardError if there is none, it has fewer layers, or its checkpoint lacks some of them.
    """
    config = load_config(loading, "encoder")
    if config.is_encoder_decoder:
        raise RewardError(f"{loading.path!r} is an encoder with a decoder; give one without, such as BERT or RoBERTa")
    layers = config.get_text_config().num_hidden_layers
    if layer is not None and layer > layers:
        raise RewardError(f"layer: {loading.path!r} has {layers} layers, got {layer}")
    tokenizer = load_tokenizer(loading)
    model, missing = load_pretrained(AutoModel, loading, num_hidden_layers=layers if layer is None else layer)
    # A pooler makes a sentence's vector of the first token; language models are saved without, and no one asks it.
    if lacking := [name for name in missing if "pooler" not in name]:
        raise RewardError(f"{loading.path!r} lacks weights of its layers: {', '.join(lacking[:5])}")
    return Embedder(
        model=model,
        loading=loading,
        tokenizer=tokenizer,
        max_length=longest_text(None, config, tokenizer),
        token_budget=token_budget or default_budget(loading),
    )
