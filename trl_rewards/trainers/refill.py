"""One batch of several: which prompts are generated for beside a batch's own, and the rows that are trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from trl_rewards.components import RewardBatch
from trl_rewards.errors import RewardError
from trl_rewards.samples import Samples


class Generated(NamedTuple):
    """What one call of TRL's generation and scoring gave."""

    output: dict[str, Any]
    """TRL's, of this process."""
    batch: RewardBatch
    """Of all processes."""
    logs: dict[str, list]
    """TRL's logs of the rows of all processes, by column."""


def more_rows(dataset: Any, rows: int, group_size: int, accelerator: Any, seed: str) -> list[dict[str, Any]]:
    """This process's `rows` rows of a batch of other prompts, `group_size` times each.

    The same `seed` draws the same prompts on every process, and again after a resume.
    """
    prompts = rows * accelerator.num_processes // group_size
    drawn = random.Random(seed).choices(range(len(dataset)), k=prompts)
    first = rows * accelerator.process_index
    return [dataset[drawn[row // group_size]] for row in range(first, first + rows)]


def staying(rounds: Sequence[Generated]) -> list[bool]:
    """Which groups of all rounds the filter lets stay."""
    kept: list[bool] = []
    for found in rounds:
        assert found.batch.left_out is not None
        kept += (~found.batch.left_out[:: found.batch.scores.group_size]).tolist()
    return kept


def merge(rounds: Sequence[Generated], rows: list[int], accelerator: Any, pad: int) -> Generated:
    """The chosen `rows` of all rounds' rows, as many as one round has. `pad`: the id that pads token ids."""
    return Generated(
        _merged_output([found.output for found in rounds], rows, accelerator, pad),
        _merged_batch([found.batch for found in rounds], rows),
        {
            name: _picked([found.logs[name] for found in rounds], rows)
            for name in rounds[0].logs
            if all(len(found.logs.get(name, ())) == len(found.batch.rewards) for found in rounds)
        },
    )


def _picked(parts: Sequence[list], rows: list[int]) -> list:
    every = [value for part in parts for value in part]
    return [every[row] for row in rows]


def _merged_output(rounds: Sequence[dict[str, Any]], rows: list[int], accelerator: Any, pad: int) -> dict[str, Any]:
    """This process's of the chosen rows. RewardError for what is not of rows and tokens, such as images."""
    size = len(rounds[0]["advantages"])
    mine = rows[accelerator.process_index * size :][:size]
    merged: dict[str, Any] = {}
    for name in rounds[0]:
        if name == "num_items_in_batch":  # of the whole batch, and counted anew
            merged[name] = rounds[0][name]
            continue
        if any(not isinstance(found[name], torch.Tensor) or len(found[name]) != size for found in rounds):
            raise RewardError(
                f"filter: oversample and refill cannot put batches with {name!r} together; leave them out"
            )
        first = name.startswith("prompt")  # prompts are padded on the left
        index = pad if name.endswith("_ids") else 0
        parts = [
            accelerator.gather(accelerator.pad_across_processes(found[name], 1, index, first))
            if found[name].dim() > 1
            else accelerator.gather(found[name])
            for found in rounds
        ]
        merged[name] = _stacked(parts, index, first)[mine]
    return merged


def _merged_batch(batches: Sequence[RewardBatch], rows: list[int]) -> RewardBatch:
    last = batches[-1]
    samples = Samples.concatenate([batch.samples for batch in batches])

    def chosen(tensors: Sequence[Any]) -> Any:
        return None if tensors[0] is None else _stacked(tensors, 0, first=False)[rows]

    return RewardBatch(
        rewards=chosen([batch.rewards for batch in batches]),
        scores=last.scores._replace(
            values=chosen([batch.scores.values for batch in batches]),
            status=chosen([batch.scores.status for batch in batches]),
        ),
        samples=samples.take(rows, last.scores.group_size),
        process_rewards=chosen([batch.process_rewards for batch in batches]),
        shaped=chosen([batch.shaped for batch in batches]),
        left_out=chosen([batch.left_out for batch in batches]),
        traces=None if last.traces is None else _picked([batch.traces or [] for batch in batches], rows),
    )


def _stacked(parts: Sequence[torch.Tensor], pad: int, first: bool) -> torch.Tensor:
    """(n, …) tensors one below the other, padded to the same width on the left (`first`) or on the right."""
    if parts[0].dim() == 1:
        return torch.cat([*parts])
    width = max(part.size(1) for part in parts)
    missing = [width - part.size(1) for part in parts]
    return torch.cat(
        [
            torch.nn.functional.pad(part, (more, 0) if first else (0, more), value=pad)
            for part, more in zip(parts, missing, strict=True)
        ]
    )
