"""Texts as vectors: what R³ (https://huggingface.co/papers/2402.03469) and DR-IRL's similarity have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from trl_rewards import Context
from trl_rewards.models import Held, InProcess

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards.models import Embedder

HELD = 256
"""Texts whose token states are held at a time."""


class Encoder(InProcess):
    """A reward with an encoder in this process."""

    path: str
    """Folder or Hub name of an encoder, such as `facebook/contriever`."""
    pooling: Literal["mean", "first"] = "mean"
    """What a text's vector is made of: all tokens (Contriever, most sentence encoders) or the first (CLS)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    token_budget: int | None = None
    """Tokens in one forward pass, padding included. None: 16384, on a CPU 4096. Halved when memory runs out."""

    def __post_init__(self):
        super().__post_init__()
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {self.token_budget}")
        self._embedder: Embedder | None = None

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        from trl_rewards.models import load_embedder

        self._embedder = load_embedder(self.loading(self.path, context), token_budget=self.token_budget)

    def close(self) -> None:
        self._embedder = None

    def vectors(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{text: (H,) float32 on the CPU}; texts that are too long lose their end."""
        if self._embedder is None:
            self.setup(Context())
        assert self._embedder is not None
        distinct = list(dict.fromkeys(texts))
        found = {}
        for start in range(0, len(distinct), HELD):
            some = distinct[start : start + HELD]
            states = self._embedder.states(self._embedder.encode(some))
            pooled = [each.mean(dim=0) if self.pooling == "mean" else each[0] for each in states]
            found |= {text: vector.cpu() for text, vector in zip(some, pooled, strict=True)}
        return found
