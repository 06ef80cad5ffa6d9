"""A recipe's alarms at work: each log is looked at, and what has to be said is said, marked, or ends the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trl_rewards.alarms import Alarm, Count
from trl_rewards.errors import did_you_mean
from trl_rewards.report.recording import RunRecorder
from trl_rewards.report.run import ALARM, METRICS, finite, write_lines
from trl_rewards.scoring import World

logger = logging.getLogger(__name__)

PATIENCE = 5
"""Logs after which a metric that none of them had is asked after."""


class AlarmWatch(TrainerCallback):
    """Looks at every log that `recorder` keeps; comes after it among the trainer's callbacks.

    The main process looks, and all stop together. A run that resumes has its alarms look again at the logs it kept, so
    that they count on where they were.
    """

    def __init__(self, alarms: Sequence[Alarm], recorder: RunRecorder):
        self.stopped: str | None = None
        """What ended the run, for its user; None if no alarm did. The same on every rank."""
        self._counts = [Count(alarm) for alarm in alarms]
        self._recorder = recorder
        self._keys: dict[str, None] = {}
        self._logs = 0
        self._begun = False

    def _begin(self) -> None:
        """Look again at what was logged before the run was resumed, and say nothing of it."""
        if not self._begun:
            self._begun = True
            for line in self._recorder.resumed:
                self._look(line)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None:
            return
        self._begin()
        stop = None
        if state.is_world_process_zero:
            step = self._recorder.step(state)
            for alarm, said in self._look(logs):
                self._say(alarm, said, step, Path(args.output_dir))
                if alarm.then == "stop":
                    stop = f"alarm: {said}, at step {step}"
            self._logs += "loss" in logs
            if self._logs == PATIENCE and "loss" in logs:
                self._ask_after_unseen(f"is in none of the first {PATIENCE} logs", evaluations=False)
        if any(count.alarm.then == "stop" for count in self._counts):
            stop = World.current().gather_objects(stop)[0]
        if stop is not None:
            self.stopped = stop
            self._recorder.stop()
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._ask_after_unseen("was in no log", evaluations=True)

    def _look(self, logs: Mapping[str, Any]) -> list[tuple[Alarm, str]]:
        """The alarms that these logs set off, with their words."""
        self._keys |= dict.fromkeys(logs)
        found = []
        for count in self._counts:
            value = logs.get(count.alarm.metric)
            number = value if value in (math.inf, -math.inf) else finite(value)
            if number is not None and (said := count.look(number)):
                found.append((count.alarm, said))
        return found

    def _say(self, alarm: Alarm, said: str, step: int, folder: Path) -> None:
        logger.warning("alarm at step %s: %s", step, said)
        if alarm.then != "log":
            mark = {"step": step, ALARM: said, "metric": alarm.metric, "then": alarm.then}
            write_lines(folder / METRICS, [mark], "a")

    def _ask_after_unseen(self, where: str, evaluations: bool) -> None:
        for metric in (count.alarm.metric for count in self._counts if not count.seen):
            if evaluations or not metric.startswith("eval_"):
                hint = did_you_mean(metric, self._keys)
                logger.warning("alarms: %r %s%s: its alarm has nothing to watch", metric, where, hint.rstrip("?"))
