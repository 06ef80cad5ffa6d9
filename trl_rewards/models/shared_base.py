"""One base model in memory, and many rewards on it: LoRA adapters and small heads beside the policy's own adapter.

What members share is computed once for all of them: heads alone share the whole decoder, LoRA in the last layers
shares the layers below, LoRA in all layers shares no computing, only memory. PEFT's mixed batches (`adapter_names`)
are not used: an adapter changes hidden states from its first layer on, so that a row goes through the base once per
member whichever way, and the index copies of mixed batches made it slower (1.05 times for k = 4 in
benchmarks/shared_base.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import ModuleList
from transformers import AutoModelForCausalLM, DynamicCache

from trl_rewards.errors import RewardError
from trl_rewards.models.adapters import adapter_parameters, trunk_of, using, with_adapter
from trl_rewards.models.encoding import Truncate
from trl_rewards.models.heads import Head, Output, output_weights
from trl_rewards.models.pretrained import Loading, device_of, load_pretrained
from trl_rewards.models.reward_adapter import KEEPS_BASE, RewardAdapter, read_adapter
from trl_rewards.models.scorer import PrefixReuse, Scorer, default_budget, longest_text

logger = logging.getLogger(__name__)


@dataclass
class Member:
    """A reward on a shared base. `scorer` is there once the base is."""

    adapter: RewardAdapter
    weights: list[float]
    """How much each of the head's outputs counts."""
    options: _Options
    scorer: Scorer | None = None


class _Options(NamedTuple):
    """Members with the same of these are computed together."""

    max_length: int | None
    truncate: Truncate
    token_budget: int | None
    prefix_reuse: PrefixReuse
    progress: bool
    chat_template: str | None


class SharedBase:
    """The base of a policy, and the rewards that are adapters and heads on it.

    Rewards are added first, which reads and checks their files; `bind` puts them on the policy when it is loaded, or
    `load` loads a base for them alone. The base's own weights must stay as they are, so the policy trains an adapter.
    """

    def __init__(self, loading: Loading):
        self.loading = loading
        self.model: Any = None
        self.members: list[Member] = []
        self.trained: dict[str, tuple[Any, int]] = {}
        """Adapters that rewards train: name -> LoraConfig and the seed that they are drawn with."""

    def add(
        self,
        adapter: str,
        *,
        revision: str | None = None,
        output: Output | None = None,
        max_length: int | None = None,
        truncate: Truncate = "prompt_head",
        token_budget: int | None = None,
        prefix_reuse: PrefixReuse = "auto",
        progress: bool = False,
    ) -> Member:
        """A reward adapter by folder or Hub name. The options are those of `load_scorer`.

        RewardError if there is none, or if it does not fit this base or its tokenizer.
        """
        found = read_adapter(adapter, self.loading, revision)
        weights = output_weights(output, [str(index) for index in range(found.head.out_features)], adapter)
        template = found.tokenizer.chat_template
        member = Member(found, weights, _Options(max_length, truncate, token_budget, prefix_reuse, progress, template))
        self.members.append(member)
        return member

    def add_trained(self, name: str, config: Any, seed: int) -> None:
        """An adapter that starts at nothing and that its reward trains (`using(base.model, name, training=True)`)."""
        if name in self.trained:
            raise RewardError(f"two rewards train an adapter {name!r} on the policy's base; give one of them a path")
        self.trained[name] = (config, seed)

    def load(self) -> Self:
        """Load a base for the members alone, without a policy, and bind them to it."""
        model, _ = load_pretrained(AutoModelForCausalLM, replace(self.loading, adapter=None))
        self.bind(model)
        return self

    def bind(self, model: Any) -> None:
        """Put the members on a model in memory: a PEFT model, or a base that gets its first adapter here.

        Before it goes into DistributedDataParallel. RewardError if training changes the base's own weights.
        """
        _check_policy(model)
        for index, member in enumerate(self.members):
            config = member.adapter.config
            if config is None:
                continue
            model = with_adapter(model, _name(index), config, autocast_adapter_dtype=False)
            _load_weights(model, _name(index), member.adapter)
        for name, (config, seed) in self.trained.items():
            model = with_adapter(model, name, config, seed=seed)
        self.model = model
        self.loading = replace(self.loading, dtype=str(trunk_of(model).dtype).removeprefix("torch."))
        groups: dict[_Options, list[int]] = {}
        for index, member in enumerate(self.members):
            groups.setdefault(member.options, []).append(index)
        for options, indices in groups.items():
            self._bind_group(options, indices)

    @property
    def adapters(self) -> list[str]:
        """Names of the rewards' adapters in the model: no part of the policy."""
        there = [_name(index) for index, member in enumerate(self.members) if member.adapter.config is not None]
        return [*there, *self.trained]

    def _bind_group(self, options: _Options, indices: list[int]) -> None:
        members = [self.members[index] for index in indices]
        names = [_name(index) if self.members[index].adapter.config is not None else None for index in indices]
        first = {name: member.adapter.first_layer for name, member in zip(names, members, strict=True)}
        trunk = SharedTrunk(self.model, first)
        heads = ModuleList(member.adapter.head for member in members).to(device_of(self.loading))
        size = trunk.trunk.config.get_text_config().hidden_size

        def read(hidden: torch.Tensor) -> torch.Tensor:
            parts = dict(zip(trunk.order, hidden.split(size, dim=1), strict=True))
            return torch.cat([head(parts[name]) for head, name in zip(heads, names, strict=True)], dim=1)

        outputs = [f"{member.adapter.path} {index}" for member in members for index, _ in enumerate(member.weights)]
        tokenizer = members[0].adapter.tokenizer
        common: dict[str, Any] = {
            "head": Head(self.model, trunk, read, outputs),
            "max_length": longest_text(options.max_length, trunk.trunk.config, tokenizer),
            "truncate": options.truncate,
            "token_budget": options.token_budget or default_budget(self.loading),
            "prefix_reuse": options.prefix_reuse,
            "progress": options.progress,
            "surrounding": torch.no_grad,  # what inference mode leaves in a model's buffers cannot be trained with
        }
        group = _Group(Scorer(weights=[1.0] * len(outputs), loading=self.loading, tokenizer=tokenizer, **common))
        start = 0
        for member in members:
            columns = slice(start, start + len(member.weights))
            member.scorer = MemberScorer(
                weights=member.weights,
                loading=replace(self.loading, path=member.adapter.path),
                tokenizer=member.adapter.tokenizer,
                group=group,
                columns=columns,
                **common,
            )
            start = columns.stop


