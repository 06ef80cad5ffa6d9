"""Preference training from rewards: sample, score, pair, train with TRL's DPOTrainer, and again.

A round's folder, `round-<k>` in `output_dir`, holds its pairs with a dataset card, TRL's checkpoints, and the policy
that it ended with; `round.json` there says that it is finished.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from pyarrow import parquet
from transformers.trainer_utils import get_last_checkpoint

from trl_rewards.components import Context, RewardBatch
from trl_rewards.errors import RecipeError, RewardError
from trl_rewards.files import write_whole
from trl_rewards.models.pretrained import keep_4bit_unpacked
from trl_rewards.models.sampling import TEMPLATE_COLUMNS, LocalSampler, sample_candidates, template_columns
from trl_rewards.pairs import Counts, Group, PairOptions, describe, groups_of, make_pairs, pair_rows, refused_arguments
from trl_rewards.pipeline import Pipeline
from trl_rewards.plugins import load_plugins
from trl_rewards.samples import Samples, Text, as_completion, completion_text
from trl_rewards.scoring import World
from trl_rewards.trainers.seam import check_seam, default_folder
from trl_rewards.trainers.state import read_state, save_state

logger = logging.getLogger(__name__)

PAIRS, FINISHED, HELD_OUT = "pairs.parquet", "round.json", "held_out.json"
_SEAM = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_get_output_dir": ["self", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
}


class DPOTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` with two more arguments, `pipeline=` and `pairs=`; without them, TRL's own to the last bit.

    With a pipeline `train_dataset` holds prompts and the columns that rewards read, `eval_dataset` those on which the
    held-out reward is measured, and `train()` runs the rounds.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *more: Any,
        pipeline: Pipeline | None = None,
        pairs: PairOptions | None = None,
        **options: Any,
    ):
        self.pipeline: Any = pipeline
        self.last_batch: RewardBatch | None = None
        self.last_advantages = None  # what reports ask of every trainer
        self.steps_before = 0
        """Optimiser steps of the rounds before this one."""
        self.measures = False
        """Whether a held-out reward is logged after each round."""
        self.stopped = False
        """Set by what ends the run early: no round is begun any more, and one that is not through is not finished."""
        self._folder: Path | None = None
        self._own_reference = False
        if pipeline is None:
            if pairs is not None:
                raise ValueError("pairs are made by a pipeline: give pipeline= too, or neither")
            super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *more, **options)
            return
        check_seam(type(self), _SEAM)
        self.pairs = pairs or PairOptions()
        args: Any = args or trl.DPOConfig(default_folder(model, "DPO"))
        _check(args, self.pairs, train_dataset)
        if self.pairs.source == "dataset":
            train_dataset = with_every_completion(train_dataset, self.pairs)
        self._context = Context(device=args.device, seed=args.seed, base_dir=pipeline.base_dir)
        # Before the policy: a wrong path or a missing column should not cost its loading.
        pipeline.setup(self._context)
        self._prompts, self._held_out = train_dataset, eval_dataset
        self.measures = eval_dataset is not None and self.pairs.held_out > 0
        self._run_folder = Path(args.output_dir)
        # TRL wants pairs when it is built, and the policy that writes them is loaded by it: each round replaces this.
        prompt = train_dataset[0]["prompt"]
        one = Dataset.from_list(
            [{"prompt": prompt, **dict.fromkeys(("chosen", "rejected"), as_completion("", prompt))}]
        )
        super().__init__(model, ref_model, args, data_collator, one, None, *more, **options)
        if self.pairs.source == "sample" or self.pairs.rounds > 1:
            self._refuse_sharded_weights()
        self._context.tokenizer = self._tokenizer
        keep_4bit_unpacked(self.model)
        if self.ref_model is not None:
            keep_4bit_unpacked(self.ref_model)
        policy: Any = self.model
        self._policy = policy.config.name_or_path or type(policy).__name__
        self._world = World(self.accelerator.process_index, self.accelerator.num_processes)
        self._tell = load_plugins().tell

    def _refuse_sharded_weights(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            problem = (
                "the policy samples from its weights in this process, which FSDP and DeepSpeed hold in their own way; "
                "use DDP (LoRA, or 4-bit weights), or write the candidates with `trl-rewards bon` and train on them "
                "with pairs: {source: dataset}"
            )
            raise RecipeError([problem], "DPOTrainer")

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **options: Any) -> Any:
        """Without a pipeline TRL's; with one all rounds that are left (`resume_from_checkpoint`: True or False)."""
        if self.pipeline is None:
            return super().train(resume_from_checkpoint, *more, **options)
        done = self._rounds_done(bool(resume_from_checkpoint))
        self.steps_before = sum(each["steps"] for each in done)
        if done:
            folder = self._round_folder(len(done))
            self._load_from_checkpoint(str(folder / "policy"))
            self.pipeline.load_state_dict(read_state(str(folder), self._world.rank, self.pipeline.signature))
        result = None
        try:
            for number in range(len(done) + 1, self.pairs.rounds + 1):
                if not self.stopped:
                    result = self._train_round(number, bool(resume_from_checkpoint))
        finally:
            self._folder = None
        if self.measures and self._world.rank == 0:
            known = json.loads((self._run_folder / HELD_OUT).read_text(encoding="utf-8"))
            values = " -> ".join(_number(found.get("eval_reward")) for found in known.values())
            print(f"\nheld-out reward, before and after each round: {values}")
        return result

    def _rounds_done(self, resume: bool) -> list[dict[str, Any]]:
        """What the finished rounds' `round.json` say. RewardError if there are rounds, and they are not to go on."""
        folders = [self._round_folder(number) for number in range(1, self.pairs.rounds + 1)]
        there = [str(folder) for folder in folders if folder.exists()]
        problem = None
        if there and not resume:
            problem = (
                f"{there[0]} is of an earlier run: go on with it by resume_from_checkpoint true, or give another "
                "output_dir"
            )
        self._world.raise_together(problem, self.accelerator.device)
        if not resume and self._world.rank == 0:
            (self._run_folder / HELD_OUT).unlink(missing_ok=True)
        done: list[dict[str, Any]] = []
        for folder in folders:
            if not (folder / FINISHED).is_file():
                break
            done.append(json.loads((folder / FINISHED).read_text(encoding="utf-8")))
        return self._of_main(done)

    def _train_round(self, number: int, resume: bool) -> Any:
        folder = self._folder = self._round_folder(number)
        self.state.global_step = 0  # of this round, as TRL counts
        if number == 1:
            self._measure(0)
        else:
            self.optimizer = self.lr_scheduler = None
        if number > 1 and self.pairs.reference == "previous":
            self._reference_is_policy()
        if self._of_main((folder / PAIRS).is_file()):
            table = parquet.read_table(folder / PAIRS) if self._world.rank == 0 else None
            rows = self._of_main(table.to_pylist() if table is not None else None)
            self.pipeline.load_state_dict(read_state(str(folder), self._world.rank, self.pipeline.signature))
        else:
            rows = self._make_pairs(number, folder)
        if self.stopped:  # by what was logged of its candidates
            return None
        tokenizer, args = cast(Any, self.processing_class), cast(trl.DPOConfig, self.args)
        self.train_dataset = self._prepare_dataset(Dataset.from_list(rows), tokenizer, args, "train")
        checkpoint = get_last_checkpoint(str(folder)) if resume else None
        result = super().train(self._of_main(checkpoint))
        if self._own_reference:  # it would be saved beside the policy
            self.accelerator.unwrap_model(self.model).delete_adapter("ref")
            self._own_reference = False
        if self.stopped:
            return result
        self.save_model(str(folder / "policy"))
        held_out = self._measure(number)
        steps = self.state.global_step
        self._write(folder / FINISHED, json.dumps({"round": number, "steps": steps, "held_out": held_out}) + "\n")
        self.steps_before += steps
        return result

    def _reference_is_policy(self) -> None:
        """Make DPO's reference the policy as it is."""
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(policy.state_dict())
            return
        # With LoRA TRL's reference is an adapter called "ref", or the base model where there is none.
        if "ref" not in policy.peft_config:
            policy.add_adapter("ref", policy.peft_config["default"])
            self._own_reference = True
        for name, parameter in policy.named_parameters():
            if ".default." in name:
                reference = policy.get_parameter(name.replace(".default.", ".ref."))
                reference.data = parameter.data.clone()
                reference.requires_grad_(False)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._folder is None else str(self._folder)

    def _round_folder(self, number: int) -> Path:
        return self._run_folder / f"round-{number}"

    def _make_pairs(self, number: int, folder: Path) -> list[dict[str, Any]]:
        """The pairs of a round, on every rank the same, saved with their card and the pipeline's state."""
        folder.mkdir(parents=True, exist_ok=True)
        data = self._prompts.select(round_rows(len(self._prompts), number, self.pairs, self.args.seed))
        work = folder / f"candidates-{self._world.rank}.jsonl"
        groups, metrics = self._scored(data, number, [self.args.seed, number], work, learn=True)
        counts, rows = Counts(), []
        for group in groups:
            pairs, counted = make_pairs(group, self.pairs, self.args.seed)
            counts += counted
            rows += pair_rows(group, pairs)
        if not rows:
            raise RewardError(f"round {number}: no pairs. {describe(counts)}")
        self.accelerator.print(f"round {number} of {self.pairs.rounds}: {describe(counts)}")
        margins = [row["margin"] for row in rows]
        metrics |= {"pairs/count": counts.pairs, "pairs/margin": statistics.fmean(margins)}
        metrics |= {
            "pairs/holes": counts.holes / counts.candidates,
            "frac_reward_zero_std": counts.ties / counts.prompts,
        }
        self.log(metrics)
        save_state(str(folder), self._world.rank, self.pipeline.signature, self.pipeline.state_dict())
        if self._world.rank == 0:
            self._save_pairs(folder, rows, number, counts)
        work.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return rows

    def _save_pairs(self, folder: Path, rows: list[dict[str, Any]], number: int, counts: Counts) -> None:
        written_by = f"{self._policy}, {f'after round {number - 1}' if number > 1 else 'before training'}"
        if self.pairs.source == "dataset":
            written_by = f"columns {', '.join(self.pairs.columns)} of the dataset"
        card = dataset_card(rows, counts, self.pairs, self.pipeline.names, self.pipeline.signature, written_by)
        self._write(folder / "README.md", card)
        Dataset.from_list(rows).to_parquet(folder / (PAIRS + ".tmp"))
        os.replace(folder / (PAIRS + ".tmp"), folder / PAIRS)  # last: it says that the pairs are there

    def _measure(self, number: int) -> dict[str, float]:
        """The held-out reward after a round (0: before the first), logged; {} without held-out prompts.

        Every time with the same prompts and random numbers, and without a trace in the pipeline's state.
        """
        if not self.measures:
            return {}
        file = self._run_folder / HELD_OUT
        known = self._of_main(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
        if str(number) in known:  # the run was interrupted after it
            return known[str(number)]
        data = self._held_out.select(range(min(self.pairs.held_out, len(self._held_out))))
        _, metrics = self._scored(data, max(number, 1), [self.args.seed, "held out"], None, learn=False)
        found = {f"eval_{name}": value for name, value in metrics.items()}
        self._write(file, json.dumps(known | {str(number): found}, indent=1) + "\n")
        self.log(dict(found))
        return found

    def _scored(
        self, data: Any, number: int, seed: Any, work: Path | None, learn: bool
    ) -> tuple[list[Group], dict[str, float]]:
        """Every prompt of `data` with its scored candidates, the same on every rank, and metrics.

        Each rank writes and scores its share of every chunk of prompts. Of prompts that do not divide among the ranks
        the last are left out.
        """
        world, ranks = self._world, self._world.size
        chunk = math.ceil(self.pairs.score_prompts / ranks) * ranks
        held_out = self.pairs.held_out_candidates
        total = len(data) // ranks * ranks
        if not total:
            raise RewardError(f"{len(data)} prompts are fewer than the {ranks} processes")
        shares = [_share(start, min(start + chunk, total), world) for start in range(0, total, chunk)]
        mine = [row for share in shares for row in share]
        answers, problem = [], None
        try:
            if learn and self.pairs.source == "dataset":
                answers = self._read(data, mine)
            else:
                answers = self._sample(data, mine, seed, work, self.pairs.candidates if learn else held_out)
        except Exception as error:  # the other ranks would wait for this one for ever
            logger.exception("no candidates")
            problem = f"{type(error).__name__}: {error}"
        world.raise_together(problem, self.accelerator.device)
        groups: list[Group] = []
        means: list[dict[str, float]] = []
        with nullcontext() if learn else self.pipeline.frozen():
            for share in shares:
                groups += self._score(data, share, answers[: len(share)], number, learn)
                answers = answers[len(share) :]
                means.append(self.pipeline.metrics)
        names = dict.fromkeys(name for each in means for name in each)  # a chunk may have taught a reward nothing
        metrics = {name: statistics.fmean(each[name] for each in means if name in each) for name in names}
        return groups, metrics | reward_metrics(groups)

    def _sample(self, data: Any, rows: list[int], seed: Any, work: Path | None, n: int) -> list[list[_Answer]]:
        """n answers of the policy, as it is, to each prompt of these rows."""
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if is_peft_model(policy) else policy  # its LoRA layers are inside
        drawn = sample_candidates(
            LocalSampler(policy, self._tokenizer, self._policy),
            list(data["prompt"]),
            n,
            self.pairs,
            seed=seed,
            rows=rows,
            **template_columns(data),
            work=work,
            signature=f"{self._policy} {self.steps_before} {self.pipeline.signature}",
            progress=self._world.rank == 0 and not self.args.disable_tqdm,
        )
        return [
            [_Answer(as_completion(each.text, data[row]["prompt"]), each.ids, each.ended) for each in group]
            for row, group in zip(rows, drawn, strict=True)
        ]

    def _read(self, data: Any, rows: list[int]) -> list[list[_Answer]]:
        """The completions that the dataset holds at these rows; RewardError where rows hold different numbers."""
        found, sizes = [], {len(_completions(data[row], self.pairs.columns)) for row in range(len(data))}
        if len(sizes) > 1 or min(sizes) < 2:
            raise RewardError(
                f"pairs.columns: rows hold {min(sizes)} to {max(sizes)} completions; every row must have the same "
                "number, two or more"
            )
        for row in rows:
            given = [as_completion(each, data[row]["prompt"]) for each in _completions(data[row], self.pairs.columns)]
            texts = [completion_text(completion) for completion in given]
            ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            found.append([_Answer(completion, each, True) for completion, each in zip(given, ids, strict=True)])
        return found

    def _score(self, data: Any, share: range, answers: list[list[_Answer]], number: int, learn: bool) -> list[Group]:
        """The groups of one chunk, those of all ranks in the order of the prompts."""
        n = len(answers[0])
        repeated = [data[row] for row in share for _ in range(n)]
        flat = [answer for group in answers for answer in group]
        names = [name for name in data.column_names if name not in ("prompt", *self.pairs.columns)]
        samples = Samples(
            prompts=[row["prompt"] for row in repeated],
            completions=[answer.completion for answer in flat],
            completion_ids=[answer.ids for answer in flat],
            columns={name: [row[name] for row in repeated] for name in names},
            step=number - 1,
            max_steps=self.pairs.rounds,
        )
        batch = self.pipeline.score(samples, n, self._world, self.accelerator.device, training=learn)
        self.last_batch = batch
        if learn:
            self._tell("batch_scored", batch=batch, step=self.steps_before)
            self.pipeline.update(batch)
        kept = [{name: data[row][name] for name in TEMPLATE_COLUMNS if name in names} for row in share]
        ended = [answer.ended for answer in flat]
        kept, ended = ([each for part in self._world.gather_objects(own) for each in part] for own in (kept, ended))
        return groups_of(batch, kept, ended)

    def _of_main(self, value: Any) -> Any:
        """The main process's value, on every rank: others may not see its files yet."""
        return self._world.gather_objects(value)[0]

    def _write(self, file: Path, text: str) -> None:
        """Write a file whole or not at all, by the main process."""
        if self._world.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, text, errors="replace")


