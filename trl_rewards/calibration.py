"""Scores as probabilities of being right: the curves, how they are fitted, and the file that keeps them.

Platt's sigmoid, isotonic regression, and temperature scaling: https://huggingface.co/papers/1706.04599, section 4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards.components import Reward
from trl_rewards.maths import Bin, brier, ece, log_loss, reliability

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["platt", "isotonic", "temperature"]
FEWEST = 10
"""Rows below which no curve is fitted."""
FOLDS = 5
EDGE = 1e-6
"""Probabilities are held to [EDGE, 1 - EDGE] where their logit is taken."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A map from scores to probabilities that never falls."""

    method: Method
    slope: float = 1.0
    """σ(slope · x + offset) of `platt` and `temperature`, which is 1 / slope."""
    offset: float = 0.0
    of_logits: bool = False
    """x is the score's logit, since scores are probabilities; else it is the score."""
    scores: list[float] = field(default_factory=list)
    """Of `isotonic`: corners, rising. Straight lines between them, level before the first and after the last."""
    probabilities: list[float] = field(default_factory=list)

    def __call__(self, scores: Tensor) -> Tensor:
        """Probabilities in [0, 1] of scores, float64 of the same shape; holes stay NaN."""
        import torch

        x = scores.double()
        if self.method != "isotonic":
            x = x.clamp(EDGE, 1 - EDGE).logit() if self.of_logits else x
            return (self.slope * x + self.offset).sigmoid()
        corners, heights = x.new_tensor(self.scores), x.new_tensor(self.probabilities)
        x = x.clamp(corners[0], corners[-1])
        right = torch.searchsorted(corners, x).clamp(1, len(corners) - 1)
        part = (x - corners[right - 1]) / (corners[right] - corners[right - 1])
        return heights[right - 1] + part * (heights[right] - heights[right - 1])


def rising_means(scores: Sequence[float], labels: Sequence[float]) -> tuple[list[float], list[float]]:
    """Isotonic regression of labels on scores, by pooling neighbours that fall: corners and their heights.

    Least squares among all maps that never fall. A pool has a corner at its lowest and at its highest score.
    """
    by_score: dict[float, list[float]] = {}
    for score, label in zip(scores, labels, strict=True):
        by_score.setdefault(score, []).append(label)
    pools: list[tuple[float, int, float, float]] = []  # sum of labels, their number, lowest and highest score
    for score in sorted(by_score):
        total, count, low = sum(by_score[score]), len(by_score[score]), score
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            more, others, low, _ = pools.pop()
            total, count = total + more, count + others
        pools.append((total, count, low, score))
    corners = [(edge, total / count) for total, count, *edges in pools for edge in sorted(set(edges))]
    return [edge for edge, _ in corners], [height for _, height in corners]


