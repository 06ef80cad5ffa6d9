"""One readable line per log in the terminal, in place of transformers' progress bar and printed dicts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_rewards.terminal import output_console

if TYPE_CHECKING:
    from rich.console import Console

HEADER_EVERY = 20
NOTABLE_CHANGE = 0.05
"""Abstentions are noted when their share moved by this much since the last note: some sources always abstain on some
rows, and a line that never changes hides the one that does. Failures are noted on every line."""


class Column(NamedTuple):
    """A metric of TRL's as a column. `small` values are printed in scientific notation, a `share` as per cent."""

    key: str
    label: str
    form: Literal["number", "small", "share", "seconds"] = "number"
    droppable: bool = True


TOTAL = Column("reward", "reward", droppable=False)
METRICS = (  # from the most to the least telling; the last are the first to go when a line is full
    Column("accuracy", "accuracy", "share"),
    Column("margin", "margin"),
    Column("rewards/accuracies", "accuracy", "share"),
    Column("rewards/margins", "margin"),
    Column("completions/mean_length", "tokens"),
    Column("kl", "kl", "small"),
    Column("entropy", "entropy"),
    Column("frac_reward_zero_std", "zero-var", "share"),
    Column("completions/clipped_ratio", "clipped", "share"),
    Column("loss", "loss", "small"),
    Column("learning_rate", "lr", "small"),
    Column("grad_norm", "grad"),
    Column("step_time", "s/step", "seconds"),
)


