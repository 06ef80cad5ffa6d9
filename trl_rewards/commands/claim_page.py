"""What came out of a claim, as a picture and as a page."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rewards.commands.outcome import effects, interval, parts_reproduced, seeds_of, table
from trl_rewards.report.drawing import theme
from trl_rewards.report.page import PAGE, document, escape, number, picture
from trl_rewards.report.run import METRICS, Curve, finite, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trl_rewards.commands.claims import Claim, Expectation, Measure
    from trl_rewards.commands.reproduce import Job

PLOT = "plot.png"


def write_claim(claim: Claim, result: Mapping[str, Any], jobs: Iterable[Job], out: Path) -> Path:
    """Write `plot.png` and `report.html` into `out`, from a summary and the folders of the runs."""
    arms = [job for job in jobs if job.name in result["values"]]
    curves = {
        name: _curves(measure, [job for job in arms if name in result["values"][job.name]])
        for name, measure in claim.measures.items()
    }
    light = _draw(claim, result, curves, dark=False)
    (out / PLOT).write_bytes(light)
    page = out / PAGE
    page.write_text(_page(claim, result, arms, light, _draw(claim, result, curves, dark=True)), encoding="utf-8")
    return page


def _curves(measure: Measure, arms: Sequence[Job]) -> dict[str, list[Curve]]:
    """{arm: a measure's key over steps, of each seed}; empty where runs log it no more than twice."""
    found: dict[str, list[Curve]] = {}
    for job in arms if measure.file == METRICS else ():
        lines, _ = read_lines(job.folder / METRICS)
        points = [(line["step"], value) for line in lines if (value := finite(line.get(measure.key))) is not None]
        if len(points) > 2:
            found.setdefault(job.name, []).append(Curve(*map(list, zip(*points, strict=True))))
    return found


def _draw(claim: Claim, result: Mapping[str, Any], curves: Mapping[str, Mapping[str, list]], dark: bool) -> bytes:
    """A column per measure: each arm's seeds with their mean and its interval, expected differences, and curves."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 3 if any(curves.values()) else 2
    with rc_context(theme(dark)):
        figure = Figure(figsize=(1.2 + 2.8 * len(claim.measures), 2.8 * rows), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, len(claim.measures), squeeze=False)
        arms = list(result["values"])
        for column, (name, measure) in enumerate(claim.measures.items()):
            having = {arm: found[name] for arm, found in result["values"].items() if name in found}
            _draw_dots(panels[0][column], having, arms)
            panels[0][column].set_title(name, parse_math=False)
            panels[0][column].set_ylabel(measure.unit)
            expected = [pair for pair in zip(claim.expect, result["expected"], strict=True) if pair[0].measure == name]
            _draw_differences(panels[1][column], expected)
            if rows > 2:
                _draw_curves(panels[2][column], curves[name], arms)
        figure.suptitle(f"{claim.name}: {result['verdict']}", fontsize=10, parse_math=False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw_dots(axes: Axes, values: Mapping[str, Sequence[float | None]], arms: Sequence[str]) -> None:
    for place, (arm, found) in enumerate(values.items()):
        there = [value for value in found if value is not None]
        if there:
            mean, colour = interval(there), f"C{arms.index(arm)}"
            axes.plot([place] * len(there), there, "o", alpha=0.4, color=colour)
            if len(there) > 1:
                reach = mean.high - mean.mean
                axes.errorbar(place, mean.mean, yerr=reach, fmt="_", color=colour, capsize=5, markersize=16)
    axes.set_xticks(range(len(values)), list(values), rotation=20, parse_math=False)
    axes.margins(x=0.3)


def _draw_differences(axes: Axes, expected: Sequence[tuple[Expectation, Mapping[str, Any]]]) -> None:
    """Each expected difference with its interval, and the side of the line that it is expected on, shaded."""
    shown = [(each, found["difference"]) for each, found in expected if found["difference"] is not None]
    if not shown:
        axes.set_axis_off()
        return
    for place, (each, difference) in enumerate(shown):
        mean, *bounds = difference
        reach = [[mean - bounds[0]], [bounds[1] - mean]] if bounds else None
        axes.errorbar(mean, place, xerr=reach, fmt="o", color="C0", capsize=4)
        axes.plot([each.line] * 2, [place - 0.4, place + 0.4], color="0.5", linewidth=1)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=4)
    low, high = axes.get_xlim()
    for place, (each, _) in enumerate(shown):
        wanted = (max(each.line, low), high) if each.sign > 0 else (low, min(each.line, high))
        axes.fill_betweenx([place - 0.4, place + 0.4], *wanted, color="C2", alpha=0.15, linewidth=0)
    axes.set_xlim(low, high)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    labels = [f"{each.arm} - {each.than}" if each.than else each.arm for each, _ in shown]
    axes.set_yticks(range(len(shown)), labels, parse_math=False)


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Curve]], arms: Sequence[str]) -> None:
    """Seeds as thin lines, their mean over the steps that all have as a thick one."""
    if not curves:
        axes.set_axis_off()
        return
    for arm, found in curves.items():
        colour = f"C{arms.index(arm)}"
        at = [dict(zip(*curve, strict=True)) for curve in found]
        steps = sorted(set.intersection(*(set(each) for each in at)))
        for curve in found:
            axes.plot(*curve, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(steps, [math.fsum(each[step] for each in at) / len(at) for step in steps], color=colour, linewidth=2)
    axes.set_xlabel("step")


def _page(claim: Claim, result: Mapping[str, Any], arms: Sequence[Job], light: bytes, dark: bytes) -> str:
    titles, rows = table(claim, result)
    alone = "" if len(result["seeds"]) > 1 else ", by one seed, which decides nothing"
    verdict = f"{result['verdict']}{parts_reproduced(result)}{alone}"
    differences = "".join(f"<li>{escape(line)}</li>" for line in effects(result))
    parts = [
        f"<header><p class=kind>Claim in miniature</p><h1>{escape(claim.name)}: {escape(verdict)}</h1>"
        f'<p><a href="{escape(claim.paper)}">{escape(claim.paper)}</a></p></header>',
        f"<p>{escape(claim.claim)}</p><p>{escape(claim.miniature)} {escape(claim.caveat)}</p>",
        f"<section><h2>Differences</h2><ul class=evidence>{differences}</ul><p class=caption>Means over "
        f"{seeds_of(result)}, taken seed by seed, with 95 % intervals (Student's t).</p></section>",
        f"<section><h2>Arms</h2><figure class=wide>{picture(light, dark, 'Measures of each arm')}"
        "<figcaption>Dots are seeds, bars their mean and its 95 % interval. Below, the differences that the claim "
        "speaks of, with their intervals: shaded is the side where it expects them. Last, where runs logged "
        "it often, measures over steps: seeds as thin lines and their mean as a thick one.</figcaption></figure>",
        f"{_table(titles, rows)}</section>",
        f"<section><h2>Runs</h2>{_runs(claim, result, arms)}</section>",
        f"<section><h2>The claim's file</h2><pre>{escape(claim.file.read_text(encoding='utf-8'))}</pre></section>",
        f"<footer>Written by trl-rewards {escape(result['version'])}; {result['cpu_minutes']:.0f} CPU minutes."
        "</footer>",
    ]
    return document(f"{claim.name} · claim", parts)


def _runs(claim: Claim, result: Mapping[str, Any], arms: Sequence[Job]) -> str:
    """Each run's measures, with a link to its own report."""
    rows = []
    for job in arms:
        file = job.folder / PAGE
        where = os.path.relpath(file, job.folder.parent)
        name = f'<a href="{escape(where)}">{escape(job)}</a>' if file.is_file() else escape(job)
        found = result["values"][job.name]
        at = result["seeds"].index(job.seed)
        rows.append((name, *(number(found[each][at]) if each in found else "" for each in claim.measures)))
    return _table(("run", *claim.measures), rows, escaped=True)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = False) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if escaped else escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
