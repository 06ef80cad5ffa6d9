"""Several reward models as one source: whole models, adapters or heads.  https://huggingface.co/papers/2401.16635"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import (
    Context,
    Failed,
    PluginError,
    RecipeError,
    RewardError,
    Samples,
    Score,
    Scores,
    Traced,
    Unweighted,
    load_combiner,
)
from trl_rewards.maths import std
from trl_rewards.models import FromHead, Held

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards.models import Member, Scorer, SharedBase

logger = logging.getLogger(__name__)


def disagreement(members: Tensor) -> Tensor:
    """Population deviation of each row's members, holes left out: (N, K) -> (N,) float64; NaN where fewer than two
    score a row."""
    return std(members, ddof=0).masked_fill((~members.isnan()).sum(dim=1) < 2, float("nan"))


class Ensemble(FromHead):
    """The scores of k reward models, combined into one. Unbounded, unless the combiner bounds it.

    https://huggingface.co/papers/2401.16635 has the three kinds: whole models, LoRA adapters on one base, and heads on
    one trunk. Adapters of one base share it in memory, and heads share all of the computing.

    A member without a score for a row is a hole, and the combiner's rule says what becomes of the row; where all are
    holes the row has none. How far the members are apart (`disagreement`, their population deviation) is logged for
    each batch, over its different rows, and is with the members' scores in the traces of each row.
    """

    traces = True

    members: list[str]
    """Folders or Hub names. Each is a model or a LoRA adapter with its head; each output of one with several is a
    member too."""
    combine: str | dict[str, Any] = "mean"
    """A combiner that takes its sources alike: `mean`, `median`, `min`, `uwo`, …, or `{use: uwo, with: {coef: 0.1}}`.
    """
    base: Literal["own", "policy"] = "own"
    """`policy`: the members are adapters, and run on the policy's base in memory (`share_base: true`)."""

    def __post_init__(self):
        super().__post_init__()
        if not self.members or len(set(self.members)) < len(self.members):
            raise ValueError(f"members must be different folders or Hub names, one at least, got {self.members}")
        if self.adapter is not None:
            raise ValueError("adapter: members are models or adapters themselves; name them all under members")
        self._combiner = _combiner(self.combine)
        self._context = Context()
        self._scorers: list[Scorer] = []
        self._on_policy: list[Member] = []

    def shares_base(self) -> bool:
        return self.base == "policy"

    def held(self) -> list[Held]:
        paths: list[str | None] = [None] if self.base == "policy" else [*self.members]
        return [Held(path, self.token_budget) for path in paths]

    def setup(self, context: Context) -> None:
        self._context = context
        if self.base == "own":
            self._scorers = self._load(context)
        elif context.shared_base is not None:
            paths = [context.path(member) for member in self.members]
            self._on_policy = [self._add(context.shared_base, path, context) for path in paths]

    def _load(self, context: Context) -> list[Scorer]:
        """The members' scorers, on one base where they are adapters of one."""
        from trl_rewards.models import ALL_OUTPUTS, SharedBase, load_scorer

        loadings = [self.loading(member, context) for member in self.members]
        adapters = [loading.adapter for loading in loadings if loading.adapter]
        if len(adapters) == len(loadings) > 1 and len({loading.path for loading in loadings}) == 1:
            base = SharedBase(replace(loadings[0], adapter=None, adapter_revision=None))
            try:
                found = [self._add(base, adapter, context) for adapter in adapters]
            except RewardError as error:
                logger.warning("%s: each member has a base of its own in memory: %s", self.display_name, error)
            else:
                base.load()
                return _bound(found)
        return [load_scorer(loading, output=ALL_OUTPUTS, **self.scoring(context)) for loading in loadings]

    def _add(self, base: SharedBase, path: str, context: Context) -> Member:
        from trl_rewards.models import ALL_OUTPUTS

        return base.add(path, revision=self.revision, output=ALL_OUTPUTS, **self.scoring(context))

    def close(self) -> None:
        self._scorers, self._on_policy = [], []

    def score(self, samples: Samples) -> list[Score]:
        import torch

        scorers = self._ready_scorers()
        if not len(samples):
            return []
        names: list[str] = []
        columns: list[Tensor] = []
        reasons: dict[int, str] = {}
        for path, name, scorer in zip(self.members, _names(self.members), scorers, strict=True):
            rows, whys = _outputs(scorer, samples, path)
            size = rows.shape[1]
            names += [name] if size == 1 else [f"{name}.{index}" for index in range(size)]
            columns.append(rows)
            reasons |= whys
        values = torch.cat(columns, dim=1)  # (n, K)
        totals, apart = self._combined(tuple(names), values, samples), disagreement(values)
        self._log(names, values, apart, max(scorer.metrics["truncated"] for scorer in scorers))
        found: list[Score] = []
        for row, (total, distance, cells) in enumerate(zip(*map(_cells, (totals, apart, values)), strict=True)):
            trace = {"members": dict(zip(names, cells, strict=True)), "disagreement": distance}
            reason = reasons.get(row, "no member has a score")
            found.append(Failed(reason, trace=trace) if total is None else Traced(total, trace))
        return found

    def _combined(self, names: tuple[str, ...], values: Tensor, samples: Samples) -> Tensor:
        import torch

        weights = torch.ones(len(names))
        status = torch.zeros(values.shape, dtype=torch.uint8)
        return self._combiner(Scores(names, values, status, weights, group_size=1), samples)

    def _log(self, names: Sequence[str], values: Tensor, apart: Tensor, truncated: float) -> None:
        if not self._context.log_metric:
            return
        means = dict(zip(names, _cells(values.nanmean(dim=0)), strict=True))
        for name, value in {"disagreement": _cells(apart.nanmean()), "truncated": truncated, **means}.items():
            if value is not None:
                self._context.log_metric(f"{self.display_name}/{name}", value)

    def _ready_scorers(self) -> list[Scorer]:
        if not self._scorers and self.base == "own":
            self.setup(Context())
        if not self._scorers:
            self._scorers = _bound(self._on_policy)
        if not self._scorers:
            raise RewardError(
                f"{self.display_name!r} has `base: policy`: it runs in a trainer of trl_rewards or with "
                "`share_base: true`; elsewhere leave base out"
            )
        return self._scorers


