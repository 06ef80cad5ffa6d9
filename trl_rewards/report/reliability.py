"""Reliability diagrams: how often answers of a confidence are right, before and after calibration."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trl_rewards.calibration import Calibration, read_calibrations
from trl_rewards.components import resolve_path
from trl_rewards.recipe_files import source_name

BEFORE, AFTER = "#e07b28", "#3a86d6"
CAPTION = (
    "How often labelled answers are right, by the probability that their score stands for, before and after "
    "calibration; on the diagonal they agree. Larger dots have more answers. After: by curves fitted without "
    "these answers."
)


def draw_reliability(found: Mapping[str, Calibration], settings: dict[Any, Any]) -> bytes:
    """A panel per source as PNG, with matplotlib's settings."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    with rc_context(settings):
        figure = Figure(figsize=(3.6 * columns, 3.7 * rows), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for place, (name, kept) in enumerate(found.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            axes.set_title(name, loc="left", fontweight="bold", parse_math=False)
            axes.plot([0, 1], [0, 1], color=settings["text.color"], linewidth=0.8, alpha=0.5)
            for label, bins, colour, error in (
                ("before", kept.bins_before, BEFORE, kept.before["ece"]),
                ("after", kept.bins_after, AFTER, kept.after["ece"]),
            ):
                x, y = [each.confidence for each in bins], [each.right for each in bins]
                axes.plot(x, y, color=colour, linewidth=1.2, label=f"{label}, ECE {error:.3f}")
                axes.scatter(x, y, s=[10 + 120 * each.count / kept.n for each in bins], color=colour, linewidths=0)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="probability", ylabel="share of right answers")
            axes.set_aspect("equal")
            axes.legend(loc="upper left", fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def used_calibrations(recipe: str | None) -> dict[str, Calibration]:
    """{source: calibration} of what the YAML of a run's recipe names; files that are gone are left out."""
    raw = yaml.safe_load(recipe) if recipe else None
    if not isinstance(raw, dict):
        return {}
    found: dict[str, Calibration] = {}
    for entry in raw.get("rewards") or []:
        shapers = entry.get("shape") or [] if isinstance(entry, dict) else []
        for shaper in shapers if isinstance(shapers, list) else [shapers]:
            if not isinstance(shaper, dict) or str(shaper.get("use")).rpartition("/")[2] != "calibrated":
                continue
            options = shaper.get("with") or {}
            name = options.get("source") or source_name(entry)
            try:
                kept = read_calibrations(Path(resolve_path(str(options.get("path")), raw.get("base_dir", "."))))
            except ValueError:
                continue
            if name in kept:
                found[name] = kept[name]
    return found
