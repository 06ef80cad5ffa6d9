"""How a model's scores are read: classifiers, value heads, and the logit of a "yes"."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch.nn import Linear, functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import cached_file

from trl_rewards.errors import RewardError
from trl_rewards.models.pretrained import Loading, at_work, load_pretrained

HeadKind = Literal["auto", "classifier", "v_head", "yes"]
YesScore = Literal["logit", "probability"]
Output = int | str | Mapping[int | str, float]
ALL_OUTPUTS: Output = {}
"""For callers that read each output (`Scorer.outputs_of_texts`): none of them is the score."""

HEADS = ("score", "v_head", "classifier")
"""What models call the part that makes a score of hidden states."""
_SUMMARY = "v_head.summary."
"""What TRL's AutoModelForCausalLMWithValueHead calls the head that it saves with a causal LM."""


class Head(NamedTuple):
    """A model, and how its outputs are read."""

    model: Any
    backbone: Any
    """Its part that gives hidden states (B, T, H); None where only the whole model gives outputs (encoders)."""
    read: Callable[[torch.Tensor], torch.Tensor]
    """(B, K) float32 outputs, of the last tokens' hidden states (B, H) in float32; of logits without a backbone."""
    labels: list[str]
    """Names of the K outputs."""


def load_head(
    loading: Loading,
    config: Any,
    kind: HeadKind = "auto",
    model_class: Any = None,
    output: Output | None = None,
    fresh: bool = False,
) -> Head:
    """A model with a classifier or a value head. RewardError if its checkpoint has no such head, or if it has several
    outputs and `output` does not say what to make of them. `fresh`: a classifier without its head gets zeros."""
    values: dict[str, torch.Tensor] = {}
    if model_class is None and kind != "classifier":
        values = value_head_weights(loading, config)
        own = config.to_dict().get("auto_map") or {}
        if values:
            model_class = AutoModelForCausalLM
        elif "AutoModel" in own and "AutoModelForSequenceClassification" not in own:
            if not loading.trust_remote_code:
                raise RewardError(f"{loading.path!r} has code of its own, which is not run without trust_remote_code")
            model_class = AutoModel  # such as InternLM2-Reward's
    if model_class is None and kind == "v_head":
        raise RewardError(f"{loading.path!r} has no value head: no weights {_SUMMARY}*, and no model class of its own")
    if model_class is None:
        return _classifier(loading, config, output, fresh)
    model = _complete(model_class, loading)
    if values:
        model.v_head = _linear(values, model.device)
    found = _last_token_head(model)
    if found is None:
        parts = ", ".join(name for name, _ in model.named_children())
        raise RewardError(f"{loading.path!r}: {type(model).__name__} has neither `v_head` nor `score`, but {parts}")
    return found


def _classifier(loading: Loading, config: Any, output: Output | None, fresh: bool) -> Head:
    # A config that says nothing of labels reports two; one with several names them.
    named = "id2label" in config.to_diff_dict() or output not in (None, ALL_OUTPUTS)
    size = config.num_labels if named else 1
    if output == ALL_OUTPUTS and not named:  # two outputs or one: its head says it
        size = len(checkpoint_weights(loading.path, "score.", loading.revision).get("weight", [0]))
    if loading.adapter and (head := _adapter_head(loading)) is not None:  # it brings a head of its own
        size = len(head)
        config.num_labels = size
    output_weights(output, _labels(config, size), loading.path)  # refused before the weights are loaded
    model = _complete(AutoModelForSequenceClassification, loading, fresh, num_labels=size)
    whole = Head(model, None, torch.Tensor.float, _labels(config, size))
    return whole if config.is_encoder_decoder else _last_token_head(model) or whole


