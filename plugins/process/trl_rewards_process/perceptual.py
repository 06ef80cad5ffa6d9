"""Perceptual rewards: steps that look like the milestones of a few demonstrations.  https://huggingface.co/papers/1612.06699

The paper has videos and the features of an image model; here frames are steps of a text, and features those of a text
encoder. Its code is not released.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trl_rewards import Context, Failed, RewardError, Samples, Score, StepReward
from trl_rewards.models import Held, InProcess

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards.models import Embedder

Demonstrations = list[list[str]]
"""Steps of each demonstration."""


class Milestone(NamedTuple):
    """What is typical of one segment of the demonstrations."""

    chosen: Tensor
    """(M,) which features tell it from the rest."""
    mean: Tensor
    """(M,) of the chosen features in the segment."""
    deviation: Tensor
    """(M,) of the chosen features in the segment."""


def segments(features: Tensor, count: int, least: int) -> list[int]:
    """Where `count` segments of at least `least` steps begin, such that the mean deviation within them is least:
    (T, F) -> as many places from 0.

    The deviation of a segment is that of the population, averaged over features; segments count by their steps. The
    paper cuts recursively; this finds the best of all ways to cut.
    """
    steps = len(features)
    if steps < count * least:
        raise ValueError(f"{steps} steps do not make {count} segments of at least {least}")
    sums, squares = (part.cumsum(dim=0) for part in (features.double(), features.double() ** 2))

    def cost(start: int, end: int) -> float:
        """Steps times deviation of the steps from `start` up to `end`."""
        size = end - start
        first = (sums[end - 1], squares[end - 1])
        before = (sums[start - 1], squares[start - 1]) if start else (0.0, 0.0)
        mean, square = ((one - other) / size for one, other in zip(first, before, strict=True))
        return size * (square - mean**2).clamp(min=0).sqrt().mean().item()

    costs = {
        (start, end): cost(start, end) for start in range(steps) for end in range(start + least, steps + 1)
    }  # one segment from `start` up to `end`
    best = {(1, end): (costs[0, end], [0]) for end in range(least, steps + 1)}
    for number in range(2, count + 1):
        for end in range(number * least, steps + 1):
            best[number, end] = min(
                (best[number - 1, cut][0] + costs[cut, end], [*best[number - 1, cut][1], cut])
                for cut in range((number - 1) * least, end - least + 1)
            )
    return best[count, steps][1]


def milestone(inside: Tensor, outside: Tensor, alpha: float, most: int, floor: float) -> Milestone:
    """The `most` features that tell steps of a segment (n, F) from all others (m, F): highest
    α |μ⁺ - μ⁻| - (σ⁺ + σ⁻). Deviations are of the population, and at least `floor`."""
    mean, other = inside.mean(dim=0), outside.mean(dim=0)
    deviation, apart = (part.std(dim=0, correction=0).clamp(min=floor) for part in (inside, outside))
    chosen = discrimination(mean, deviation, other, apart, alpha).topk(min(most, len(mean))).indices
    return Milestone(chosen, mean[chosen], deviation[chosen])


def discrimination(mean: Tensor, deviation: Tensor, other: Tensor, apart: Tensor, alpha: float) -> Tensor:
    """α |μ⁺ - μ⁻| - (σ⁺ + σ⁻) of each feature: (F,) four times -> (F,)."""
    return alpha * (mean - other).abs() - (deviation + apart)


def likeness(features: Tensor, at: Milestone) -> Tensor:
    """- mean of ((x - μ⁺) / σ⁺)² over a milestone's features: (T, F) -> (T,), at most 0."""
    return -(((features[:, at.chosen] - at.mean) / at.deviation) ** 2).mean(dim=1)


def combined(stages: Tensor) -> Tensor:
    """Σ 2^(s-1) R_s over segments s = 2, 3, …, so that later ones count for more: (S - 1, T) -> (T,)."""
    weights = 2.0 ** stages.new_tensor(range(1, len(stages) + 1))
    return (weights[:, None] * stages).sum(dim=0)


