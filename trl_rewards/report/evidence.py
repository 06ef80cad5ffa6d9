"""What a run's metrics show of over-optimisation, in plain words and numbers; never what will come of it.

A change is spoken of where it is `SURE` times its standard error, which is taken from how much neighbouring logs
differ, and large enough to matter by the bounds below. Of fewer than `ENOUGH` logs nothing is said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from trl_rewards.report.figures import disagreements
from trl_rewards.report.run import Curve, Run, curve, finite, running_mean, tenth, trainer_of, watched

ENOUGH = 20
"""Logs below which nothing is said of a metric."""
SURE = 4.0
"""Standard errors that a change is at least; a peak is looked for, so that two would often be found in noise."""
OF_ROWS = 0.1
"""Standard deviations of a batch's rows that a reward changes at least."""
FACTOR = 1.5
"""By which length or disagreement changes at least."""
REPETITION = 0.1
"""By which the share of repeated 4-grams rises at least."""
SHARE = 0.5
"""From which length explains much of the reward, and many groups are without variance."""


class Finding(NamedTuple):
    """One sentence of evidence."""

    text: str
    harm: bool
    """It is a known sign of over-optimisation; else it only says how the run went."""


class Change(NamedTuple):
    """From one stretch of a metric's logs to its last."""

    before: float
    after: float
    error: float
    """Standard error of the difference."""

    @property
    def sure(self) -> bool:
        return self.before != self.after and abs(self.after - self.before) >= SURE * self.error

    @property
    def factor(self) -> float:
        """How many times the smaller the larger is; infinity where the smaller is 0."""
        low, high = sorted((abs(self.before), abs(self.after)))
        return high / low if low else math.inf


def findings(run: Run) -> list[Finding]:
    """All that there is to say, signs of over-optimisation first."""
    found = [finding for name in watched(run) for finding in _held_out(run, name)]
    found += [*_length(run), *_repetition(run), *_zero_variance(run), *_disagreement(run), *_kl(run)]
    return sorted(found, key=lambda finding: not finding.harm)


