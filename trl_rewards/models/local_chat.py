"""A judge in this process: chat completions from a causal language model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_rewards.errors import RewardError
from trl_rewards.models.chat import Reply, Request
from trl_rewards.models.pretrained import Loading, at_work, load_pretrained, load_tokenizer
from trl_rewards.models.untrusted import control_tokens_of
from trl_rewards.samples import Failed


class LocalChat:
    """A causal language model with its own chat template."""

    def __init__(self, loading: Loading, token_budget: int, seed: int):
        """`token_budget`: tokens of one batch, replies included. `seed` and the prompts seed what is sampled."""
        self._loading, self._token_budget, self._seed = loading, token_budget, seed
        self._tokenizer: Any = load_tokenizer(loading)
        if not self._tokenizer.chat_template:
            raise RewardError(f"{loading.path!r} has no chat template; a judge needs a chat model")
        self._model, missing = load_pretrained(AutoModelForCausalLM, loading)
        if missing:
            raise RewardError(f"{loading.path!r} is no causal language model: it has no weights for {missing[0]}")
        ends = self._model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self._ends = sorted({*ends, self._tokenizer.eos_token_id} - {None})
        self._longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that mean something to the model, and must not come from a completion."""
        return control_tokens_of(self._tokenizer)

    def replies(self, requests: list[Request]) -> list[Reply | Failed]:
        """One reply per request, in order; Failed for a prompt that leaves no room for the reply.

        Batches hold prompts of similar length. At temperatures above 0 a reply depends on the batch that it is
        sampled in; the global random streams are left as they were.
        """
        prompts = [self._encode(request) for request in requests]
        found: list[Reply | Failed] = [
            Failed(
                f"the judge's prompt has {len(ids)} tokens, which leaves no room for max_tokens "
                f"{request.max_tokens} in its context of {self._longest}"
            )
            for ids, request in zip(prompts, requests, strict=True)
        ]
        fitting = [
            row
            for row, request in enumerate(requests)
            if not self._longest or len(prompts[row]) + request.max_tokens <= self._longest
        ]
        with at_work(self._model, self._loading) as device:
            for rows in self._batches(fitting, prompts, requests):
                batch = self._generate([prompts[row] for row in rows], requests[rows[0]], device)
                for row, reply in zip(rows, batch, strict=True):
                    found[row] = reply
        return found

    def _encode(self, request: Request) -> list[int]:
        """Token ids of the prompt. The template writes its own beginning-of-text token, so none is added."""
        options = (request.extra.get("chat_template_kwargs") or {}) | {"add_generation_prompt": True}
        text = self._tokenizer.apply_chat_template(request.messages, tokenize=False, **options)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _batches(self, rows: list[int], prompts: list[list[int]], requests: list[Request]) -> list[list[int]]:
        """Rows of one batch: equal settings, similar lengths, padded size within the token budget."""
        batches: list[list[int]] = []
        order = sorted(rows, key=lambda row: (_settings(requests[row]), len(prompts[row]), row))
        for row in order:
            size = len(prompts[row]) + requests[row].max_tokens
            if (
                batches
                and _settings(requests[batches[-1][0]]) == _settings(requests[row])
                and size * (len(batches[-1]) + 1) <= self._token_budget
            ):
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _generate(self, prompts: list[list[int]], request: Request, device: torch.device) -> list[Reply]:
        width = max(len(ids) for ids in prompts)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(each)) + each for each in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=device)
        sampling = {"temperature": request.temperature, "top_p": request.top_p} if request.temperature > 0 else {}
        # Settings of the model's own, such as a top_k, would make another judge of it than a server with this request.
        config = GenerationConfig(
            max_new_tokens=request.max_tokens,
            do_sample=request.temperature > 0,
            top_k=0 if sampling else None,
            eos_token_id=self._ends,
            pad_token_id=pad,
            **sampling,
        )
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._batch_seed(prompts, request))
            tokens = self._model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return [self._read(new, len(each)) for new, each in zip(tokens[:, width:].tolist(), prompts, strict=True)]

    def _batch_seed(self, prompts: list[list[int]], request: Request) -> int:
        content = json.dumps([self._seed, request.seed, request.attempt, prompts])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=7).digest())

    def _read(self, tokens: list[int], prompt_tokens: int) -> Reply:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        said = tokens if end is None else tokens[:end]
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        return Reply(text, "length" if end is None else "stop", prompt_tokens, len(said))


def _settings(request: Request) -> tuple:
    return (request.temperature, request.top_p, request.max_tokens, request.seed or 0, request.attempt)
