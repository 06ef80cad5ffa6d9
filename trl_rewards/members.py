"""Members of an ensemble of reward models: what their recipe's `members:` says, and the recipe of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KEPT = ("output_dir", "resume_from_checkpoint")
"""TRL's keys that are the whole recipe's."""


@dataclass(frozen=True, kw_only=True)
class MemberOptions:
    """Several reward models of one recipe, each in a folder of its own: `output_dir/member0`, `member1`, …"""

    count: int | None = None
    """How many. Member i has the recipe's seed plus i, for its head and the order of its data. None: as many as the
    lists under `vary` are long."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """TRL's keys in which members differ, a value for each: `{model_name_or_path: [seed0, seed1, seed2]}` is an
    ensemble of pre-training seeds."""
    head: Literal["own", "shared", "probed"] = "own"
    """What the score heads begin as: each its `own` random numbers; one `shared` draw; or what training a head alone
    on the first member's frozen base gives (`probed`), which members whose weights will be averaged need."""
    probe: dict[str, Any] = field(default_factory=dict)
    """TRL's keys of that training of the head, such as `{max_steps: 100, learning_rate: 1e-3}`; else the recipe's."""

    def __post_init__(self):
        lengths = {key: len(values) for key, values in self.vary.items()}
        if self.count is None and not lengths:
            raise ValueError("count is needed, or lists under vary")
        if self.size < 2 or set(lengths.values()) - {self.size}:
            given = ", ".join(f"{len(values)} of {key}" for key, values in self.vary.items()) or "none under vary"
            raise ValueError(f"two members or more, with a value each in every list; got count {self.count}, {given}")
        for where, keys in (("vary", self.vary), ("probe", self.probe)):
            if refused := [key for key in KEPT if key in keys]:
                raise ValueError(f"{where}: {refused[0]} is the whole recipe's")
        if self.probe and self.head != "probed":
            raise ValueError(f"probe: goes with head: probed, got head: {self.head}")

    @property
    def size(self) -> int:
        """How many members there are."""
        return self.count if self.count is not None else len(next(iter(self.vary.values())))

    def keys_of(self, member: int, trl: Mapping[str, Any]) -> dict[str, Any]:
        """TRL's keys in which a member differs from the recipe, whose own are `trl`."""
        seed = trl.get("seed")
        varied = {key: values[member] for key, values in self.vary.items()}
        return {"seed": (42 if seed is None else seed) + member} | varied

    def problems(self, trl: Mapping[str, Any]) -> list[str]:
        """What of the recipe's own TRL keys does not go with members."""
        found = []
        if trl.get("data_seed") is not None and "data_seed" not in self.vary:
            found.append("members: data_seed would give all of them the same order of data; leave it out")
        if trl.get("dataset_streaming") and self.head != "own" and not self.vary:
            found.append("members: streamed data have one order and the head is shared, so all would be the same")
        if trl.get("push_to_hub"):
            found.append("members: push_to_hub would push them all to one place; push their folders afterwards")
        if str(trl.get("resume_from_checkpoint") or "true").lower() not in ("true", "false"):
            found.append("members: each goes on from its own folder: set resume_from_checkpoint: true")
        return found


def folder_of(output_dir: str, member: int) -> str:
    """Where a member is trained."""
    return os.path.join(output_dir, f"member{member}")
