"""Plots as pictures, for a light and for a dark page."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from trl_rewards.report.figures import COLOURS, STEPS, Line, Panel, Plot
from trl_rewards.report.run import running_mean, tenth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTH_FROM = 30
"""Points from which a curve is drawn as a thin raw line under its running mean."""
ALARM_COLOUR = COLOURS[6]
BAND, BAND_ALPHA = "± 1 std", 0.13


def smoothing_window(points: int) -> int:
    """About a tenth of the points, odd; 1 below `SMOOTH_FROM`."""
    return tenth(points) if points >= SMOOTH_FROM else 1


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
    for mark in panel.marks:
        axes.axvline(mark, color=ALARM_COLOUR, linewidth=1.2, linestyle=":", label="alarm")
    axes.set_ylabel(panel.unit)
    if last_row or panel.over != STEPS:
        axes.set_xlabel(panel.over)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=panel.over == STEPS, steps=[1, 2, 5, 10]))
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
        if handle is not None and len(colours.get(label, ())) > 1:
            handle.set_color(text)
            handle.set_alpha(BAND_ALPHA if label == BAND else 1)