def logistic(scores: Sequence[float], labels: Sequence[float], platt: bool = True) -> tuple[float, float]:
    """Slope and offset of σ(slope · s + offset) with the least cross-entropy.

    With `platt` labels are drawn in as he has it, to (P + 1) / (P + 2) and 1 / (N + 2) of P right and N wrong ones, so
    that scores which part them perfectly have a finite slope too. Without it the offset is 0, and labels stay.
    """
    import torch

    x, y = torch.tensor(scores, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
    right, wrong = y.sum(), (1 - y).sum()
    wanted = y * (right + 1) / (right + 2) + (1 - y) / (wrong + 2) if platt else y
    middle = x.mean() if platt else x.new_zeros(())
    width = (x - middle).square().mean().sqrt().clamp(min=1e-12)
    # Of scores of mean 0 and deviation 1, so that neither weight is much larger than the other.
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = weights[0] * (x - middle) / width + (weights[1] if platt else 0.0)
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        value.backward()
        return value

    optimiser.step(loss)
    slope = weights[0].item() / width.item()
    return slope, (weights[1].item() - slope * middle.item() if platt else 0.0)


def as_probabilities(scores: Sequence[float]) -> tuple[list[float], bool]:
    """What scores say without calibration, and whether they are probabilities: themselves if all are in [0, 1], else
    their sigmoid, as Bradley-Terry has it."""
    if all(0 <= score <= 1 for score in scores):
        return list(scores), True
    return [1 / (1 + math.exp(-min(max(score, -500.0), 500.0))) for score in scores], False


def fit(method: Method, scores: Sequence[float], labels: Sequence[float]) -> Curve:
    """The curve of a method. Labels are in [0, 1]."""
    if method == "isotonic":
        corners, heights = rising_means(scores, labels)
        edge = 1 / (len(labels) + 2)  # so many labels cannot show more, and a log loss stays finite
        heights = [min(max(height, edge), 1 - edge) for height in heights]
        if len(corners) == 1:
            corners, heights = [corners[0], corners[0] + 1.0], heights * 2
        return Curve(method=method, scores=corners, probabilities=heights)
    if method == "platt":
        slope, offset = logistic(scores, labels)
        return Curve(method=method, slope=slope, offset=offset)
    logits, of_logits = _logits(scores)
    slope, _ = logistic(logits, labels, platt=False)
    return Curve(method=method, slope=slope, of_logits=of_logits)


def _logits(scores: Sequence[float]) -> tuple[list[float], bool]:
    """What a temperature divides, and whether scores are probabilities, whose logits these are."""
    confidences, of_logits = as_probabilities(scores)
    held = [min(max(q, EDGE), 1 - EDGE) for q in confidences]
    return [math.log(q / (1 - q)) for q in held] if of_logits else list(scores), of_logits


def refusal(scores: Sequence[float], labels: Sequence[float]) -> str | None:
    """Why no curve can be fitted to these rows, and what to do; None if one can."""
    wrong, right = sum(label == 0 for label in labels), sum(label == 1 for label in labels)
    if len(labels) < FEWEST:
        return f"{len(labels)} rows with a score and a label, and at least {FEWEST} are needed: label more answers"
    if len(set(labels)) == 1:
        return f"every label is {labels[0]:g}: add answers that are {'wrong' if labels[0] > 0.5 else 'right'}"
    if wrong + right == len(labels) and min(wrong, right) < 2:
        return f"{right} right and {wrong} wrong answers: at least 2 of each are needed, better 20"
    if len(set(scores)) == 1:
        return f"every score is {scores[0]:g}, which says nothing of right and wrong: is the reward the right one?"
    return None


def falls(curve: Curve) -> bool:
    """Whether higher scores do not mean more right answers: the fitted curve is level, or falls."""
    return curve.slope <= 0 if curve.method != "isotonic" else curve.probabilities[0] == curve.probabilities[-1]


def held_out(method: Method, scores: Sequence[float], labels: Sequence[float], seed: int = 0) -> list[float]:
    """Each row's probability by a curve that was fitted without it: cross-validation in five parts."""
    import torch

    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: labels[row])  # dealt out in turn, so that every part has right and wrong ones
    found = [0.0] * len(labels)
    for part in range(FOLDS):
        out = order[part::FOLDS]
        kept = [row for row in range(len(labels)) if row not in set(out)]
        curve = fit(method, [scores[row] for row in kept], [labels[row] for row in kept])
        for row, value in zip(out, curve(torch.tensor([scores[row] for row in out])).tolist(), strict=True):
            found[row] = value
    return found


MEASURES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "ece": ece,
    "brier": brier,
    "log_loss": log_loss,
}


@dataclass(frozen=True)
class Calibration:
    """A source's curve, how it was found, and what it is worth."""

    component: str
    """Class of the source's reward."""
    options: dict[str, Any]
    """Those that are not the defaults."""
    hash: str
    """Of the class and all its options, to know the source again."""
    n: int
    curve: Curve
    before: dict[str, float]
    """`ece`, `brier` and `log_loss` of the scores as they are (`as_probabilities`)."""
    after: dict[str, float]
    """The same of the calibrated ones, each by a curve that was fitted without it."""
    bins_before: list[Bin]
    bins_after: list[Bin]


