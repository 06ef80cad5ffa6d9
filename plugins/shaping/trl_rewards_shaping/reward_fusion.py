"""RewardFusion: a reward, averaged with those of known answers that are alike.  https://huggingface.co/papers/2309.16155"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_rewards import Context, Reward, RewardError, Samples, Score
from trl_rewards.models import as_text
from trl_rewards_shaping.encoder import Encoder

if TYPE_CHECKING:
    from torch import Tensor


def fused(own: float, similarities: Tensor, rewards: Tensor) -> float:
    """(r + Σ sim_m r_m) / (1 + Σ sim_m): a row's reward and those of M neighbours, (M,) and (M,)."""
    return ((own + (similarities * rewards).sum()) / (1 + similarities.sum())).item()


class RewardFusion(Encoder):
    """A source's reward, averaged with its rewards of known answers that are alike, by how alike they are.

    https://huggingface.co/papers/2309.16155, against rewards that differ between paraphrases. Of the pairs of prompt
    and answer in a file, such as those that the reward model was trained on, up to `most` with a cosine of `least` or
    more count with their cosines, the row itself with 1. A row without such a neighbour keeps its reward, one without
    a reward has none.

    The source is another one of the recipe, to be watched with `weight: 0.0`; it is asked about the file once, and
    about each batch once more. What is embedded, prompt and answer together, the authors' notes do not say.
    """

    source: str
    """Name of the source that is fused, one that scores row by row."""
    pairs: str
    """JSON-lines file of objects with `prompt` and `completion`, and the columns that the source reads."""
    most: int = 5
    """Neighbours that count, at most."""
    least: float = 0.9
    """Cosine of a neighbour, at least; above 0."""

    def __post_init__(self):
        super().__post_init__()
        if self.most < 1:
            raise ValueError(f"most must be at least 1, got {self.most}")
        if not 0 < self.least <= 1:
            raise ValueError(f"least must be above 0 and at most 1, got {self.least}")
        self._reward: Reward | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        self._pairs: list[dict[str, Any]] = []

    def check_sources(self, names: Sequence[str]) -> None:
        if self.source not in names or self.source == self.display_name:
            raise ValueError(f"source: no other source {self.source!r}; there is {', '.join(names)}")

    def reads(self) -> tuple[str, ...]:
        return self._reward.reads() if self._reward is not None else ()

    def setup(self, context: Context) -> None:
        reward = context.sources.get(self.source)
        if reward is None or reward.scope == "group":
            raise RewardError(f"source: {self.source!r} must be a source of the recipe that scores row by row")
        self._pairs = _read(self.pairs, context, ("prompt", "completion", *reward.reads()))
        self._reward = reward
        super().setup(context)

    def close(self) -> None:
        super().close()
        self._known = None

    def score(self, samples: Samples) -> list[Score]:
        import torch

        own = self._ask(samples)
        vectors, rewards = self._neighbours()
        rows = self._embedded(samples)
        found: list[Score] = []
        for row, reward in enumerate(own):
            if reward is None:
                found.append(None)  # the source's own column says why
                continue
            near = (vectors @ rows[row]).clamp(max=1.0)
            best = torch.topk(near, min(self.most, len(near)))
            kept = best.values >= self.least
            found.append(fused(reward, best.values[kept], rewards[best.indices[kept]]))
        return found

    def _ask(self, samples: Samples) -> list[float | None]:
        if self._reward is None:
            raise RewardError("reward_fusion asks another source, and works in a recipe alone")
        return self._reward(samples.prompts, samples.completions, samples.completion_ids, **samples.columns)

    def _neighbours(self) -> tuple[Tensor, Tensor]:
        """(M, H) unit vectors of the file's pairs and (M,) their rewards; those without a reward are left out."""
        import torch

        if self._known is None:
            columns = {name: [row[name] for row in self._pairs] for name in self.reads()}
            prompts, completions = ([row[name] for row in self._pairs] for name in ("prompt", "completion"))
            samples = Samples(prompts, completions, columns=columns)
            rewards = self._ask(samples)
            there = [row for row, reward in enumerate(rewards) if reward is not None]
            if not there:
                raise RewardError(f"{self.source!r} has no score of any pair in {self.pairs!r}")
            known = torch.tensor([rewards[row] for row in there], dtype=torch.float64)
            self._known = (self._embedded(samples)[there], known)
        return self._known

    def _embedded(self, samples: Samples) -> Tensor:
        """(n, H) float64 unit vectors of prompts and completions together."""
        import torch

        texts = [f"{as_text(prompt)}\n{text}" for prompt, text in zip(samples.prompts, samples.texts, strict=True)]
        if not texts:
            return torch.zeros(0, 1, dtype=torch.float64)
        vectors = self.vectors(texts)
        return torch.nn.functional.normalize(torch.stack([vectors[text] for text in texts]).double(), dim=1)


def _read(path: str, context: Context, names: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        with open(context.path(path), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise RewardError(f"pairs: {path!r}: {error} (looked in {context.looked_in})") from error
    for number, row in enumerate(rows, start=1):
        if lacking := [name for name in names if not isinstance(row, dict) or name not in row]:
            raise RewardError(f"pairs: {path!r}, line {number}: wanted an object with {lacking[0]!r}")
    if not rows:
        raise RewardError(f"pairs: {path!r} is empty")
    return rows
