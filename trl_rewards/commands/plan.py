"""What a recipe needs of a GPU's memory, before it is rented: `trl-rewards plan`.

An estimate by arithmetic, for one process without sharding (FSDP, ZeRO): models are built without weights, their parts
counted, and the height of each phase of a step is the sum of what is there then.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from trl_rewards.commands.footprint import SIZES, Shape, optimiser, shape_of
from trl_rewards.components import resolve_path
from trl_rewards.errors import RecipeError, RewardError
from trl_rewards.loading import build
from trl_rewards.models.options import Held, InProcess
from trl_rewards.models.pretrained import Quantization, quantization_of
from trl_rewards.models.scorer import BUDGET
from trl_rewards.recipe import Recipe
from trl_rewards.recipe_files import find_recipe
from trl_rewards.train import peft_config
from trl_rewards.trl_keys import parse_trl

GIB = 2**30
CONTEXT = 0.8 * GIB
"""The CUDA context and the libraries' own workspaces."""
SPARE = 1.1
"""What the allocator takes for what is asked of it."""
CARDS = (16, 24, 40, 48, 80, 141)
"""GiB of usual cards."""
PHASES = ("generate", "score", "learn")


@dataclass
class Part:
    """Something in memory: how many bytes, and in which phases."""

    what: str
    size: float
    phases: tuple[str, ...] = PHASES


@dataclass
class Plan:
    """What `plan` found. Sizes in bytes."""

    recipe: str
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    vllm_share: float = 0.0
    """Of the card's memory, which vLLM takes for itself beside the trainer."""
    vllm_phases: tuple[str, ...] = PHASES
    """When it does: with sleep mode, only while it generates."""
    beside: float = 0.0
    """What a judge's server holds on the same card."""

    def add(self, what: str, size: float, phases: Sequence[str] = PHASES) -> None:
        if size:
            self.parts.append(Part(what, size, tuple(phases)))

    def at(self, phase: str) -> float:
        """Bytes at the height of a phase, of context and allocator too."""
        return CONTEXT + SPARE * sum(part.size for part in self.parts if phase in part.phases)

    def fits(self, card: float) -> bool:
        """Whether the height of every phase is within a card of so many GiB, less what servers keep of it then."""
        return all(
            self.at(phase) + self.beside <= card * GIB * (1 - self.vllm_share * (phase in self.vllm_phases))
            for phase in PHASES
        )

    @property
    def card(self) -> int | None:
        """GiB of the smallest usual card that it fits; None: none of them."""
        return next((card for card in CARDS if self.fits(card)), None)

    @property
    def brief(self) -> str:
        """In a few words: GiB at the height of its largest phase, and the card that it fits."""
        phase = max(PHASES, key=self.at)
        beside = f" + {self.beside / GIB:.1f} for a judge's server" if self.beside else ""
        card = f"fits {self.card} GB" if self.card else "fits no usual card"
        return f"{self.at(phase) / GIB:.1f} GiB ({phase}){beside}, {card}"

    def rows(self) -> list[tuple[str, ...]]:
        """A table: part, then GiB in each phase."""
        table: list[tuple[str, ...]] = [
            (part.what, *(f"{part.size / GIB:.2f}" if phase in part.phases else "" for phase in PHASES))
            for part in self.parts
        ]
        totals = (f"{self.at(phase) / GIB:.1f}" for phase in PHASES)
        return [*table, ("with CUDA's context and a tenth to spare", *totals)]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "parts": [{"what": part.what, "bytes": round(part.size), "phases": part.phases} for part in self.parts],
            "bytes": {phase: round(self.at(phase)) for phase in PHASES},
            "beside": round(self.beside),
            "card_gib": self.card,
            "notes": self.notes,
        }


@dataclass
class _Run:
    """What a recipe says of the policy, and of its batches on one process."""

    trainer: str
    args: Any
    shape: Shape
    dtype: str
    quantization: Quantization
    nested: bool
    lora: Any
    """A LoraConfig, or None."""
    parameters: int
    """How many learn: those of the adapter, or all."""
    prompt: int
    completion: int

    @property
    def size(self) -> int:
        """Bytes of a parameter that learns: TRL keeps adapters on a quantised base in bf16, others in fp32."""
        return SIZES[self.dtype] if self.lora is None else 2 if self.quantization else 4

    @property
    def mixed(self) -> bool:
        """Whether a training step is in autocast: Accelerate then makes fp32 of the model's outputs."""
        return bool(self.args.bf16 or self.args.fp16)

    @property
    def computes_in(self) -> str:
        """The numbers that a training step computes in."""
        if self.dtype != "float32" or not self.mixed:
            return self.dtype
        return "bfloat16" if self.args.bf16 else "float16"

    @property
    def online(self) -> bool:
        return self.trainer in ("grpo", "rloo", "ppo")


