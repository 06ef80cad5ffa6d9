"""What four rewards on one base cost, against one reward model and against four: memory, and time in three modes.

    python benchmarks/shared_base.py             # a random Qwen2 of 12 layers and 108 M weights on the CPU, Linux
    python benchmarks/shared_base.py --rounds 5

Memory: bytes of weights (of 4-bit ones with their scales), and by how much resident memory grew by loading and by
scoring, each way in a process of its own. Time: CPU time of one thread as a multiple of the base's own forward pass
over the same rows, all modes in turn in one run, the median of the rounds. Weights are random, LoRA is r = 16 on all
linear layers; late LoRA is on the last 3 of 12 layers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from trl_rewards import bundled
from trl_rewards.models import Loading, SharedBase, load_scorer, trunk_of, using
from trl_rewards.models.scorer import Scorer

K, LAYERS, LATE = 4, 12, 3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [[5 + (7 * row + 3 * index) % 200 for index in range(128)] for row in range(4)]


def make_folders(folder: Path) -> None:
    """A base, and four adapters of each mode, with heads."""
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    classifier = Qwen2ForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    last = list(range(LAYERS - LATE, LAYERS))
    for mode, layers in (("full", None), ("late", last)):
        lora = LoraConfig(
            r=16, target_modules=LINEAR, layers_to_transform=layers, task_type="SEQ_CLS", init_lora_weights=False
        )
        adapted = get_peft_model(classifier, lora)
        for member in range(K):
            adapted.save_pretrained(folder / f"{mode}{member}")
        classifier = adapted.unload()
    for member in range(K):
        (folder / f"head{member}").mkdir()
        head = {"v_head.summary.weight": torch.randn(1, config.hidden_size)}
        save_file(head, folder / f"head{member}" / "value_head.safetensors")


def scorers_of(way: str, folder: Path, bits: str | None) -> list[Scorer]:
    """`apart1`, `apart4`: models of their own. `shared`: full LoRA on one base."""
    options: dict[str, Any] = {"dtype": "bfloat16", "quantization": bits, "device": "cpu"}
    loading = Loading(path=str(folder / "base"), **options)
    if way == "shared":
        base = SharedBase(loading)
        members = [base.add(str(folder / f"full{member}"), prefix_reuse="off") for member in range(K)]
        base.load()
        return [member.scorer for member in members if member.scorer]
    return [
        load_scorer(Loading(path=loading.path, adapter=str(folder / f"full{member}"), **options), prefix_reuse="off")
        for member in range(int(way[-1]))
    ]


def weight_bytes(scorers: list[Scorer]) -> int:
    """Of the parameters and buffers of the scorers' models, each counted once, and of 4-bit weights' scales."""
    models = {id(scorer.head.model): scorer.head.model for scorer in scorers}.values()
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    for tensor in list(tensors):
        if state := getattr(tensor, "quant_state", None):
            tensors += [part for part in state.as_dict(packed=False).values() if isinstance(part, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def memory(way: str, folder: Path, bits: str | None) -> dict[str, int]:
    """Bytes in this process: of weights, by which loading made it grow, and scoring at its peak."""
    scorers_of("apart1", folder, bits)[0].score_ids(ROWS[:1])  # what the first call of all loads
    trim()
    start = resident("VmRSS")
    scorers = scorers_of(way, folder, bits)
    trim()
    loaded = resident("VmRSS") - start
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    for scorer in scorers:
        scorer.score_ids(ROWS[:1])
    return {"weights": weight_bytes(scorers), "loaded": loaded, "peak": resident("VmHWM") - start}


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def cpu_seconds(function: Any) -> float:
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def times(folder: Path, rounds: int) -> dict[str, float]:
    """CPU time of k members, as multiples of one forward pass of the base."""
    loading = Loading(path=str(folder / "base"), dtype="float32", device="cpu")
    members, bases = {}, {}
    for mode in ("head", "late", "full"):
        bases[mode] = SharedBase(loading)
        members[mode] = [bases[mode].add(str(folder / f"{mode}{member}"), prefix_reuse="off") for member in range(K)]
        bases[mode].load()

    def score(mode: str) -> None:
        for member in members[mode]:
            member.scorer.score_ids(ROWS)
        members[mode][0].scorer.group.known.clear()  # the next round is of the same rows

    model, ids = bases["full"].model, torch.tensor(ROWS)

    def base_pass() -> None:
        with using(model, None):
            trunk_of(model)(input_ids=ids, use_cache=False)

    def mixed() -> None:
        """PEFT's way: every row once per adapter, in one batch."""
        names = [name for name in bases["full"].adapters for _ in ROWS]
        with torch.no_grad():
            model.eval()(input_ids=ids.repeat(K, 1), use_cache=False, adapter_names=names, logits_to_keep=1)

    ways = {"base": base_pass, "mixed": mixed} | {mode: (lambda mode=mode: score(mode)) for mode in members}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for function in ways.values():
        function()
    for _ in range(rounds):
        for name, function in ways.items():
            found[name].append(cpu_seconds(function))
    return {
        name: statistics.median(mine / base for mine, base in zip(seconds, found["base"], strict=True))
        for name, seconds in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        way, folder, bits = arguments.memory_of
        print(json.dumps(memory(way, Path(folder), bits if bits != "none" else None)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folders(folder)
        adapter = os.path.getsize(folder / "full0" / "adapter_model.safetensors") / 2  # kept in bfloat16
        for bits in ("4bit", "none"):
            found = {}
            for way in ("apart1", "shared", "apart4"):
                command = [sys.executable, __file__, "--memory-of", way, name, bits]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way] = json.loads(done.stdout.splitlines()[-1])
            print(f"memory, {'bfloat16' if bits == 'none' else '4 bits'}, MiB (an adapter: {adapter / 2**20:.1f})")
            for kind in ("weights", "loaded", "peak"):
                one, shared, four = (found[way][kind] / 2**20 for way in ("apart1", "shared", "apart4"))
                print(
                    f"  {kind:8} one {one:.0f}, four on one base {shared:.0f}, four models {four:.0f}: "
                    f"{shared / one:.2f} and {four / one:.2f} times one; "
                    f"{shared / (one + (K - 1) * adapter / 2**20):.2f} times one and the other adapters"
                )
        ratios = times(folder, arguments.rounds)
        print(f"time of {K} members, {len(ROWS)} rows of {len(ROWS[0])} tokens, float32, in passes of the base:")
        names = {
            "head": "heads on the trunk",
            "late": f"LoRA on the last {LATE} of {LAYERS} layers",
            "full": "LoRA on all layers",
            "mixed": "LoRA on all layers, PEFT's mixed batch",
        }
        for mode, what in names.items():
            print(f"  {what}: {ratios[mode]:.2f}")


if __name__ == "__main__":
    main()
