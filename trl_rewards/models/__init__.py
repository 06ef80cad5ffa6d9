"""Rewards that are models: loading them, running them within memory, and asking judges."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_rewards.models.adapters import adapter_parameters, add_adapter, trunk_of, using, with_adapter
    from trl_rewards.models.asking import Asker
    from trl_rewards.models.averaging import average
    from trl_rewards.models.chat import Reply, Request
    from trl_rewards.models.embedding import Embedder, load_embedder
    from trl_rewards.models.encoding import completion_start, shown_samples, shown_text
    from trl_rewards.models.heads import ALL_OUTPUTS, Head, checkpoint_weights, head_parameters, load_next_token
    from trl_rewards.models.http import HttpClient, HttpFailure, api_key
    from trl_rewards.models.judge import (
        Ask,
        JudgeReward,
        ListwiseJudge,
        PairwiseJudge,
        as_number,
        as_text,
        excerpt,
        extract_json,
        object_schema,
        read_winner,
        score_in,
        winner_schema,
    )
    from trl_rewards.models.judge_options import ChatOptions
    from trl_rewards.models.learner import Learner, outcomes_of, parts, source_of
    from trl_rewards.models.options import FromHead, Held, InProcess, nested_options
    from trl_rewards.models.pretrained import (
        Loading,
        at_work,
        keep_4bit_unpacked,
        load_config,
        load_pretrained,
        load_tokenizer,
    )
    from trl_rewards.models.sampling import (
        LocalSampler,
        Sampled,
        Sampler,
        Sampling,
        VllmSampler,
        WorkFile,
        load_sampler,
        sample_candidates,
        stream,
    )
    from trl_rewards.models.scorer import Scorer, default_budget, load_scorer, longest_text, padded_rollout
    from trl_rewards.models.served import ServedScorer
    from trl_rewards.models.shared_base import Member, SharedBase
    from trl_rewards.models.untrusted import (
        control_tokens_of,
        fenced,
        fill,
        placeholders,
        without_control_tokens,
        without_thinking,
    )
    from trl_rewards.models.web import WebTool

_LAZY = {  # name -> module; loaded on first use, since torch takes seconds
    "ALL_OUTPUTS": "heads",
    "Ask": "judge",
    "Asker": "asking",
    "ChatOptions": "judge_options",
    "Embedder": "embedding",
    "FromHead": "options",
    "Head": "heads",
    "HttpClient": "http",
    "Held": "options",
    "HttpFailure": "http",
    "InProcess": "options",
    "JudgeReward": "judge",
    "Learner": "learner",
    "ListwiseJudge": "judge",
    "Loading": "pretrained",
    "LocalSampler": "sampling",
    "Member": "shared_base",
    "PairwiseJudge": "judge",
    "Sampled": "sampling",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "Reply": "chat",
    "Request": "chat",
    "Scorer": "scorer",
    "ServedScorer": "served",
    "SharedBase": "shared_base",
    "adapter_parameters": "adapters",
    "add_adapter": "adapters",
    "at_work": "pretrained",
    "average": "averaging",
    "checkpoint_weights": "heads",
    "completion_start": "encoding",
    "control_tokens_of": "untrusted",
    "default_budget": "scorer",
    "head_parameters": "heads",
    "load_config": "pretrained",
    "longest_text": "scorer",
    "nested_options": "options",
    "object_schema": "judge",
    "outcomes_of": "learner",
    "padded_rollout": "scorer",
    "parts": "learner",
    "placeholders": "untrusted",
    "source_of": "learner",
    "shown_samples": "encoding",
    "shown_text": "encoding",
    "api_key": "http",
    "VllmSampler": "sampling",
    "WebTool": "web",
    "WorkFile": "sampling",
    "as_number": "judge",
    "as_text": "judge",
    "excerpt": "judge",
    "extract_json": "judge",
    "fenced": "untrusted",
    "fill": "untrusted",
    "keep_4bit_unpacked": "pretrained",
    "load_embedder": "embedding",
    "load_next_token": "heads",
    "load_pretrained": "pretrained",
    "load_sampler": "sampling",
    "load_scorer": "scorer",
    "load_tokenizer": "pretrained",
    "trunk_of": "adapters",
    "using": "adapters",
    "with_adapter": "adapters",
    "without_control_tokens": "untrusted",
    "without_thinking": "untrusted",
    "read_winner": "judge",
    "sample_candidates": "sampling",
    "score_in": "judge",
    "winner_schema": "judge",
    "stream": "sampling",
}

__all__ = [
    "ALL_OUTPUTS",
    "Ask",
    "Asker",
    "ChatOptions",
    "Embedder",
    "FromHead",
    "Head",
    "Held",
    "HttpClient",
    "HttpFailure",
    "InProcess",
    "JudgeReward",
    "Learner",
    "ListwiseJudge",
    "Loading",
    "LocalSampler",
    "Member",
    "PairwiseJudge",
    "Reply",
    "Request",
    "Sampled",
    "Sampler",
    "Sampling",
    "Scorer",
    "ServedScorer",
    "SharedBase",
    "VllmSampler",
    "WebTool",
    "WorkFile",
    "adapter_parameters",
    "add_adapter",
    "api_key",
    "as_number",
    "as_text",
    "at_work",
    "average",
    "checkpoint_weights",
    "completion_start",
    "control_tokens_of",
    "default_budget",
    "excerpt",
    "extract_json",
    "fenced",
    "fill",
    "head_parameters",
    "keep_4bit_unpacked",
    "load_config",
    "load_embedder",
    "load_next_token",
    "load_pretrained",
    "load_sampler",
    "load_scorer",
    "load_tokenizer",
    "longest_text",
    "nested_options",
    "object_schema",
    "outcomes_of",
    "padded_rollout",
    "parts",
    "placeholders",
    "read_winner",
    "sample_candidates",
    "score_in",
    "shown_samples",
    "shown_text",
    "source_of",
    "stream",
    "trunk_of",
    "using",
    "winner_schema",
    "with_adapter",
    "without_control_tokens",
    "without_thinking",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
