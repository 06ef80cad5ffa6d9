"""The options that every reward with a model in this process has in common."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from trl_rewards.components import Context, Reward, resolve_path

if TYPE_CHECKING:
    from trl_rewards.models.pretrained import Loading

T = TypeVar("T")


def nested_options(cls: type[T], name: str, options: dict[str, Any]) -> T:
    """An object of options that stand under another option, `name`. ValueError says all that is wrong with them."""
    from trl_rewards.loading import check_options

    if problems := check_options(cls, options):
        said = (problem.removeprefix("with").removeprefix(":").removeprefix(".").strip() for problem in problems)
        raise ValueError(f"{name}: {'; '.join(said)}")
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class Held(NamedTuple):
    """A model that a reward holds in this process, as far as its memory depends on it."""

    path: str | None
    """Folder or Hub name; None: the policy's base, in memory anyway."""
    tokens: int | None = None
    """Of one forward pass, padding included; None: the usual budget."""
    cached: int = 0
    """Tokens whose keys and values are kept while it writes."""
    trains: Literal["all", "lora", "head"] | None = None
    """Which of its weights learn while the policy does."""
    lora_r: int = 16
    lora_target_modules: str | list[str] = "all-linear"
    micro_batch: int = 1
    """Rows that go through it together when it learns."""
    logits: bool = False
    """Whether it learns through its logits, not through a score head."""


class InProcess(Reward):
    """A reward whose model may run in this process. Loaded on each rank, before the policy, outside its DeepSpeed."""

    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, …; None: the model's own choice."""
    adapter: str | None = None
    """Folder or Hub name of a LoRA adapter that is put on the model."""
    load_in_4bit: bool = False
    """bitsandbytes nf4, whatever the policy's quantisation is."""
    load_in_8bit: bool = False
    """bitsandbytes int8, whatever the policy's quantisation is."""
    device: str = "same"
    """Where it runs: `same` as the policy on this rank, `cpu`, or another accelerator such as `cuda:1`."""
    offload: bool = False
    """Keep the weights in CPU memory between scoring phases. Not with load_in_8bit."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("set load_in_4bit or load_in_8bit, not both")
        if self.offload and self.load_in_8bit:
            raise ValueError("offload moves weights, and bitsandbytes int8 weights cannot be moved; use load_in_4bit")

    def held(self) -> list[Held]:
        """The models that this reward loads here, for estimates of memory. Without one: all is elsewhere."""
        return []

    def check_trained(self) -> None:
        """ValueError for options with which a model cannot be trained while the policy is."""
        if self.offload:
            raise ValueError("offload moves a model between devices, which its optimiser would not follow; leave it")
        if self.device != "same" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"device: with several processes gradients are added up where the policy is; got {self.device!r}, "
                "leave it at same"
            )

    def loading(self, path: str, context: Context) -> Loading:
        """These options for a model, its paths resolved against the recipe's folder.

        A `path` with nothing but an adapter, as training with LoRA leaves it, is its base model with the adapter on.
        """
        from trl_rewards.models.pretrained import Loading, default_device, with_base

        loading = Loading(
            path=resolve_path(path, context.base_dir),
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            adapter=resolve_path(self.adapter, context.base_dir) if self.adapter else None,
            quantization="4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None,
            device=(context.device or default_device()) if self.device == "same" else self.device,
            offload=self.offload,
            trust_remote_code=self.trust_remote_code,
        )
        return with_base(loading, lambda base: resolve_path(base, context.base_dir))
