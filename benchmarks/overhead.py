"""What the framework costs: our trainer's step over stock TRL's, 1,000 rows of a pipeline, the CLI's cold start.

    python benchmarks/overhead.py

Every figure is a ratio, or stands beside what it is compared with, measured in turn in one run.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time

import trl
from datasets import Dataset
from transformers import TrainerCallback

import trl_rewards
from trl_rewards import Pipeline, Reward, bundled, load_advantage, load_shaper
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples


def length(completions, **kwargs):
    """Characters of the completion."""
    return [len(str(text)) / 100 for text in completions]


def letters(completions, **kwargs):
    """Letters e of the completion."""
    return [str(text).count("e") / 10 for text in completions]


class Length(Reward):
    def score(self, samples):
        return length(samples.completions)


class Letters(Reward):
    def score(self, samples):
        return letters(samples.completions)


def step_seconds(make_trainer, steps: int) -> list[float]:
    """Seconds of each step after the first three."""
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter() - self.start)

    trainer = make_trainer()
    trainer.add_callback(Clock())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return times[3:steps]


def trainer_ratio(rounds: int = 4, steps: int = 23) -> tuple[float, float, float]:
    """Median step seconds of stock TRL and of ours with the same two rewards, in turn; and the median ratio."""
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in bundled.load_data("tiny")["train"].to_list()[:200]])
    folder = tempfile.mkdtemp()

    def arguments():
        return trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=32, num_generations=8, max_completion_length=32,
            max_steps=steps, logging_steps=1, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            generation_kwargs={"min_new_tokens": 32},
        )  # fmt: skip

    def stock():
        return trl.GRPOTrainer(str(bundled.model_path()), [length, letters], arguments(), train_dataset=data)

    def ours():
        sources = [Source(name, reward, Schedule.parse(1.0)) for name, reward in [("a", Length()), ("b", Letters())]]
        pipeline = Pipeline(sources, advantage=load_advantage("group_norm"))
        return trl_rewards.GRPOTrainer(
            str(bundled.model_path()), args=arguments(), train_dataset=data, pipeline=pipeline
        )

    medians = [
        (statistics.median(step_seconds(stock, steps)), statistics.median(step_seconds(ours, steps)))
        for _ in range(rounds)
    ]
    theirs, mine = (statistics.median(column) for column in zip(*medians, strict=True))
    return theirs, mine, statistics.median(b / a for a, b in medians)


def pipeline_milliseconds(rows: int = 1000, repeats: int = 20) -> float:
    """Median milliseconds of scoring, combining, shaping and advantages for `rows` rows with 4 trivial sources."""

    class Constant(Reward):
        value: float = 0.5

        def score(self, samples):
            return [self.value + row % 7 / 10 for row in range(len(samples))]

    sources = [Source(f"s{index}", Constant(value=float(index)), Schedule.parse(1.0)) for index in range(4)]
    pipeline = Pipeline(sources, shape=[load_shaper("whiten")], advantage=load_advantage("group_norm"))
    samples = make_samples([f"completion number {row}" for row in range(rows)], prompts=["p"] * rows)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        pipeline.advantages(pipeline.score(samples, 8))
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def cold_start(command: list[str], repeats: int = 5) -> float:
    """Median wall seconds of a command, after one run that warms the disk."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    theirs, mine, ratio = trainer_ratio()
    print(f"GRPO step, 32 completions of 32 tokens, bundled policy: stock {theirs:.4f} s, ours {mine:.4f} s")
    print(f"  ratio, median of 4 rounds in turn: {ratio:.4f}")
    print(f"pipeline, 1,000 rows, 4 sources, whiten, group_norm: {pipeline_milliseconds():.1f} ms")
    scripts = sys.executable.rpartition("/")[0]
    ours, trl_help = cold_start([f"{scripts}/trl-rewards", "list"]), cold_start([f"{scripts}/trl", "--help"])
    print(f"cold start: trl-rewards list {ours:.2f} s, trl --help {trl_help:.2f} s, ratio {ours / trl_help:.3f}")


if __name__ == "__main__":
    main()
