"""What PRIME costs beside outcomes alone: CPU time of a step, and resident memory.

    python benchmarks/prime_overhead.py [--rounds 3] [--steps 4] [--new-tokens 48]

GRPO with LoRA (r = 16, all linear layers) on a random Qwen2 of 6 M weights, 32 completions a step, four a prompt. The
same run with outcomes alone, with `prime` on the policy's own base, and with `prime` on a model of its own, each in
a process of its own and in turn; the first step of each is left out. CPU time of one thread; memory is the process's
peak, and `grown` what it grew by from the first rollout on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from trl_rewards import GRPOTrainer, Pipeline, Reward, bundled, load_advantage, load_reward
from trl_rewards.scoring import Source

VARIANTS = ("outcomes", "shared", "own")


class Even(Reward):
    """1 where the completion's first token id is even."""

    def score(self, samples):
        return [float(ids[0] % 2 == 0) if ids else 0.0 for ids in samples.completion_ids]


class Clock(TrainerCallback):
    """CPU seconds of each step, and the peak of memory after each."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)
        self.peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def make_base(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(variant: str, base: str, steps: int, new_tokens: int) -> dict[str, Any]:
    """One run's CPU seconds per step, its peak of memory, and what that grew by in the run, MiB."""
    torch.set_num_threads(1)
    sources = [Source("even", Even())]
    if variant != "outcomes":
        model = {} if variant == "shared" else {"path": base, "dtype": "float32"}
        prime = load_reward("prime", micro_batch=8, **model)
        sources.append(Source("prime", prime))
    advantage = load_advantage("leave_one_out" if variant == "outcomes" else "prime_rloo")
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=4,
            max_completion_length=new_tokens, max_steps=steps, beta=0.0, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, generation_kwargs={"min_new_tokens": new_tokens},
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [f"What is {number} plus 5?" for number in range(64)]})
        clock = Clock()
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        trainer = GRPOTrainer(
            base, None, args, train_dataset=data, peft_config=lora, pipeline=Pipeline(sources, advantage=advantage),
            callbacks=[clock],
        )  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        trainer.train()
    return {"seconds": clock.seconds[1:], "peak": clock.peaks[-1], "grown": clock.peaks[-1] - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print("RESULT" + json.dumps(run(args.variant, args.base, args.steps, args.new_tokens)))
        return
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        options = ["--steps", str(args.steps), "--new-tokens", str(args.new_tokens), "--base", folder]
        for _ in range(args.rounds):
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--variant", variant, *options]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[variant].append(json.loads(done.stdout.rpartition("RESULT")[2]))
    seconds = {v: statistics.median(s for each in found[v] for s in each["seconds"]) for v in VARIANTS}
    for variant in VARIANTS:
        peak = statistics.median(each["peak"] for each in found[variant])
        grown = statistics.median(each["grown"] for each in found[variant])
        ratio = seconds[variant] / seconds["outcomes"]
        print(
            f"{variant:9} step {seconds[variant]:.2f} CPU s ({ratio:.2f}), peak {peak:.0f} MiB, grown {grown:.0f} MiB"
        )


if __name__ == "__main__":
    main()
