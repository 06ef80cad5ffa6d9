"""Sampling completions from a policy: n candidates per prompt, the same ones in whatever batch a prompt is.

Every candidate has a random stream of its own, seeded by the prompt's tokens and the candidate's number. Batches,
their order and the number of processes change nothing but the last bits of the logits.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_rewards.errors import RewardError
from trl_rewards.files import write_whole
from trl_rewards.models.pretrained import Loading, keep_4bit_unpacked, load_pretrained, load_tokenizer
from trl_rewards.pairs import Sampling
from trl_rewards.samples import Text

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # what TRL's chat template reads beside the prompt


class Sampled(NamedTuple):
    """One completion."""

    text: str
    ids: list[int]
    """Its tokens, the end token included."""
    ended: bool
    """Whether the policy ended it; else it was cut at `max_new_tokens`."""


class Sampler:
    """Prompts to token ids to completions. `LocalSampler` and `VllmSampler` draw the tokens."""

    def __init__(self, tokenizer: Any, context: int | None, ends: Iterable[int], name: str):
        """`context`: tokens that prompt and completion may have together. `name` is what messages call the policy."""
        self.tokenizer, self.name, self.ends = tokenizer, name, frozenset(ends)
        self.context = context or sys.maxsize

    def encode(self, prompt: Text, tools: Any = None, template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt: messages in the policy's chat template, a string as it is.

        `tools` (schemas, or their JSON) and `template` (variables, such as enable_thinking) are for the chat template.
        RewardError where the prompt is empty or does not fit, or where there is no chat template for a chat.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise RewardError(f"policy {self.name!r} has no chat template, and the prompts are chats")
        else:
            text = self.tokenizer.apply_chat_template(
                prompt,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                tokenize=False,
                add_generation_prompt=True,
                **(template or {}),
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RewardError("a prompt is empty; leave out rows without text")
        if len(ids) >= self.context:
            raise RewardError(
                f"policy {self.name!r} has a context of {self.context} tokens, and a prompt has {len(ids)}"
            )
        return ids

    def batches(self, prompts: Mapping[int, Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Keys of `prompts` in batches of similar length within the budgets, shortest first.

        A prompt that leaves less room than `max_new_tokens` goes alone, so that it shortens no other's completion.
        """
        found: list[list[int]] = []
        alone: list[list[int]] = []
        for key in sorted(prompts, key=lambda key: (len(prompts[key]), key)):
            size = len(prompts[key]) + sampling.max_new_tokens
            if size > self.context:
                alone.append([key])
            elif (
                found
                and (len(found[-1]) + 1) * size <= sampling.batch_tokens
                and len(found[-1]) < (sampling.batch_size or sys.maxsize)
            ):
                found[-1].append(key)
            else:
                found.append([key])
        return found + alone

    def draw(self, prompts: Sequence[list[int]], streams: Sequence[int], sampling: Sampling) -> list[Sampled]:
        """One completion per prompt; `streams` seed their random numbers, one for each (`stream`)."""
        raise NotImplementedError

    def read(self, prompt: list[int], tokens: list[int]) -> Sampled:
        """A completion from its tokens, whatever follows its end left out."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        ids = tokens if end is None else tokens[: end + 1]
        return Sampled(continuation(self.tokenizer, prompt, tokens[:end]), ids, end is not None)


class LocalSampler(Sampler):
    """A model in this process. One that is being trained is left in the mode it was in."""

    def __init__(self, model: Any, tokenizer: Any, name: str = "policy"):
        """`model`: a causal language model, LoRA layers inside it or not, on the device where it works."""
        self.model = model
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        super().__init__(tokenizer, context, ends | {tokenizer.eos_token_id} - {None}, name)

    def draw(self, prompts: Sequence[list[int]], streams: Sequence[int], sampling: Sampling) -> list[Sampled]:
        device, width = self.model.device, max(map(len, prompts))
        inputs = self.tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(device)
        room = min(sampling.max_new_tokens, self.context - width)
        processors = [_Draw(sampling, streams, width, room, device)] if sampling.temperature else []
        with generating(self.model), torch.no_grad():
            written = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                logits_processor=processors,
                max_new_tokens=room,
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(self.ends),
                pad_token_id=self.tokenizer.pad_token_id,
            )[:, width:].tolist()
        return [self.read(prompt, tokens) for prompt, tokens in zip(prompts, written, strict=True)]


class VllmSampler(Sampler):
    """A model in vLLM's engine, for sampling that trains nothing meanwhile."""

    def __init__(self, loading: Loading, name: str = ""):
        try:
            vllm: Any = importlib.import_module("vllm")
            self._lora: Any = importlib.import_module("vllm.lora.request")
        except ImportError as error:
            raise RewardError('backend vllm needs vLLM: pip install "trl-rewards[vllm]"') from error
        if loading.quantization == "8bit":
            raise RewardError("backend vllm loads bitsandbytes weights in 4 bits only; use load_in_4bit")
        self._vllm, self._adapter = vllm, loading.adapter
        options: dict[str, Any] = {"quantization": "bitsandbytes"} if loading.quantization else {}
        self._engine = vllm.LLM(
            model=loading.path,
            revision=loading.revision,
            dtype=loading.dtype,
            trust_remote_code=loading.trust_remote_code,
            enable_lora=bool(loading.adapter),
            **options,
        )
        tokenizer = load_tokenizer(loading)
        super().__init__(
            tokenizer, self._engine.model_config.max_model_len, {tokenizer.eos_token_id} - {None}, name or loading.path
        )

    def batches(self, prompts: Mapping[int, Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """vLLM batches by itself; these are what is kept at a time."""
        order = sorted(prompts)
        size = sampling.batch_size or 1024
        return [order[start : start + size] for start in range(0, len(order), size)]

    def draw(self, prompts: Sequence[list[int]], streams: Sequence[int], sampling: Sampling) -> list[Sampled]:
        settings = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed % 2**31,
                max_tokens=min(sampling.max_new_tokens, self.context - len(prompt)),
            )
            for prompt, seed in zip(prompts, streams, strict=True)
        ]
        lora = self._lora.LoRARequest("policy", 1, self._adapter) if self._adapter else None
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [output.outputs[0] for output in self._engine.generate(inputs, settings, lora_request=lora)]
        # vLLM knows the ends of the model's generation config, which the tokenizer may not name.
        return [
            self.read(prompt, list(output.token_ids))._replace(ended=output.finish_reason == "stop")
            for prompt, output in zip(prompts, outputs, strict=True)
        ]


