"""The seam with TRL: the only overrides of its trainers, each calling TRL's own method.

`_calculate_rewards` returns `[total | one column per source]`, with weights `[1, 0, …, 0]`, so that TRL logs every
source and trains on the total. `_generate_and_score_completions` puts the recipe's advantages where TRL's were.
`_save_checkpoint` and `_load_optimizer_and_scheduler` keep the pipeline's state beside TRL's own; `_save` leaves the
adapters of rewards out of the policy's; `_get_per_token_logps_and_entropies` lets rewards reuse what TRL has computed.
"""

from __future__ import annotations

import logging
import os
import statistics
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from trl_rewards.components import Context, RewardBatch
from trl_rewards.errors import RewardError
from trl_rewards.filtering import fill
from trl_rewards.maths import on_tokens, std, token_rewards
from trl_rewards.models.adapters import left_out
from trl_rewards.models.pretrained import keep_4bit_unpacked
from trl_rewards.models.shared_base import SharedBase
from trl_rewards.pipeline import Pipeline
from trl_rewards.plugins import load_plugins
from trl_rewards.samples import Samples
from trl_rewards.scoring import World
from trl_rewards.trainers.refill import Generated, merge, more_rows, staying
from trl_rewards.trainers.rollout import RolloutLogps
from trl_rewards.trainers.seam import LOGPS, check_seam
from trl_rewards.trainers.sharing import policy_base
from trl_rewards.trainers.state import CommittedState, checkpoint_folder, read_state, save_state

logger = logging.getLogger(__name__)

_SEAM = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_save": ["self", "output_dir", "state_dict"],
    **LOGPS,
}


if TYPE_CHECKING:  # it is mixed into trl.GRPOTrainer or trl.RLOOTrainer, which share no base that has these methods
    _Trainer = Any
else:
    _Trainer = object


