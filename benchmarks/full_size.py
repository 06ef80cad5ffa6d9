"""What a recipe for a GPU takes there, without a download: tokens per second, memory, and seconds per phase of a step.

    python benchmarks/full_size.py bleuberi/gpu-7b-4bit --steps 4 --out full_size.jsonl
    python benchmarks/full_size.py ppo/gpu-4bit --prompt-tokens 256 --per_device_train_batch_size 2
    python benchmarks/full_size.py bleuberi/gpu-7b-4bit --shrink       # on a CPU in seconds: whether it would run

Every model that the recipe names gets a stand-in: a folder with a config of the real shape, weights drawn at random in
bfloat16 (on the disk they take what the published ones take; TMPDIR says where), and a tokenizer with a word for every
id of the vocabulary. The recipe then trains as it would, quantised as it says, on prompts that the script writes.
What follows `--steps` and the like are overrides of the recipe, as for `recipes/train.py`.

Random weights end nothing, and chance is kept from it: every completion has its full length. Time and memory are upper
bounds; where a reward model has another vocabulary than the policy, it may read more tokens than were written.
What depends on scores does as random text has it: a filter that asks for other prompts, a source with an `only_if`, a
reward that learns. One process on one device.

Phases are those of `trl-rewards plan`: `generate`; `score`, the rewards and their own learning; `learn`, the rest of a
step: log-probabilities, losses, gradients and the optimiser. A first generation batch warms up and counts for memory
alone.

Refused: trainers other than GRPO, RLOO and PPO, rewards that ask a judge or a server, models that are more than a
score on a published shape, columns that the script does not know, vLLM.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import random
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, TrainerCallback

import trl_rewards
from trl_rewards import bundled
from trl_rewards.commands.footprint import Shape, shape_of
from trl_rewards.commands.plan import GIB, Plan, plan
from trl_rewards.defaults.model import Model
from trl_rewards.errors import RecipeError, RewardError
from trl_rewards.files import write_rows
from trl_rewards.loading import build
from trl_rewards.models.options import InProcess
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe
from trl_rewards.train import build_trainer, end, quieten_libraries
from trl_rewards.trl_keys import parse_trl

SHARD = 2 * GIB
"""Bytes of weights that are in memory together while a stand-in is written, but for a larger tensor."""
PROMPT_TOKENS = 512
"""As `trl-rewards plan` takes them to be."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VOCABULARY, SMALL_PROMPT, SMALL_COMPLETION = 2048, 32, 16
DATASET_KEYS = ("datasets", "dataset_config", "dataset_streaming", "dataset_train_split")
"""Of a recipe, about its own dataset."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="file or bundled name")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps to measure, at least")
    parser.add_argument("--prompt-tokens", type=int, help=f"of every prompt; {PROMPT_TOKENS}")
    parser.add_argument("--shrink", action="store_true", help="the same architectures with small widths and lengths")
    parser.add_argument("--out", type=Path, help="file to which the result is added, as one line of JSON")
    arguments, overrides = parser.parse_known_args(words)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    quieten_libraries()
    prompt_tokens = arguments.prompt_tokens or (SMALL_PROMPT if arguments.shrink else PROMPT_TOKENS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(
                arguments.recipe, overrides, Path(folder), arguments.steps, prompt_tokens, arguments.shrink
            )
    except (RecipeError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    print(json.dumps({found["recipe"]: in_words(found)}, ensure_ascii=False)[1:-1])
    return 0


def measure(
    config: str, overrides: Sequence[str], folder: Path, steps: int, prompt_tokens: int, small: bool
) -> dict[str, Any]:
    """Run a recipe with stand-ins that are written into `folder`. RecipeError where it cannot be run like that."""
    recipe = Recipe.load(config, overrides)
    if problems := obstacles(recipe):
        raise RecipeError(problems, config)
    recipe = with_stand_ins(recipe, folder, small)
    args = parse_trl(recipe)[1]
    # A generation batch is learnt from in so many optimiser steps; whole ones are measured.
    cycle = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
    steps = cycle * -(-steps // cycle)
    columns = sorted(needed_columns(recipe))
    write_prompts(folder, columns, prompt_tokens, args.max_completion_length, args.generation_batch_size)
    recipe = changed(recipe, {"max_steps": cycle + steps})
    recipe.save(folder / "recipe")
    planned = plan(str(folder / "recipe/recipe.yaml"), prompt_tokens=prompt_tokens)

    meter = Meter(warmup=cycle)
    with meter.at("load"):
        trainer, _ = build_trainer(recipe)
    meter.watch(trainer)
    try:
        trainer.train()
    finally:
        trainer.pipeline.close()
        end(trainer)
    return {
        "recipe": config,
        "overrides": list(overrides),
        "shrunk": small,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "weights": "random",
        "steps": steps,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": args.max_completion_length,
        "tokens": meter.tokens,
        "tokens_per_second": meter.tokens / meter.seconds["generate"],
        "seconds_per_step": {phase: meter.seconds[phase] / steps for phase in ("generate", "score", "learn")},
        "peak": meter.peaks,
        "planned": planned_bytes(planned),
        "versions": {module.__name__: module.__version__ for module in (trl_rewards, trl, transformers, torch)},
        "signature": recipe.signature,
    }


def planned_bytes(planned: Plan) -> dict[str, Any]:
    """Of each phase what the plan says is asked for (as `allocated`), and with context and spare room (the card)."""
    card = planned.as_json()["bytes"]
    asked = {phase: round(sum(part.size for part in planned.parts if phase in part.phases)) for phase in card}
    return {"allocated": asked, "card": card}


def in_words(found: dict[str, Any]) -> str:
    """A line for recipes/results.json."""
    seconds = found["seconds_per_step"]
    peaks = {kind: max(peak[kind] for peak in found["peak"].values()) for kind in found["peak"]["learn"]}
    whole = f"{sum(seconds.values()):.3g} s a step"
    return (
        f"random weights{' of a shrunk model' if found['shrunk'] else ''} on {found['device']}, prompts of "
        f"{found['prompt_tokens']} tokens, all completions of {found['completion_tokens']}: "
        f"{found['tokens_per_second']:.0f} completion tokens a second of generating, {whole} ("
        + ", ".join(f"{phase} {value:.3g}" for phase, value in seconds.items())
        + "), peak "
        + ", ".join(f"{size / GIB:.1f} GiB {kind}" for kind, size in peaks.items())
        + f", by plan {max(found['planned']['card'].values()) / GIB:.1f} GiB of a card; {found['steps']} steps"
    )


# --- what cannot be run ----------------------------------------------------------------------------------------------


def obstacles(recipe: Recipe) -> list[str]:
    """Why a recipe cannot be run with stand-ins; nothing where it can."""
    if recipe.trainer not in ("grpo", "rloo", "ppo"):
        return [f"trainer: {recipe.trainer!r} learns from pairs or labels; only grpo, rloo and ppo are measured here"]
    problems = []
    if not recipe.trl.get("model_name_or_path"):
        problems.append("model_name_or_path: a policy is needed")
    if recipe.trl.get("use_vllm"):
        problems.append("use_vllm: not measured here; --use_vllm false measures generation by transformers")
    for source in recipe.rewards:
        reward, _ = build("reward", source.use, source.options, recipe.base_dir)
        if why := _cannot_stand_in(reward):
            problems.append(f"{source.path}: {source.name!r} {why}")
    unknown = needed_columns(recipe) - set(column_values(""))
    problems += [f"dataset: nothing is known to put into column {name!r}" for name in sorted(unknown)]
    return problems


def _cannot_stand_in(reward: Any) -> str | None:
    if reward.is_async():
        return "asks a server or a judge, for whose answers random weights cannot stand in"
    if not isinstance(reward, InProcess):
        return None
    if reward.adapter or any(held.path is None for held in reward.held()):
        return "needs an adapter that was trained before, or the policy's own base"
    if type(reward) is not Model:
        return f"needs a model of its own kind; only `use: model` has stand-ins, got {type(reward).__name__}"
    if reward.head == "yes":
        return "reads a language model's answer, which random weights do not give"
    return None


def needed_columns(recipe: Recipe) -> set[str]:
    return {name for part in Pipeline.from_recipe(recipe).components().values() for name in part.reads()} - {"*"}


def column_values(text: str) -> dict[str, Any]:
    """What rows have in the columns that rewards may read."""
    return {"answer": "42", "references": [text], "reference_rewards": [0.0]}


# --- stand-ins -------------------------------------------------------------------------------------------------------


def with_stand_ins(recipe: Recipe, folder: Path, small: bool) -> Recipe:
    """The recipe with stand-ins for its models, on the script's own prompts, leaving nothing but its log behind."""
    made: dict[tuple[str, bool], str] = {}

    def of(name: str, classifier: bool) -> str:
        if (name, classifier) not in made:
            made[name, classifier] = str(folder / f"model{len(made)}")
            write_stand_in(stand_in(name, classifier, small), Path(made[name, classifier]))
        return made[name, classifier]

    changes: dict[str, Any] = {
        "model_name_or_path": of(recipe.trl["model_name_or_path"], False),
        "dataset_name": str(folder / "prompts.jsonl"),
        "dataset": None,
        "alarms": None,
        "output_dir": str(folder / "run"),
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    for source in recipe.rewards:
        reward, _ = build("reward", source.use, source.options, recipe.base_dir)
        if isinstance(reward, Model):
            assert reward.path is not None
            changes[f"rewards.{source.name}.with.path"] = of(reward.path, True)
    if recipe.trainer == "ppo":
        changes["critic_warmup_steps"] = 0  # or the policy would not learn in the steps that are measured
        if critic := recipe.trl.get("critic_model_name_or_path"):
            changes["critic_model_name_or_path"] = of(critic, True)
    if small:
        changes |= {"max_completion_length": SMALL_COMPLETION, "attn_implementation": None, "use_liger_kernel": False}
        if not importlib.util.find_spec("bitsandbytes"):
            changes |= {"load_in_4bit": False, "load_in_8bit": False, "optim": "adamw_torch"}
            changes |= {
                f"rewards.{source.name}.with.{key}": False
                for source in recipe.rewards
                for key in ("load_in_4bit", "load_in_8bit")
                if key in source.options
            }
    recipe = changed(recipe, changes)
    length = parse_trl(recipe)[1].max_completion_length
    return changed(
        recipe, {"generation_kwargs": {**(recipe.trl.get("generation_kwargs") or {}), "min_new_tokens": length}}
    )


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    raw = {key: value for key, value in recipe.raw.items() if key not in (*DATASET_KEYS, "resume_from_checkpoint")}
    return Recipe.parse(raw, changes, recipe.source, recipe.base_dir)


def stand_in(name: str, classifier: bool, small: bool) -> Shape:
    """The shape of a model by name, or a small one of its architecture; its config has the bundled tokenizer's ids."""
    shape = shape_of(name, classifier)
    classifier = type(shape.model).__name__.endswith("Classification")
    config = shrunk(shape.model.config) if small else copy.deepcopy(shape.model.config)
    tokenizer: Any = AutoTokenizer.from_pretrained(bundled.model_path())
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    shape = Shape.of(config, classifier)
    config.architectures = [type(shape.model).__name__]
    return shape


def write_stand_in(shape: Shape, folder: Path) -> None:
    """A folder for `from_pretrained`: config, tokenizer, and random weights in bfloat16."""
    folder.mkdir(parents=True)
    config = shape.model.config
    config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocab, config.max_position_embeddings)
    write_weights(shape.model, folder, config.initializer_range)


