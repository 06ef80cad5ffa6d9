"""ArmoRM: several attributes of an answer, freed of verbosity and mixed by a gate.  https://huggingface.co/papers/2406.12845"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_rewards import Combiner, Samples, Scores
from trl_rewards.maths import spearman, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

GRID = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(step / 20 for step in range(3, 20)))
"""Penalties that are tried: fine steps, then 0.15, 0.2, … 0.95."""


def verbosity_penalties(values: Tensor, verbosity: int, threshold: float = 0.03) -> list[float]:
    """λ_k of each column of (N, K): the lowest of `GRID` with which R_k - λ R_verbosity goes with R_verbosity at most
    to a rank correlation of `threshold`; 1 where none is enough, and for the verbosity itself. Holes are left out."""
    found = []
    for k in range(values.shape[1]):
        both = ~values[:, [k, verbosity]].isnan().any(dim=1)
        column, verbose = values[both, k].double(), values[both, verbosity].double()
        enough = (step for step in GRID if k != verbosity and spearman(column - step * verbose, verbose) <= threshold)
        found.append(next(enough, 1.0))
    return found


def debiased(values: Tensor, penalties: Tensor, verbosity: int) -> Tensor:
    """R_k - λ_k R_verbosity: (N, K), (K,) -> (N, K); NaN where one of the two is missing and λ_k is not 0."""
    return values - (penalties * values[:, verbosity : verbosity + 1]).masked_fill(penalties == 0, 0.0)


def gates(outputs: Tensor, temperature: float = 10.0) -> Tensor:
    """softmax(x / temperature) of a gating network's outputs: (N, K) -> (N, K), rows sum to 1."""
    return (outputs / temperature).softmax(dim=-1)


class ArmoRM(Combiner):
    """Σ_k g_k (R_k - λ_k R_verbosity): attributes freed of verbosity, weighted by a gate that knows the prompt.

    https://huggingface.co/papers/2406.12845. The sources are the attributes. g_k is the source's weight, times its
    gate where a dataset column has gates: a gate reads the prompt alone, so that it can be computed beforehand. λ_k is
    the least with which the attribute no longer goes with verbosity. The paper finds it on a set of reference answers;
    here it is given, or found from the first rows of the run and then kept, the same on every rank.

    A row with a hole stands where its other attributes put it; without a verbosity score those with a λ other than 0
    are holes.
    """

    verbosity: str | None = None
    """Name of the source that says how verbose an answer is; None: nothing is debiased."""
    penalties: dict[str, float] | None = None
    """{source: λ}, 0 for sources that are not named and 1 for verbosity itself. None: found from the first `rows`."""
    threshold: float = 0.03
    """Rank correlation with verbosity that an attribute may have left."""
    rows: int = 1000
    """λ follows the first so many rows, batch by batch, and stays; at least 2."""
    gates: str | None = None
    """Dataset column with each prompt's gates: a list in the sources' order, or a mapping from their names."""
    temperature: float | None = None
    """None: the column has gates. A number (the paper's is 10): it has outputs of a gating network, and
    softmax(x / temperature) of them is taken."""

    def __post_init__(self):
        if self.penalties is not None and self.verbosity is None:
            raise ValueError("penalties are taken of a verbosity score; name its source in verbosity")
        if self.rows < 2:
            raise ValueError(f"rows must be at least 2, got {self.rows}")
        if self.temperature is not None and (self.gates is None or not self.temperature > 0):
            raise ValueError(f"temperature must be above 0 and is that of gates, got {self.temperature}")
        self._seen: list[list[float]] = []
        self._found: list[float] | None = None

    def reads(self) -> tuple[str, ...]:
        return () if self.gates is None else (self.gates,)

    def check_sources(self, names: Sequence[str]) -> None:
        for option, named in (
            ("verbosity", [self.verbosity] if self.verbosity else []),
            ("penalties", self.penalties),
        ):
            if unknown := sorted(set(named or ()) - set(names)):
                raise ValueError(f"{option}: no source {unknown[0]!r}; there is {', '.join(names)}")

    def __call__(self, scores: Scores, samples: Samples) -> Tensor:
        values = scores.values.double()
        if self.verbosity is not None:
            place = scores.names.index(self.verbosity)
            values = debiased(values, values.new_tensor(self._penalties(scores, place)), place)
        weights = scores.weights.double()
        if self.gates is not None:
            weights = weights * self._gates(scores, samples)
        return weighted_sum(values, weights, scores.group_size).to(scores.values.dtype)

    def _penalties(self, scores: Scores, place: int) -> list[float]:
        """λ of each source."""
        if self.penalties is not None:
            given = dict.fromkeys(scores.names, 0.0) | {self.verbosity: 1.0} | self.penalties
            return [given[name] for name in scores.names]
        if self._found is None:
            scored = scores.values[~scores.values.isnan().all(dim=1)].tolist()
            self._seen += scored[: self.rows - len(self._seen)]
            seen = scores.values.new_tensor(self._seen).view(-1, len(scores.names))
            found = verbosity_penalties(seen, place, self.threshold)
            if len(self._seen) < self.rows:
                return found
            self._seen, self._found = [], found
        return self._found

    def _gates(self, scores: Scores, samples: Samples) -> Tensor:
        """(N, K) the column's gates."""
        assert self.gates is not None
        rows = [self._row(value, scores.names, row) for row, value in enumerate(samples[self.gates])]
        found = scores.values.new_tensor(rows).double().view(len(rows), len(scores.names))
        return gates(found, self.temperature) if self.temperature is not None else found

    def _row(self, value: Any, names: Sequence[str], row: int) -> list[float]:
        if isinstance(value, dict):
            value = [value.get(name) for name in names]
        if not isinstance(value, list | tuple) or len(value) != len(names) or None in value:
            raise ValueError(
                f"column {self.gates!r}, row {row}: wanted a number for each of {', '.join(names)}, got {value!r}"
            )
        return [float(number) for number in value]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [list(row) for row in self._seen], "found": self._found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._found = [list(row) for row in state["seen"]], state["found"]
