"""A run on one page: metrics and samples kept while training, then plots and a self-contained HTML report."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from transformers import TrainerCallback

from trl_rewards.components import Status
from trl_rewards.console import source_names
from trl_rewards.reliability import CAPTION, draw_reliability, used_calibrations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trl_rewards.components import RewardBatch

logger = logging.getLogger(__name__)

METRICS, SAMPLES, PAGE = "metrics.jsonl", "samples.jsonl", "report.html"
STATUS = {
    Status.OK: "ok",
    Status.ABSTAINED: "abstained",
    Status.FAILED: "failed",
    Status.TIMEOUT: "timeout",
    Status.SKIPPED: "not asked",
}
SMOOTH_FROM = 30
"""Points from which a curve is drawn as a thin raw line under its running mean."""
BAND, BAND_ALPHA = "± 1 std", 0.13
SHOWN_PROMPTS = 4
SHOWN_CHARACTERS = 3000
"""Longer prompts and completions are cut on the page; samples.jsonl has them whole."""

# Told apart with colour vision deficiencies, and legible on white and on black (after Okabe and Ito).
COLOURS = ("#3a86d6", "#e07b28", "#1f9e77", "#c65b9b", "#b08d00", "#2fa9c9", "#d1495b", "#8a79d6")


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

    def step(self, state) -> int:
        """Optimiser steps of the run."""
        return state.global_step

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = None
        for file in (folder / METRICS, folder / SAMPLES):
            if self.step(state) > 0 and file.exists():
                lines, _ = read_lines(file)
                _write_lines(file, [line for line in lines if line["step"] <= self.step(state)])
            else:
                file.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / METRICS, [{"step": self.step(state), **logs}], "a")
        batch = self._trainer.last_batch
        # A log may come before another batch was scored: during an evaluation, or when a batch serves several steps.
        if batch is None or batch is self._kept:
            return
        self._kept = batch
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        lines = sample_lines(batch, self._trainer.last_advantages, self.step(state), mode, self._rows)
        _write_lines(folder / SAMPLES, lines, "a")

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            logger.info("report: %s", write_report(args.output_dir))
        except Exception:  # the run is done and saved; a plot must not make it look failed
            logger.warning("no report was written; `write_report(%r)` tries again", args.output_dir, exc_info=True)


class RoundRecorder(RunRecorder):
    """A recorder of a trainer that trains in rounds: steps go on counting over them.

    The trainer also offers `steps_before` and `measures`.
    """

    _begun = False

    def step(self, state) -> int:
        return self._trainer.steps_before + state.global_step

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
        if not self._trainer.measures:  # else the held-out reward comes next
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
            "status": {name: STATUS[code] for name, code in zip(names, status[row], strict=True)},
            "total": totals[row],
            "advantage": learned[row],
            **({"traces": batch.traces[row]} if batch.traces else {}),
        }
        for row, prompt, completion in zip(spread, chosen.prompt_texts, chosen.texts, strict=True)
    ]


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON Lines file that have a step, and how many lines were not readable (a run was killed)."""
    lines, unreadable = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
            lines.append(line)
        except (ValueError, TypeError, KeyError):
            unreadable += bool(text.strip())
    return lines, unreadable


def _write_lines(file: Path, lines: Iterable[Mapping[str, Any]], mode: str = "w") -> None:
    with file.open(mode, encoding="utf-8") as out:
        out.writelines(json.dumps(_jsonable(line), allow_nan=False) + "\n" for line in lines)