def change(values: Sequence[float], start: int | None = None) -> Change:
    """From the tenth of the logs around place `start` (None: from the first tenth) to the last tenth."""
    window = tenth(len(values))
    first = 0 if start is None else max(0, start - window // 2)
    before, after = values[first : first + window], values[-window:]
    steps = [(later - earlier) ** 2 for earlier, later in itertools.pairwise(values)]
    variance = sum(steps) / len(steps) / 2  # of one log, whatever trend there is
    return Change(sum(before) / len(before), sum(after) / len(after), math.sqrt(2 * variance / window))


def since(found: Curve, bound: float) -> int | None:
    """The place from which the running mean stays at `bound` or above until the end; None for half of `ENOUGH` logs
    or fewer."""
    means = running_mean(found.values, tenth(len(found.values)))
    below = [place for place, mean in enumerate(means) if mean < bound]
    start = below[-1] + 1 if below else 0
    return start if len(means) - start > ENOUGH / 2 else None


def _held_out(run: Run, name: str) -> list[Finding]:
    key = f"rewards/{name}/mean"
    lines = [(line["step"], finite(line.get("reward")), finite(line.get(key))) for line in run.history]
    both = [(step, proxy, gold) for step, proxy, gold in lines if proxy is not None and gold is not None]
    if len(both) < ENOUGH:
        return []
    proxies, golds = [proxy for _, proxy, _ in both], [gold for _, _, gold in both]
    window = tenth(len(both))
    means = [round(mean, 12) for mean in running_mean(golds, window)]  # equal means are equal whatever they sum over
    peak = max(range(len(means)), key=lambda place: (means[place], place))
    fall, rise = change(golds, peak), change(proxies, peak)
    if (
        peak + window < len(both)
        and fall.sure
        and rise.sure
        and rise.after - rise.before >= OF_ROWS * _rows(run, "reward_std")
        and fall.before - fall.after >= OF_ROWS * _rows(run, f"rewards/{name}/std")
    ):
        text = (
            f"After step {both[peak][0]} the reward rose from {_n(rise.before)} to {_n(rise.after)} while the "
            f"held-out {name} fell from {_n(fall.before)} to {_n(fall.after)}."
        )
        return [Finding(text + _kl_at(run, both[peak][0]), harm=True)]
    reward, gold = change(proxies), change(golds)
    text = (
        f"The reward went from {_n(reward.before)} to {_n(reward.after)}, the held-out {name} from "
        f"{_n(gold.before)} to {_n(gold.after)}."
    )
    return [Finding(text, harm=False)]


def _rows(run: Run, key: str) -> float:
    """Mean standard deviation of a batch's rows; 0 where it was not logged."""
    stds = curve(run, key).values
    return sum(stds) / len(stds) if stds else 0.0


def _kl_at(run: Run, step: int) -> str:
    kl = curve(run, "kl")
    before = [value for at, value in zip(kl.steps, kl.values, strict=True) if at <= step][-tenth(len(kl.values)) :]
    if len(kl.values) < ENOUGH or not before:
        return ""
    return f" The KL to the reference was {_n(sum(before) / len(before))} nats per token by then."


def _length(run: Run) -> list[Finding]:
    found, key = [], "rewards/total/length_explained"
    share, correlation = curve(run, key), curve(run, "rewards/total/length_correlation")
    start = since(share, SHARE) if len(share.values) >= ENOUGH else None
    if start is not None:
        mean = sum(share.values[start:]) / len(share.values[start:])
        signs = [value for at, value in zip(*correlation, strict=True) if at >= share.steps[start]]
        which = "longer" if sum(signs) > 0 else "shorter"
        text = (
            f"Length explains {mean:.2f} of the reward's variance among answers to one prompt since step "
            f"{share.steps[start]:g}: {which} ones score higher."
        )
        found.append(Finding(text, harm=True))
    lengths = curve(run, "completions/mean_length").values
    if len(lengths) >= ENOUGH and (drift := change(lengths)).sure and drift.factor >= FACTOR:
        way = "grew" if drift.after > drift.before else "shrank"
        text = f"Completions {way} from {_n(drift.before)} to {_n(drift.after)} tokens between {_TENTHS}."
        found.append(Finding(text, harm=True))
    return found


def _repetition(run: Run) -> list[Finding]:
    values = curve(run, "completions/repetition").values
    if len(values) < ENOUGH or not (rise := change(values)).sure or rise.after - rise.before < REPETITION:
        return []
    text = f"Repeated 4-grams rose from {rise.before:.2f} to {rise.after:.2f} of a completion's between {_TENTHS}."
    return [Finding(text, harm=True)]


def _zero_variance(run: Run) -> list[Finding]:
    share = curve(run, "frac_reward_zero_std")
    start = since(share, SHARE) if len(share.values) >= ENOUGH else None
    if start is None:
        return []
    mean = sum(share.values[start:]) / len(share.values[start:])
    text = (
        f"In {mean:.2f} of the groups all answers got the same reward since step {share.steps[start]:g}: nothing is "
        "learnt from these."
    )
    return [Finding(text, harm=True)]


def _disagreement(run: Run) -> list[Finding]:
    found = []
    for key, name in disagreements(run).items():
        values = curve(run, key).values
        if len(values) >= ENOUGH and (rise := change(values)).sure and rise.after >= FACTOR * rise.before:
            text = (
                f"The disagreement of {name} rose from {_n(rise.before)} to {_n(rise.after)} between {_TENTHS}: "
                "its members are further apart on what the policy writes."
            )
            found.append(Finding(text, harm=True))
    return found


def _kl(run: Run) -> list[Finding]:
    values = curve(run, "kl").values
    if len(values) < ENOUGH:
        return []
    moved = change(values)
    per = "answer" if trainer_of(run) == "kto" else "token"  # KTO's is of whole answers, to other prompts' questions
    went = f"from {_n(moved.before)} to {_n(moved.after)} nats per {per}"
    return [Finding(f"The KL to the reference went {went} between {_TENTHS}.", harm=False)]


_TENTHS = "the first and the last tenth of the logs"


def _n(value: float) -> str:
    """Two decimals; fewer of large numbers, and of small ones as many as show two digits."""
    size = round(abs(value), 6)
    if size >= 10:
        return f"{value:,.{1 if size < 100 else 0}f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.2g}"
