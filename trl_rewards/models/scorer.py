"""Scalar reward models: loading one, and scoring texts in micro-batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from trl_rewards.errors import RewardError


@dataclass
class RewardModel:
    """A sequence-classification model with one output, its tokenizer, and how it is run."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int


def load_reward_model(
    path: str,
    revision: str | None,
    dtype: str,
    device: Any,
    batch_size: int,
    max_length: int | None,
    trust_remote_code: bool,
    quantization: str | None,
) -> RewardModel:
    """Load from a folder or the Hub. RewardError if the path is wrong or the score head is not in the checkpoint."""
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **shared)
        tokenizer: Any = AutoTokenizer.from_pretrained(path, **shared)
    except (OSError, ValueError) as error:
        raise RewardError(f"no reward model at {path!r}: {str(error).splitlines()[0]}") from error
    # A config that says nothing of labels reports two; one with several names them.
    if config.num_labels != 1 and "id2label" in config.to_diff_dict():
        raise RewardError(f"{path!r} has {config.num_labels} outputs; `model` needs a reward model with one")
    device = device or default_device()
    options: dict[str, Any] = {"num_labels": 1, "dtype": getattr(torch, dtype)}
    if quantization:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantization == "4bit",
            load_in_8bit=quantization == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        options["device_map"] = {"": device}
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, **shared, **options, output_loading_info=True
        )
    except RuntimeError as error:  # a head of another size
        raise RewardError(f"{path!r} is not a reward model with one output: {error}") from error
    if fresh := sorted(info["missing_keys"]):
        raise RewardError(
            f"{path!r} is not a reward model: its checkpoint has no weights for {', '.join(fresh)}, "
            "which would be random numbers"
        )
    if not quantization:
        model.to(device)
    model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"  # of a text that is too long, the prompt's head goes and the answer stays
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return RewardModel(model, tokenizer, batch_size, min(max_length or longest, longest))


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


@torch.inference_mode()
def score_texts(reward_model: RewardModel, texts: list[str], templated: bool) -> list[float | None]:
    """One float32 score per text, in order; None for a text without tokens.

    `templated` texts come from a chat template and have their special tokens; others get the tokenizer's own.

    Batches hold texts of similar length, whatever order they came in.
    """
    tokenizer, model = reward_model.tokenizer, reward_model.model
    encoded = tokenizer(
        texts, add_special_tokens=not templated, truncation=True, max_length=reward_model.max_length, padding=False
    )["input_ids"]
    order = sorted((row for row in range(len(texts)) if encoded[row]), key=lambda row: (len(encoded[row]), row))
    scores: list[float | None] = [None] * len(texts)
    for start in range(0, len(order), reward_model.batch_size):
        rows = order[start : start + reward_model.batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt").to(model.device)
        for row, score in zip(rows, _forward(model, batch).float().tolist(), strict=True):
            scores[row] = score
    return scores


def _forward(model: Any, batch: Any) -> torch.Tensor:
    """(B,) scores. For decoder models the score is read at the last attended token; transformers' own head looks for
    the last token that is not the pad id, which misreads texts that end with it where pad and eos are one token."""
    head = getattr(model, "score", None)
    if head is None:  # encoders with a pooler
        return model(**batch).logits[:, 0]
    hidden = model.base_model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(dim=1) - 1
    return head(hidden[torch.arange(len(last), device=hidden.device), last])[:, 0]