def plan(config: str, overrides: Sequence[str] = (), prompt_tokens: int = 512) -> Plan:
    """Estimate a recipe's memory. `prompt_tokens`: the longest prompt, which the dataset alone would tell.

    RecipeError where the recipe is wrong or a model's shape cannot be had.
    """
    recipe = Recipe.load(config, overrides)
    run = _run(recipe, prompt_tokens)
    made = Plan(config, beside=GIB * served_beside(Path(find_recipe(config)).read_text(encoding="utf-8")))
    if made.beside:
        made.notes.append(f"a judge's server takes {made.beside / GIB:.1f} GiB of the card that the header names")
    _policy(made, run)
    _generation(made, run, recipe)
    _rewards(made, run, recipe)
    _learning(made, run)
    if recipe.objective is not None and recipe.trainer == "reward":
        made.notes.append(f"what objective {recipe.objective.use!r} makes beside scores is not counted")
    return made


def served_beside(text: str) -> float:
    """GiB that servers hold on a recipe's own card, by the header of its file: the `--gpu-memory-utilization` of each
    `vllm serve` there, of the card that it names ("One GPU of 80 GB"). Without a share a server is on another card."""
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())).replace("\\\n#", " ")
    shares = re.findall(r"^# +vllm serve .*--gpu-memory-utilization[ =]([0-9.]+)", header, re.MULTILINE)
    return sum(map(float, shares)) * (named_card(text) or 0)


def named_card(text: str) -> float | None:
    """GB of the card that a recipe's header says it is for."""
    named = re.search(r"^#.*GPUs? of (\d+) GB", text, re.MULTILINE)
    return float(named[1]) if named else None


def _run(recipe: Recipe, prompt: int) -> _Run:
    from trl_rewards.data import model_path

    _, args, model, _ = parse_trl(recipe)
    if not model.model_name_or_path:
        raise RecipeError(["model_name_or_path: nothing to plan for without a model"], recipe.source)
    path = model_path(model.model_name_or_path, recipe.base_dir)
    reward_model = recipe.trainer == "reward" and recipe.objective is None
    try:
        shape = shape_of(path, classifier=reward_model, trust_remote_code=args.trust_remote_code)
        lora = peft_config(model, recipe)
        parameters = shape.adapter(lora) if lora else shape.parameters
    except (RewardError, ValueError) as error:
        raise RecipeError([f"model_name_or_path: {error}"], recipe.source) from error
    if isinstance(getattr(args, "max_completion_length", None), int):
        completion = args.max_completion_length
    else:  # pairs and labelled answers: the length of both together
        prompt, completion = 0, args.max_length or prompt
    quantization = quantization_of(model.load_in_4bit, model.load_in_8bit)
    dtype = model.dtype if model.dtype in SIZES else "bfloat16" if quantization else shape.published_in
    nested = model.use_bnb_nested_quant
    return _Run(recipe.trainer, args, shape, dtype, quantization, nested, lora, parameters, prompt, completion)


def _policy(made: Plan, run: _Run) -> None:
    """The model that is trained, what trains it, and what it is held against."""
    args, shape = run.args, run.shape
    weights = shape.weights(run.dtype, run.quantization, run.nested)
    how = {"4bit": "4-bit", "8bit": "8-bit", None: run.dtype}[run.quantization]
    made.add(f"policy, {shape.parameters / 1e9:.2f} G parameters, {how}", weights)
    parameters, size = run.parameters, run.size
    if run.lora:
        made.add(f"LoRA adapter, {parameters / 1e6:.0f} M parameters", parameters * size)
    critic = _critic(made, run) if run.trainer == "ppo" else 0
    optim = str(getattr(args.optim, "value", args.optim))
    made.add(f"optimiser ({optim})", optimiser(optim, parameters + critic, size))
    made.add("gradients", (parameters + critic) * size, ["learn"])
    held_against = run.trainer in ("dpo", "kto") or (run.online and args.beta > 0)
    if held_against and not run.lora:
        made.add("reference model", shape.weights(run.dtype, None))


def _critic(made: Plan, run: _Run) -> int:
    """Parameters that learn in PPO's critic."""
    path = run.args.critic_model_name_or_path
    if run.args.critic == "model" or path or (run.args.critic == "auto" and not run.lora):
        critic = shape_of(path, classifier=True) if path else run.shape
        made.add("critic", critic.weights(run.dtype, run.quantization, run.nested))
        if not run.lora:
            return critic.parameters
        lora = copy.deepcopy(run.lora)
        lora.task_type, lora.modules_to_save = None, None  # as the trainer: a critic is no language model
        count = critic.adapter(lora)
    else:
        count = run.parameters
    made.add("critic's adapter", count * run.size)
    return count