def _bound(members: Sequence[Member]) -> list[Scorer]:
    """The scorers of members whose base is in memory."""
    return [member.scorer for member in members if member.scorer is not None]


def _cells(values: Tensor) -> Any:
    """As nested lists, None for NaN."""

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(each) for each in value]
        return None if math.isnan(value) else value

    return known(values.tolist())


def _combiner(given: str | dict[str, Any]) -> Unweighted:
    """ValueError unless it is a combiner of members, which looks at a row alone."""
    entry = {"use": given} if isinstance(given, str) else given
    if not isinstance(entry.get("use"), str) or not set(entry) <= {"use", "with"}:
        raise ValueError(f"combine must be a name or {{use: name, with: {{…}}}}, got {given!r}")
    try:
        combiner = load_combiner(entry["use"], **(entry.get("with") or {}))
    except PluginError as error:
        raise ValueError(f"combine: {error}") from error
    except RecipeError as error:
        raise ValueError(f"combine: {'; '.join(error.problems)}") from error
    if not (isinstance(combiner, Unweighted) and combiner.one_thing):
        raise ValueError(
            f"combine: {entry['use']!r} is for sources that say different things; members say the same: take mean, "
            "median, min, trimmed, mean_minus_std, uwo, …"
        )
    return combiner


def _names(paths: Sequence[str]) -> list[str]:
    """The members' last folders, or their whole paths where two are called alike."""
    short = [os.path.basename(path.rstrip("/")) for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _outputs(scorer: Scorer, samples: Samples, path: str) -> tuple[Tensor, dict[int, str]]:
    """(n, K) what a member says, NaN where nothing, and why of rows on which it failed."""
    import torch

    from trl_rewards.models import shown_samples

    found = scorer.outputs_of_texts(*shown_samples(scorer.tokenizer, samples, path))
    nothing = [float("nan")] * len(scorer.weights)
    rows = torch.tensor([nothing if isinstance(outputs, Failed) else outputs for outputs in found])
    rows = rows.reshape(len(samples), len(scorer.weights))
    whys = {row: outputs.reason for row, outputs in enumerate(found) if isinstance(outputs, Failed)}
    return rows.masked_fill(~rows.isfinite(), float("nan")), whys
