"""Training the members of an ensemble of reward models, one after the other: what `members:` in a recipe does.

Pre-training and fine-tuning seeds are those of https://huggingface.co/papers/2312.09244, and the head that is trained
first and then shared is that of https://huggingface.co/papers/2401.12187, for members whose weights are averaged.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trl_rewards.errors import RecipeError
from trl_rewards.files import write_whole
from trl_rewards.members import KEPT, MemberOptions, folder_of
from trl_rewards.models.heads import HEADS, head_parameters
from trl_rewards.models.pretrained import default_device, free_memory
from trl_rewards.recipe import Recipe
from trl_rewards.scoring import World
from trl_rewards.train import build_trainer, end, run
from trl_rewards.trainers.sharing import splits_weights
from trl_rewards.trl_keys import parse_trl

MARK = "member.json"
"""In a member's folder once it is trained: what it was trained with."""
HEAD = "head.safetensors"
"""In `output_dir`: what the members' heads begin as, where that is the same for all; `head.json` is its mark."""


def train_members(recipe: Recipe, members: MemberOptions) -> list[str]:
    """Train each member that is not there yet, and return the folders of all.

    RecipeError if a folder holds a member of another recipe. Every process of a launch must call it.
    """
    training_args = parse_trl(recipe)[1]
    out, main = training_args.output_dir, World.current().rank == 0
    if members.head != "own" and (splitter := splits_weights(training_args)):
        problem = f"members.head: a head is put into whole models, and {splitter} splits them; use DDP or ZeRO-2"
        raise RecipeError([problem], recipe.source)
    if main:
        recipe.save(out)
    folders = [folder_of(out, index) for index in range(members.size)]
    trainer: Any = None
    head: dict[str, torch.Tensor] = {}
    for index, folder in enumerate(folders):
        member = _one(recipe, members, index, folder)
        made_with = member.raw | {"head": members.head, "probe": members.probe}
        if _is_done(os.path.join(folder, MARK), made_with, recipe.source):
            if main:
                print(f"member {folder} is trained already")
            continue
        if members.head != "own" and not head:
            head = _common_head(recipe, members, out)
        trainer = None  # before the next one is in memory
        _release()
        trainer = run(member, functools.partial(_set_head, head))
        if main:
            _mark(os.path.join(folder, MARK), made_with)
    if main:
        print("members " + " ".join(folders))
    if trainer is not None:
        end(trainer)
    return folders


def _one(recipe: Recipe, members: MemberOptions, index: int, folder: str, **keys: Any) -> Recipe:
    """The recipe of one member, `keys` being further ones of TRL's."""
    own = members.keys_of(index, recipe.trl) | keys | {"output_dir": folder}
    if name := recipe.trl.get("run_name"):
        own["run_name"] = f"{name}-{os.path.basename(folder)}"
    raw = {key: value for key, value in recipe.raw.items() if key != "members"} | own
    return replace(recipe, members=None, trl=recipe.trl | own, raw=raw)


def _common_head(recipe: Recipe, members: MemberOptions, out: str) -> dict[str, torch.Tensor]:
    """What the heads of all members begin as: drawn with the first member's seed, and trained on its base if it is to
    be probed."""
    unsaved = {"gradient_checkpointing": False, "save_strategy": "no", "load_best_model_at_end": False}
    own = members.probe | {"resume_from_checkpoint": None}
    first = _one(recipe, members, 0, os.path.join(out, "probe"), **(unsaved | own))
    file, mark, made_with = os.path.join(out, HEAD), os.path.join(out, "head.json"), first.raw | {"head": members.head}
    main, head = World.current().rank == 0, None
    if _is_done(mark, made_with, recipe.source):
        head = load_file(file) if main else None
    else:
        trainer = run(first, _train_head_alone, save=False) if members.head == "probed" else build_trainer(first)[0]
        if main:
            weights = head_parameters(_inner(trainer.model))
            head = {_plain(name): weight.detach().cpu().clone() for name, weight in weights.items()}
            save_file(head, file)
            _mark(mark, made_with)
    return World.current().gather_objects(head)[0]


def _train_head_alone(trainer: Any) -> None:
    head = {id(weight) for weight in head_parameters(_inner(trainer.model)).values()}
    for weight in trainer.model.parameters():
        weight.requires_grad_(id(weight) in head)


@torch.no_grad()
def _set_head(head: dict[str, torch.Tensor], trainer: Any) -> None:
    """Put the head's weights into a model; an empty head leaves it as it is. RecipeError if it has another one."""
    if not head:
        return
    parts = {n: weight for n, weight in _inner(trainer.model).named_parameters() if n.split(".")[0] in HEADS}
    shapes = {_plain(name): tuple(weight.shape) for name, weight in parts.items()}
    wanted = {name: tuple(weight.shape) for name, weight in head.items()}
    if shapes != wanted:
        raise RecipeError([f"members.head: the common head has {wanted}, and this member's base {shapes}"])
    for name, weight in parts.items():
        weight.copy_(head[_plain(name)])


def _inner(model: Any) -> Any:
    """The model itself, with adapter layers in it where it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain(name: str) -> str:
    """A weight's name without what PEFT puts into it for modules that are trained whole."""
    return name.replace(".modules_to_save.default", "").replace(".original_module", "")


def _is_done(file: str, made_with: dict[str, Any], source: str) -> bool:
    """Whether the mark is there, as the first process sees it. RecipeError on all if it is another recipe's."""
    differing = None
    if World.current().rank == 0 and os.path.isfile(file):
        was, wanted = json.loads(Path(file).read_text(encoding="utf-8")), _comparable(made_with)
        differing = [key for key in {**was, **wanted} if was.get(key) != wanted.get(key)]
    (differing, *_) = World.current().gather_objects(differing)
    if differing:
        problem = f"output_dir: {os.path.dirname(file)} was made with another {', '.join(differing)}"
        raise RecipeError([f"{problem}; delete that folder, or give another output_dir"], source)
    return differing is not None


def _mark(file: str, made_with: dict[str, Any]) -> None:
    write_whole(Path(file), json.dumps(_comparable(made_with), indent=2) + "\n")


def _comparable(made_with: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, without where it lies."""
    return json.loads(json.dumps({key: value for key, value in made_with.items() if key not in KEPT}, default=str))


def _release() -> None:
    """Free what the last trainer held, and end its run where a tracker would log the next one into it."""
    gc.collect()
    free_memory(default_device())
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