class Perceptual(StepReward, InProcess):
    """How much each step is like the milestones of a few demonstrations, by an encoder's features; at most 0.
    https://huggingface.co/papers/1612.06699

    Each demonstration is cut into `segments` alike within themselves. Of each but the first, the features that tell
    it from the rest are found over all demonstrations; a step's reward is the logarithm of a Gaussian there, up to
    constants, and later segments count twice as much as the one before. Features of a step are the mean of its tokens'
    hidden states, without the text around it.

    Rewards are not bounded below, and a sum of them falls with every step: `take: last` or `mean`, or `differences`,
    does not reward short answers.
    """

    path: str
    """Folder or Hub name of an encoder, or of a language model whose hidden states are used."""
    demonstrations: str
    """JSON-lines file of demonstrations for all prompts (strings, or objects with `completion`); or the dataset column
    with a list of them for each row, as `column:NAME`. At least two."""
    segments: int = 3
    """S, parts of a demonstration; the first has no reward of its own."""
    least: int = 1
    """Steps of a segment, at least."""
    alpha: float = 5.0
    """α of the choice of features."""
    features: int = 32
    """M, features of a segment."""
    floor: float = 1.0e-3
    """Least deviation of a feature."""
    differences: bool = False
    """Each step's value less the one before: a row adds up to its last step, so that staying earns nothing. Ours."""
    layer: int | None = None
    """How many of the model's layers are run; None: all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    token_budget: int | None = None
    """Tokens in one forward pass, padding included. None: 16384, on a CPU 4096."""

    def __post_init__(self):
        StepReward.__post_init__(self)
        InProcess.__post_init__(self)
        for name, value, low in (
            ("segments", self.segments, 2),
            ("least", self.least, 1),
            ("features", self.features, 1),
            ("layer", self.layer, 1),
            ("token_budget", self.token_budget, 1),
        ):
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if self.floor <= 0 or self.alpha <= 0:
            raise ValueError(f"floor and alpha must be above 0, got {self.floor} and {self.alpha}")
        if self._column == "":
            raise ValueError("demonstrations: column: needs the name of a dataset column")
        self._embedder: Embedder | None = None
        self._given: list[Milestone] = []

    @property
    def _column(self) -> str | None:
        """The dataset column of demonstrations; None: there is a file."""
        return self.demonstrations.removeprefix("column:") if self.demonstrations.startswith("column:") else None

    def reads(self) -> tuple[str, ...]:
        return (self._column,) if self._column else ()

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        from trl_rewards.models import load_embedder

        StepReward.setup(self, context)
        given = None
        if self._column is None:
            given = self._steps_of_all(_read(self.demonstrations, context))
            if problem := self._problem(given):
                raise RewardError(f"demonstrations: {self.demonstrations!r} has {problem}")
        loading = self.loading(self.path, context)
        self._embedder = load_embedder(loading, layer=self.layer, token_budget=self.token_budget)
        if given is not None:
            self._given = self._milestones(given)

    def close(self) -> None:
        self._embedder, self._given = None, []

    def score_steps(self, samples: Samples, steps: list[list[str]]) -> list[list[float | None] | Score]:
        if self._embedder is None:
            self.setup(Context())
        known: dict[str, list[Milestone] | Failed | None] = {}  # rows of a group have the same demonstrations
        found: list[list[float | None] | Score] = []
        for row, each in enumerate(steps):
            at: list[Milestone] | Failed | None = self._given
            if self._column:
                value = samples[self._column][row]
                key = json.dumps(value, default=str)
                if key not in known:
                    known[key] = self._learned(value)
                at = known[key]
            found.append(self._values(each, at) if isinstance(at, list) else at)
        return found

    def _values(self, steps: list[str], milestones: list[Milestone]) -> list[float | None] | Score:
        import torch

        if not steps:
            return None
        features = self._features(steps)
        values = combined(torch.stack([likeness(features, at) for at in milestones]).double())
        if self.differences:
            values = torch.cat([values[:1], values.diff()])
        return values.tolist() if values.isfinite().all() else Failed("the encoder's features are not finite")

    def _learned(self, value: Any) -> list[Milestone] | Failed | None:
        """The milestones of a row's demonstrations; None where it has none."""
        texts = [text for text in value if text] if isinstance(value, list | tuple) else []
        if not texts:
            return None
        given = self._steps_of_all(texts)
        problem = self._problem(given)
        return Failed(f"a row's demonstrations: {problem}") if problem else self._milestones(given)

    def _steps_of_all(self, texts: Sequence[Any]) -> Demonstrations:
        return self.steps_of(Samples([""] * len(texts), list(texts)))

    def _problem(self, given: Demonstrations) -> str | None:
        """Why demonstrations cannot be used."""
        if len(given) < 2:
            return f"{len(given)} demonstration; two are needed, for deviations"
        shortest = min(map(len, given))
        if shortest < self.segments * self.least:
            return (
                f"a demonstration of {shortest} steps, too few for {self.segments} segments of at least {self.least}"
            )
        return None

    def _milestones(self, given: Demonstrations) -> list[Milestone]:
        """Those of all segments but the first."""
        import torch

        every = [self._features(steps) for steps in given]
        number = torch.cat([self._numbers(features) for features in every])
        flat = torch.cat(every)
        return [
            milestone(flat[number == s], flat[number != s], self.alpha, self.features, self.floor)
            for s in range(1, self.segments)
        ]

    def _numbers(self, features: Tensor) -> Tensor:
        """(T,) which segment each step of a demonstration is in, from 0."""
        import torch

        starts = torch.zeros(len(features), dtype=torch.long)
        starts[segments(features, self.segments, self.least)[1:]] = 1
        return starts.cumsum(dim=0)

    def _features(self, steps: list[str]) -> Tensor:
        """(T, F) float32 on the CPU: the mean of each step's hidden states."""
        import torch

        assert self._embedder is not None
        states = self._embedder.states(self._embedder.encode(steps))
        return torch.stack([state.mean(dim=0) for state in states]).cpu()


def _read(path: str, context: Context) -> list[Any]:
    resolved = context.path(path)
    try:
        with open(resolved, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise RewardError(f"demonstrations: {path!r}: {error} (looked in {context.looked_in})") from error
    texts = [line.get("completion") if isinstance(line, dict) else line for line in lines]
    if not all(isinstance(text, str | list) and text for text in texts):
        raise RewardError(f"demonstrations: {path!r}: each line must be a JSON string or an object with `completion`")
    return texts