def _jsonable(value: Any) -> Any:
    """What JSON can say: NaN and infinity become None, 0-d tensors and NumPy scalars numbers, other things text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


class Run(NamedTuple):
    """What a run left in its folder."""

    folder: Path
    history: list[dict[str, Any]]
    """One mapping per log, in order, each with its step."""
    samples: list[dict[str, Any]]
    sources: list[str]
    signature: str | None
    recipe: str | None
    notes: list[str]
    """What is absent or could not be read, in words for the page."""


class Curve(NamedTuple):
    """Values of one metric over optimiser steps; steps where it was not logged are left out."""

    steps: list[int]
    values: list[float]


def read_run(folder: Path) -> Run:
    """The run in `folder`. ValueError if it holds no metrics."""
    notes: list[str] = []
    history: list[dict[str, Any]] = []
    metrics = folder / METRICS
    if metrics.exists():
        history, unreadable = read_lines(metrics)
        if unreadable:
            notes.append(f"{unreadable} line(s) of {METRICS} could not be read and were left out.")
    checkpoint = newest_checkpoint(folder)
    if not history and checkpoint:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        notes.append(f"There is no {METRICS}; the metrics are those of {checkpoint.name}/trainer_state.json.")
    if not history:
        raise ValueError(
            f"{folder} has neither {METRICS} nor a checkpoint-*/trainer_state.json with logs; give the output_dir of "
            "a run that logged at least once (add RunRecorder to the trainer, or lower logging_steps)"
        )
    samples: list[dict[str, Any]] = []
    if (folder / SAMPLES).exists():
        samples, unreadable = read_lines(folder / SAMPLES)
        if unreadable:
            notes.append(f"{unreadable} line(s) of {SAMPLES} could not be read and were left out.")
    else:
        notes.append(f"There is no {SAMPLES}, so no completions and no advantages are shown.")
    texts = {}
    for name in ("signature.txt", "recipe.yaml"):
        file = folder / name
        texts[name] = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else None
        if texts[name] is None:
            notes.append(f"There is no {name}.")
    keys = dict.fromkeys(key.removeprefix("eval_") for line in history for key in line)
    return Run(folder, history, samples, source_names(keys), texts["signature.txt"], texts["recipe.yaml"], notes)


def newest_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-<step>` with the highest step that has a trainer_state.json."""
    found = [
        (int(file.parent.name.removeprefix("checkpoint-")), file.parent)
        for file in folder.glob("checkpoint-*/trainer_state.json")
        if file.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return max(found)[1] if found else None


def curve(run: Run, key: str) -> Curve:
    """A metric over the run; null and NaN are left out."""
    points = [(line["step"], number) for line in run.history if (number := _finite(line.get(key))) is not None]
    return Curve([step for step, _ in points], [value for _, value in points])


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


class Line(NamedTuple):
    """A curve in a panel. `std` draws a band around it; `colour` None is the text's colour."""

    label: str
    curve: Curve
    colour: str | None = None
    std: Curve | None = None
    style: str = "-"
    marker: str = ""
    dots: bool = False
    """A point cloud in place of a line."""
    raw: bool = False
    """Never smoothed: a peak is what one looks for."""


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    unit: str
    lines: list[Line]
    share: bool = False
    """Values are shares of 1, shown as per cent."""
    zero: bool = False
    """A faint line at zero."""


class Plot(NamedTuple):
    """A figure of one or more panels; one without any curve is not drawn."""

    name: str
    title: str
    caption: str
    panels: list[Panel]
    wide: bool = False
    """Takes the page's whole width."""


def plots(run: Run) -> list[Plot]:
    """All plots of a run, in the order of the page, those without data left out."""
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(run.sources)}

    def metric(key: str, colour: str | None = COLOURS[0], std: str | None = None, raw: bool = False) -> list[Line]:
        """The metric in training and, as diamonds, in evaluation."""
        lines = [
            Line("train", curve(run, key), colour, curve(run, std) if std else None, raw=raw),
            Line("eval", curve(run, f"eval_{key}"), colour, style="--", marker="D", raw=True),
        ]
        return [line for line in lines if line.curve.steps]

    def per_source(what: Callable[[str], Curve]) -> list[Line]:
        return [Line(name, found, colour[name], raw=True) for name in run.sources if any((found := what(name)).values)]

    advantages = _advantages(run)
    found = [
        Plot(
            "reward",
            "Total reward",
            "Mean over the batch, with a band of one standard deviation. Diamonds are evaluations.",
            [Panel("", "total reward", metric("reward", None, "reward_std"))],
            wide=True,
        ),
        Plot(
            "sources",
            "Reward sources",
            "Raw scores before weights and shaping, each on its own scale; mean over the rows that have a score, with "
            "a band of one standard deviation. Diamonds are evaluations.",
            [
                Panel(name, "score", metric(f"rewards/{name}/mean", colour[name], f"rewards/{name}/std"))
                for name in run.sources
            ],
            wide=True,
        ),
        Plot(
            "holes",
            "Rows without a score",
            "Share of the batch's rows. Abstained: the source had no opinion. Failed: it raised, or ran out of time. "
            "Sources that are never without a score are left out.",
            [
                Panel("abstained", "share of rows", per_source(lambda name: _abstained(run, name)), share=True),
                Panel(
                    "failed or timed out",
                    "share of rows",
                    per_source(lambda name: curve(run, f"rewards/{name}/failed")),
                    share=True,
                ),
                Panel(
                    "no total",
                    "share of rows",
                    [line for line in metric("rewards/total/missing", None, raw=True) if any(line.curve.values)],
                    share=True,
                ),
            ],
            wide=True,
        ),
        Plot(
            "advantages",
            "Advantages",
            "One dot per recorded row, and the standard deviation of the recorded rows of a step. A spread that falls "
            "to zero leaves nothing to learn from.",
            [
                Panel(
                    "",
                    "advantage",
                    [
                        Line("recorded rows", advantages, COLOURS[0], dots=True),
                        Line("standard deviation", _spread(advantages), COLOURS[1]),
                    ],
                    zero=True,
                )
            ],
        ),
        Plot(
            "zero_variance",
            "Groups without variance",
            "Share of groups whose completions all got the same reward: they give no learning signal.",
            [Panel("", "share of groups", metric("frac_reward_zero_std"), share=True)],
        ),
        Plot(
            "length",
            "Completion length",
            "Clipped completions reached the length limit without an end.",
            [
                Panel("mean length", "tokens", metric("completions/mean_length")),
                Panel("clipped", "share of rows", metric("completions/clipped_ratio"), share=True),
            ],
        ),
        Plot(
            "policy",
            "Distance and entropy",
            "Per token, over the policy's own tokens.",
            [
                Panel("KL to the reference", "nats", metric("kl")),
                Panel("entropy", "nats", metric("entropy")),
            ],
        ),
        Plot(
            "critic",
            "Critic",
            "How much of what came the critic had expected: 1 is all, 0 no more than the mean, below 0 it misleads.",
            [
                Panel("explained variance", "share", metric("value/explained_variance")),
                Panel("value loss", "loss", metric("value/loss")),
            ],
        ),
        Plot(
            "preferences",
            "Preferences",
            "Share of pairs in which the chosen answer scores higher, and by how much.",
            [
                Panel("accuracy", "share of pairs", _first(metric, "accuracy", "rewards/accuracies"), share=True),
                Panel("margin", "score", _first(metric, "margin", "rewards/margins")),
                Panel("pairs of a round", "pairs", metric("pairs/count")),
                Panel("margin of their rewards", "total reward", metric("pairs/margin")),
            ],
        ),
        Plot(
            "optimiser",
            "Optimiser",
            "The loss of a policy-gradient method is not a measure of progress; jumps in the gradient norm are worth "
            "a look.",
            [
                Panel("loss", "loss", metric("loss")),
                Panel("gradient norm", "norm", metric("grad_norm", raw=True)),
                Panel("learning rate", "learning rate", metric("learning_rate", raw=True)),
            ],
            wide=True,
        ),
        Plot(
            "time",
            "Time",
            "Of a step, and of each source in it on the slowest process.",
            [
                Panel("step", "seconds", [Line("step", curve(run, "step_time"))]),
                Panel("sources", "seconds", per_source(lambda name: curve(run, f"rewards/{name}/seconds"))),
            ],
        ),
        Plot(
            "weights",
            "Weights of the sources",
            "Shown because a schedule changes them.",
            [Panel("", "weight", per_source(lambda name: curve(run, f"rewards/{name}/weight")))],
        ),
    ]
    if all(len(set(line.curve.values)) == 1 for line in found[-1].panels[0].lines):
        found.pop()
    filled = [
        plot._replace(panels=[panel for panel in plot.panels if any(line.curve.steps for line in panel.lines)])
        for plot in found
    ]
    return [plot for plot in filled if plot.panels]