def calibration(reward: Reward, method: Method, scores: Sequence[float], labels: Sequence[float]) -> Calibration:
    """Fit and measure. ValueError says why that cannot be, and what to do."""
    if why := refusal(scores, labels):
        raise ValueError(why)
    if method == "temperature" and all(
        logit * (label - 0.5) > 0 and label in (0, 1) for logit, label in zip(_logits(scores)[0], labels, strict=True)
    ):
        raise ValueError("scores part right answers from wrong ones at 0, which every low temperature fits: use platt")
    curve = fit(method, scores, labels)
    if falls(curve):
        raise ValueError(
            "answers with higher scores are not right more often, so no rising curve fits: check that label 1 means "
            "right, and that the reward says what you want"
        )
    raw, _ = as_probabilities(scores)
    told = held_out(method, scores, labels)
    return Calibration(
        **source_config(reward),
        n=len(labels),
        curve=curve,
        before={name: measure(raw, labels) for name, measure in MEASURES.items()},
        after={name: measure(told, labels) for name, measure in MEASURES.items()},
        bins_before=reliability(raw, labels),
        bins_after=reliability(told, labels),
    )


def source_config(reward: Reward) -> dict[str, Any]:
    """What a calibration keeps of its source: `component`, `options` and `hash`."""
    every = {option.name: getattr(reward, option.name) for option in dataclasses.fields(reward) if option.init}
    defaults = {
        option.name: option.default_factory() if callable(option.default_factory) else option.default
        for option in dataclasses.fields(reward)
    }
    name = type(reward).__qualname__
    said = json.dumps([name, every], sort_keys=True, default=str)
    options = {key: value for key, value in every.items() if value != defaults[key]}
    digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return {"component": name, "options": json.loads(json.dumps(options, default=str)), "hash": digest}


def changes(kept: Calibration, reward: Reward) -> str | None:
    """How a source differs from the one that was calibrated, in words; None if it does not."""
    config = source_config(reward)
    if config["hash"] == kept.hash:
        return None
    if config["component"] != kept.component:
        return f"it was fitted to a {kept.component}, and this is a {config['component']}"
    was, now = kept.options, config["options"]
    differing = [
        f"{name} {was.get(name, 'not set')!r} became {now.get(name, 'not set')!r}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    return f"the source has changed: {', '.join(differing) or 'other defaults than then'}"


# --- the file --------------------------------------------------------------------------------------------------------


def write_calibrations(file: Path, found: dict[str, Calibration]) -> None:
    """{source: calibration} as JSON; the sources that the file holds beside these stay."""
    whole = (read_calibrations(file) if file.exists() else {}) | found
    sources = {name: _plain(each) for name, each in sorted(whole.items())}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"sources": sources}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_calibrations(file: Path) -> dict[str, Calibration]:
    """{source: calibration}. ValueError if the file is not there, or is none of ours."""
    if not file.is_file():
        raise ValueError(f"no file {str(file)!r}; `trl-rewards calibrate` writes one")
    try:
        return {name: _parsed(entry) for name, entry in json.loads(file.read_text("utf-8"))["sources"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no calibrations ({type(error).__name__}: {error}); write it again with "
            "`trl-rewards calibrate`"
        ) from error


def _plain(kept: Calibration) -> dict[str, Any]:
    entry = asdict(kept)
    used = {
        "platt": ("method", "slope", "offset"),
        "temperature": ("method", "slope", "of_logits"),
        "isotonic": ("method", "scores", "probabilities"),
    }[kept.curve.method]
    return entry | {"curve": {name: entry["curve"][name] for name in used}}


def _parsed(entry: dict[str, Any]) -> Calibration:
    curve = Curve(**entry["curve"])
    if curve.method not in ("platt", "isotonic", "temperature"):
        raise ValueError(f"unknown method {curve.method!r}")
    if curve.method == "isotonic" and not len(curve.scores) == len(curve.probabilities) >= 2:
        raise ValueError("isotonic needs as many scores as probabilities, two at least")
    whole: dict[str, Any] = {**entry, "curve": curve}
    whole |= {key: [Bin(*each) for each in entry[key]] for key in ("bins_before", "bins_after")}
    return Calibration(**whole)