def load_sampler(
    loading: Loading, backend: Literal["transformers", "vllm"] = "transformers", name: str = ""
) -> Sampler:
    """A policy from a folder or the Hub, ready to sample from. RewardError if it cannot be loaded."""
    if backend == "vllm":
        return VllmSampler(loading, name)
    tokenizer = load_tokenizer(loading)
    model, missing = load_pretrained(AutoModelForCausalLM, loading)
    if missing:
        raise RewardError(f"{loading.path!r} is no causal language model: it has no weights for {missing[0]}")
    return LocalSampler(model, tokenizer, name or loading.path)


def sample_candidates(
    sampler: Sampler,
    prompts: Sequence[Text],
    n: int,
    sampling: Sampling,
    *,
    seed: Any = 0,
    rows: Sequence[int] | None = None,
    tools: Sequence[Any] | None = None,
    templates: Sequence[Mapping[str, Any] | None] | None = None,
    work: Path | None = None,
    signature: str = "",
    progress: bool = False,
) -> list[list[Sampled]]:
    """n candidates for each of `prompts`, or of those at `rows` alone: a process's share, which is what it returns.

    A prompt that is there twice gets other candidates the second time. `work` is a file that keeps batches as they
    are written, so that an interrupted call goes on where it stopped; `signature` says what else they depend on, such
    as the policy. `tools` and `templates`: per prompt, for the chat template. RewardError where a prompt cannot be
    encoded, or where `work` is of another call.
    """
    rows = range(len(prompts)) if rows is None else rows
    encoded = [
        sampler.encode(prompt, tools[row] if tools else None, templates[row] if templates else None)
        for row, prompt in enumerate(prompts)
    ]
    seen: Counter[tuple[int, ...]] = Counter()
    first = []  # the number of each prompt's first candidate: a repeated prompt goes on counting
    for ids in encoded:
        first.append(n * seen[tuple(ids)])
        seen[tuple(ids)] += 1
    requests = {row * n + k: encoded[row] for row in rows for k in range(n)}
    drawn_by = {each.name: getattr(sampling, each.name) for each in fields(Sampling)}
    held = [signature, seed, n, drawn_by, list(rows), encoded]
    keeper = WorkFile(work, _digest(held), "candidates of another call") if work else None
    found = {key: Sampled(*fields) for line in (keeper.lines if keeper else []) for key, *fields in line}
    left = {key: ids for key, ids in requests.items() if key not in found}
    with _bar(len(requests), len(found), progress) as advance:
        for keys in sampler.batches(left, sampling):
            streams = [stream(seed, requests[key], first[key // n] + key % n) for key in keys]
            drawn = sampler.draw([requests[key] for key in keys], streams, sampling)
            found |= zip(keys, drawn, strict=True)
            if keeper:
                keeper.append([[key, *each] for key, each in zip(keys, drawn, strict=True)])
            advance(len(keys))
    return [[found[row * n + k] for k in range(n)] for row in rows]


def template_columns(data: Any) -> dict[str, Any]:
    """The columns of a dataset that `sample_candidates` takes beside its prompts, None where there are none."""
    tools, templates = (data[name] if name in data.column_names else None for name in TEMPLATE_COLUMNS)
    return {"tools": tools, "templates": templates}


def stream(seed: Any, prompt: Sequence[int], number: Any) -> int:
    """The seed of one candidate's random numbers, below 2⁵⁶. `seed` and `number` are what JSON can say."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, list(prompt), number]).encode(), digest_size=7).digest())


class _Draw(LogitsProcessor):
    """Leaves one token per row: the one at which the cumulative distribution passes the row's own uniform number.

    As a logits processor under greedy decoding, since `generate` samples all rows from one global stream.
    """

    def __init__(self, sampling: Sampling, streams: Sequence[int], width: int, steps: int, device: Any):
        warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1.0 else []
        warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else []
        self._warpers, self._width = warpers, width
        rows = [torch.rand(steps, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in streams]
        self._uniforms = torch.stack(rows).to(device)  # (B, T)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        # In float32 a token that is rarer than the rounding of the sum would never be drawn.
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        reached = self._uniforms[:, input_ids.shape[1] - self._width, None] * cumulative[:, -1:]
        token = (cumulative <= reached).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


@contextmanager
def generating(model: Any) -> Generator[None]:
    """Evaluation mode without the model's own generation defaults; both are put back, also after an exception.

    Defaults such as a repetition penalty would be part of what is sampled, and not of what is trained.
    """
    modes = {module: module.training for module in model.modules()}
    defaults = model.generation_config
    keep_4bit_unpacked(model)
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = defaults
        for module, mode in modes.items():
            module.training = mode


def continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text of `ids` after the prompt. Alone, SentencePiece tokenizers drop the space in front of it."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, both = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + ids, **options)
    return both.removeprefix(before) if both.startswith(before) else tokenizer.decode(ids, **options)


class WorkFile:
    """A file of JSON lines under a header that says what they are of; what an interrupted call goes on from.

    A last line that is torn is dropped. RewardError if the file is of something else.
    """

    def __init__(self, path: Path, header: str, what: str):
        """`what` is what the message says of a file with another header, such as "candidates of another call"."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and lines[0] != header + "\n" and lines[0].endswith("\n"):
            raise RewardError(f"{path} holds {what}; delete it, or give the same arguments again")
        whole = [line for line in lines[1:] if line.endswith("\n")]
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines != [header + "\n", *whole]:
            write_whole(path, header + "\n" + "".join(whole))
        self.path, self.lines = path, [json.loads(line) for line in whole]

    def append(self, value: Any) -> None:
        """Write a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@contextmanager
def _bar(total: int, done: int, shown: bool) -> Generator[Callable[[int], None]]:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not shown) as progress:
        bar = progress.add_task("sampling", total=total, completed=done)
        yield lambda rows: progress.advance(bar, rows)
