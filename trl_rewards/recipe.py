"""YAML -> Recipe: TRL's flat keys verbatim, ours checked strictly, every problem reported at once.

Our keys are `trainer`, `rewards`, `combine`, `shape`, `advantage`, `pairs`, `objective`, `members`, `share_base`,
`filter`, `alarms`, `pre_clip`, `dataset` and `base_dir`; any other is a field of TRL's `<Algo>Config`, `ModelConfig`,
`ScriptArguments` or `DatasetMixtureConfig` and keeps its name and meaning. A `trl grpo` config is a recipe: its
`reward_funcs` become sources.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trl_rewards.alarms import Alarm, parse_alarms
from trl_rewards.components import Advantage, TokenReward, TokenShaper
from trl_rewards.errors import RecipeError, did_you_mean
from trl_rewards.filtering import GroupFilter
from trl_rewards.loading import build, check_options
from trl_rewards.members import MemberOptions
from trl_rewards.pairs import PairOptions
from trl_rewards.plugins import load_plugins
from trl_rewards.preclip import PreClip
from trl_rewards.recipe_files import (
    OWN_KEYS,
    apply_overrides,
    find_recipe,
    read_yaml,
    source_name,
    word_value,
    write_yaml,
)
from trl_rewards.schedules import Schedule
from trl_rewards.trl_keys import TRAINERS, check_trl_keys

T = TypeVar("T")
ON_MISSING = ("renormalize", "group_mean", "drop_row", "drop_group", "fail")
BASE_KEYS = ("model_revision", "load_in_4bit", "load_in_8bit", "dtype")
"""TRL's keys that say how the policy's base is loaded."""
DEFAULT_CACHE = "~/.cache/trl_rewards/scores.sqlite"


@dataclass
class Spec:
    """`{use: …, with: {…}}`: a component and its options."""

    use: str
    options: dict[str, Any] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        return {"use": self.use} | ({"with": self.options} if self.options else {})

    def __str__(self) -> str:
        return f"{self.use}({_options_text(self.options)})" if self.options else self.use


@dataclass
class SourceSpec(Spec):
    """One entry under `rewards:`."""

    name: str = ""
    weight: Schedule = field(default_factory=lambda: Schedule("constant", 1.0, 1.0))
    shape: list[Spec] = field(default_factory=list)
    path: str = ""
    """Where the user wrote it: `rewards[0]`, `reward_funcs[0]` or `reward_model_name_or_path`."""
    running: dict[str, Any] = field(default_factory=dict)
    """timeout, retries, max_failures, concurrency, isolate, cache, on_missing, only_if: those the recipe sets."""


@dataclass
class DatasetSpec:
    """Our `dataset:` key: how the dataset's columns become prompts and what rewards read."""

    columns: dict[str, str] = field(default_factory=dict)
    """{name that components read: name in the dataset}"""
    chat: bool = False
    """Make a chat message of a string prompt, so that the model's chat template is used."""
    system_prompt: str | None = None
    """Put before each prompt as a system message; makes string prompts chat prompts."""


