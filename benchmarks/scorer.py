"""What the scorer of reward models saves: over TRL's own path, by shared prefixes, and what 4 bits cost in agreement.

    python benchmarks/scorer.py                                     # a small random model on the CPU
    python benchmarks/scorer.py --device cuda --model-shape 7b      # random weights in the shape of Qwen2-7B, bfloat16

Every figure is a ratio of two things measured in turn in one run, CPU time on a CPU (one thread), wall time on a GPU;
the median of the rounds. Memory is what a scoring call adds to the process's peak: on a CPU resident memory (Linux),
each way in a process of its own; on a GPU what the allocator handed out. Weights are random, so the agreement says
what rounding does to a random function, not what it does to a trained reward model's ranking.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from trl_rewards import bundled
from trl_rewards.models.heads import Head
from trl_rewards.models.pretrained import Loading
from trl_rewards.models.scorer import BUDGET, CPU_BUDGET, Scorer, load_scorer

SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}


def make_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    tokenizer.model_max_length = 4096
    return tokenizer


def make_model(shape: str, tokenizer, device: str, dtype: torch.dtype) -> Qwen2ForSequenceClassification:
    """A random classifier with one output."""
    options = {"vocab_size": len(tokenizer)} | SHAPES[shape]
    config = Qwen2Config(**options, num_labels=1, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForSequenceClassification._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def make_scorer(model, tokenizer, device: str, prefix_reuse: str) -> Scorer:
    model.score.float()
    return Scorer(
        head=Head(model, model.base_model, model.score, ["score"]),
        weights=[1.0],
        loading=Loading(path="random", device=device, dtype=str(model.dtype).removeprefix("torch.")),
        tokenizer=tokenizer,
        max_length=4096,
        truncate="prompt_head",
        token_budget=CPU_BUDGET if device == "cpu" else BUDGET,
        prefix_reuse=prefix_reuse,
        progress=False,
    )


def trl_scores(model, tokenizer, texts: list[str]) -> list[float]:
    """What trl.GRPOTrainer does with a model as reward function: all texts padded to the longest, one forward pass."""
    inputs = tokenizer(
        text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    ).to(model.device)
    with torch.inference_mode():
        return model(**inputs).logits[:, 0].tolist()


def make_texts(tokenizer, rows: int = 64) -> list[str]:
    """Texts of one-token words, their lengths log-normal: median 280, 5 in 100 above 800."""
    rng = random.Random(0)
    words = [f" {token[1:]}" for token in sorted(tokenizer.get_vocab()) if token[0] == "Ġ" and token[1:].isalpha()]
    lengths = [min(int(rng.lognormvariate(math.log(280), 0.65)), 2000) for _ in range(rows)]
    return ["".join(rng.choices(words, k=length)) for length in lengths]


def make_rows(prefix: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    start = [rng.randrange(5, 200) for _ in range(prefix)]
    return [start + [rng.randrange(5, 200) for _ in range(length)] for length in lengths]


def seconds(function: Callable[[], object], device: str) -> float:
    gc.collect()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function()  # ends in .tolist(), which waits for the GPU
    return clock() - start


def ratio(
    slow: Callable[[], object], fast: Callable[[], object], device: str, rounds: int
) -> tuple[float, float, float]:
    """Median seconds of both, in turn, and the median of the ratios, after one round that warms up."""
    fast(), slow()
    times = [(seconds(slow, device), seconds(fast, device)) for _ in range(rounds)]
    slows, fasts = zip(*times, strict=True)
    return statistics.median(slows), statistics.median(fasts), statistics.median(s / f for s, f in times)


def peak_on_gpu(function: Callable[[], object]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(way: str, shape: str) -> int:
    """Bytes by which a process's resident peak grows while it scores in one of the ways: `ours` or `trl`."""
    command = [sys.executable, __file__, "--model-shape", shape, "--peak-of", way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grown(function: Callable[[], object]) -> int:
    """Bytes by which this process's resident peak exceeds what it holds before the call. Linux only."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = field("VmRSS")
    function()
    return field("VmHWM") - before


def agreement(tokenizer, device: str) -> float:
    """Pearson correlation of a small random model's scores in 4 bits with those in bfloat16."""
    rows = make_rows(0, [20 + row % 40 for row in range(64)])
    with tempfile.TemporaryDirectory() as folder:
        make_model("small", tokenizer, "cpu", torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = [
            load_scorer(Loading(path=folder, device=device, quantization=bits)).score_ids(rows)
            for bits in (None, "4bit")
        ]
    return torch.corrcoef(torch.tensor(found))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model-shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", choices=["ours", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, on_cpu = arguments.device, arguments.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(arguments.model_shape, tokenizer, device, torch.float32 if on_cpu else torch.bfloat16)
    off, on = (make_scorer(model, tokenizer, device, choice) for choice in ("off", "on"))
    texts = make_texts(tokenizer)

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: off.score_texts(texts, add_special_tokens=False),
        "trl": lambda: trl_scores(model, tokenizer, texts),
    }
    if arguments.peak_of:
        trl_scores(model, tokenizer, texts[:1])  # what the first call of all loads
        print(grown(ways[arguments.peak_of]))
        return
    print(f"{arguments.model_shape} on {device}, {model.dtype}, random weights; {torch.__version__}")
    theirs, mine, times = ratio(ways["trl"], ways["ours"], device, arguments.rounds)
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    print(f"64 texts of {lengths[0]}–{lengths[-1]} tokens, mean {statistics.mean(lengths):.0f}:")
    print(f"  time    TRL {theirs:.3f} s, ours {mine:.3f} s: {times:.2f} times as fast")
    peaks = {way: peak_on_cpu(way, arguments.model_shape) if on_cpu else peak_on_gpu(ways[way]) for way in ways}
    print(
        f"  memory  TRL {peaks['trl'] / 2**20:.0f} MiB, ours {peaks['ours'] / 2**20:.0f} MiB: "
        f"{peaks['ours'] / peaks['trl']:.3f} of it"
    )
    rows = make_rows(1000, list(range(145, 356, 30)))  # mean 250
    without, shared, times = ratio(lambda: off.score_ids(rows), lambda: on.score_ids(rows), device, arguments.rounds)
    print("8 completions of 145 to 355 tokens, mean 250, to a prompt of 1,000:")
    print(f"  time    off {without:.3f} s, on {shared:.3f} s: {times:.2f} times as fast; tokens say 3.33")
    print(f"4 bits against bfloat16, a small random model: correlation {agreement(tokenizer, device):.3f}")


if __name__ == "__main__":
    main()
