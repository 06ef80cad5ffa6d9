"""A language model that writes trajectories, and the scalar head beside it that reads them.
https://huggingface.co/papers/2310.01045
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Failed, RewardError
from trl_rewards.models import (
    Head,
    Loading,
    Scorer,
    at_work,
    checkpoint_weights,
    default_budget,
    load_config,
    load_pretrained,
    load_tokenizer,
    longest_text,
)
from trl_rewards_themis.trajectory import OBSERVATION, cut

if TYPE_CHECKING:
    import torch

HEADS = ("v_head.", "score.", "v_head.summary.")
"""Names of the head: of the authors, of objective `themis`, and of TRL's models with a value head."""
TAIL = 16
"""Tokens at the end of a text in which a stop is looked for; the marks are shorter."""


class Writer:
    """Continues texts: many at a time, padded on the left, greedily unless there is a temperature.

    A row that asks for an observation stops there, and so does one that ends; the others go on.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        loading: Loading,
        *,
        max_new_tokens: int,
        temperature: float,
        max_length: int,
        token_budget: int | None,
    ):
        """`max_length`: tokens of a text with what is written. `token_budget`: those of a batch, halved when memory
        runs out."""
        self._model, self._tokenizer, self._loading = model, tokenizer, loading
        self._max_new_tokens, self._temperature, self._max_length = max_new_tokens, temperature, max_length
        self.token_budget = token_budget or default_budget(loading)
        ends = model.generation_config.eos_token_id
        self._ends = sorted({*([ends] if isinstance(ends, int) else ends or []), tokenizer.eos_token_id} - {None})

    def write(self, texts: Sequence[str]) -> list[str | Failed]:
        """What comes after each text, up to an observation or the end; Failed for a text that leaves no room."""
        import torch

        if not texts:
            return []
        ids = self._tokenizer(list(texts), verbose=False)["input_ids"]
        found: dict[int, str | Failed] = {
            row: Failed(f"the trajectory has {len(each)} tokens, which leaves no room in {self._max_length}")
            for row, each in enumerate(ids)
            if len(each) >= self._max_length
        }
        with at_work(self._model, self._loading) as device, torch.inference_mode():
            while rows := self._next_batch(ids, found):
                try:
                    found |= zip(rows, self._continue([ids[row] for row in rows], device), strict=True)
                except torch.OutOfMemoryError as error:
                    if len(rows) == 1:
                        raise RewardError(
                            f"{self._loading.path!r}: out of memory for a single trajectory; use load_in_4bit, "
                            "offload, another device or fewer max_new_tokens"
                        ) from error
                    self.token_budget //= 2
        return [found[row] for row in range(len(texts))]

    def _next_batch(self, ids: list[list[int]], found: dict[int, Any]) -> list[int]:
        """The shortest of the rows that are left, within the budget; one row at least."""
        rest = sorted((row for row in range(len(ids)) if row not in found), key=lambda row: (len(ids[row]), row))
        rows: list[int] = []
        for row in rest:
            if rows and (len(ids[row]) + self._max_new_tokens) * (len(rows) + 1) > self.token_budget:
                break
            rows.append(row)
        return rows

    def _continue(self, prompts: list[list[int]], device: torch.device) -> list[str]:
        import torch
        from transformers import GenerationConfig

        width, pad = max(map(len, prompts)), self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(each)) + each for each in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=device)
        sampling = {"temperature": self._temperature, "top_k": 0} if self._temperature else {}
        # Defaults of the model's own, such as a repetition penalty, would be another way to read it.
        config = GenerationConfig(
            max_new_tokens=max(min(self._max_new_tokens, self._max_length - width), 1),
            do_sample=bool(sampling),
            eos_token_id=self._ends,
            pad_token_id=pad,
            **sampling,
        )
        written = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[AtObservation(self._tokenizer, width)],
        )
        return [self._read(new) for new in written[:, width:].tolist()]

    def _read(self, tokens: list[int]) -> str:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        kept = [token for token in tokens[:end] if token != self._tokenizer.pad_token_id]
        return cut(self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class AtObservation:
    """A stopping criterion: ends a row where `cut` would cut it first: what comes after is the tool's."""

    def __init__(self, tokenizer: Any, width: int):
        """`width`: tokens of the prompts, in which nothing is looked for."""
        self._tokenizer, self._width = tokenizer, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        tails = input_ids[:, max(self._width, input_ids.shape[1] - TAIL) :].tolist()
        texts = [self._tokenizer.decode(tail, clean_up_tokenization_spaces=False) for tail in tails]
        return torch.tensor([OBSERVATION in text for text in texts], device=input_ids.device)


@dataclass
class MeanPooled:
    """A decoder and a head that reads the mean of its hidden states, to be called as a classifier is."""

    model: Any
    head: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def to(self, device: Any) -> None:
        self.model.to(device)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        import torch
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states = hidden.last_hidden_state.float()
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (states * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        return SequenceClassifierOutput(logits=self.head(mean))


def load(
    loading: Loading,
    *,
    pooling: Literal["last", "mean"],
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    token_budget: int | None,
) -> tuple[Writer, Scorer]:
    """One model in memory, as a writer and as a scorer. RewardError where it is no causal LM or has no head."""
    import torch
    from torch.nn import Linear
    from transformers import AutoModelForCausalLM

    config = load_config(loading, "reward model")
    tokenizer = load_tokenizer(loading)
    weight = _head_weight(loading)
    model, missing = load_pretrained(AutoModelForCausalLM, loading)
    if missing:
        raise RewardError(
            f"{loading.path!r} cannot write: it has no weights for {missing[0]}; give a model that was trained with "
            "objective 'themis', or one of its authors'"
        )
    head = Linear(weight.shape[1], 1, bias=False, device=model.device)
    head.load_state_dict({"weight": weight.float()})
    head.requires_grad_(False)
    limit = longest_text(max_length, config, tokenizer)
    if pooling == "last":
        read = Head(model, model.base_model, head, ["reward"])
    else:
        read = Head(MeanPooled(model, head), None, torch.Tensor.float, ["reward"])
    scorer = Scorer(
        head=read,
        weights=[1.0],
        loading=loading,
        tokenizer=tokenizer,
        max_length=limit,
        truncate="refuse",
        token_budget=token_budget or default_budget(loading),
        prefix_reuse="off",  # trajectories of a prompt differ from their first lines on
        progress=False,
    )
    writer = Writer(
        model,
        tokenizer,
        loading,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        max_length=limit,
        token_budget=token_budget,
    )
    return writer, scorer


def _head_weight(loading: Loading) -> torch.Tensor:
    """(1, H): the scalar head's weight, the adapter's before the model's."""
    for folder, revision, prefix in (
        (loading.adapter, loading.adapter_revision, "base_model.model."),
        (loading.path, loading.revision, ""),
    ):
        for name in HEADS if folder else ():
            assert folder is not None
            weights = checkpoint_weights(folder, prefix + name, revision)
            if "weight" in weights:
                if len(weights["weight"]) != 1 or "bias" in weights:
                    raise RewardError(f"{folder!r} has a head {name}* of another shape than one output without bias")
                return weights["weight"]
    raise RewardError(
        f"{loading.path!r} has no scalar head: no weights {', '.join(f'{name}weight' for name in HEADS)}; give a "
        "model that was trained with objective 'themis', or one of its authors'"
    )
