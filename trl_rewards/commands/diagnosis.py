"""What scores of real answers and of probes say about a reward: figures, and findings in plain words.

Shapes: N rows in groups of G, K sources.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trl_rewards.commands.probes import COPY
from trl_rewards.components import RewardBatch, Status
from trl_rewards.maths import group_std, kendall_in_groups, spearman, std
from trl_rewards.scoring import Source, failures

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
TOTAL = "total"

# From which share, or size of a correlation, on something is said.
TIED_GROUPS = 0.5
ABSTAINED = 0.5
CUT = 0.1
LENGTH = 0.7
OPPOSED = -0.3
ALIKE = 0.95
BEATEN, MOST_BEATEN = 0.25, 0.5
DOMINANT = 0.9
TRUNCATED = 0.05


class Finding(NamedTuple):
    """Something to look at."""

    severity: Severity
    source: str
    """A source, or "total"."""
    check: str
    says: str


class Answers(NamedTuple):
    """Where the real answers are from."""

    kind: Literal["policy", "column", "stand-ins"]
    says: str
    ended: list[bool]
    """(N,) False where the policy was cut at its length limit."""


def figures(batch: RewardBatch, sources: Sequence[Source], metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """{source: figures} and those of the total, of a scored batch. `metrics`: the pipeline's of the same batch."""
    lengths = _lengths(batch)
    found = {}
    for k, source in enumerate(sources):
        status, seconds = batch.scores.status[:, k], metrics[f"rewards/{source.name}/seconds"]
        asked = int((status != Status.SKIPPED).sum())
        found[source.name] = _column(batch.scores.values[:, k], batch.scores.group_size, lengths) | {
            "abstained": int((status == Status.ABSTAINED).sum()),
            "failed": int(failures(status).sum()),
            "not_asked": len(status) - asked,
            "seconds_per_1000": 1000 * seconds / max(asked, 1),
        }
    return found | {TOTAL: _column(batch.rewards, batch.scores.group_size, lengths)}


def _lengths(batch: RewardBatch) -> Tensor:
    """(N,) in tokens, or in characters where nobody counted tokens."""
    samples = batch.samples
    return torch.tensor(samples.lengths if samples.completion_ids else [len(text) for text in samples.texts])


def _column(values: Tensor, group_size: int, lengths: Tensor) -> dict[str, Any]:
    there = ~values.isnan()
    scored = values[there]
    groups = values.view(-1, group_size)
    several = (~groups.isnan()).sum(dim=1) > 1
    tied = (std(groups) == 0) & several
    spreads = group_std(values, group_size).view(-1, group_size)[:, 0][several]
    return {
        "scored": len(scored),
        "mean": scored.double().mean().item() if len(scored) else None,
        "std": std(scored).item() if len(scored) else None,
        "std_in_groups": spreads.mean().item() if len(spreads) else None,
        "min": scored.min().item() if len(scored) else None,
        "max": scored.max().item() if len(scored) else None,
        "distinct": len(scored.unique()),
        "tied_groups": (tied.sum() / several.sum()).item() if several.any() else None,
        "length_correlation": spearman(scored, lengths[there]) if len(scored) else 0.0,
    }


def agreement(batch: RewardBatch) -> list[dict[str, Any]]:
    """Each two sources: Spearman's ρ over all answers, and Kendall's τ-b over those to the same prompt."""
    found = []
    for (i, one), (j, other) in itertools.combinations(enumerate(batch.scores.names), 2):
        both = ~batch.scores.values[:, [i, j]].isnan().any(dim=1)
        first, second = batch.scores.values[both][:, [i, j]].unbind(dim=1)
        tau = kendall_in_groups(batch.scores.values[:, i], batch.scores.values[:, j], batch.scores.group_size)
        differ = len(first.unique()) > 1 and len(second.unique()) > 1
        found.append({"of": [one, other], "spearman": spearman(first, second) if differ else None, "kendall": tau})
    return found