def _first(metric: Callable[[str], list[Line]], *keys: str) -> list[Line]:
    """The lines of the first of these metrics that was logged: trainers name it differently."""
    return next((lines for key in keys if (lines := metric(key))), [])


def _abstained(run: Run, name: str) -> Curve:
    """Share of rows on which the source had no opinion: holes that are no failures."""
    points = []
    for line in run.history:
        missing = _finite(line.get(f"rewards/{name}/missing"))
        if missing is not None:
            failed = _finite(line.get(f"rewards/{name}/failed")) or 0.0
            share = missing - failed
            points.append((line["step"], share if share > 1e-6 else 0.0))
    return Curve([step for step, _ in points], [share for _, share in points])


def _advantages(run: Run) -> Curve:
    """Advantages of the recorded training rows, several per step."""
    rows = [
        (sample["step"], advantage)
        for sample in run.samples
        if sample.get("mode") != "eval" and (advantage := _finite(sample.get("advantage"))) is not None
    ]
    return Curve([step for step, _ in rows], [advantage for _, advantage in rows])


def _spread(dots: Curve) -> Curve:
    """Standard deviation of the values of each step that has at least two."""
    by_step: dict[int, list[float]] = {}
    for step, value in zip(dots.steps, dots.values, strict=True):
        by_step.setdefault(step, []).append(value)
    stds = {}
    for step, values in by_step.items():
        if len(values) > 1:
            mean = sum(values) / len(values)
            stds[step] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Curve(list(stds), list(stds.values()))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd); at the ends over those that are there."""
    half = window // 2
    means = []
    for index in range(len(values)):
        near = values[max(0, index - half) : index + half + 1]
        means.append(sum(near) / len(near))
    return means


def smoothing_window(points: int) -> int:
    """About a tenth of the points, odd; 1 below `SMOOTH_FROM`."""
    return max(points // 10 // 2 * 2 + 1, 3) if points >= SMOOTH_FROM else 1


def theme(dark: bool = False) -> dict[Any, Any]:
    """Matplotlib's settings, for a light or for a dark page."""
    text, faint, paper = ("#d5d9e0", "#3a404a", "#171a1f") if dark else ("#24292f", "#d8dce2", "#ffffff")
    return {
        "font.size": 9,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.titlesize": 10,
        "axes.edgecolor": faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.facecolor": paper,
        "figure.facecolor": paper,
        "grid.color": faint,
        "grid.linewidth": 0.6,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": text,
        "ytick.labelcolor": text,
        "legend.frameon": False,
    }