@dataclass
class Recipe:
    """A checked recipe. `Recipe.load` is the way to get one."""

    source: str
    """Path or bundled name, as the user typed it."""
    base_dir: str
    trainer: str
    rewards: list[SourceSpec]
    combine: Spec
    shape: list[Spec]
    advantage: Spec | None
    pairs: PairOptions | None
    """None where the trainer learns from no pairs."""
    objective: Spec | None
    dataset: DatasetSpec
    trl: dict[str, Any]
    """TRL's flat keys, overrides applied."""
    raw: dict[str, Any]
    """The whole recipe, overrides applied: what is saved with a run."""
    share_base: bool = False
    """Sources with an adapter and no path run on the policy's base in memory."""
    filter: GroupFilter | None = None
    alarms: list[Alarm] = field(default_factory=list)
    pre_clip: PreClip | None = None
    members: MemberOptions | None = None
    """None: one reward model is trained."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        overrides: Sequence[str] | Mapping[str, Any] = (),
        check_trl: bool = True,
    ) -> Recipe:
        """Read a recipe file, or a bundled one by name (`quickstart`), and check all of it.

        `overrides` are command-line words (`["--learning_rate", "2e-6", "--rewards.0.weight", "0.3"]`) or a mapping
        (`{"rewards.bleuberi.weight": 0.3}`). `check_trl=False` skips TRL's keys, which need torch to check.
        Raises RecipeError with every problem found.
        """
        source = os.fspath(path)
        file = find_recipe(source)
        folder = os.path.dirname(os.path.abspath(file))
        return cls.parse(read_yaml(file, source), overrides, source, folder, check_trl)

    @classmethod
    def parse(
        cls,
        raw: dict[str, Any],
        overrides: Sequence[str] | Mapping[str, Any] = (),
        source: str = "recipe",
        base_dir: str = ".",
        check_trl: bool = True,
    ) -> Recipe:
        """A recipe of the mapping that its file holds; `source` is what messages call it. Otherwise as `load`."""
        raw = copy.deepcopy(raw)
        problems = apply_overrides(raw, overrides)
        recipe, found = _parse(raw, source, base_dir)
        problems += found
        if recipe is not None:
            problems += check_components(recipe)
            if check_trl and recipe.trainer in TRAINERS:
                problems += check_trl_keys(recipe)
        if problems or recipe is None:
            raise RecipeError(problems, source=source)
        return recipe

    @property
    def trains_policy(self) -> bool:
        """Whether rewards train a policy; otherwise the dataset says what is good, to train a reward model on."""
        return "rewards" in TRAINERS[self.trainer].keys

    @property
    def signature(self) -> str:
        """What makes two runs comparable, in one line to paste beside a result."""
        sources = "+".join(
            f"{source.weight}*"
            + (f"{source.name}=" if source.name != source.use else "")
            + Spec.__str__(source)
            + "".join(f"|{shaper}" for shaper in source.shape)
            + (f"|missing:{source.running['on_missing']}" if "on_missing" in source.running else "")
            + (f"|only_if:{_one_line(source.running['only_if'])}" if "only_if" in source.running else "")
            for source in self.rewards
        )
        parts = [f"trainer:{self.trainer}"]
        if self.trains_policy:
            parts += [f"rewards:{sources}", f"combine:{self.combine}"]
            parts += [f"shape:{'|'.join(map(str, self.shape))}"] if self.shape else []
            parts += [f"pairs:{_pairs_text(self.pairs)}" if self.pairs else f"advantage:{self.advantage or 'trl'}"]
            parts += [f"base:{self.base}"] if self.share_base else []
            parts += [f"filter:{_options_text(vars(self.filter))}"] if self.filter else []
            parts += [f"pre_clip:{_options_text(vars(self.pre_clip))}"] if self.pre_clip else []
        else:
            parts += [f"objective:{self.objective or 'trl'}"]
            if self.members:
                said = {name: value for name, value in vars(self.members).items() if value}
                parts.append(f"members:{_options_text(said)}")
        parts += [f"{name}:{version}" for name, version in self.versions().items()]
        return "  ".join(parts)

    @property
    def base(self) -> str:
        """The policy's base and how it is loaded: what scores of a source on it depend on."""
        loaded = [f"{key}:{_one_line(self.trl[key])}" for key in BASE_KEYS if self.trl.get(key)]
        return ",".join([str(self.trl.get("model_name_or_path")), *loaded])

    def versions(self) -> dict[str, str]:
        """Versions of trl-rewards, trl and the plugins that own the recipe's components."""
        versions = {name: _version(name) for name in ("trl-rewards", "trl")}
        registry = load_plugins()
        used = [("reward", source.use) for source in self.rewards]
        used += [("combiner", self.combine.use)] if self.trains_policy else []
        used += [("shaper", spec.use) for spec in [*self.shape, *(s for source in self.rewards for s in source.shape)]]
        used += [("advantage", self.advantage.use)] if self.advantage else []
        used += [("objective", self.objective.use)] if self.objective else []
        for kind, use in used:
            if ":" in use:
                continue
            owner = registry.find(kind, use).owner
            plugin = next(plugin for plugin in registry.plugins if plugin.name == owner)
            if plugin.distribution and plugin.distribution not in versions:
                versions[plugin.distribution] = plugin.version
        return versions

    def save(self, folder: str | os.PathLike) -> None:
        """Write `recipe.yaml` (overrides applied) and `signature.txt` into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        whole = {"base_dir": os.path.abspath(self.base_dir)} | self.raw  # its relative paths must still be found
        write_yaml(Path(folder, "recipe.yaml"), f"# from {self.source}\n# {self.signature}\n", whole)
        Path(folder, "signature.txt").write_text(self.signature + "\n")


def spec_of_word(word: str, path: str) -> Spec:
    """A component from the command line: its name, or `{use: …, with: {…}}`. RecipeError says what is wrong."""
    problems: list[str] = []
    spec = _parse_spec(word_value(word), path, problems)
    if spec is None or problems:
        raise RecipeError(problems, path)
    return spec


# --- parsing our keys ------------------------------------------------------------------------------------------------


def _parse(raw: dict[str, Any], source: str, base_dir: str) -> tuple[Recipe | None, list[str]]:
    if {"arms", "expect"} <= raw.keys():
        return None, [f"a claim and not a recipe; `trl-rewards reproduce {source}` checks and runs it"]
    problems: list[str] = []
    trainer = raw.get("trainer", "grpo")
    if not isinstance(trainer, str) or trainer not in TRAINERS:
        problems.append(
            f"trainer: unknown trainer {trainer!r}{did_you_mean(str(trainer), TRAINERS)} ({', '.join(TRAINERS)})"
        )
        trainer = str(trainer)
    flat = {key: value for key, value in raw.items() if key not in OWN_KEYS}
    if isinstance(resume := flat.get("resume_from_checkpoint"), bool):  # a path for TRL, or a word for us
        flat["resume_from_checkpoint"] = str(resume).lower()
    takes_rewards = trainer not in TRAINERS or "rewards" in TRAINERS[trainer].keys
    entries = _sources_of_trl_keys(flat, problems) if takes_rewards else {}
    own = raw.get("rewards", [])
    if not isinstance(own, list):
        problems.append(f"rewards: must be a list of sources (`- use: name`), got {type(own).__name__}")
        own = []
    entries |= {f"rewards[{index}]": entry for index, entry in enumerate(own)}
    rewards = [parsed for path, entry in entries.items() if (parsed := _parse_source(entry, path, problems))]
    foreign = [key for kind in TRAINERS.values() for key in kind.keys if raw.get(key) is not None]
    if trainer in TRAINERS:
        for key in dict.fromkeys(foreign):
            if key not in TRAINERS[trainer].keys:
                takes = ", ".join(TRAINERS[trainer].keys)
                problems.append(f"{key}: trainer {trainer!r} does not take it (it takes {takes})")
    if not rewards and not problems and "rewards" in TRAINERS[trainer].keys:
        problems.append("rewards: at least one source is needed, such as `rewards: [{use: bleuberi}]`")
    seen: set[str] = set()
    for parsed in rewards:
        if parsed.name in seen:
            problems.append(f"{parsed.path}: another source is called {parsed.name!r} already; name it with `as:`")
        seen.add(parsed.name)
    if not isinstance(raw.get("share_base", False), bool):
        problems.append(f"share_base: must be true or false, got {raw['share_base']!r}")
    dataset = _parse_dataset(raw.get("dataset"), problems)
    if not takes_rewards and (dataset.chat or dataset.system_prompt):
        rows = "preference pairs" if trainer == "reward" else "labelled answers"
        problems.append(f"dataset: chat and system_prompt make chat prompts; {rows} must be chats already")
    recipe = Recipe(
        source=source,
        base_dir=str(raw.get("base_dir", base_dir)),
        trainer=trainer,
        rewards=rewards,
        combine=_parse_spec(raw.get("combine", "weighted_sum"), "combine", problems) or Spec("weighted_sum"),
        shape=_parse_shape(raw.get("shape"), "shape", problems),
        advantage=_parse_advantage(raw.get("advantage"), trainer, problems),
        pairs=_parse_pairs(raw.get("pairs"), problems) if trainer == "dpo" else None,
        filter=_parse_filter(raw.get("filter"), [parsed.name for parsed in rewards], problems),
        alarms=parse_alarms(raw.get("alarms"), [parsed.name for parsed in rewards], problems),
        pre_clip=_parse_pre_clip(raw.get("pre_clip"), problems),
        objective=_parse_spec(raw["objective"], "objective", problems) if raw.get("objective") is not None else None,
        members=parse_options(MemberOptions, "members", raw.get("members"), problems, "{count: 4}"),
        dataset=dataset,
        trl=flat,
        raw=raw,
        share_base=raw.get("share_base") is True and trainer in TRAINERS and "share_base" in TRAINERS[trainer].keys,
    )
    return recipe, problems


_TRL_REWARDS = {  # trl/scripts/grpo.py: the names that `reward_funcs` knows
    "accuracy_reward": Spec("trl.rewards:accuracy_reward"),
    "reasoning_accuracy_reward": Spec("trl.rewards:reasoning_accuracy_reward"),
    "think_format_reward": Spec("trl.rewards:think_format_reward"),
    "get_soft_overlong_punishment": Spec(
        "function",
        {
            "path": "trl.rewards:get_soft_overlong_punishment",
            "factory": {"max_completion_len": 1280, "soft_punish_cache": 256},
        },
    ),
}


SOURCE_KEYS_OF_TRL = ("reward_model_name_or_path", "reward_funcs", "reward_weights")


def _sources_of_trl_keys(flat: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """What a `trl grpo` config says about rewards, as {path: entry under `rewards:`}; taken out of `flat`."""
    entries: dict[str, Any] = {}
    if model := flat.pop("reward_model_name_or_path", None):
        entries["reward_model_name_or_path"] = {"use": "model", "with": {"path": model}}
    functions = flat.pop("reward_funcs", None) or []
    for index, name in enumerate(functions if isinstance(functions, list) else [functions]):
        if not isinstance(name, str):
            problems.append(f"reward_funcs: must be names, got {name!r}")
        elif name in _TRL_REWARDS:
            entries[f"reward_funcs[{index}]"] = {"as": name} | _TRL_REWARDS[name].resolved()
        elif "." in name:
            entries[f"reward_funcs[{index}]"] = {"use": ":".join(name.rsplit(".", 1))}
        else:
            problems.append(f"reward_funcs: unknown {name!r}{did_you_mean(name, _TRL_REWARDS)}; or a dotted path")
    weights = flat.pop("reward_weights", None)
    if weights is not None and not entries:
        problems.append("reward_weights: goes with reward_funcs; a source under rewards: has its own `weight:`")
    elif weights is not None and not (isinstance(weights, list) and all(map(_real, weights))):
        problems.append(f"reward_weights: must be a list of numbers, got {weights!r}")
    elif weights is not None and len(weights) != len(entries):
        problems.append(f"reward_weights: {len(weights)} weights for {len(entries)} reward functions")
    elif weights is not None:
        for entry, weight in zip(entries.values(), weights, strict=True):
            entry["weight"] = weight
    return entries


_RUNNING: dict[str, tuple[str, Any]] = {  # key -> (what is wanted, test)
    "on_missing": (" or ".join(ON_MISSING), lambda value: value in ON_MISSING),
    "timeout": ("seconds above 0", lambda value: _real(value) and value > 0),
    "retries": ("a whole number from 0", lambda value: _whole(value) and value >= 0),
    "max_failures": ("a share from 0 to 1", lambda value: _real(value) and 0 <= value <= 1),
    "concurrency": ("a whole number from 1", lambda value: _whole(value) and value >= 1),
    "isolate": ("true or false", lambda value: isinstance(value, bool)),
    "only_if": (
        "{source: name, at_least: number} or {source: name, missing: true}, with `otherwise: number` or without",
        lambda value: (
            isinstance(value, dict)
            and set(value) - {"otherwise"} in ({"source", "at_least"}, {"source", "missing"})
            and isinstance(value["source"], str)
            and (_real(value["at_least"]) if "at_least" in value else value["missing"] is True)
            and (value.get("otherwise") is None or _real(value["otherwise"]))
        ),
    ),
    "cache": ("true, false or a path", lambda value: isinstance(value, bool | str)),
}
_SOURCE_KEYS = ("use", "as", "weight", "with", "shape", *_RUNNING)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_source(entry: Any, path: str, problems: list[str]) -> SourceSpec | None:
    spec = _parse_spec(entry, path, problems, keys=_SOURCE_KEYS)
    if spec is None:
        return None
    entry = {"use": entry} if isinstance(entry, str) else entry
    name = source_name(entry)
    if not re.fullmatch(r"[\w.\-]+", name) or name == "total":
        problems.append(f"{path}.as: a name is letters, digits, '_', '-' and '.', and not 'total'; got {name!r}")
    try:
        weight = Schedule.parse(entry.get("weight", 1.0))
    except ValueError as error:
        problems.append(f"{path}.weight: {error}")
        weight = Schedule("constant", 1.0, 1.0)
    running = {key: entry[key] for key in _RUNNING if entry.get(key) is not None}
    for key, value in running.items():
        wanted, test = _RUNNING[key]
        if not test(value):
            hint = did_you_mean(value, ON_MISSING) if key == "on_missing" and isinstance(value, str) else ""
            problems.append(f"{path}.{key}: must be {wanted}, got {value!r}{hint}")
    if running.get("isolate") is True and "timeout" not in running:
        problems.append(f"{path}.isolate: needs a `timeout:`, at which a row's process is killed")
    shape = _parse_shape(entry.get("shape"), f"{path}.shape", problems)
    return SourceSpec(spec.use, spec.options, name, weight, shape, path, running)


def _parse_spec(entry: Any, path: str, problems: list[str], keys: Sequence[str] = ("use", "with")) -> Spec | None:
    if isinstance(entry, str):
        entry = {"use": entry}
    if not isinstance(entry, dict):
        problems.append(f"{path}: must be a name or {{use: name, with: {{…}}}}, got {entry!r}")
        return None
    for key in entry:
        if key not in keys:
            problems.append(f"{path}: unknown key {key!r}{did_you_mean(str(key), keys)} (it takes {', '.join(keys)})")
    use, options = entry.get("use"), entry.get("with")
    if not isinstance(use, str) or not use:
        problems.append(f"{path}.use: a component's name is needed, got {use!r}")
        return None
    if options is not None and not (isinstance(options, dict) and all(isinstance(key, str) for key in options)):
        problems.append(f"{path}.with: must be a mapping of options, got {options!r}")
        options = None
    return Spec(use, dict(options or {}))


def _parse_advantage(entry: Any, trainer: str, problems: list[str]) -> Spec | None:
    if entry is None and trainer in TRAINERS:
        entry = TRAINERS[trainer].advantage
    return _parse_spec(entry, "advantage", problems) if entry is not None else None


def _parse_shape(entries: Any, path: str, problems: list[str]) -> list[Spec]:
    if entries is None:
        return []
    if not isinstance(entries, list):
        entries = [entries]
    parsed = [_parse_spec(entry, f"{path}[{index}]", problems) for index, entry in enumerate(entries)]
    return [spec for spec in parsed if spec]


def parse_options(cls: type[T], key: str, entry: Any, problems: list[str], example: str) -> T | None:
    """An object of the options under one of our keys; None where there are none, or something is wrong with them."""
    if entry is None:
        return None
    if not (isinstance(entry, dict) and all(isinstance(name, str) for name in entry)):
        problems.append(f"{key}: must be a mapping of options, such as {example}, got {entry!r}")
        return None
    found = [problem.replace("with", key, 1) for problem in check_options(cls, entry)]
    if not found:
        try:
            return cls(**entry)
        except ValueError as error:
            found = [f"{key}: {error}"]
    problems += found
    return None


def _parse_pairs(entry: Any, problems: list[str]) -> PairOptions:
    if isinstance(entry, dict):
        entry = {name: value for name, value in entry.items() if value is not None}
    return parse_options(PairOptions, "pairs", entry, problems, "{candidates: 8}") or PairOptions()


def _parse_filter(entry: Any, names: Sequence[str], problems: list[str]) -> GroupFilter | None:
    source = entry.get("source") if isinstance(entry, dict) else None
    if isinstance(source, str) and source not in names:
        problems.append(
            f"filter.source: no source {source!r}{did_you_mean(source, names)}; there is {', '.join(names)}"
        )
    return parse_options(GroupFilter, "filter", entry, problems, "{source: accuracy}")


def _parse_pre_clip(entry: Any, problems: list[str]) -> PreClip | None:
    entry = {True: {}, False: None}[entry] if isinstance(entry, bool) else entry
    return parse_options(PreClip, "pre_clip", entry, problems, "{low: 0.001, high: 1000.0}, or true")


def _pairs_text(pairs: PairOptions) -> str:
    """The options that are not the defaults."""
    defaults = PairOptions()
    return _options_text({k: v for k, v in vars(pairs).items() if v != getattr(defaults, k)}) or "best_worst"


def _options_text(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}:{_one_line(value)}" for name, value in sorted(options.items()))


def _parse_dataset(entry: Any, problems: list[str]) -> DatasetSpec:
    if entry is None:
        return DatasetSpec()
    known = [option.name for option in dataclasses.fields(DatasetSpec)]
    if not isinstance(entry, dict):
        problems.append(f"dataset: must be a mapping with {', '.join(known)}; the dataset itself is `dataset_name`")
        return DatasetSpec()
    for key in entry:
        if key not in known:
            problems.append(
                f"dataset: unknown key {key!r}{did_you_mean(str(key), known)} (it takes {', '.join(known)})"
            )
    columns, chat, system = entry.get("columns") or {}, entry.get("chat", False), entry.get("system_prompt")
    if not isinstance(columns, dict) or not all(isinstance(item, str) for pair in columns.items() for item in pair):
        problems.append(
            f"dataset.columns: must map names to column names, such as {{answer: solution}}, got {columns!r}"
        )
        columns = {}
    if not isinstance(chat, bool):
        problems.append(f"dataset.chat: must be true or false, got {chat!r}")
    if system is not None and not isinstance(system, str):
        problems.append(f"dataset.system_prompt: must be a string, got {system!r}")
    return DatasetSpec(columns, bool(chat), system if isinstance(system, str) else None)


# --- checks that need more than the text -----------------------------------------------------------------------------


def check_components(recipe: Recipe) -> list[str]:
    """Problems with components: not found, wrong options, not for this trainer. Loads no model and no torch."""
    problems: list[str] = []

    def make(kind: str, spec: Spec, path: str) -> Any:
        component, found = build(kind, spec.use, spec.options, recipe.base_dir)
        problems.extend(_at(path, problem) for problem in found)
        return component

    sharing, scores_tokens = 0, False
    for source in recipe.rewards:
        path = source.path
        reward = make("reward", source, path)
        scores_tokens = scores_tokens or isinstance(reward, TokenReward)
        if reward is not None and reward.shares_base():
            sharing += 1
            problems += _check_sharing_source(source, recipe)
        for step, spec in enumerate(source.shape):
            shaper = make("shaper", spec, f"{path}.shape[{step}]")
            if isinstance(shaper, TokenShaper) and reward is not None and not isinstance(reward, TokenReward):
                problems.append(f"{path}.shape[{step}]: {spec.use!r} shapes tokens, and {source.use!r} scores none")
        if reward is not None:
            try:
                reward.check_running(source.running)
            except ValueError as error:
                problems.append(f"{path}.{error}")
        if reward is not None and source.running.get("cache"):
            if reward.scope == "group":
                problems.append(f"{path}.cache: {source.name!r} scores whole groups, whose scores are not kept")
            elif isinstance(reward, TokenReward):
                problems.append(f"{path}.cache: {source.name!r} scores tokens, and the cache keeps one number per row")
            elif not reward.deterministic:
                problems.append(f"{path}.cache: {source.name!r} does not say that it is deterministic")
            elif reward.sees_every_row:
                problems.append(f"{path}.cache: {source.name!r} is asked about every row, for what it logs of them")
    if recipe.share_base and not sharing and not problems:
        problems.append(
            "share_base: no source runs on the policy's base; give one an adapter that was trained on it, and no "
            "path: {use: model, with: {adapter: …}}"
        )
    if recipe.share_base and not recipe.trl.get("use_peft"):
        problems.append("share_base: the base must stay as it is, so the policy trains LoRA on it; set use_peft: true")
    if recipe.objective:
        objective = make("objective", recipe.objective, "objective")
        if objective is not None and recipe.trainer in ("reward", "kto") and objective.trainer != recipe.trainer:
            problems.append(f"objective: {recipe.objective.use!r} {_LEARNS_FROM[objective.trainer]}")
    if recipe.members:
        problems += recipe.members.problems(recipe.trl)
    make("combiner", recipe.combine, "combine")
    for step, spec in enumerate(recipe.shape):
        if isinstance(make("shaper", spec, f"shape[{step}]"), TokenShaper):
            problems.append(f"shape[{step}]: {spec.use!r} shapes one source's tokens; name it under that source")
    if recipe.advantage and recipe.trainer in TRAINERS and "advantage" in TRAINERS[recipe.trainer].keys:
        advantage = make("advantage", recipe.advantage, "advantage")
        if advantage is not None:
            problems += _check_advantage(advantage, recipe)
            if "process_rewards" in advantage.needs and not scores_tokens:
                problems.append(
                    f"advantage: {recipe.advantage.use!r} is made of process rewards, and no source scores tokens"
                )
    return problems


_LEARNS_FROM = {
    "reward": "learns from preference pairs (chosen, rejected); use trainer: reward",
    "kto": "learns from answers with a label each (prompt, completion, label); use trainer: kto",
}


def _check_sharing_source(source: SourceSpec, recipe: Recipe) -> list[str]:
    """Problems of a source that runs on the policy's base."""
    path = source.path
    if not recipe.share_base:
        return [f"{path}.with: so it runs on the policy's base: set share_base: true, or give it a base of its own"]
    problems = [
        f"{path}.{key}: a source on the policy's base runs in turn with the policy; leave {key} out, or give it a path"
        for key in ("timeout", "concurrency", "isolate")
        if source.running.get(key)
    ]
    policys = {"load_in_4bit": False, "load_in_8bit": False, "trust_remote_code": False} | recipe.trl
    policys |= {"device": "same", "offload": False}
    for key in (
        "load_in_4bit",
        "load_in_8bit",
        "dtype",
        "attn_implementation",
        "trust_remote_code",
        "device",
        "offload",
    ):
        if key in source.options and source.options[key] != policys.get(key):
            problems.append(
                f"{path}.with.{key}: got {source.options[key]!r}, but the source runs on the policy's base, which has "
                f"{policys.get(key, 'TRL’s default')!r}; leave it out, or give the source a path"
            )
    return problems


