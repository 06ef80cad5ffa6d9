"""Log-probabilities of a rollout for rewards that ask for them: TRL's own where it has them, else made once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel

from trl_rewards.models.adapters import using
from trl_rewards.models.scorer import padded_rollout

Key = tuple[str, tuple[int, ...]]


class RolloutLogps:
    """Of each completion's tokens, by the policy that wrote it ("policy") or by the trainer's reference ("reference").

    At temperature 1, where TRL's numbers are the models' own. `clear()` it before each rollout.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._known: dict[Key, torch.Tensor] = {}

    def clear(self) -> None:
        self._known.clear()

    def record(self, model: Any, ids: torch.Tensor, attention: torch.Tensor, width: int, logps: torch.Tensor) -> None:
        """Keep what TRL has computed of (B, L) ids: (B, width) log-probabilities of the last ones."""
        which = "reference" if self._is_reference(model) else "policy"
        tokens = attention[:, -width:].bool()
        for row, (row_ids, seen) in enumerate(zip(ids, attention.bool(), strict=True)):
            self._known[which, tuple(row_ids[seen].tolist())] = logps[row][tokens[row]].detach().float()

    def __call__(
        self, which: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Per row the (T,) float32 log-probabilities of the completion's tokens."""
        keys: list[Key] = [(which, (*p, *c)) for p, c in zip(prompts, completions, strict=True)]
        missing = [row for row, key in enumerate(keys) if key not in self._known]
        size = self._trainer.args.per_device_train_batch_size
        for start in range(0, len(missing), size):
            rows = missing[start : start + size]
            found = self._compute(which, [prompts[row] for row in rows], [completions[row] for row in rows])
            self._known |= {keys[row]: logps for row, logps in zip(rows, found, strict=True)}
        return [self._known[key] for key in keys]

    def _compute(
        self, which: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        trainer = self._trainer
        ids, attention, width = padded_rollout(prompts, completions, trainer._tokenizer.pad_token_id)
        device = trainer.accelerator.device
        model, context = trainer.model, nullcontext()
        if which == "reference":
            model = trainer.ref_model or trainer.accelerator.unwrap_model(model)
            if isinstance(model, PeftModel):
                context = using(model, "ref" if "ref" in model.peft_config else None)
        with torch.no_grad(), context:
            logps, *_ = trainer._get_per_token_logps_and_entropies(
                model, ids.to(device), attention.to(device), width, batch_size=len(prompts)
            )
        return [row[: len(completion)].float() for row, completion in zip(logps, completions, strict=True)]

    def _is_reference(self, model: Any) -> bool:
        if model is self._trainer.ref_model:
            return True
        model = self._trainer.accelerator.unwrap_model(model)
        if not isinstance(model, PeftModel):
            return False
        return model.active_adapter == "ref" or model.get_model_status().enabled is False