def _generation(made: Plan, run: _Run, recipe: Recipe) -> None:
    """The cache of keys and values while the policy writes."""
    args, shape = run.args, run.shape
    if not run.online:
        if recipe.pairs is not None and recipe.pairs.source == "sample":
            size = shape.cache(1, recipe.pairs.batch_tokens, run.dtype)
            made.add(f"keys and values of {recipe.pairs.batch_tokens} tokens", size, ["generate"])
        return
    if args.use_vllm:
        if args.vllm_mode == "colocate":
            made.vllm_share = args.vllm_gpu_memory_utilization
            made.vllm_phases = ("generate",) if args.vllm_enable_sleep_mode else PHASES
            when = ", while it generates" if args.vllm_enable_sleep_mode else ""
            made.notes.append(
                f"vLLM takes {made.vllm_share:.0%} of the card, the policy's weights a second time{when}"
            )
        else:
            made.notes.append("vLLM's server generates, on GPUs of its own")
        return
    rows = args.per_device_train_batch_size * args.steps_per_generation
    tokens = run.prompt + run.completion
    made.add(f"keys and values of {rows} rows of {tokens} tokens", shape.cache(rows, tokens, run.dtype), ["generate"])
    made.add("next tokens' logits", 3 * 4 * rows * shape.vocab, ["generate"])


def _rewards(made: Plan, run: _Run, recipe: Recipe) -> None:
    """Models that sources hold in this process, or put on the policy's base."""
    tokens = run.prompt + run.completion
    for source in recipe.rewards:
        reward, _ = build("reward", source.use, source.options, recipe.base_dir)
        if not isinstance(reward, InProcess):
            continue
        for held in reward.held():
            if reward.device != "same":
                made.notes.append(f"{source.name}: {held.path or 'an adapter'} is on {reward.device}, not counted")
                continue
            _held(made, run, f"{source.name}: ", reward, held, recipe, tokens)


def _held(made: Plan, run: _Run, name: str, reward: InProcess, held: Held, recipe: Recipe, tokens: int) -> None:
    if held.path is None:
        shape, dtype = run.shape, run.dtype
    else:
        dtype = reward.dtype
        try:
            shape = shape_of(resolve_path(held.path, recipe.base_dir), trust_remote_code=reward.trust_remote_code)
        except RewardError as error:
            made.notes.append(f"{name}not counted: {error}")
            return
        quantization = quantization_of(reward.load_in_4bit, reward.load_in_8bit)
        made.add(
            f"{name}{held.path}, {shape.parameters / 1e9:.2f} G parameters",
            shape.weights(dtype, quantization),
            ["score"] if reward.offload else PHASES,
        )
    at_once = held.tokens or BUDGET
    made.add(f"{name}a forward pass of {at_once} tokens", shape.working(at_once, dtype), ["score"])
    made.add(f"{name}keys and values", shape.cache(1, held.cached, dtype), ["score"])
    if held.trains is None:
        return
    if held.trains == "all":
        count, size = shape.parameters, SIZES[dtype]
    elif held.trains == "head":
        count, size = shape.hidden, 4
    else:
        lora = LoraConfig(r=held.lora_r, target_modules=held.lora_target_modules)
        count, size = shape.adapter(lora), 4
        made.add(f"{name}its adapter", count * size)
    made.add(f"{name}its optimiser", 2 * count * size)
    made.add(f"{name}its gradients", count * size, ["score"])
    if held.trains != "head":
        rows = held.micro_batch
        made.add(
            f"{name}its activations, {rows} rows of {tokens} tokens",
            shape.learning(rows, tokens, dtype, checkpointing=held.path is None and run.args.gradient_checkpointing),
            ["score"],
        )
    if held.logits:
        of = held.micro_batch * run.completion
        made.add(f"{name}its logits", shape.logits(of, dtype), ["score"])


def _learning(made: Plan, run: _Run) -> None:
    """A backward pass of the policy."""
    args, shape = run.args, run.shape
    rows, tokens = args.per_device_train_batch_size, run.prompt + run.completion
    if run.trainer in ("dpo", "reward"):
        rows *= 2  # chosen and rejected
    made.add(
        f"activations of {rows} rows of {tokens} tokens" + (", computed again" if args.gradient_checkpointing else ""),
        shape.learning(rows, tokens, run.computes_in, args.gradient_checkpointing),
        ["learn"],
    )
    if run.mixed and run.dtype == "float32" and not run.quantization and not args.gradient_checkpointing:
        made.add("16-bit copies of the weights, by autocast", shape.copies, ["learn"])
    if run.trainer == "reward":
        return
    if getattr(args, "use_liger_kernel", False):
        made.notes.append("the Liger kernel makes the loss in parts: no logits are counted")
        return
    of, dtype = run.completion if run.online else tokens, "float32" if run.mixed else run.dtype
    made.add(f"logits of {rows} rows of {of} tokens", shape.logits(rows * of, dtype), ["learn"])
