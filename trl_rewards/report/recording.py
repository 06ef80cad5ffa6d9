"""Keeping what happens while training: every log, some rows of each scored batch, and the page at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from trl_rewards.components import Status
from trl_rewards.report.page import write_report
from trl_rewards.report.run import METRICS, SAMPLES, read_lines, write_lines

if TYPE_CHECKING:
    from trl_rewards.components import RewardBatch

logger = logging.getLogger(__name__)


class RunRecorder(TrainerCallback):
    """Keeps every log in `metrics.jsonl` and some rows of the last scored batch in `samples.jsonl`, in `output_dir`.

    Writes the report when training ends. A fresh run starts fresh files; a resumed one first drops what the files
    hold after the step that it resumes from. Only the main process writes.
    """

    def __init__(self, trainer: Any, rows: int = 8):
        """`trainer` offers `last_batch` and `last_advantages`; `rows` are kept per log, spread over the batch."""
        self._trainer = trainer
        self._rows = rows
        self._kept: RewardBatch | None = None
        self.resumed: list[dict[str, Any]] = []
        """Logs of before the step that the run resumed from, on the main process."""

    def step(self, state) -> int:
        """Optimiser steps of the run."""
        return state.global_step

    def stop(self) -> None:
        """An alarm ends the run: called on every rank."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = None
        self.resumed = list(state.log_history) if self.step(state) > 0 else []
        for file in (folder / METRICS, folder / SAMPLES):
            if self.step(state) > 0 and file.exists():
                lines = [line for line in read_lines(file)[0] if line["step"] <= self.step(state)]
                write_lines(file, lines)
                self.resumed = lines if file.name == METRICS else self.resumed
            else:
                file.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / METRICS, [{"step": self.step(state), **logs}], "a")
        batch = self._trainer.last_batch
        # A log may come before another batch was scored: during an evaluation, or when a batch serves several steps.
        if batch is None or batch is self._kept:
            return
        self._kept = batch
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        lines = sample_lines(batch, self._trainer.last_advantages, self.step(state), mode, self._rows)
        write_lines(folder / SAMPLES, lines, "a")

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            logger.info("report: %s", write_report(args.output_dir))
        except Exception:  # the run is done and saved; a plot must not make it look failed
            logger.warning("no report was written; `write_report(%r)` tries again", args.output_dir, exc_info=True)


class RoundRecorder(RunRecorder):
    """A recorder of a trainer that trains in rounds: steps go on counting over them.

    The trainer also offers `steps_before` and `measures`, and takes `stopped`.
    """

    _begun = False

    def step(self, state) -> int:
        return self._trainer.steps_before + state.global_step

    def stop(self) -> None:
        self._trainer.stopped = True

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._begun:
            self._begun = True
            super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.on_train_begin(args, state, control)  # the first log comes before the first round's training
        super().on_log(args, state, control, logs, **kwargs)
        if "eval_reward" in (logs or {}) and self.step(state) > 0:
            super().on_train_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        if self._trainer.stopped or not self._trainer.measures:  # else the held-out reward comes next
            super().on_train_end(args, state, control, **kwargs)


def sample_lines(batch: RewardBatch, advantages: Any, step: int, mode: str, rows: int) -> list[dict[str, Any]]:
    """At most `rows` rows of a batch, evenly spread so that they come from different prompts, as plain data."""
    n = len(batch.rewards)
    spread = [index * n // min(rows, n) for index in range(min(rows, n))]
    values, status = batch.scores.values.tolist(), batch.scores.status.tolist()
    totals, names = batch.rewards.tolist(), batch.scores.names
    learned = advantages.tolist() if advantages is not None and len(advantages) == n else [None] * n
    chosen = batch.samples.take(spread)
    return [
        {
            "step": step,
            "mode": mode,
            "prompt": prompt,
            "completion": completion,
            "scores": dict(zip(names, values[row], strict=True)),
            "status": {name: Status.WORDS[code] for name, code in zip(names, status[row], strict=True)},
            "total": totals[row],
            "advantage": learned[row],
            **({"traces": batch.traces[row]} if batch.traces else {}),
        }
        for row, prompt, completion in zip(spread, chosen.prompt_texts, chosen.texts, strict=True)
    ]
