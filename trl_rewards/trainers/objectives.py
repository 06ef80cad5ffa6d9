"""What trainers with an objective have in common: its columns in the batch, its metrics in the log, its state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from trl_rewards.components import Context, Objective, OutcomeObjective
from trl_rewards.errors import RecipeError
from trl_rewards.loading import build
from trl_rewards.maths import column_values
from trl_rewards.models.pretrained import keep_4bit_unpacked
from trl_rewards.recipe import Recipe
from trl_rewards.scoring import World
from trl_rewards.trainers.seam import check_seam
from trl_rewards.trainers.state import CommittedState, checkpoint_folder, read_state, save_state

if TYPE_CHECKING:  # it is mixed into trl.RewardTrainer or trl.KTOTrainer, which share no base that has these methods
    _Trainer = Any
else:
    _Trainer = object

AnyObjective = Objective | OutcomeObjective
COLUMNS = "objective_columns"
"""Key of a batch under which the objective's columns travel."""
_SEAM = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_set_signature_columns_if_needed": ["self"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "log": ["self", "logs", "start_time"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
}


class ObjectiveMixin(_Trainer):
    """Overrides of a TRL trainer for an objective; without one, TRL's own to the last bit.

    `_take` comes before TRL's `__init__`, and `_begin` after it where there is an objective.
    """

    _own_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that the trainer makes for its objective, beside those that the objective reads."""

    def _take(self, objective: AnyObjective | None, args: Any, signature: str, base_dir: str) -> None:
        self.own_objective = objective  # `objective` is transformers' name for what a search optimises
        self.signature = signature
        self.pipeline = self.last_batch = self.last_advantages = None  # what reports ask of every trainer
        if objective is None:
            return
        check_seam(type(self), _SEAM)
        self._objective_metrics: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        objective.setup(
            Context(device=args.device, seed=args.seed, base_dir=base_dir, log_metric=self._log_objective_metric)
        )

    def _begin(self) -> None:
        keep_4bit_unpacked(self.model)
        self._generator = torch.Generator().manual_seed(self.args.seed + self.args.process_index)
        self._committed = CommittedState(self._state_of_objective)
        self.add_callback(self._committed)

    def _log_objective_metric(self, name: str, value: float) -> None:
        self._objective_metrics["train" if self.model.training else "eval"].setdefault(name, []).append(float(value))

    def log(self, logs, start_time=None):
        if self.own_objective is not None:
            mode = "train" if self.model.training else "eval"
            everyone: dict[str, list[float]] = defaultdict(list)
            for share in World.current().gather_objects(self._objective_metrics[mode]):
                for name, values in share.items():
                    everyone[name] += values
            self._metrics[mode].update(everyone)
            self._objective_metrics[mode] = {}
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.own_objective is not None:
            columns = self._signature_columns or []
            wanted = {*self.own_objective.reads(), *self._own_columns}
            self._signature_columns = [*columns, *(wanted - set(columns))]

    def _state_of_objective(self) -> dict[str, Any]:
        return {"objective": self.own_objective.state_dict(), "generator": self._generator.get_state()}

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.own_objective is not None:
            folder = checkpoint_folder(self, trial)
            save_state(folder, self.accelerator.process_index, self.signature, self._committed.value)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.own_objective is not None and checkpoint is not None:
            state = read_state(checkpoint, self.accelerator.process_index, self.signature)
            if state:
                self.own_objective.load_state_dict(state["objective"])
                self._generator.set_state(state["generator"])
            self._committed.value = self._state_of_objective()


class WithColumns:
    """TRL's collator, and beside its tensors what the objective reads."""

    def __init__(self, collator: Any, columns: Sequence[str]):
        self._collator, self._columns = collator, columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collator(rows)
        there = [name for name in self._columns if name in rows[0]]
        batch[COLUMNS] = {name: column_values([row[name] for row in rows]) for name in there}
        return batch


def objective_of(recipe: Recipe) -> AnyObjective | None:
    """The objective of a recipe; None where it leaves it to TRL. Raises RecipeError with every problem."""
    if recipe.objective is None:
        return None
    objective, problems = build("objective", recipe.objective.use, recipe.objective.options, recipe.base_dir)
    if problems:
        raise RecipeError(problems, source=f"{recipe.source}: objective {recipe.objective.use!r}")
    return objective


def missing_columns(objective: AnyObjective | None, columns: Sequence[str]) -> list[str]:
    """One problem per column that the objective reads and that is not among `columns`."""
    return [
        f"objective needs dataset column {name!r}; the dataset has {', '.join(columns)} (map it under dataset.columns)"
        for name in (objective.reads() if objective else ())
        if name not in columns
    ]