def beaten(batch: RewardBatch, probes: Sequence[str]) -> list[dict[str, Any]]:
    """For each probe: the share of real answers to the same prompts that it scores above, by source and in total.

    Each group of the batch has a probe first, and real answers behind it; `probes` names it. None where the probe, or
    every real answer, has no score. `scores`: the probe's mean score.
    """
    columns = {name: batch.scores.values[:, k] for k, name in enumerate(batch.scores.names)} | {TOTAL: batch.rewards}
    found = []
    for probe in dict.fromkeys(probes):
        rows = [group for group, name in enumerate(probes) if name == probe]
        shares: dict[str, float | None] = {}
        means: dict[str, float | None] = {}
        for name, values in columns.items():
            groups = values.view(-1, batch.scores.group_size)[rows]
            first, real = groups[:, :1], groups[:, 1:]
            pairs = ~(first.isnan() | real.isnan())
            shares[name] = ((first > real) & pairs).sum().item() / pairs.sum().item() if pairs.any() else None
            means[name] = first.nanmean().item() if not first.isnan().all() else None
        found.append({"probe": probe, "beats": shares, "scores": means})
    return found


# --- findings --------------------------------------------------------------------------------------------------------


def findings(
    found: Mapping[str, Mapping[str, Any]],
    sources: Sequence[Source],
    batch: RewardBatch,
    reasons: Mapping[str, Sequence[str]],
    agreed: Sequence[Mapping[str, Any]],
    probed: Sequence[Mapping[str, Any]],
    answers: Answers,
    groups_matter: bool,
    logged: Mapping[str, float],
) -> list[Finding]:
    """All findings. `groups_matter`: the advantage compares answers of a prompt."""
    said: list[Finding] = []
    for k, source in enumerate(sources):
        said += _holes(source, found[source.name], reasons[source.name])
        said += _constant(source, batch.scores.values[:, k], probed, answers)
        if (share := logged.get(f"{source.name}/truncated", 0.0)) > TRUNCATED:
            said.append(
                Finding(
                    "warning",
                    source.name,
                    "truncation",
                    f"its model cuts {share:.0%} of the texts to its max_length: raise it, or shorten the answers",
                )
            )
    said += _total(found[TOTAL], answers, groups_matter)
    said += _length(found)
    if answers.kind == "policy" and (cut := answers.ended.count(False) / len(answers.ended)) > CUT:
        severity: Severity = "error" if cut > MOST_BEATEN else "warning"
        said.append(
            Finding(
                severity,
                TOTAL,
                "truncation",
                f"{cut:.0%} of the policy's answers are cut at max_completion_length: what the rewards see is "
                "unfinished; raise it",
            )
        )
    said += _agreement(agreed)
    said += _dominance(batch, sources)
    said += [finding for probe in probed for finding in _probe(probe)]
    return said


def _holes(source: Source, figures: Mapping[str, Any], reasons: Sequence[str]) -> list[Finding]:
    asked = figures["scored"] + figures["abstained"] + figures["failed"]
    if not asked:
        return [Finding("warning", source.name, "holes", "its only_if lets no answer pass: it is never asked")]
    said = []
    if figures["failed"]:
        share = figures["failed"] / asked
        (reason, times), *_ = Counter(reasons).most_common(1)
        stops = share > source.max_failures
        end = f"; above max_failures {source.max_failures:g} a run stops" if stops else ""
        said.append(
            Finding(
                "error" if stops else "warning",
                source.name,
                "holes",
                f"fails on {share:.0%} of the answers{end}: {reason} ({times} times)",
            )
        )
    share = figures["abstained"] / asked
    if share >= ABSTAINED:
        said.append(
            Finding(
                "error" if share == 1 else "warning",
                source.name,
                "holes",
                f"has no opinion on {share:.0%} of the answers: do its columns hold what it reads?",
            )
        )
    if figures["scored"] < asked and source.on_missing == "fail":
        said.append(Finding("error", source.name, "holes", "has holes, and on_missing is fail: a run stops"))
    return said