class PipelineMixin(_Trainer):
    """A TRL trainer whose rewards and advantages may come from a Pipeline. Without one it is TRL's own."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *more: Any,
        pipeline: Pipeline | None = None,
        **options: Any,
    ):
        self.pipeline = pipeline
        self.shared_base: SharedBase | None = None
        self.last_batch: RewardBatch | None = None
        self.last_advantages: torch.Tensor | None = None
        if pipeline is None:
            super().__init__(model, reward_funcs, args, *more, **options)
            return
        if reward_funcs:
            raise ValueError(
                "give reward_funcs or pipeline, not both; load_reward makes a source of any reward function"
            )
        check_seam(type(self), _SEAM)
        args = args or self._default_arguments(model)
        self._check_arguments(args, pipeline)
        _check_data(options.get("train_dataset", more[0] if more else None), args, pipeline)
        self.shared_base = policy_base(pipeline, model, args)
        self._asked_logps: RolloutLogps | None = None
        self._context = Context(
            device=args.device,
            seed=args.seed,
            base_dir=pipeline.base_dir,
            shared_base=self.shared_base,
            log_metric=self._log_metric,
            log_extra=self._keep_extra,
        )
        self._extras: dict[str, list] = {}
        # Before the policy: a wrong path or a missing column should not cost its loading.
        pipeline.setup(self._context)
        columns = [_Column("total"), *(_Column(name) for name in pipeline.names)]
        super().__init__(model, columns, args, *more, **options)
        if len(self.reward_funcs) != 1 + len(pipeline.sources):
            raise ValueError(
                "an environment of yours has get_reward, which TRL adds as a reward of weight 1; make it a source: "
                "a function `def reward(environments, **_): return [e.get_reward() for e in environments]` and "
                "`use: ./file.py:reward`, and give get_reward another name"
            )
        self._context.tokenizer = self._tokenizer
        if any(source.reward.asks_logps() for source in pipeline.sources):
            self._context.rollout_logps = self._asked_logps = RolloutLogps(self)
        keep_4bit_unpacked(self.model)
        if self.shared_base is not None:
            self.shared_base.bind(self.model)
        self.reward_weights = torch.tensor([1.0] + [0.0] * len(pipeline.sources))
        self._tell = load_plugins().tell
        self._committed = CommittedState(pipeline.state_dict)
        self.add_callback(self._committed)

    @staticmethod
    def _default_arguments(model: Any) -> Any:
        """TRL's own, where none are given: what a pipeline cannot go with is looked for in them too."""
        raise NotImplementedError

    @classmethod
    def _check_arguments(cls, args: Any, pipeline: Pipeline) -> None:
        """ValueError for arguments that a pipeline takes the meaning of, or cannot go with. Trainers add their own."""
        for source in pipeline.sources:
            if (asked := source.reward.asks_logps()) and args.temperature != 1:
                raise ValueError(
                    f"{source.name!r} asks for log-probabilities of the rollout, which TRL makes of logits over the "
                    f"temperature: set temperature to 1.0, got {args.temperature}"
                )
            if "reference" in asked and args.beta == 0:
                raise ValueError(f"{source.name!r} asks for the reference's log-probabilities: beta 0 has none")
        if args.reward_weights is not None:
            raise ValueError("reward_weights goes with reward_funcs; with a pipeline each source has its own weight")
        if pipeline.advantage is not None and pipeline.advantage.undoes_affine():
            pipeline.warn_of_undone_shapers()
        if pipeline.advantage is not None and pipeline.advantage.divides_by_group():
            pipeline.warn_of_lost_properness()
        if args.save_strategy == "steps" and args.save_steps >= 1:
            per_generation = args.steps_per_generation * args.num_iterations
            if (args.save_steps * args.gradient_accumulation_steps) % per_generation:
                logger.warning(
                    "save_steps %s falls inside a generation batch (%s batches, each used %s times): a run resumed "
                    "from such a checkpoint generates that batch again and does not repeat exactly. Make save_steps × "
                    "gradient_accumulation_steps a multiple of %s.",
                    args.save_steps,
                    args.steps_per_generation,
                    args.num_iterations,
                    per_generation,
                )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.pipeline is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        training = self.model.training
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "completion")}
        columns.pop("completion_ids", None)
        if environments := getattr(self, "environments", None):  # GRPO's; RLOO has none
            columns["environments"] = environments
        samples = Samples(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids_list,
            columns=columns,
            step=self.state.global_step,
            max_steps=max(self.state.max_steps, 0),
        )
        self._context.trainer_state = self.state
        world = World(self.accelerator.process_index, self.accelerator.num_processes)
        group_size = self.num_generations if training else self.num_generations_eval
        try:
            with self._evaluating():
                batch = self.pipeline.score(
                    samples, group_size, world, self.accelerator.device, training, self.max_completion_length
                )
        except RewardError:
            self._save_what_was_trained()
            raise
        self._log_extras(len(prompts))
        self.last_batch = batch
        mode = "train" if training else "eval"
        for name, value in self.pipeline.metrics.items():
            self._metrics[mode][name].append(value)
        if training:
            self._tell("batch_scored", batch=batch, step=self.state.global_step)
        # TRL calls a row unscorable only if every column is NaN (grpo_trainer.py, unscorable_mask).
        matrix = torch.cat([batch.rewards[:, None], batch.scores.values], dim=1)
        return matrix.masked_fill(batch.rewards.isnan()[:, None], float("nan"))

    def _keep_extra(self, column: str, values: list) -> None:
        self._extras[column] = list(values)  # a call that is made again says it again

    def _log_extras(self, rows: int) -> None:
        """Hand rewards' extra columns to TRL, which needs one value per row of this rank, in the rows' order."""
        for column, values in self._extras.items():
            if len(values) == rows:
                self._log_completion_extra(column, values)
            else:
                logger.warning(
                    "log_extra %r came with %s values for %s rows and is left out: it needs a source that is called "
                    "with the whole batch (deterministic = False, no concurrency, no isolate)",
                    column,
                    len(values),
                    rows,
                )
        self._extras.clear()

    def _generate_and_score_completions(self, inputs):
        self.last_advantages = None
        if self.pipeline is not None and self._asked_logps is not None:
            self._asked_logps.clear()
        output = super()._generate_and_score_completions(inputs)
        if self.pipeline is None:
            return output
        assert self.last_batch is not None
        try:
            if self.pipeline.filter and self.model.training:
                output = self._filtered(output)
            self.last_batch = self._use_advantages(self.last_batch, output)
            if self.model.training:
                if self.pipeline.holds_back(self.last_batch):
                    self._hold_back(output)
                for name, value in self.pipeline.update(self.last_batch).items():
                    self._metrics["train"][name].append(value)
        except RewardError:
            self._save_what_was_trained()
            raise
        return output

    def _get_per_token_logps_and_entropies(self, model, *inputs, **options):
        found = super()._get_per_token_logps_and_entropies(model, *inputs, **options)
        if self.pipeline is not None and self._asked_logps is not None and not torch.is_grad_enabled():
            ids, attention, width, *_ = inputs
            self._asked_logps.record(model, ids, attention, width, found[0])
        return found

    def _filtered(self, output: dict[str, Any]) -> dict[str, Any]:
        """TRL's output of groups that stay, of this batch and of others where the filter asks for more, as far as
        there are enough of them; the rest is masked. `last_batch` goes with it."""
        filter, rounds = self.pipeline.filter, [self._generated(output)]
        group_size, rows = rounds[0].batch.scores.group_size, len(rounds[0].batch.rewards)
        wanted = rows // group_size
        while len(rounds) < filter.oversample + filter.refill:
            if len(rounds) >= filter.oversample and sum(staying(rounds)) >= wanted:
                break
            # A step may have several generation batches, by the place among its gradients.
            place = self._step % self.args.gradient_accumulation_steps
            seed = f"{self.args.seed} {self.state.global_step} {place} {len(rounds)}"
            more = more_rows(self.train_dataset, len(output["advantages"]), group_size, self.accelerator, seed)
            rounds.append(self._generated(super()._generate_and_score_completions(more)))
        stayed = staying(rounds)
        if len(rounds) > 1:
            chosen = [group * group_size + row for group in fill(stayed, wanted) for row in range(group_size)]
            merged = merge(rounds, chosen, self.accelerator, self._tokenizer.pad_token_id)
            output, self.last_batch = merged.output, merged.batch
            columns = self._log_columns()
            for name, values in merged.logs.items():
                columns[name].extend(values)
        left_out: Any = self.last_batch.left_out
        gone = self._local(left_out, output)
        output["completion_mask"] = output["completion_mask"].masked_fill(gone[:, None], 0)
        if "old_logps" in output:  # RLOO's sums over the mask as it was: a ratio to an empty sum would be infinite
            output["old_logps"] = output["old_logps"].masked_fill(gone, 0.0)
        if "num_items_in_batch" in output:
            output["num_items_in_batch"] = self.accelerator.gather(own_tokens(output).sum()).sum()
        self._metrics["train"]["filter/staying"].append(statistics.fmean(stayed))
        self._metrics["train"]["filter/trained"].append((~left_out).float().mean().item())
        self._metrics["train"]["filter/batches"].append(len(rounds))
        return output

    def _generated(self, output: dict[str, Any]) -> Generated:
        """What TRL has just generated and scored. What it logs of sources becomes that of all rows."""
        batch: Any = self.last_batch
        for name, scores in zip(batch.scores.names, batch.scores.values.unbind(dim=1), strict=True):
            self._metrics["train"][f"rewards/{name}/mean"][-1] = scores.nanmean().item()
            self._metrics["train"][f"rewards/{name}/std"][-1] = std(scores).item()
        rows = len(batch.rewards)
        return Generated(output, batch, {name: list(column)[-rows:] for name, column in self._log_columns().items()})

    def _log_columns(self) -> dict[str, Any]:
        """TRL's logs of a batch's rows, bounded deques, by column."""
        logs = self._logs
        columns = {name: logs[name] for name in ("prompt", "completion", "advantages")}
        nested = {f"{kind}/{name}": column for kind in ("rewards", "extra") for name, column in logs[kind].items()}
        return columns | nested

    def _use_advantages(self, batch: RewardBatch, output: dict[str, Any]) -> RewardBatch:
        """Put the recipe's advantages where TRL's are, in its output and in its logs; or note TRL's own.

        Returns the batch with what the advantage needed.
        """
        rows, advantage = len(batch.rewards), self.pipeline.advantage
        logged = self._logs["advantages"]  # a bounded deque, whose last rows are TRL's advantages of this batch
        if advantage is None:
            last = list(logged)[-rows:]
            self.last_advantages = torch.tensor(last) if len(last) == rows else None
            return batch
        batch = self._with_tokens(batch, output)
        with self._evaluating():
            advantages = self.pipeline.advantages(batch)
        assert advantages is not None
        advantages = self._finished(advantages, batch, output)
        output["advantages"] = self._local(advantages, output).to(output["advantages"].dtype)
        per_row = advantages if advantages.dim() == 1 else _row_means(advantages, batch.mask)
        self._log_advantages(per_row)
        return batch

    def _log_advantages(self, per_row: torch.Tensor) -> None:
        """Put (N,) advantages in the place of those that TRL has logged of this batch."""
        logged = self._logs["advantages"]
        for _ in range(min(len(per_row), len(logged))):
            logged.pop()
        logged.extend(per_row.tolist())
        self.last_advantages = per_row

    def _hold_back(self, output: dict[str, Any]) -> None:
        """Advantages of 0, in TRL's output and logs: the policy has no gradient from this batch but of a KL term."""
        assert self.last_batch is not None
        output["advantages"].zero_()
        self._log_advantages(torch.zeros_like(self.last_batch.rewards))

    def _with_tokens(self, batch: RewardBatch, output: dict[str, Any]) -> RewardBatch:
        """The batch with the (N, T) tensors that the advantage needs."""
        assert self.pipeline is not None
        assert self.pipeline.advantage is not None
        needs = self.pipeline.advantage.needs
        if self.pipeline.advantage.level == "sequence" and not needs & {"mask", "process_rewards", "token_rewards"}:
            return batch
        batch = with_mask(batch, mask := self._gathered(own_tokens(output)))
        if "token_rewards" in needs:
            batch = batch._replace(token_rewards=token_rewards(batch.rewards, batch.process_rewards, mask))
        return batch

    def _finished(self, advantages: torch.Tensor, batch: RewardBatch, output: dict[str, Any]) -> torch.Tensor:
        """What is trained on, (N,) or (N, T), made of what the advantage gave."""
        return advantages

    def _local(self, everyone: torch.Tensor, output: dict[str, Any]) -> torch.Tensor:
        """This rank's rows of a gathered (N,) or (N, T) tensor, as wide as its own completions."""
        rows = len(output["advantages"])
        mine = everyone[self.accelerator.process_index * rows :][:rows]
        return mine[:, : output["completion_ids"].size(1)] if mine.dim() == 2 else mine

    def _evaluating(self) -> Any:
        """Evaluation leaves no trace in the pipeline's state."""
        return nullcontext() if self.model.training else self.pipeline.frozen()

    def _gathered(self, local: torch.Tensor) -> torch.Tensor:
        """(n, t) of each rank -> (N, T) on every rank, padded with 0; T is the widest rank's."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(local, dim=1, pad_index=0))

    def _save_what_was_trained(self) -> None:
        """A reward stops the run on all ranks together: keep the finished steps first, whatever `save_strategy` is."""
        if not self.is_in_train or self.state.global_step == 0:
            return
        folder = checkpoint_folder(self)
        if not os.path.isdir(folder):
            self._save_checkpoint(self.model_wrapped, None)
        logger.error("a reward stopped the run; step %s is saved in %s", self.state.global_step, folder)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.pipeline is None:
            return
        # Not the state of this moment: a checkpoint on SIGTERM may come after a step's rewards and before its end.
        folder = checkpoint_folder(self, trial)
        save_state(folder, self.accelerator.process_index, self.pipeline.signature, self._committed.value)

    def _save(self, output_dir=None, state_dict=None):
        names = self._foreign_adapters()
        with left_out(self.accelerator.unwrap_model(self.model), names) if names else nullcontext():
            super()._save(output_dir, state_dict)

    def _foreign_adapters(self) -> list[str]:
        """Adapters in the policy's model that are no part of the policy, and are kept elsewhere."""
        return self.shared_base.adapters if self.shared_base is not None else []

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.pipeline is None or checkpoint is None:
            return
        state = read_state(checkpoint, self.accelerator.process_index, self.pipeline.signature)
        self.pipeline.load_state_dict(state)
        self._committed.value = state or self.pipeline.state_dict()


