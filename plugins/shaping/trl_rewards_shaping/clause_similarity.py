"""How far an answer's clauses are those of a demonstration, DR-IRL's W.  https://huggingface.co/papers/2503.18991"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from trl_rewards import Failed, Samples, Score
from trl_rewards_shaping.encoder import Encoder

if TYPE_CHECKING:
    from torch import Tensor

_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])\s*|\n+")


def coverage(generated: Tensor, demonstrated: Tensor) -> Tensor:
    """W: mean over generated clauses of the highest cosine with one of the demonstration: (K, H), (L, H) -> ()."""
    import torch

    made, shown = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (generated, demonstrated))
    return (made @ shown.T).amax(dim=1).mean()


def clauses(text: str) -> list[str]:
    """The parts of a text between line breaks and marks that end a sentence or a clause."""
    return [part.strip() for part in _END.split(text) if re.search(r"\w", part)]


class ClauseSimilarity(Encoder):
    """Mean over the answer's clauses of the highest cosine with a clause of the demonstration, in [-1, 1].

    https://huggingface.co/papers/2503.18991. One less this is how hard a prompt is for the model that answers, by
    which DR-IRL scales advantages: `trl-rewards select` with this reward writes it as `clause_similarity_score`.
    An answer without words scores 0.0, a row without a demonstration has no opinion (None). What a clause is, the
    paper's notes do not say: here it ends at a line break, a full stop, `!`, `?` or `;`.
    """

    demonstration: str = "demonstration"
    """Dataset column with the demonstration."""

    def reads(self) -> tuple[str, ...]:
        return (self.demonstration,)

    def score(self, samples: Samples) -> list[Score]:
        import torch

        pairs = [
            (clauses(text), clauses(shown or ""))
            for text, shown in zip(samples.texts, samples[self.demonstration], strict=True)
        ]
        vectors = self.vectors([clause for made, shown in pairs for clause in (*made, *shown)])
        scores: list[Score] = []
        for made, shown in pairs:
            if not shown or not made:
                scores.append(0.0 if shown else None)
                continue
            found = coverage(torch.stack([vectors[c] for c in made]), torch.stack([vectors[c] for c in shown])).item()
            scores.append(found if math.isfinite(found) else Failed(f"the encoder's similarity is {found}"))
        return scores