@dataclass
class _Group:
    """What is computed together. Rows that one member asked for are there for the others until other rows come."""

    scorer: Scorer
    known: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def outputs_of(self, ids: Sequence[list[int]]) -> tuple[list[list[float]], dict[str, float]]:
        """(N, K) outputs of all members, and metrics if they were computed for this call."""
        keys, metrics = [tuple(row) for row in ids], {}
        if not self.known.keys() >= set(keys):
            self.known = dict(zip(keys, self.scorer.outputs_of(ids), strict=True))
            metrics = dict(self.scorer.metrics)
        return [self.known[key] for key in keys], metrics


@dataclass(kw_only=True)
class MemberScorer(Scorer):
    """The scorer of one member, which computes those of its group."""

    group: _Group
    columns: slice

    def outputs_of(self, ids: Sequence[list[int]]) -> list[list[float]]:
        rows, self.metrics = self.group.outputs_of(ids)
        return [row[self.columns] for row in rows]


class SharedTrunk:
    """A decoder with several adapters, called like a decoder: token ids (B, T) -> hidden states (B, T, A·H).

    Those of the adapters stand side by side, in `order`. The layers below an adapter's first are computed once: what
    went into its first layer is recorded in the first pass, and its own layers alone run again.
    """

    def __init__(self, model: Any, first_layers: dict[str | None, int]):
        self.model = model
        self.trunk = trunk_of(model)
        self.first_layers = first_layers
        self.order = sorted(first_layers, key=lambda name: -first_layers[name])
        """The adapter whose own layers are the fewest comes first: its pass goes through the base longest."""
        self.layers, self.norm = _parts(self.trunk)
        if len(self.order) > 1 and not (self.layers and self._agrees()):
            logger.info("%s: layers that adapters have in common are not shared", type(self.trunk).__name__)
            self.layers = []

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = False,
        position_ids: torch.Tensor | None = None,
        past_key_values: Caches | None = None,
    ) -> Hidden:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        caches = past_key_values
        if use_cache and caches is None:
            caches = Caches([DynamicCache(config=self.trunk.config) for _ in self.order])
        passed = caches.each if caches else [None] * len(self.order)
        replayed = self.order[1:] if self.layers else []
        with self._recorded(replayed) as inputs, using(self.model, self.order[0]):
            found = [self.trunk(input_ids=input_ids, past_key_values=passed[0], **given).last_hidden_state]
        for adapter, cache in zip(self.order[1:], passed[1:], strict=True):
            with using(self.model, adapter):
                if adapter in replayed:
                    found.append(self._replay(inputs, self.first_layers[adapter], cache))
                else:
                    found.append(self.trunk(input_ids=input_ids, past_key_values=cache, **given).last_hidden_state)
        return Hidden(torch.cat(found, dim=-1), caches)

    @contextmanager
    def _recorded(self, adapters: Iterable[str | None]) -> Generator[dict[int, _Call]]:
        """How each layer from the adapters' first on is called inside; hidden states where an adapter begins."""
        begins = {self.first_layers[adapter] for adapter in adapters}
        calls: dict[int, _Call] = {}

        def record(index: int) -> Any:
            def hook(layer: Any, arguments: tuple, options: dict[str, Any]) -> None:
                calls[index] = _Call(arguments[0] if index in begins else None, arguments[1:], dict(options))

            return hook

        hooks = [
            self.layers[index].register_forward_pre_hook(record(index), with_kwargs=True)
            for index in range(min(begins, default=len(self.layers)), len(self.layers))
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    def _replay(self, calls: dict[int, _Call], first: int, cache: Any) -> torch.Tensor:
        hidden = calls[first].hidden
        for index in range(first, len(self.layers)):
            options = calls[index].options | ({"past_key_values": cache} if cache is not None else {})
            output = self.layers[index](hidden, *calls[index].arguments, **options)
            hidden = output[0] if isinstance(output, tuple) else output
        return self.norm(hidden)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether layers run again give what whole passes give: not every architecture is layers and a norm."""
        ids = torch.arange(1, 9, device=self.trunk.device)[None] % self.trunk.config.get_text_config().vocab_size
        wanted = []
        for adapter in self.order:
            with using(self.model, adapter):
                wanted.append(self.trunk(input_ids=ids, use_cache=False).last_hidden_state)
        try:
            found = self(ids).last_hidden_state
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):  # layers are called in another way
            return False
        return bool(torch.allclose(found.float(), torch.cat(wanted, dim=-1).float(), rtol=1e-3, atol=1e-3))


class _Call(NamedTuple):
    hidden: torch.Tensor | None
    arguments: tuple
    options: dict[str, Any]


class Hidden(NamedTuple):
    """What a decoder gives, as far as a scorer reads it."""

    last_hidden_state: torch.Tensor
    past_key_values: Caches | None


@dataclass
class Caches:
    """A cache per adapter. Those of adapters that run their own layers again hold these layers alone."""

    each: list[Any]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` rows of each row, as a cache does."""
        for cache in self.each:
            cache.batch_repeat_interleave(repeats)


def _parts(trunk: Any) -> tuple[Sequence[Any], Any]:
    """A decoder's layers and the norm after them; no layers where it is built in another way."""
    parts = dict(trunk.named_children())
    size = trunk.config.get_text_config().num_hidden_layers
    layers = [part for part in parts.values() if isinstance(part, ModuleList) and len(part) == size]
    norms = [parts[name] for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm") if name in parts]
    return (layers[0], norms[0]) if len(layers) == len(norms) == 1 else ([], None)


def _name(index: int) -> str:
    """The adapter's name in the model: names of sources may hold dots, which PEFT's may not."""
    return f"reward{index}"


def _check_policy(model: Any) -> None:
    """RewardError if training changes what the rewards are built on."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    for config in configs.values():
        if config.peft_type != PeftType.LORA:
            raise RewardError(f"share_base: the policy's adapter is {config.peft_type.value}; only LoRA shares a base")
        if config.init_lora_weights not in KEEPS_BASE:
            raise RewardError(
                f"share_base: init_lora_weights={config.init_lora_weights!r} changes the base's own weights, which "
                "the rewards need as they were; use PEFT's default"
            )
    own = {path for name in configs for path in adapter_parameters(model, name)}
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad and path not in own]
    if trained:
        raise RewardError(
            f"share_base: the policy trains weights of the base itself ({', '.join(trained[:3])} …), which the "
            "rewards need as they are; train it with LoRA (use_peft: true, peft_config=…)"
        )


def _load_weights(model: Any, name: str, adapter: RewardAdapter) -> None:
    """Move an adapter's weights into the model. RewardError unless they are the ones that it has there."""
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    sizes, found = (
        {path: tuple(tensor.shape) for path, tensor in weights.items()} for weights in (wanted, adapter.weights)
    )
    if differing := sorted(sizes.items() ^ found.items()):
        path = differing[0][0]
        raise RewardError(
            f"adapter: {adapter.path!r} does not fit the base: {path} is {found.get(path, 'absent')}, wanted "
            f"{sizes.get(path, 'none')}"
        )
    set_peft_model_state_dict(model, adapter.weights, name)
    adapter.weights.clear()
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)