def draw(plot: Plot, dark: bool = False) -> bytes:
    """The plot as PNG, for a light or for a dark page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = theme(dark)
    text = settings["text.color"]
    count = len(plot.panels)
    columns = min(count, 3 if plot.wide else 2)
    rows = math.ceil(count / columns)
    size = (11, 3.6 if count == 1 else 2.9 * rows) if plot.wide else (6.4, 3.1)
    with rc_context(settings):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for index, panel in enumerate(plot.panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw_panel(axes, panel, text, last_row=index + columns >= count)
        _draw_legend(figure, plot, text)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw_panel(axes: Any, panel: Panel, text: str, last_row: bool) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_axisbelow(True)
    if panel.title:
        axes.set_title(panel.title, loc="left", fontweight="bold", parse_math=False)
    if panel.zero:
        axes.axhline(0, color=text, linewidth=0.8, alpha=0.5)
    for line in panel.lines:
        if line.curve.steps:
            _draw_line(axes, line, line.colour or text)
    axes.set_ylabel(panel.unit)
    if last_row:
        axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    if panel.share:
        top = max(value for line in panel.lines for value in line.curve.values)
        axes.set_ylim(0, max(top * 1.15, 0.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.unit == "learning rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")


def _draw_line(axes: Any, line: Line, colour: str) -> None:
    steps, values = line.curve
    if line.dots:
        axes.plot(steps, values, ".", color=colour, alpha=0.6, markersize=5, markeredgewidth=0, label=line.label)
        return
    window = 1 if line.raw else smoothing_window(len(values))
    smooth = running_mean(values, window)
    marker = line.marker or ("o" if len(values) <= 12 else "")
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
    axes.plot(steps, smooth, line.style, color=colour, linewidth=1.9, marker=marker, markersize=5, label=line.label)
    if line.std and line.std.steps:
        at = dict(zip(line.std.steps, line.std.values, strict=True))
        band = [(step, mean) for step, mean in zip(steps, smooth, strict=True) if step in at]
        wide = running_mean([at[step] for step, _ in band], window)
        axes.fill_between(
            [step for step, _ in band],
            [mean - std for (_, mean), std in zip(band, wide, strict=True)],
            [mean + std for (_, mean), std in zip(band, wide, strict=True)],
            color=colour,
            alpha=BAND_ALPHA,
            linewidth=0,
            label=BAND,
        )


def _draw_legend(figure: Figure, plot: Plot, text: str) -> None:
    """One legend above all panels, outside the axes, with each label once; none if there is only one curve.

    Where panels differ in colour, a label that they share is shown in the colour of the text.
    """
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if len(entries) < 2:
        return
    where = {"loc": "outside upper right", "ncols": 6, "fontsize": 8, "markerscale": 1.2}
    legend = figure.legend(list(entries.values()), list(entries), **where)
    colours: dict[str, set[str | None]] = {}
    for line in (line for panel in plot.panels for line in panel.lines):
        for label in (line.label, BAND):
            colours.setdefault(label, set()).add(line.colour)
    handles: list[Any] = legend.legend_handles
    for label, handle, words in zip(entries, handles, legend.get_texts(), strict=True):
        words.set_parse_math(False)
        if handle is not None and len(colours[label]) > 1:
            handle.set_color(text)
            handle.set_alpha(BAND_ALPHA if label == BAND else 1)


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `plots/*.png` into the folder of a run, from what the run left there.

    The page needs no other file and no network. ValueError if the run left no metrics.
    """
    run = read_run(Path(run_dir))
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    figures = []
    for plot in _fill_rows(plots(run)):
        light, dark = draw(plot), draw(plot, dark=True)
        (folder / f"{plot.name}.png").write_bytes(light)
        figures.append(_figure(plot, light, dark))
    if kept := used_calibrations(run.recipe):
        light, dark = draw_reliability(kept, theme()), draw_reliability(kept, theme(dark=True))
        (folder / "calibration.png").write_bytes(light)
        figures.append(_figure(Plot("calibration", "Calibration", CAPTION, [], wide=True), light, dark))
    page = run.folder / PAGE
    # Completions may hold lone surrogates, which UTF-8 cannot say.
    page.write_text(_page(run, figures), encoding="utf-8", errors="replace")
    return page


