"""BERTScore: how well the tokens of two texts match by their contextual embeddings.

https://huggingface.co/papers/1904.09675; as a reward: https://huggingface.co/papers/2505.11080
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from trl_rewards import Context, Failed, Samples, Score
from trl_rewards.models import Held, InProcess
from trl_rewards_bleuberi.answers import AgainstReferences

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards.models import Embedder

HELD_TOKENS = 32768
"""Tokens whose embeddings are kept at a time: 100 MB for 768 dimensions in float32."""


class BertScore(AgainstReferences, InProcess):
    """BERTScore of the completion with its best reference: greedy matching of token embeddings. 1 for equal texts.

    https://huggingface.co/papers/1904.09675. The authors of BLEUBERI (https://huggingface.co/papers/2505.11080,
    lilakk/BLEUBERI@e0d15639) use F1 with `{path: distilbert-base-uncased, layer: 5}`, on the whole completion. As in
    the package `bert_score` without idf weights and without rescaling: CLS and SEP can be matched with, and have no
    weight of their own; a text that is too long loses its end.

    Unscaled scores lie close together, often between 0.7 and 0.9. An empty completion scores 0.0; a row without a
    reference has no opinion (None).

    Deviations from bert_score: a row's score does not depend on its batch, where padding counts as a match of 0 there;
    and with RoBERTa's and GPT-2's tokenizers no space is put before the text.
    """

    path: str
    """Folder or Hub name of an encoder."""
    layer: int | None = None
    """How many of its layers are run; None: all. bert_score has a table of those that agree best with people: 5 for
    distilbert-base-uncased, 9 for bert-base-uncased, 17 for roberta-large."""
    measure: Literal["f1", "precision", "recall"] = "f1"
    """Precision matches the completion's tokens with the reference's, recall the reference's with the completion's."""
    extract_answer: bool = False
    """Score what follows the first `<answer>` tag, where there is one; the authors score the whole completion."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    token_budget: int | None = None
    """Tokens in one forward pass, padding included. None: 16384, on a CPU 4096. Halved when memory runs out."""

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("layer", self.layer), ("token_budget", self.token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._embedder: Embedder | None = None

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        from trl_rewards.models import load_embedder

        loading = self.loading(self.path, context)
        self._embedder = load_embedder(loading, layer=self.layer, token_budget=self.token_budget)

    def close(self) -> None:
        self._embedder = None

    def score(self, samples: Samples) -> list[Score]:
        import torch

        if self._embedder is None:
            self.setup(Context())
        assert self._embedder is not None
        pairs = [(text.strip(), [one.strip() for one in references]) for text, references in self.pairs(samples)]
        pairs = [(text, [one for one in references if one]) for text, references in pairs]
        scores: list[Score] = [0.0 if references else None for _, references in pairs]
        texts = {row: [answer, *references] for row, (answer, references) in enumerate(pairs) if answer and references}
        distinct = list(dict.fromkeys(text for own in texts.values() for text in own))
        ids = dict(zip(distinct, self._embedder.encode(distinct), strict=True))
        for rows in runs(texts, ids):
            embedded = self._embed({text: ids[text] for row in rows for text in texts[row]})
            best = torch.stack([self._best(*pairs[row], embedded) for row in rows])
            for row, score in zip(rows, best.tolist(), strict=True):
                scores[row] = score if math.isfinite(score) else Failed(f"the encoder's score is {score}")
        return scores

    def _embed(self, ids: dict[str, list[int]]) -> dict[str, tuple[Tensor, Tensor]]:
        """{text: ((T, H) embeddings of length 1, (T,) weights of its tokens, which sum to 1)}"""
        import torch

        assert self._embedder is not None
        tokenizer = self._embedder.tokenizer
        special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
        found = {}
        for (text, tokens), states in zip(ids.items(), self._embedder.states(list(ids.values())), strict=True):
            weights = torch.tensor([float(token not in special) for token in tokens], device=states.device)
            found[text] = torch.nn.functional.normalize(states, dim=-1), weights / weights.sum().clamp(min=1)
        return found

    def _best(self, answer: str, references: Sequence[str], embedded: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """() the highest score with any reference."""
        import torch

        index = ("precision", "recall", "f1").index(self.measure)
        return torch.stack([greedy_match(*embedded[answer], *embedded[one])[index] for one in references]).max()


def greedy_match(answer: Tensor, answer_weights: Tensor, reference: Tensor, reference_weights: Tensor) -> list[Tensor]:
    """Precision, recall and F1: (T, H), (T,), (S, H), (S,) -> () each.

    Every token is matched with the one most like it on the other side; embeddings have length 1, weights sum to 1.
    """
    similarity = answer @ reference.T
    precision = (similarity.amax(dim=1) * answer_weights).sum()
    recall = (similarity.amax(dim=0) * reference_weights).sum()
    total = precision + recall
    f1 = 2 * precision * recall / total.where(total != 0, 1.0)
    return [precision, recall, f1]


def runs(texts: dict[int, list[str]], ids: dict[str, list[int]]) -> Iterator[list[int]]:
    """Rows in runs whose distinct texts have at most HELD_TOKENS tokens; a longer row goes alone."""
    rows: list[int] = []
    held: set[str] = set()
    for row, own in texts.items():
        if rows and sum(len(ids[text]) for text in held.union(own)) > HELD_TOKENS:
            yield rows
            rows, held = [], set()
        rows.append(row)
        held.update(own)
    if rows:
        yield rows