def _at(path: str, problem: str) -> str:
    return f"{path}.{problem}" if problem.startswith("with") else f"{path}.use: {problem}"


def _check_advantage(advantage: Advantage, recipe: Recipe) -> list[str]:
    kind, use = TRAINERS[recipe.trainer], recipe.advantage.use if recipe.advantage else ""
    problems = []
    if advantage.level not in kind.levels:
        problems.append(
            f"advantage: {use!r} gives one value per token, and {recipe.trainer}'s loss takes one per sequence; "
            "use trainer: grpo"
        )
    if lacking := sorted(advantage.needs - kind.provides):
        problems.append(
            f"advantage: {use!r} needs {', '.join(lacking)}, which trainer {recipe.trainer!r} does not have"
        )
    if (
        recipe.trainer == "ppo"
        and "token_rewards" not in advantage.needs
        and recipe.trl.get("kl_coef") != 0
        and recipe.trl.get("kl_in", "reward") == "reward"
    ):
        problems.append(
            f"advantage: {use!r} does not look at token rewards, where PPO's KL penalty is; set kl_in: loss, or "
            f"kl_coef: 0 (got {recipe.trl.get('kl_coef', 'the default 0.05')})"
        )
    if recipe.trainer == "rloo" and recipe.trl.get("beta") != 0:
        problems.append(
            "beta: RLOO puts its KL penalty into the advantage, so with `advantage:` it would be lost in silence; "
            f"set beta: 0.0 (got {recipe.trl.get('beta', 'TRL’s default 0.05')}), or leave out `advantage:`"
        )
    return problems


def _one_line(value: Any) -> str:
    """An option's value in the signature: on one line, the same for the same value."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, sort_keys=True, default=str)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