class _Answer(NamedTuple):
    """One candidate before it is scored."""

    completion: Text
    ids: list[int]
    ended: bool


def round_rows(size: int, number: int, pairs: PairOptions, seed: int) -> list[int]:
    """Which rows of the prompts round `number` (from 1) takes: one stretch after the other of a shuffled order."""
    order = random.Random(seed).sample(range(size), size)
    each = pairs.prompts_per_round or max(size // pairs.rounds, 1)
    return [order[place % size] for place in range((number - 1) * each, number * each)]


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all candidates that have a score, under the names that GRPO's logs have."""
    every = [candidate for group in groups for candidate in group.candidates]
    columns = {"reward": [candidate.total for candidate in every]}
    columns |= {f"rewards/{name}": [candidate.scores[name] for candidate in every] for name in every[0].scores}
    metrics: dict[str, float] = {}
    for name, values in columns.items():
        there = [value for value in values if not math.isnan(value)]
        if there:
            metrics[name if name == "reward" else f"{name}/mean"] = statistics.fmean(there)
            metrics["reward_std" if name == "reward" else f"{name}/std"] = statistics.pstdev(there)
    metrics["completions/mean_length"] = statistics.fmean(candidate.tokens for candidate in every)
    metrics["completions/clipped_ratio"] = statistics.fmean(not candidate.ended for candidate in every)
    return metrics


def dataset_card(
    rows: Sequence[dict[str, Any]],
    counts: Counts,
    pairs: PairOptions,
    sources: Sequence[str],
    signature: str,
    written_by: str,
) -> str:
    """The README.md of a pair set: where it is from, what was left out, and what its columns are."""
    margins = sorted(row["margin"] for row in rows)
    numbers = "\n".join(f"| {name} | {value} |" for name, value in asdict(counts).items())
    settings = "\n".join(f"- `{name}: {value}`" for name, value in vars(pairs).items())
    scores = "\n".join(
        f"| `{source}/chosen`, `{source}/rejected` | raw scores of source `{source}`; null where it gave none |"
        for source in sources
    )
    return f"""---
configs:
- config_name: default
  data_files: {PAIRS}
tags:
- preference
- trl-rewards
---

# Preference pairs

{len(rows)} pairs. Candidates: {written_by}. Margins from {margins[0]:.4g} to {margins[-1]:.4g}, median
{statistics.median(margins):.4g}.

    {signature}

| count | |
| --- | --- |
{numbers}

`holes` are candidates without a total, `repeats` those with the text of another, `truncated` those cut at the length
limit; `alone`, `ties` and `filtered` count prompts without a pair: fewer than two candidates were left, all totals
were equal, or no pair had the margin, lengths or end that is asked for.

| column | |
| --- | --- |
| `prompt`, `chosen`, `rejected` | as TRL's DPOTrainer reads them |
| `margin` | `score_chosen` - `score_rejected`, the totals |
| `tokens_chosen`, `tokens_rejected` | lengths |
{scores}

Made with

{settings}
"""


def _number(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3f}"


def _share(start: int, end: int, world: World) -> range:
    """This rank's part of the prompts from `start` to `end`."""
    size = (end - start) // world.size
    return range(start + world.rank * size, start + (world.rank + 1) * size)


def _completions(row: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    """The completions of a dataset row: a list in one column, or one in each of several."""
    return list(row[columns[0]] or ()) if len(columns) == 1 else [row[column] for column in columns]


def with_every_completion(dataset: Dataset, pairs: PairOptions) -> Dataset:
    """The rows that hold all their completions: a missing one (None) is no empty answer, which a pair could reject.

    A warning says how many are left out; RecipeError where not enough are left.
    """
    rows = enumerate(dataset.select_columns(pairs.columns))
    there = [number for number, row in rows if None not in _completions(row, pairs.columns)]
    if len(there) == len(dataset):
        return dataset
    problem = f"pairs.columns: {len(dataset) - len(there)} of {len(dataset)} rows lack a completion (None)"
    if len(there) < (pairs.prompts_per_round or 1):
        raise RecipeError([f"{problem}; too few are left, {len(there)}"], "DPOTrainer")
    logger.warning("%s and are left out", problem)
    return dataset.select(there)


def _check(args: Any, pairs: PairOptions, dataset: Any) -> None:
    """RecipeError for arguments that rounds of pairs leave no room for."""
    if not isinstance(dataset, Dataset):
        got = type(dataset).__name__
        raise RecipeError([f"with a pipeline train_dataset must be a datasets.Dataset, got {got}"], "DPOTrainer")
    problems = refused_arguments(vars(args)) + pairs.missing_columns(dataset.column_names)
    if pairs.prompts_per_round and pairs.prompts_per_round > len(dataset):
        problems.append(
            f"prompts_per_round {pairs.prompts_per_round} is more than the {len(dataset)} prompts there are"
        )
    if problems:
        raise RecipeError(problems, "DPOTrainer")
