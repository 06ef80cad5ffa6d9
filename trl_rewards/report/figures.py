"""Which curves of a run are shown, in which panels and plots; drawing.py makes pictures of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from trl_rewards.report.run import Curve, Run, curve, finite

# Told apart with colour vision deficiencies, and legible on white and on black (after Okabe and Ito).
COLOURS = ("#3a86d6", "#e07b28", "#1f9e77", "#c65b9b", "#b08d00", "#2fa9c9", "#d1495b", "#8a79d6")


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
        missing = finite(line.get(f"rewards/{name}/missing"))
        if missing is not None:
            failed = finite(line.get(f"rewards/{name}/failed")) or 0.0
            share = missing - failed
            points.append((line["step"], share if share > 1e-6 else 0.0))
    return Curve([step for step, _ in points], [share for _, share in points])


def _advantages(run: Run) -> Curve:
    """Advantages of the recorded training rows, several per step."""
    rows = [
        (sample["step"], advantage)
        for sample in run.samples
        if sample.get("mode") != "eval" and (advantage := finite(sample.get("advantage"))) is not None
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