def _complete(model_class: Any, loading: Loading, fresh_head: bool = False, **options: int) -> Any:
    """The model. RewardError if its checkpoint lacks weights, or has some of another size.

    `fresh_head`: those of `score`, `v_head` or `classifier` may be absent, and are zeros then.
    """
    try:
        model, absent = load_pretrained(model_class, loading, **options)
    except (RewardError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        outputs = options.get("num_labels", 1)
        wanted = "one output" if outputs == 1 else f"{outputs} outputs"
        raise RewardError(f"{loading.path!r} is not a reward model with {wanted}: {error}") from error
    if fresh_head:
        for name in [name for name in absent if name.split(".")[0] in HEADS]:
            torch.nn.init.zeros_(model.get_parameter(name))
            absent.remove(name)
    if absent:
        raise RewardError(
            f"{loading.path!r} is not a reward model: its checkpoint has no weights for {', '.join(absent)}, "
            "which would be random numbers"
        )
    return model


def _last_token_head(model: Any) -> Head | None:
    """The head of a decoder, which reads the last token's hidden state; None where the model has no such part."""
    parts = dict(model.named_children())
    head = parts.get("v_head", parts.get("score"))
    if head is None or model.base_model is model:
        return None
    head.float()  # in bfloat16 near scores would become equal
    size = head.in_features if isinstance(head, Linear) else model.config.get_text_config().hidden_size
    with torch.no_grad():
        outputs = head(torch.zeros(1, size, device=model.device)).shape[-1]
    return Head(model, model.base_model, head, _labels(model.config, outputs))


def head_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of the part that makes a score of hidden states, by their names in the model."""
    head = {name: weight for name, weight in model.named_parameters() if name.split(".")[0] in HEADS}
    # Of a head that an adapter brought, the model's own copy is there too and does nothing.
    return {name: weight for name, weight in head.items() if ".original_module." not in name}


@dataclass
class YesHead:
    """The logit of one token less that of another, or p(yes) / (p(yes) + p(no)): (B, H) hidden states -> (B, 1).

    Only the two logits are computed, in float32.
    """

    output: Any
    """The model's output layer."""
    tokens: list[int]
    """Ids of yes and no."""
    cap: float | None
    """Gemma 2's soft cap on logits."""
    score: YesScore

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        yes, no = self.logits(hidden).split(1, dim=1)
        return (yes - no).sigmoid() if self.score == "probability" else yes - no

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = self.output.bias[self.tokens].float() if self.output.bias is not None else None
        logits = functional.linear(hidden, self.output.weight[self.tokens].float(), bias)
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


@dataclass
class NextToken:
    """Logits of the next token: (B, H) hidden states -> (B, V) float32, made in the model's own precision."""

    output: Any
    """The model's output layer."""
    dtype: torch.dtype
    cap: float | None
    """Gemma 2's soft cap on logits."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.output(hidden.to(self.dtype)).float()
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def load_yes(loading: Loading, tokenizer: Any, yes: str, no: str, score: YesScore) -> Head:
    """A causal LM that answers with one token. RewardError if `yes` or `no` is not one token, or if the model's logits
    are not what its output layer gives."""
    tokens = [_one_token(tokenizer, option, word) for option, word in (("yes_token", yes), ("no_token", no))]
    model = _complete(AutoModelForCausalLM, loading)
    head = YesHead(model.get_output_embeddings(), tokens, _soft_cap(model), score)
    _check_logits(model, loading, head.logits, tokens)
    return Head(model, model.base_model, head, ["yes"])


def load_next_token(loading: Loading) -> Head:
    """A causal LM, of whose hidden states `read` makes the logits of the next token (B, V); it names no outputs.

    RewardError if it cannot be loaded, or if the model's logits are not what its output layer gives.
    """
    model = _complete(AutoModelForCausalLM, loading)
    head = NextToken(model.get_output_embeddings(), model.get_input_embeddings().weight.dtype, _soft_cap(model))
    _check_logits(model, loading, head, range(model.get_input_embeddings().num_embeddings))
    return Head(model, model.base_model, head, [])


def _soft_cap(model: Any) -> float | None:
    return model.config.get_text_config().to_dict().get("final_logit_softcapping")


def _check_logits(
    model: Any, loading: Loading, logits: Callable[[torch.Tensor], torch.Tensor], tokens: Sequence[int]
) -> None:
    """RewardError if `logits` of the last hidden state are not those that the model itself gives for `tokens`."""
    with at_work(model, loading) as device, torch.inference_mode():
        ids = torch.tensor([list(tokens[:2])], device=device)
        wanted = model(input_ids=ids).logits[0, -1, list(tokens)].float()
        found = logits(model.base_model(input_ids=ids).last_hidden_state[:, -1].float())[0]
    if not (found - wanted).abs().max() <= 0.05 * wanted.abs().max():
        raise RewardError(
            f"{loading.path!r} changes its logits after the output layer in a way that is not known here"
        )


def _one_token(tokenizer: Any, option: str, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise RewardError(f"{option}: {word!r} is {len(ids)} tokens to this model; give a word that is one")
    return ids[0]


def value_head_weights(loading: Loading, config: Any) -> dict[str, torch.Tensor]:
    """Weight and bias of a value head that was saved with a causal LM, or with its adapter; empty if there is none."""
    if not any(name.endswith("ForCausalLM") for name in config.architectures or []):
        return {}
    for folder, revision in ((loading.adapter, None), (loading.path, loading.revision)):
        if folder and (found := checkpoint_weights(folder, _SUMMARY, revision)):
            return found
    return {}


def checkpoint_weights(folder: str, prefix: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """The weights of a model's or an adapter's checkpoint whose names begin with `prefix`, which is left out of them.

    `folder`: here or on the Hub. Empty where there are none.
    """
    for file in _weight_files(folder, prefix, revision):
        if found := _tensors(file, prefix):
            return found
    return {}


def _weight_files(folder: str, prefix: str, revision: str | None) -> list[str]:
    """Files of a checkpoint that may hold the weights; LlamaFactory writes a value head into one of its own."""

    def there(name: str) -> str | None:
        return cached_file(
            folder,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    names = ["model.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]
    names += ["value_head.safetensors", "value_head.bin"]
    for index in filter(None, map(there, ("model.safetensors.index.json", "pytorch_model.bin.index.json"))):
        with open(index, encoding="utf-8") as file:
            shards = json.load(file)["weight_map"]
        names += sorted({shard for name, shard in shards.items() if name.startswith(prefix)})
    return [file for file in map(there, names) if file]


def value_head_file(folder: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """Weight and bias of a value head that lies in a folder in a file of its own; empty if there is none."""
    for name in ("value_head.safetensors", "value_head.bin"):
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if file := cached_file(folder, name, revision=revision, **missing):
            return _tensors(file, _SUMMARY)
    return {}


def _tensors(file: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight file whose names begin with `prefix`, without it."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dict)
            return {name.removeprefix(prefix): weights.get_tensor(name) for name in names}
    weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _adapter_head(loading: Loading) -> torch.Tensor | None:
    """(K, H): the weight of the classifier's head in an adapter's folder; None where there is none."""
    assert loading.adapter is not None
    return checkpoint_weights(loading.adapter, "base_model.model.score.", loading.adapter_revision).get("weight")


def _linear(values: dict[str, torch.Tensor], device: Any) -> Linear:
    outputs, inputs = values["weight"].shape
    linear = Linear(inputs, outputs, bias="bias" in values, device=device)
    linear.load_state_dict(values)
    return linear.requires_grad_(False)


def _labels(config: Any, outputs: int) -> list[str]:
    return [str(config.id2label.get(index, index)) for index in range(outputs)]


def output_weights(output: Output | None, labels: list[str], path: str) -> list[float]:
    """How much each output counts: all of the one that `output` names, by index or label, or as its weights say.

    RewardError names the outputs there are.
    """
    there = ", ".join(f"{index} ({label})" for index, label in enumerate(labels))
    if output is None:
        if len(labels) == 1:
            return [1.0]
        raise RewardError(
            f"{path!r} has {len(labels)} outputs: {there}; say with `output` which is the score, or their weights"
        )
    weights = [0.0] * len(labels)
    for name, weight in (output if isinstance(output, Mapping) else {output: 1.0}).items():
        index = labels.index(name) if name in labels else name
        if not isinstance(index, int) or not 0 <= index < len(labels):
            raise RewardError(f"output: {path!r} has no output {name!r}; it has {there}")
        weights[index] += weight
    return weights
