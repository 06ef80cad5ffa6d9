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
        from trl_rewards.models.pretrained import Loading, default_device, quantization_of, with_base

        loading = Loading(
            path=resolve_path(path, context.base_dir),
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            adapter=resolve_path(self.adapter, context.base_dir) if self.adapter else None,
            quantization=quantization_of(self.load_in_4bit, self.load_in_8bit),
            device=(context.device or default_device()) if self.device == "same" else self.device,
            offload=self.offload,
            trust_remote_code=self.trust_remote_code,
        )
        return with_base(loading, lambda base: resolve_path(base, context.base_dir))


class FromHead(InProcess):
    """The options of a reward that a model's head gives at the last token of prompt and completion."""

    max_length: int | None = None
    """Tokens of prompt and completion together. None: what model and tokenizer allow."""
    truncate: Literal["prompt_head", "prompt_tail", "refuse"] = "prompt_head"
    """What goes of a longer text: the prompt's beginning, its end, or nothing (the row fails). Where the prompt is not
    enough the completion's beginning goes: its end holds the answer and the token that the score is read at."""
    token_budget: int | None = None
    """Tokens in one forward pass, padding included: what bounds memory. None: 16384, on a CPU 4096. Halved when memory
    runs out."""
    prefix_reuse: Literal["auto", "on", "off"] = "auto"
    """Compute a prefix that rows have in common (the prompt of a group) once. `auto`: where it saves enough and the
    model can do it; `on`: everywhere, and an error where it cannot."""

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("max_length", self.max_length), ("token_budget", self.token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def scoring(self, context: Context) -> dict[str, Any]:
        """What `load_scorer` and `SharedBase.add` are told of these options, and whether to show a bar."""
        return {
            "max_length": self.max_length,
            "truncate": self.truncate,
            "token_budget": self.token_budget,
            "prefix_reuse": self.prefix_reuse,
            # Where somebody runs it (a trainer, the command line) there is a bar already.
            "progress": context.log_metric is None and context.device is None,
        }
