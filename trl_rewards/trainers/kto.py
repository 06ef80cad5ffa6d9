"""Training a language model on labelled answers with an objective, in TRL's KTOTrainer."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from datasets import Dataset
from packaging.version import Version
from trl.trainer.utils import selective_log_softmax

from trl_rewards.components import OutcomeObjective, Outcomes
from trl_rewards.scoring import World
from trl_rewards.trainers.objectives import COLUMNS, ObjectiveMixin, WithColumns
from trl_rewards.trainers.seam import check_seam, default_folder

_FUSED_HEAD = Version(trl.__version__) >= Version("1.15")  # log-probabilities without whole logits in memory
_SEAM = {"compute_ref_log_probs": ["self", "model", "inputs"]}
_OF_TRLS_LOSS = {"beta": "objective.with.beta", "loss_type": "", "desirable_weight": "", "undesirable_weight": ""}
"""Arguments that an objective does not look at, and what does instead."""
_WITHOUT_KL = "apo_zero_unpaired"
"""TRL's loss whose data need no answers of other prompts, nor forward passes with them."""


class KTOTrainer(ObjectiveMixin, trl.KTOTrainer):
    """`trl.KTOTrainer` with one more argument, `objective=`; without it, TRL's own to the last bit.

    Data, reference and saving are TRL's with an objective too. The loss is the objective's, and nothing is computed
    for KTO's KL term, so that a batch of one row and any `train_sampling_strategy` will do.
    """

    own_objective: OutcomeObjective | None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *more: Any,
        objective: OutcomeObjective | None = None,
        signature: str = "",
        base_dir: str = ".",
        **options: Any,
    ):
        if objective is not None:
            args = args or trl.KTOConfig(default_folder(model, "KTO"))
            _check(objective, args, train_dataset)
            args.loss_type = _WITHOUT_KL
        self._take(objective, args, signature, base_dir)
        if objective is None:
            super().__init__(model, ref_model, args, data_collator, train_dataset, *more, **options)
            return
        check_seam(type(self), _SEAM)
        with _without_advice_on_weights():
            super().__init__(model, ref_model, args, data_collator, train_dataset, *more, **options)
        self._begin()
        self.data_collator = WithColumns(self.data_collator, objective.reads())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        objective = self.own_objective
        if objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self.model is not None
        inputs = dict(inputs)
        columns, labels = inputs.pop(COLUMNS, {}), inputs["label"].float()
        logps, outputs = self._logps(model, inputs, fused=_FUSED_HEAD and not return_outputs)
        if self.precompute_ref_logps:
            reference = inputs["ref_logps"]
        else:
            reference, _ = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        log_ratios = logps - reference.float()
        step, steps, training = self.state.global_step, max(self.state.max_steps, 0), self.model.training
        loss = objective.loss(Outcomes(log_ratios, labels, columns, step, steps, training))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._note(objective.beta * log_ratios.detach(), labels)
        return (loss, outputs) if return_outputs else loss

    def _logps(self, model: Any, inputs: dict[str, Any], fused: bool) -> tuple[torch.Tensor, Any]:
        """(B,) float32 log-probabilities of the completions, with gradient, and the model's output."""
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        if fused:
            outputs = model(**given, labels=ids.masked_fill(mask == 0, -100), fused_lm_head=True)
            # What prompt-learning adapters put in front is left out.
            return outputs.log_probs[:, -(ids.shape[1] - 1) :].float().sum(dim=1), outputs
        outputs = model(**given)
        tokens = selective_log_softmax(outputs.logits[:, -ids.shape[1] : -1].float(), ids[:, 1:])
        return (tokens * mask[:, 1:]).sum(dim=1), outputs

    def _note(self, rewards: torch.Tensor, labels: torch.Tensor) -> None:
        """Log what TRL logs of a batch's implicit rewards (B,), and the share that is on its label's side of 0."""
        right = labels > 0.5
        agree = (rewards > 0) == right
        parts = ((rewards * right).sum(), right.sum(), (rewards * ~right).sum(), (~right).sum(), agree.sum())
        sums = torch.stack([part.float() for part in parts])
        chosen, number, rejected, others, agreed = World.current().total(sums).tolist()
        assert self.model is not None
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["accuracy"].append(agreed / (number + others))
        if number:
            metrics["rewards/chosen"].append(chosen / number)
        if others:
            metrics["rewards/rejected"].append(rejected / others)
        if number and others:
            metrics["rewards/margins"].append(chosen / number - rejected / others)


def _check(objective: OutcomeObjective, args: Any, dataset: Any) -> None:
    """ValueError for what the objective would pass over in silence, and for what it cannot learn from."""
    usual = {option.name: option.default for option in args.__dataclass_fields__.values()}
    for name, instead in _OF_TRLS_LOSS.items():
        if vars(args)[name] not in (usual[name], _WITHOUT_KL):  # which another trainer may have left in it
            raise ValueError(
                f"{name} is of TRL's loss, which objective {objective.display_name!r} replaces; "
                + (f"write {instead}" if instead else "leave it out")
            )
    columns = (dataset.column_names or ()) if dataset is not None else ()
    if {"image", "images"} & set(columns):
        raise ValueError(f"objective {objective.display_name!r} is for text; the dataset has images")
    if isinstance(dataset, Dataset) and "label" in columns:
        wrong = next((label for label in dataset["label"] if not _is_label(label)), True)
        if not _is_label(wrong):
            raise ValueError(f"column 'label' must be true, false or a number from 0 to 1, got {wrong!r}")


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


@contextmanager
def _without_advice_on_weights() -> Generator[None]:
    """TRL recommends other `desirable_weight`s where labels are not balanced, which its own loss alone looks at."""
    logger = logging.getLogger("trl.trainer.kto_trainer")

    def keep(record: logging.LogRecord) -> bool:
        return "desirable_weight" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