def _constant(source: Source, values: Tensor, probed: Sequence[Mapping[str, Any]], answers: Answers) -> list[Finding]:
    there = values[~values.isnan()]
    if len(there) < 2 or len(there.unique()) > 1:
        return []
    value = there[0].item()
    reads = source.reward.reads()
    copies = {
        probe["probe"].removeprefix(COPY): probe["scores"][source.name]
        for probe in probed
        if probe["probe"].startswith(COPY)
    }
    same = [column for column, score in copies.items() if ("*" in reads or column in reads) and score == value]
    says = f"gives {value:g} to all {len(there)} answers"
    if same:
        says += (
            f", and to a copy of column {same[0]!r} too: the column has another form than what it reads, or it wants "
            "answers in a form, such as tags or a box, that none has"
        )
    else:
        says += ": it tells none apart. A format that never matches, or one that all have?"
    severity: Severity = "error" if same and answers.kind != "stand-ins" else "warning"
    return [Finding(severity, source.name, "constant", says)]


def _total(figures: Mapping[str, Any], answers: Answers, groups_matter: bool) -> list[Finding]:
    gravest: Severity = "warning" if answers.kind == "stand-ins" else "error"
    if not figures["scored"]:
        return [Finding("error", TOTAL, "holes", "no answer has a total: there is nothing to learn from")]
    if figures["distinct"] == 1 and figures["scored"] > 1:
        says = f"is {figures['min']:g} for every answer: there is nothing to learn from"
        return [Finding(gravest, TOTAL, "constant", says)]
    tied = figures["tied_groups"]
    if not groups_matter or tied is None or tied < TIED_GROUPS:
        return []
    says = f"in {tied:.0%} of the groups all answers to a prompt have the same total, which gives no learning signal"
    return [Finding(gravest if tied == 1 else "warning", TOTAL, "ties", says)]


def _length(found: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    said = []
    for name, figures in found.items():
        rho = figures["length_correlation"]
        if abs(rho) >= LENGTH:
            which = "longer" if rho > 0 else "shorter"
            says = f"{which} answers score higher (rank correlation with length {rho:+.2f})"
            said.append(Finding("warning" if name == TOTAL else "note", name, "length", says))
    return said


def _agreement(agreed: Sequence[Mapping[str, Any]]) -> list[Finding]:
    said = []
    for each in agreed:
        one, other = each["of"]
        tau = each["kendall"] if each["kendall"] is not None else each["spearman"]
        if tau is not None and tau <= OPPOSED:
            says = f"and {other} pull against each other (rank correlation {tau:+.2f} among answers to a prompt)"
            said.append(Finding("warning", one, "agreement", says))
        elif tau is not None and tau >= ALIKE:
            says = f"and {other} order the answers alike (rank correlation {tau:+.2f}): one of them may do"
            said.append(Finding("note", one, "agreement", says))
    return said


def _dominance(batch: RewardBatch, sources: Sequence[Source]) -> list[Finding]:
    if len(sources) < 2 or batch.shaped is None:
        return []
    spreads = [std(column).item() for column in (batch.shaped * batch.scores.weights).unbind(dim=1)]
    largest = max(range(len(spreads)), key=spreads.__getitem__)
    if sum(spreads) == 0 or spreads[largest] < DOMINANT * sum(spreads):
        return []
    says = (
        f"makes {spreads[largest] / sum(spreads):.0%} of the spread that weights and shapers leave the sources; "
        "`trl-rewards calibrate` puts them on one scale"
    )
    return [Finding("note", sources[largest].name, "scale", says)]


def _probe(probe: Mapping[str, Any]) -> list[Finding]:
    name, beats = probe["probe"], probe["beats"]
    share = beats[TOTAL]
    if name.startswith(COPY) or share is None or share < BEATEN:
        return []
    by = {source: of for source, of in beats.items() if source != TOTAL and of is not None and of >= BEATEN}
    most = max(by, key=by.__getitem__, default=None)
    because = f"; {most} alone lets it beat {by[most]:.0%}" if most and len(beats) > 2 else ""
    says = f"`{name}` beats {share:.0%} of real answers to the same prompts{because}"
    return [Finding("error" if share >= MOST_BEATEN else "warning", TOTAL, "probe", says)]
