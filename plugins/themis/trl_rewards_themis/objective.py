"""Themis's training: rank answers, and learn to write the tool calls and the rationale that lead to the score.

https://huggingface.co/papers/2310.01045
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trl_rewards import Context, Objective, Preferences, RewardError
from trl_rewards_themis.losses import language_loss, ranking_loss
from trl_rewards_themis.trajectory import MARKS, REASON, SEEN, WORK, Compat, segments

if TYPE_CHECKING:
    from torch import Tensor


class ThemisObjective(Objective):
    """Themis: a ranking loss at the end of both trajectories, and a language-model loss on what the model writes.

    Rows are those of `python -m trl_rewards_themis.tara`: `prompt`, `chosen` and `rejected` are texts, `chosen_trace`
    and `rejected_trace` what tools and model said of them; `context` is optional. The loss is
    L_RM + α (L_tool + β L_observation + ω L_rationale) of https://huggingface.co/papers/2310.01045, where α's part is
    one mean over the tokens that count.

    The trained folder is a sequence classifier with the language model's output layer beside its score, so it loads as
    reward `themis` (which writes, and scores) and as `model` (which scores finished texts). Embeddings that share the
    output layer's weights are parted from it. Marks that the tokenizer lacks are added to it.
    """

    columns = ("prompt", "chosen", "rejected", "chosen_trace", "rejected_trace")
    own_loss = True
    needs = frozenset({"token_hidden"})

    alpha: float = 1.0
    """Weight of the language-model loss."""
    beta: float = 1.0
    """Weight of tokens that a tool wrote. 0: they are not learned."""
    omega: float = 1.0
    """Weight of the rationale's tokens. 0: it is left out of the texts."""
    compat: Compat = "paper"
    """`release`: as in the released training code, the ranking loss counts 0.5, and of the given part more is learned:
    the assistant's header, of chosen rows the answer, and before it what a context moved there."""
    context: str | None = None
    """Dataset column with a text that the question is about."""

    def __post_init__(self):
        for name in ("alpha", "beta", "omega"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")
        self._model: Any = None
        self._log_metric: Callable[[str, float], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is hashed and copied where rows are tokenised.
        return {**vars(self), "_model": None, "_log_metric": None}

    def setup(self, context: Context) -> None:
        self._log_metric = context.log_metric

    def reads(self) -> tuple[str, ...]:
        return (*self.columns, self.context) if self.context else self.columns

    def attach(self, model: Any, tokenizer: Any, fresh: Sequence[str]) -> list[int]:
        import torch

        if not tokenizer.is_fast:
            raise RewardError("objective 'themis' needs a fast tokenizer, which tells what a token is of")
        known = len(tokenizer)
        tokenizer.add_tokens(list(MARKS), special_tokens=True)
        added = list(range(known, len(tokenizer)))
        weight = _output_weights(model)
        embeddings = model.get_input_embeddings()
        if added and len(tokenizer) > embeddings.num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        rows, size = model.get_input_embeddings().weight.shape
        head = torch.nn.Linear(size, rows, bias=False, dtype=weight.dtype, device=model.device)
        kept = min(rows, len(weight))
        with torch.no_grad():
            head.weight[:kept] = weight[:kept]
            head.weight[kept:] = weight.mean(dim=0)
        model.lm_head = head
        model.config.tie_word_embeddings = False
        self._model = model
        return added

    def tokenize(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for side in ("chosen", "rejected"):
            trace = row[f"{side}_trace"]
            pieces = segments(
                row["prompt"],
                row[side],
                trace if self.omega else trace.partition(WORK)[0],
                tokenizer.eos_token,
                row[self.context] if self.context else None,
                chosen=side == "chosen",
                compat=self.compat,
            )
            encoded = tokenizer("".join(piece.text for piece in pieces), return_offsets_mapping=True, verbose=False)
            ends, place = [], 0
            for piece in pieces:
                ends.append(place := place + len(piece.text))
            kinds = []
            piece = 0
            for start, _ in encoded["offset_mapping"]:
                while start >= ends[piece] and piece < len(pieces) - 1:
                    piece += 1
                kinds.append(pieces[piece].kind)
            found |= {f"{side}_ids": encoded["input_ids"], f"{side}_labels": kinds}
        return found

    def loss(self, batch: Preferences) -> Tensor:
        ranking = ranking_loss(batch.chosen, batch.rejected)
        if batch.labels is None:  # rows that somebody else tokenised
            return ranking
        assert batch.token_hidden is not None
        assert batch.ids is not None
        weights = {SEEN: self.beta, REASON: self.omega}
        head = self._model.lm_head  # where the base is quantised, its dtype need not be the hidden states'
        states = batch.token_hidden.to(next(head.parameters()).dtype)
        written = language_loss(states, batch.ids, batch.labels, head, weights)
        if self._log_metric:
            self._log_metric("ranking_loss", ranking.item())
            self._log_metric("language_loss", written.item())
        share = 1.0 if self.compat == "paper" else 0.5
        return share * ranking + self.alpha * written


def _output_weights(model: Any) -> Tensor:
    """(V, H) the language model's output layer, of which a classifier keeps nothing: the embeddings where they are
    one, else what the checkpoint holds."""
    from trl_rewards.models import checkpoint_weights

    config = model.config
    if config.tie_word_embeddings:
        return model.get_input_embeddings().weight.detach()
    found = checkpoint_weights(config.name_or_path, "lm_head.")
    if "weight" not in found:
        raise RewardError(
            f"{config.name_or_path!r} has no weights lm_head.weight; give objective 'themis' a causal language model"
        )
    return found["weight"].to(model.dtype)