def _fill_rows(found: list[Plot]) -> list[Plot]:
    """Widen the last of an odd number of half-width plots, which would leave a hole on the page."""
    halves = [index for index, plot in enumerate(found) if not plot.wide]
    if len(halves) % 2:
        found[halves[-1]] = found[halves[-1]]._replace(wide=True)
    return found


def _page(run: Run, figures: list[str]) -> str:
    title = run.folder.resolve().name
    last = max(line["step"] for line in run.history)
    parts = [
        f"<header><p class=kind>Training report</p><h1>{_escape(title)}</h1>",
        f"<p class=signature>{_escape(run.signature)}</p>" if run.signature else "",
        f"</header>{_tiles(run, last)}",
        "".join(f"<p class=note>{_escape(note)}</p>" for note in run.notes),
        _alarms(run),
        f"<section><h2>Curves</h2>{_smoothing(run)}<div class=figures>{''.join(figures)}</div></section>",
        f"<section><h2>First and last values</h2>{_table(run)}</section>",
        _completions(run),
        f"<section><h2>Recipe</h2><pre>{_escape(run.recipe)}</pre></section>" if run.recipe else "",
        "<footer>Written by trl-rewards. Data: metrics.jsonl and samples.jsonl beside this page.</footer>",
    ]
    # The page shows text that a model wrote: no script runs and nothing is fetched, whatever it says.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_escape(title)} · training report</title><style>{_STYLE}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )


def _smoothing(run: Run) -> str:
    if max(len(curve(run, key).steps) for key in ("reward", "loss")) < SMOOTH_FROM:
        return ""
    return (
        "<p class=caption>Thin lines are the logged values, thick ones their centred running mean over a tenth of the "
        "logs. Shares of failures, gradient norms and evaluations are not smoothed.</p>"
    )


def _tiles(run: Run, last: int) -> str:
    tiles = [("Steps", f"{last:,}", "")]
    for label, key in (
        ("Total reward", "reward"),
        ("Eval reward", "eval_reward"),
        ("Pair accuracy", "accuracy"),
        ("Mean length", "completions/mean_length"),
        ("Loss", "loss"),
    ):
        values = curve(run, key).values
        if values and (key != "loss" or len(tiles) == 1):
            tiles.append((label, number(values[-1]), f"from {number(values[0])}"))
    if runtime := curve(run, "train_runtime").values:
        minutes, seconds = divmod(round(sum(runtime)), 60)
        hours, minutes = divmod(minutes, 60)
        tiles.append(("Training time", f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s", ""))
    cells = "".join(
        f"<div class=tile><span>{label}</span><strong>{value}</strong><span>{below}</span></div>"
        for label, value, below in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _alarms(run: Run) -> str:
    """What went wrong, in words, over the whole run; a line of relief if every source scored every row."""
    lines, known = [], False
    for name in run.sources:
        failed = curve(run, f"rewards/{name}/failed")
        known = known or bool(failed.steps)
        if any(failed.values):
            worst = max(failed.values)
            step = failed.steps[failed.values.index(worst)]
            mean = sum(failed.values) / len(failed.values)
            lines.append(
                f"<p class=alarm><b>{_escape(name)}</b> failed on {mean:.1%} of the rows over the run, "
                f"and on {worst:.1%} at step {step}.</p>"
            )
    if not lines and known:
        return "<p class=calm>No source failed on any row.</p>"
    return "".join(lines)


def _table(run: Run) -> str:
    rows = [("total reward", "reward")]
    rows += [(name, f"rewards/{name}/mean") for name in run.sources]
    rows += [("eval total reward", "eval_reward")]
    rows += [(f"eval {name}", f"eval_rewards/{name}/mean") for name in run.sources]
    rows += [
        ("pair accuracy", "accuracy"),
        ("pair accuracy", "rewards/accuracies"),
        ("mean length, tokens", "completions/mean_length"),
        ("clipped completions", "completions/clipped_ratio"),
        ("groups without variance", "frac_reward_zero_std"),
        ("KL, nats", "kl"),
        ("KL coefficient", "kl/coefficient"),
        ("critic's explained variance", "value/explained_variance"),
        ("value loss", "value/loss"),
        ("entropy, nats", "entropy"),
        ("loss", "loss"),
        ("eval loss", "eval_loss"),
        ("gradient norm", "grad_norm"),
    ]
    body = ""
    for label, key in rows:
        values = curve(run, key).values
        if not values:
            continue
        tenth = max(1, len(values) // 10)
        early, late = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        cells = [number(value) for value in (values[0], values[-1], early, late)]
        cells.append(("+" if late > early else "") + number(late - early))
        body += f"<tr><th>{_escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return (
        "<p class=caption>Single logged values are noisy; the last columns compare the means of the first and of the "
        "last tenth of the logs.</p><div class=scroll><table><thead><tr><th>metric</th><th>first</th><th>last</th>"
        f"<th>first tenth</th><th>last tenth</th><th>change</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def sample_pairs(samples: Sequence[dict[str, Any]]) -> tuple[list[tuple[dict, dict]], bool]:
    """(early, late) rows to show beside each other, and whether the two of a pair answer the same prompt.

    Same prompts are taken if some were seen at steps at least half the run apart, evaluation rows first; otherwise
    rows of the first and of the last step. Of several rows of a step the first is taken: scores choose nothing.
    """
    if not samples:
        return [], False
    steps = [sample["step"] for sample in samples]
    far = max((max(steps) - min(steps)) / 2, 1)
    seen: dict[tuple[str, str], list[dict]] = {}
    for sample in samples:
        seen.setdefault((sample.get("mode", "train"), sample["prompt"]), []).append(sample)
    pairs = []
    for key in sorted(seen, key=lambda key: key[0] != "eval"):
        rows = seen[key]
        early = min(rows, key=lambda row: row["step"])
        late = next(row for row in rows if row["step"] == max(row["step"] for row in rows))
        if late["step"] - early["step"] >= far:
            pairs.append((early, late))
    if pairs:
        pairs.sort(key=lambda pair: pair[0]["step"] - pair[1]["step"])
        pairs.sort(key=lambda pair: pair[0].get("mode") != "eval")
        return pairs[:SHOWN_PROMPTS], True
    train = [sample for sample in samples if sample.get("mode") != "eval"] or list(samples)
    first, last = min(row["step"] for row in train), max(row["step"] for row in train)
    early, late = [row for row in train if row["step"] == first], [row for row in train if row["step"] == last]
    return list(zip(early, late, strict=False))[:SHOWN_PROMPTS], False


def _completions(run: Run) -> str:
    pairs, same = sample_pairs(run.samples)
    if not pairs:
        return ""
    how = (
        "The same prompts early and late in the run"
        if same
        else "No prompt was recorded both early and late, so these are rows of the first and of the last recorded step"
    )
    cards = ""
    for early, late in pairs:
        if same:
            inner = (
                f"<div class=prompt>{_text(early['prompt'])}</div><div class=pair>{_card(early)}{_card(late)}</div>"
            )
        else:
            both = "".join(f"<div>{_prompt(row)}{_card(row)}</div>" for row in (early, late))
            inner = f"<div class=pair>{both}</div>"
        cards += f"<article>{inner}</article>"
    return (
        "<section><h2>Completions</h2>"
        f"<p class=caption>{how}; the first recorded row each, not chosen by score.</p>{cards}</section>"
    )


def _prompt(sample: Mapping[str, Any]) -> str:
    return f"<div class=prompt>{_text(sample['prompt'])}</div>"


def _card(sample: Mapping[str, Any]) -> str:
    """A completion with its scores."""
    status = sample.get("status") or {}
    rows = ""
    for name, score in (sample.get("scores") or {}).items():
        why = status.get(name, "no score")
        shown = number(score) if _finite(score) is not None else why
        style = " class=hole" if why in ("failed", "timeout") else " class=none" if _finite(score) is None else ""
        rows += f"<tr><th>{_escape(name)}</th><td{style}>{_escape(shown)}</td></tr>"
    for name in ("total", "advantage"):
        shown = number(sample.get(name)) if _finite(sample.get(name)) is not None else "none"
        rows += f"<tr class={name}><th>{name}</th><td>{shown}</td></tr>"
    mode = "eval, " if sample.get("mode") == "eval" else ""
    traces = "".join(
        f"<details><summary>how {_escape(name)} came to its score</summary>"
        f"<pre>{_text(yaml.safe_dump(trace, sort_keys=False, allow_unicode=True, width=100))}</pre></details>"
        for name, trace in (sample.get("traces") or {}).items()
    )
    return (
        f"<div class=card><p class=when>{mode}step {sample['step']}</p>"
        f"<div class=completion>{_text(sample['completion'])}</div><table><tbody>{rows}</tbody></table>{traces}</div>"
    )


def _text(text: str) -> str:
    if not text.strip():
        return "<i>empty</i>"
    more = len(text) - SHOWN_CHARACTERS
    return _escape(text[:SHOWN_CHARACTERS]) + (f"<i> … {more:,} more characters</i>" if more > 0 else "")


def _figure(plot: Plot, light: bytes, dark: bytes) -> str:
    source, image = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (dark, light))
    return (
        f"<figure{' class=wide' if plot.wide else ''}><h3>{_escape(plot.title)}</h3><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{source}">'
        f'<img alt="{_escape(plot.title)} over optimiser steps" src="{image}"></picture>'
        f"<figcaption>{_escape(plot.caption)}</figcaption></figure>"
    )


def number(value: Any) -> str:
    """A number for people: three or four digits that count; an en dash for none."""
    found = _finite(value)
    if found is None:
        return "–"
    size = abs(found)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{found:.2e}"
    return f"{found:,.{4 if size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1 if size < 10000 else 0}f}"


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f4f5f7; --text: #24292f; --soft: #5d6672; --line: #dfe3e8;
  --accent: #2468b2; --bad: #b42318; --bad-paper: #fdecea; --good: #1a7f5a; }
@media (prefers-color-scheme: dark) { :root { --paper: #171a1f; --page: #0e1013; --text: #d5d9e0; --soft: #98a1ad;
  --line: #2c323a; --accent: #6cb0f5; --bad: #ff9389; --bad-paper: #35191a; --good: #5fcf9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 10px; }
h3 { font-size: 15px; margin: 0 0 8px; }
.kind { margin: 0 0 4px; color: var(--accent); font-weight: 600; font-size: 13px; }
.signature, pre, .completion, .prompt { font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.signature { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 16px; }
.tile, figure, article, pre, .scroll { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; display: flex; flex-direction: column; }
.tile span { color: var(--soft); font-size: 13px; }
.tile strong { font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.note, .caption, figcaption { color: var(--soft); font-size: 13px; margin: 6px 0; }
.alarm, .calm { margin: 8px 0; padding: 8px 14px; border-radius: 8px; }
.alarm { background: var(--bad-paper); color: var(--bad); }
.calm { padding-left: 0; color: var(--good); }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; align-items: stretch;
  grid-auto-flow: dense; }
figure { margin: 0; padding: 14px 16px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin: 8px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 6px 14px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
article { padding: 14px 16px; margin: 0 0 14px; }
.prompt, .completion { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; }
.prompt { max-height: 180px; border-left: 3px solid var(--accent); padding: 2px 0 2px 12px; margin-bottom: 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.pair > * { min-width: 0; }
.card { display: flex; flex-direction: column; height: 100%; }
.when { margin: 0 0 6px; color: var(--soft); font-size: 13px; font-weight: 600; }
.completion { background: var(--page); border-radius: 8px; padding: 10px 12px; max-height: 320px; flex: 1;
  margin-bottom: 8px; }
.card table { font-size: 13px; }
.card th, .card td { padding: 3px 4px; }
.total { font-weight: 700; }
.total th { font-weight: 700; }
.none { color: var(--soft); font-style: italic; }
.hole { color: var(--bad); font-weight: 600; }
pre { padding: 14px 16px; overflow-x: auto; margin: 0; }
details pre { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; margin: 6px 0; }
footer { margin-top: 44px; color: var(--soft); font-size: 13px; }
@media (max-width: 760px) { .figures, .pair { grid-template-columns: 1fr; } h1 { font-size: 24px; } }
@media print { body { background: none; } figure, article { break-inside: avoid; } }
"""
