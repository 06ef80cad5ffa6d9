"""Which curves of a run are shown, in which panels and plots; drawing.py makes pictures of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from trl_rewards.report.run import Curve, Run, alarms, curve, finite, running_mean, tenth, trainer_of, watched

# Told apart with colour vision deficiencies, and legible on white and on black (after Okabe and Ito).
COLOURS = ("#3a86d6", "#e07b28", "#1f9e77", "#c65b9b", "#b08d00", "#2fa9c9", "#d1495b", "#8a79d6")


STEPS = "optimiser step"


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
    over: str = STEPS
    """What runs along."""
    marks: tuple[int, ...] = ()
    """Steps at which alarms marked the run."""


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
        _proxy_and_gold(run, colour),
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
            "form",
            "Form in the reward",
            "The share of a completion's 4-grams of tokens that were there before, and the share of the reward's "
            "variance among answers to one prompt that length explains, less chance.",
            [
                Panel("repetition", "share of 4-grams", metric("completions/repetition"), share=True),
                Panel("explained by length", "share of variance", metric("rewards/total/length_explained"), zero=True),
            ],
        ),
        Plot(
            "disagreement",
            "Disagreement",
            "How far the members of an ensemble are apart on a completion, mean over the batch. Where it rises the "
            "policy writes what they know less well.",
            [Panel(name, "score", metric(key)) for key, name in disagreements(run).items()],
        ),
        Plot(
            "policy",
            "Distance and entropy",
            "Per token, over the policy's own tokens."
            if trainer_of(run) != "kto"
            else "KTO's own estimate, of whole answers that belong to other prompts.",
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
    marks = tuple(dict.fromkeys(step for step, _ in alarms(run)))
    filled = [
        plot._replace(
            panels=[
                panel._replace(marks=marks if panel.over == STEPS else ())
                for panel in plot.panels
                if any(line.curve.steps for line in panel.lines)
            ]
        )
        for plot in found
    ]
    return [plot for plot in filled if plot.panels]


def _proxy_and_gold(run: Run, colour: dict[str, str]) -> Plot:
    """The reward that is trained on against sources that are only watched, over steps and over KL."""
    held_out = watched(run)
    pairs = [("total reward", "reward", "reward_std", None)]
    pairs += [(f"{name} (held out)", f"rewards/{name}/mean", f"rewards/{name}/std", colour[name]) for name in held_out]
    over_steps, over_kl = [], []
    for label, key, std, own in pairs if held_out else ():
        change = _change(curve(run, key), curve(run, std).values)
        over_steps.append(Line(label, change, own, raw=True))
        kl = curve(run, "kl")
        distance = dict(zip(kl.steps, running_mean(kl.values, tenth(len(kl.values))), strict=True))
        both = [(distance[step], value) for step, value in zip(*change, strict=True) if step in distance]
        over_kl.append(Line(label, Curve([x for x, _ in both], [y for _, y in both]), own, raw=True))
    return Plot(
        "proxy_gold",
        "Reward and held-out sources",
        "Change since the first tenth of the logs, in standard deviations of a batch's rows; running means over a "
        "tenth of the logs. A held-out source has weight 0: the policy is not trained on it. Where it falls while the "
        "reward rises, the reward is no longer a measure of it.",
        [
            Panel("over steps", "change, std", over_steps, zero=True),
            Panel("over the KL to the reference", "change, std", over_kl, zero=True, over="KL, nats per token"),
        ],
        wide=True,
    )


def _change(values: Curve, stds: list[float]) -> Curve:
    """Running means less the first, in standard deviations; empty where rows do not differ."""
    scale = sum(stds) / len(stds) if stds else 0.0
    if not scale or not values.values:
        return Curve([], [])
    window = tenth(len(values.values))
    start = sum(values.values[:window]) / len(values.values[:window])
    return Curve(values.steps, [(value - start) / scale for value in running_mean(values.values, window)])


def disagreements(run: Run) -> dict[str, str]:
    """{metric: what it is of} for every metric that says how far members of an ensemble are apart."""
    keys = dict.fromkeys(key for line in run.history for key in line if key.endswith("/disagreement"))
    names = {key: key.removeprefix("rewards/").removesuffix("/disagreement") for key in keys}
    return {k: "the sources" if name == "combine" else name for k, name in names.items() if not k.startswith("eval_")}


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
    by_step: dict[float, list[float]] = {}
    for step, value in zip(dots.steps, dots.values, strict=True):
        by_step.setdefault(step, []).append(value)
    stds = {}
    for step, values in by_step.items():
        if len(values) > 1:
            mean = sum(values) / len(values)
            stds[step] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Curve(list(stds), list(stds.values()))