class _Column:
    """The name of a column for TRL, which asks each reward function for its `__name__`. Never called."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("rewards come from the pipeline")


def _check_data(dataset: Any, args: Any, pipeline: Pipeline) -> None:
    """ValueError for a dataset that is too small for one generation batch, where TRL would end at once with a warning,
    or that gives no other prompts to a filter that asks for some."""
    if (
        pipeline.filter
        and pipeline.filter.oversample + pipeline.filter.refill > 1
        and not isinstance(dataset, Dataset)
    ):
        raise ValueError("filter: oversample and refill take prompts by their index, which a streamed dataset has not")
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, and a generation batch takes {prompts} different ones "
            f"({args.generation_batch_size} completions, num_generations {args.num_generations}); make the batch "
            "smaller or the dataset longer"
        )


def own_tokens(output: dict[str, Any]) -> torch.Tensor:
    """(n, t) 1 where a token is the policy's own: no padding and no tool's words."""
    mask = output["completion_mask"]
    return mask * output["tool_mask"] if "tool_mask" in output else mask


def with_mask(batch: RewardBatch, mask: torch.Tensor) -> RewardBatch:
    """The batch with the mask (N, T) of the policy's own tokens, and its process rewards on these alone.

    What a tool's words were given is taken out of the totals, as far as these are sums.
    """
    if batch.process_rewards is None:
        return batch._replace(mask=mask)
    own = on_tokens(batch.process_rewards, mask)
    foreign = batch.process_rewards.sum(dim=1) - own.sum(dim=1)
    return batch._replace(mask=mask, process_rewards=own, rewards=batch.rewards - foreign)


def _row_means(advantages: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return advantages.mean(dim=1)
    return (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