def shrunk(config: Any) -> Any:
    """The same architecture with few layers and small widths."""
    fields = {key: value for key, value in config.to_dict().items() if key != "layer_types"}  # one for each layer
    own = SMALL | {"vocab_size": SMALL_VOCABULARY}
    if fields.get("num_key_value_heads"):
        grouped = fields["num_key_value_heads"] < fields["num_attention_heads"]
        own["num_key_value_heads"] = SMALL["num_attention_heads"] // (2 if grouped else 1)
    if fields.get("head_dim"):
        own["head_dim"] = SMALL["hidden_size"] // SMALL["num_attention_heads"]
    return type(config).from_dict(fields | own)


def write_tokenizer(folder: Path, vocabulary: int, length: int) -> None:
    """The bundled tokenizer with other words: one of up to four letters for every id of the vocabulary, so that what
    random weights write is text, which a reward model reads as the same number of tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(bundled.model_path())
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    tokens = [token["content"] for token in sorted(parts["added_tokens"], key=lambda token: token["id"])]
    tokens.append("<|endoftext|>")  # transformers' class for Qwen2 adds it where it is not there
    tokens += sorted(ByteLevel.alphabet())
    letters = (itertools.product(string.ascii_lowercase, repeat=count) for count in (1, 2, 3, 4))
    words = ["Ġ" + "".join(word) for word in itertools.chain(*letters)][: vocabulary - len(tokens)]
    ids = {token: index for index, token in enumerate([*tokens, *words])}
    # A word is the one a letter shorter and its last letter: classes that know nothing but merges find it too.
    parts["model"] |= {"vocab": ids, "merges": [[word[:-1], word[-1]] for word in words]}
    parts["added_tokens"] = [token | {"id": ids[token["content"]]} for token in parts["added_tokens"]]
    file.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")


def write_weights(model: Any, folder: Path, std: float) -> None:
    """Shards of random weights for a model on the meta device: matrices are normal, norms 1, biases 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, weight in model.named_parameters():  # tied ones once
        if shard and sum(tensor.nbytes for tensor in shard.values()) + 2 * weight.numel() > SHARD:
            flush()
        values = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
        if weight.dim() > 1:
            values.normal_(0, std, generator=draw)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        shard[name] = values.cpu()
    flush()
    index = {
        "metadata": {"total_size": 2 * sum(weight.numel() for weight in model.parameters())},
        "weight_map": places,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if device == "cuda":
        torch.cuda.empty_cache()


def write_prompts(folder: Path, columns: Sequence[str], prompt: int, completion: int, rows: int) -> None:
    """`prompts.jsonl`: prompts of so many tokens, and texts as long as a completion where references are read."""
    draw = random.Random(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model0")
    words = [word.replace("Ġ", " ") for word in tokenizer.get_vocab() if word[0] == "Ġ" and len(word) > 1]

    def text(length: int) -> str:
        return "".join(draw.choices(words, k=length))

    def row() -> dict[str, Any]:
        prompted, values = text(prompt), column_values(text(completion))
        return {"prompt": prompted} | {name: values[name] for name in columns}

    write_rows(folder / "prompts.jsonl", [row() for _ in range(rows)])


# --- measuring -------------------------------------------------------------------------------------------------------


class Meter(TrainerCallback):
    """Seconds and peak memory by phase: from a step's begin to its end each moment belongs to one of them."""

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.seconds: Counter[str] = Counter()
        self.tokens = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase: str | None = None
        self.since = 0.0

    def turn(self, phase: str | None) -> None:
        """End the phase that it is, and begin another; None: what is not measured."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] += now - self.since
            known = self.peaks.get(self.phase, {})
            self.peaks[self.phase] = {kind: max(size, known.get(kind, 0)) for kind, size in peak().items()}
        forget_peak()
        self.phase, self.since = phase, time.perf_counter()

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.turn(phase)
        try:
            yield
        finally:
            self.turn(before)

    def watch(self, trainer: Any) -> None:
        """TRL's profiling tells trackers alone, and does not wait for the GPU: the same calls are measured here."""
        trainer.add_callback(self)
        generate, score, update = trainer._generate_single_turn, trainer.pipeline.score, trainer.pipeline.update

        def generated(*inputs: Any, **options: Any) -> Any:
            with self.at("generate"):
                found = generate(*inputs, **options)
            self.tokens += sum(map(len, found[0]))
            return found

        def scored(*inputs: Any, **options: Any) -> Any:
            with self.at("score"):
                return score(*inputs, **options)

        def updated(*inputs: Any, **options: Any) -> Any:
            with self.at("score"):
                return update(*inputs, **options)

        trainer._generate_single_turn = generated
        trainer.pipeline.score, trainer.pipeline.update = scored, updated

    def on_step_begin(self, args, state, control, **kwargs):
        self.turn("learn")

    def on_step_end(self, args, state, control, **kwargs):
        self.turn(None)
        if state.global_step == self.warmup:
            self.seconds.clear()
            self.tokens = 0


def peak() -> dict[str, int]:
    """Bytes since `forget_peak`: of the GPU's allocator, or resident memory (Linux)."""
    if torch.cuda.is_available():
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {"resident": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))}


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