class LiveTable(TrainerCallback):
    """Prints a header when training starts, an aligned line per log, and first against last values when it ends.

    Plain ASCII without control codes when stdout is no terminal. Only the main process prints.
    """

    def __init__(self, sources: Sequence[str] = (), title: str = "", console: Console | None = None):
        """`sources` are the names of the reward sources, in the order to show; those found in the logs are added."""
        self._console = console or output_console()
        self._sources = list(sources)
        self._title = title
        self._seen: set[str] = set()
        self._lines: list[list[Column]] = []
        self._since_header = 0
        self._started = time.monotonic()
        self._first_step = 0
        self._history: dict[str, list[float]] = {}
        self._noted: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._first_step = time.monotonic(), state.global_step
        self._seen, self._lines, self._since_header, self._history, self._noted = set(), [], 0, {}, {}
        if not state.is_world_process_zero:
            return
        begin = f"resumed at step {state.global_step} of {state.max_steps}" if state.global_step else None
        facts = {
            "training": self._title,
            "sources": ", ".join(self._sources),
            "steps": begin or str(state.max_steps),
            "output": str(args.output_dir),
        }
        self._print("")
        for name, fact in facts.items():
            if fact:
                self._print(f"{name:<10}{fact}", "bold" if name == "training" else "")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        values = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
        if not prefix and "train_runtime" in values and TOTAL.key not in values and "loss" not in values:
            return  # the totals of the run, which have no step of their own
        self._lay_out(values)
        for column in self._columns():
            if (value := _finite(values.get(column.key))) is not None:
                self._history.setdefault(prefix + column.key, []).append(value)
        for key in ("total/missing", *(f"{name}/{what}" for name in self._sources for what in ("missing", "failed"))):
            if (value := _finite(values.get(f"rewards/{key}"))) is not None:
                self._history.setdefault(f"{prefix}rewards/{key}", []).append(value)
        if self._since_header == 0:
            self._print_header(state.max_steps)
        self._since_header = (self._since_header + 1) % HEADER_EVERY
        self._print_row(state, values, prefix)

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        took = _clock(time.monotonic() - self._started)
        self._print("")
        verb = "done" if state.global_step >= state.max_steps else "stopped"
        self._print(f"{verb}: {state.global_step} of {state.max_steps} steps, {took}", "bold")
        shown = [column for column in self._columns() if column == TOTAL or column.key.endswith("/mean")]
        shown = shown or [column for column in self._columns() if column.key in self._history]
        rows = [
            (prefix.replace("_", " ") + column.label, column, self._history[prefix + column.key])
            for prefix in ("", "eval_")
            for column in shown
            if prefix + column.key in self._history
        ]
        if rows:
            width = max(len(label) for label, _, _ in rows)
            self._print(f"{'':<{width}}  {'first':>9} {'last':>9} {'change':>9}", "dim")
        for label, column, values in rows:
            change = _number(values[-1] - values[0], column.form)
            sign = "" if change.startswith("-") else "+"
            self._print(
                f"{label:<{width}}  {_number(values[0], column.form):>9} {_number(values[-1], column.form):>9} "
                f"{sign + change:>9}",
                "bold" if column == TOTAL else "",
            )
        means = {
            key: sum(values) / len(values) for key, values in self._history.items() if not key.startswith("eval_")
        }
        failed, holes = self._shares(means)
        if without := failed | {key: share for key, share in holes.items() if share > 0}:
            self._print(f"over the run: {_say(without)} of the rows", "bold red" if failed else "yellow")

    def _columns(self) -> list[Column]:
        """Every column that has been seen in a log, in order of importance."""
        sources = [Column(f"rewards/{name}/mean", name, droppable=False) for name in self._sources]
        return [column for column in (TOTAL, *sources, *METRICS) if column.key in self._seen]

    def _lay_out(self, values: Mapping[str, Any]) -> None:
        """Put metrics that were not seen before into the table, which then gets a header again."""
        self._sources += [name for name in source_names(values) if name not in self._sources]
        known = {f"rewards/{name}/mean" for name in self._sources} | {column.key for column in (TOTAL, *METRICS)}
        found = {key for key in known if _finite(values.get(key)) is not None} - self._seen
        if found:
            self._seen |= found
            self._since_header = 0

    def _print_header(self, max_steps: int) -> None:
        self._lines = lay_out(self._columns(), self._console.width - _lead_width(max_steps))
        lead = f"{'step':<{_step_width(max_steps)}}  {'elapsed':>7}  {'left':>7}"
        self._print("")
        for index, line in enumerate(self._lines):
            labels = "".join(f"  {_short(column.label):>{_column_width(column)}}" for column in line)
            self._print((lead if index == 0 else " " * len(lead)) + labels, "dim")

    def _print_row(self, state: Any, values: Mapping[str, Any], prefix: str) -> None:
        from rich.text import Text

        elapsed = time.monotonic() - self._started
        done = state.global_step - self._first_step
        left = _clock(elapsed / done * (state.max_steps - state.global_step)) if done > 0 else "-"
        step = f"eval {state.global_step}" if prefix else f"{state.global_step}/{state.max_steps}"
        lead = f"{step:<{_step_width(state.max_steps)}}  {_clock(elapsed):>7}  {left:>7}"
        style = "cyan" if prefix else ""
        rows = []
        for index, line in enumerate(self._lines):
            row = Text().append(lead if index == 0 else " " * len(lead), style or "dim")
            for column in line:
                cell = _number(_finite(values.get(column.key)), column.form)
                row.append(
                    f"  {cell:>{_column_width(column)}}", f"bold {style}" if column == TOTAL else style or "none"
                )
            rows.append(row)
        failed, holes = self._shares(values)
        changed = [key for key in holes if abs(holes[key] - self._noted.get(prefix + key, 0.0)) >= NOTABLE_CHANGE]
        self._noted |= {prefix + key: holes[key] for key in changed}
        holes = {key: holes[key] for key in changed if holes[key] > 0}
        note = Text("")
        if failed:
            note.append("  !! " + _say(failed), "bold red")
        if holes:
            note.append("  ! " + _say(holes), "yellow")
        if note and rows and len(rows[-1]) + len(note) <= self._console.width:
            rows[-1].append_text(note)
        elif note:
            rows.append(Text(" " * _step_width(state.max_steps)).append_text(note))
        for row in rows:
            self._console.print(row, soft_wrap=True)

    def _shares(self, values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
        """Shares of rows without a score, in words: failures, if any, and holes of other kinds, zeros included."""
        failed, holes = {}, {}
        for name in self._sources:
            share = _finite(values.get(f"rewards/{name}/failed")) or 0.0
            missing = _finite(values.get(f"rewards/{name}/missing")) or 0.0
            if share > 0:
                failed[f"{name} failed"] = share
            holes[f"{name} abstained"] = missing - share if missing - share > 1e-6 else 0.0
        holes["no total"] = _finite(values.get("rewards/total/missing")) or 0.0
        return failed, holes

    def _print(self, line: str, style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(line, style=style), soft_wrap=True)


def tame_logging(trainer: Any, sources: Sequence[str] | None = None, title: str = "") -> LiveTable:
    """Give `trainer` a LiveTable in place of transformers' own output; `report_to` is left as it is.

    `sources` defaults to those of the trainer's pipeline; give () for a trainer that has none.
    """
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # a notebook has another bar than a terminal

    for callback in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    if sources is None:
        sources = trainer.pipeline.names if trainer.pipeline is not None else ()
    model = trainer.model.config.name_or_path or type(trainer.model).__name__  # no path: a model made in memory
    table = LiveTable(sources, title or f"{model} with {type(trainer).__name__}")
    trainer.add_callback(table)
    return table


def source_names(keys: Iterable[str]) -> list[str]:
    """The sources of a log by its keys `rewards/<name>/mean`; `total` is the reward itself, so it is none of them."""
    names = [key.removeprefix("rewards/").removesuffix("/mean") for key in keys if _is_source(key)]
    return [name for name in names if name != "total"]


def lay_out(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Columns into lines of at most `width`: the least important go first, then the sources wrap."""
    kept = list(columns)
    while kept and kept[-1].droppable and _line_width(kept) > width:
        kept.pop()
    lines: list[list[Column]] = [[]]
    for column in kept:
        if lines[-1] and _line_width([*lines[-1], column]) > width:
            lines.append([])
        lines[-1].append(column)
    return lines


def _is_source(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")


def _line_width(columns: Sequence[Column]) -> int:
    return sum(2 + _column_width(column) for column in columns)


def _column_width(column: Column) -> int:
    return max(len(_short(column.label)), 8 if column.form == "small" else 7)


def _step_width(max_steps: int) -> int:
    """Room for `60/60` and for `eval 60`."""
    digits = len(str(max_steps))
    return max(2 * digits + 1, digits + 5)


def _lead_width(max_steps: int) -> int:
    return _step_width(max_steps) + 2 * (2 + 7)


def _short(name: str, limit: int = 16) -> str:
    return name if len(name) <= limit else name[: limit - 2] + ".."


def _finite(value: Any) -> float | None:
    """`value` if it is a number that can be shown, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        return None
    return float(value)


def _number(value: float | None, form: str = "number") -> str:
    """At most 8 characters; `-` for no value."""
    if value is None:
        return "-"
    if form == "share":
        return _percent(value)
    if form == "seconds":
        return f"{value:.1f}"
    size = abs(value)
    if size >= 1e6 or (form == "small" and 0 < size < 1e-3):
        return f"{value:.1e}"
    if form == "small" and size < 1:
        return f"{value:.4f}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1 if size < 10000 else 0}f}"


def _say(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {_percent(share)}" for what, share in shares.items())


def _percent(share: float) -> str:
    return f"{share:.1%}" if share else "0%"


def _clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
