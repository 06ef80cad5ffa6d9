"""sources -> holes -> combine -> shape -> advantage: what a trainer calls, and all that it knows of plugins."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trl_rewards.components import (
    Advantage,
    Combiner,
    Component,
    Context,
    Reward,
    RewardBatch,
    Scores,
    Shaper,
    Status,
    TokenShaper,
    TrainableReward,
    Unweighted,
    resolve_path,
)
from trl_rewards.errors import RecipeError, RewardError, did_you_mean
from trl_rewards.filtering import GroupFilter
from trl_rewards.loading import FunctionReward, as_reward, build, load_combiner
from trl_rewards.maths import explained, repeated_share, staying_groups, std
from trl_rewards.recipe import DEFAULT_CACHE, Recipe, Spec
from trl_rewards.samples import Samples
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import (
    Gate,
    Scored,
    Source,
    World,
    check_failures,
    check_gates,
    close_source,
    drop_rows,
    failures,
    fill_holes,
    learns_first,
    private_randomness,
    score_sources,
)

logger = logging.getLogger(__name__)

REPEATED_NGRAM = 4
"""Tokens of an n-gram whose repetition is measured."""


class Pipeline:
    """An ordered choice of components. A source may also be a TRL reward function, or the name of a reward model.

    Sources run on each rank's own rows and may be slow. Everything after them sees the gathered batch, is cheap, and
    gives the same numbers on every rank.
    """

    def __init__(
        self,
        sources: Sequence[Source | Reward | Callable[..., Any] | str],
        combine: Combiner | None = None,
        shape: Sequence[Shaper] = (),
        advantage: Advantage | None = None,
        signature: str = "",
        seed: int = 0,
        base_dir: str = ".",
        filter: GroupFilter | None = None,
    ):
        self.sources = [source if isinstance(source, Source) else _plain(source) for source in sources]
        if not self.sources:
            raise ValueError("a pipeline needs at least one reward source")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources must have different names, got {', '.join(names)}; name them with `as:`")
        for source in self.sources:
            source.reward.__name__ = source.name  # ty: ignore[missing-attribute]
        check_gates(self.sources)
        self.combine = combine or load_combiner("weighted_sum")
        self.combine.check_weights([source.weight.lowest for source in self.sources])
        self.shape = list(shape)
        self.advantage = advantage
        for path, component in self.components().items():
            try:
                component.check_sources(names)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        for path, source, shapers in [
            *((f"rewards.{source.name}.shape", source.reward, source.shape) for source in self.sources),
            ("shape", None, self.shape),
        ]:
            for index, shaper in enumerate(shapers):
                try:
                    shaper.check_place(source, shapers[:index], base_dir)
                except ValueError as error:
                    raise ValueError(f"{path}.{index}: {error}") from error
        self.signature = signature
        self.seed = seed
        self.base_dir = base_dir
        """Folder that components' relative paths start from."""
        if advantage and len(self.sources) > 1 and (passed := self._passed_over(advantage)):
            logger.warning("advantage %s takes each source alone: it passes over %s", advantage.display_name, passed)
        if filter and filter.source not in names:
            raise ValueError(f"filter: no source {filter.source!r}{did_you_mean(filter.source, names)}")
        self.filter = filter
        self.metrics: dict[str, float] = {}
        """Of the last batch: per source the share of holes and failures, seconds and weight, and what shows
        over-optimisation; equal on every rank."""
        self.reasons: dict[str, list[str]] = {}
        """Of the last batch: per source what this process's failed rows said, in their order."""

    @classmethod
    def from_recipe(cls, recipe: Recipe | str, **overrides: Any) -> Pipeline:
        """The pipeline of a recipe, or of its path or bundled name. Raises RecipeError with every problem."""
        if isinstance(recipe, str):
            recipe = Recipe.load(recipe, overrides)
        versions = recipe.versions()

        def make(kind: str, spec: Spec) -> Any:
            component, problems = build(kind, spec.use, spec.options, recipe.base_dir)
            if problems:
                raise RecipeError(problems, source=f"{recipe.source}: {kind} {spec.use!r}")
            return component

        sources = []
        for spec in recipe.rewards:
            running = dict(spec.running)
            cache, gate = running.pop("cache", None), running.pop("only_if", None)
            reward = make("reward", spec)
            base = recipe.base if reward.shares_base() else ""
            sources.append(
                Source(
                    name=spec.name,
                    reward=reward,
                    weight=spec.weight,
                    shape=[make("shaper", shaper) for shaper in spec.shape],
                    only_if=Gate(**gate) if gate else None,
                    cache=DEFAULT_CACHE if cache is True else resolve_path(cache, recipe.base_dir) if cache else None,
                    signature=f"{Spec.__str__(spec)} {versions} {_local_files(spec, reward, recipe.base_dir)}{base}",
                    use=(spec.use, spec.options, recipe.base_dir),
                    **running,
                )
            )
        try:
            return cls(
                sources,
                combine=make("combiner", recipe.combine),
                shape=[make("shaper", spec) for spec in recipe.shape],
                advantage=make("advantage", recipe.advantage) if recipe.advantage else None,
                signature=recipe.signature,
                seed=int(recipe.trl.get("seed", 42)),
                base_dir=recipe.base_dir,
                filter=recipe.filter,
            )
        except ValueError as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError([str(error)], recipe.source) from error

    def warn_of_undone_shapers(self) -> None:
        """For trainers whose advantages are z-scores within groups: affine shapers that no other follows do nothing.

        A source's own are among them where it is the only one.
        """
        steps = [(f"shape.{index}", shaper) for index, shaper in enumerate(self.shape)]
        if len(self.sources) == 1:
            (source,) = self.sources
            own = [(f"rewards.{source.name}.shape.{index}", shaper) for index, shaper in enumerate(source.shape)]
            steps = own + steps
        for path, _ in itertools.takewhile(lambda step: step[1].affine(), reversed(steps)):
            logger.warning(
                "%s changes nothing: it scales and shifts all rewards of a prompt alike, which the z-score within "
                "groups undoes. Leave it out, or set `advantage: {use: center}`",
                path,
            )

    def warn_of_lost_properness(self) -> None:
        """For trainers that divide by the deviation within groups: a proper scoring rule is one no more."""
        for source in self.sources:
            if source.reward.proper() and (source.weight.start or source.weight.end):
                logger.warning(
                    "rewards.%s pays best for an honest report, but not once it is divided by the deviation within "
                    "groups, which depends on the reports: lies then pay. Set `advantage: {use: center}`, or "
                    "`scale_rewards: none` without an advantage",
                    source.name,
                )

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def _passed_over(self, advantage: Advantage) -> str:
        """What the recipe asks for and an advantage of each source alone does not see."""
        ignored = advantage.passes_over()
        combine = "combine" if "combine" in ignored and self.combine.display_name != "weighted_sum" else ""
        return " and ".join(filter(None, [combine, "shape" if "shape" in ignored and self.shape else ""]))

    def components(self) -> dict[str, Component]:
        """Every component by its path in a recipe, such as `rewards.bleuberi.shape.0`."""
        found: dict[str, Component] = {}
        for source in self.sources:
            found[f"rewards.{source.name}"] = source.reward
            found |= {f"rewards.{source.name}.shape.{index}": shaper for index, shaper in enumerate(source.shape)}
        found["combine"] = self.combine
        found |= {f"shape.{index}": shaper for index, shaper in enumerate(self.shape)}
        if self.advantage:
            found["advantage"] = self.advantage
        return found

    def missing_columns(self, columns: Sequence[str]) -> list[str]:
        """One problem per component that reads a column which is not among `columns`."""
        problems = []
        for path, component in self.components().items():
            for column in component.reads():
                if column not in ("*", *columns):
                    there = ", ".join(columns)
                    problems.append(
                        f"{path} needs dataset column {column!r}; the dataset has {there} "
                        "(map it under dataset.columns)"
                    )
        return problems

    def setup(self, context: Context) -> None:
        """Load what is heavy in every component."""
        context.sources = {source.name: source.reward for source in self.sources}
        for component in self.components().values():
            if component.used_alone:  # two of its models may not fit side by side
                component.close()
                component.used_alone = False
            component.setup(context)

    def close(self) -> None:
        """End worker processes and release what components hold."""
        for source in self.sources:
            close_source(source)

    def score(
        self,
        samples: Samples,
        group_size: int = 1,
        world: World | None = None,
        device: Any = "cpu",
        training: bool = False,
        max_length: int | None = None,
    ) -> RewardBatch:
        """This rank's rows in, the gathered batch with its totals out. Every rank must call it.

        `training`: the filter leaves groups out, and rewards that learn first do so. `max_length`: tokens at which
        completions are cut, which the filter may ask for. Raises RewardError on all ranks if a source is broken on
        one, or fails more often than it may.
        """
        world = world or World.current()
        local_samples = samples
        local = score_sources(self.sources, samples, group_size, world, device, self.seed)
        self.reasons = dict(zip(self.names, local.reasons, strict=True))
        values, status = self._gathered(self.sources, local, world)
        global_reads = {column for component in self._global_components() for column in component.reads()}
        samples = samples.only(global_reads)
        everyone = Samples.concatenate(world.gather_objects(samples)) if world.size > 1 else samples
        everyone = everyone.take(range(len(everyone)), group_size)
        progress = samples.step / samples.max_steps if samples.max_steps else 0.0
        weights = [source.weight.at(progress) for source in self.sources]
        raw = Scores(tuple(self.names), values, status, torch.tensor(weights, device=device), group_size)
        tokens = _gathered_tokens(local.tokens, samples, world, device)
        left_out = self._left_out(raw, everyone, max_length) if training and self.filter else None
        learnt: dict[str, float] = {}
        if training and (first := [source for source in self.sources if learns_first(source.reward)]):
            rewards = torch.zeros(len(everyone), device=device)
            rewards = rewards if left_out is None else rewards.masked_fill(left_out, float("nan"))
            learnt = self._learn(first, RewardBatch(rewards, raw, everyone, left_out=left_out))
            raw, tokens = self._scored_again(first, raw, tokens, local_samples, world, device)
        if left_out is not None:
            tokens = {k: values.masked_fill(left_out[:, None], torch.nan) for k, values in tokens.items()}
        with private_randomness(self.seed + samples.step):  # the same on every rank
            tokens = {k: self._shape_tokens(self.sources[k], values, raw, everyone) for k, values in tokens.items()}
            shaped, rewards = self._combine(raw, tokens, everyone, left_out)
        if rewards.isinf().any():
            raise RewardError("the total reward is infinite on some rows; add `shape: [{use: clip, with: {…}}]`")
        self.metrics = self._measure(raw, rewards, local.seconds, world, device) | learnt
        self.metrics |= self._signs(raw._replace(values=shaped), rewards, local_samples, everyone, world, device)
        process = None
        if tokens:
            process = torch.stack([values.nan_to_num(nan=0.0) * weights[k] for k, values in tokens.items()]).sum(dim=0)
        return RewardBatch(
            rewards.float(),
            raw,
            everyone,
            shaped=shaped,
            process_rewards=process,
            left_out=left_out,
            traces=self._traces(local.traces, len(samples), world),
        )

    def advantages(self, batch: RewardBatch) -> torch.Tensor | None:
        """(N,) or (N, T) from the recipe's advantage, NaN-free; None if the recipe leaves advantages to TRL."""
        if self.advantage is None:
            return None
        absent = sorted(name for name in self.advantage.needs if getattr(batch, name) is None)
        if absent:
            raise RewardError(f"advantage needs {', '.join(absent)}, which this trainer does not have")
        with private_randomness(self.seed + batch.samples.step):
            advantages = _blamed("advantage", self.advantage, batch).float()
        rows = advantages.shape[0] if advantages.dim() else 0
        if rows != len(batch.rewards) or advantages.dim() > 2:
            wanted = f"({len(batch.rewards)},)" if self.advantage.level == "sequence" else f"({len(batch.rewards)}, T)"
            raise RewardError(f"advantage returned shape {tuple(advantages.shape)}, wanted {wanted}")
        holes = batch.rewards.isnan()
        advantages = advantages.masked_fill(holes if advantages.dim() == 1 else holes[:, None], 0.0)
        if not advantages.isfinite().all():
            raise RewardError("the advantage gave NaN or infinity for a row that has a reward")
        return advantages

    def holds_back(self, batch: RewardBatch) -> bool:
        """Whether a source that learns wants the policy not to learn from this batch. Every rank must call it."""
        learners = [source.reward for source in self.sources if isinstance(source.reward, TrainableReward)]
        return any(reward.holds_back(batch) for reward in learners)

    def update(self, batch: RewardBatch) -> dict[str, float]:
        """Let the sources that learn do so from a scored batch. Metrics, as `rewards/<source>/<metric>`.

        Those that learn first have done so while it was scored. Every rank must call it, and learns from the same
        batch with the same random numbers.
        """
        return self._learn([source for source in self.sources if not learns_first(source.reward)], batch)

    def _learn(self, sources: Sequence[Source], batch: RewardBatch) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for source in sources:
            if isinstance(source.reward, TrainableReward):
                with private_randomness(self.seed + batch.samples.step):
                    learnt = source.reward.update(batch)
                metrics |= {f"rewards/{source.name}/{name}": value for name, value in learnt.items()}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state of every component, by its path in the recipe."""
        return copy.deepcopy({path: component.state_dict() for path, component in self.components().items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. ValueError if the checkpoint is of another pipeline."""
        components = self.components()
        if unknown := sorted(path for path in state if state[path] and path not in components):
            raise ValueError(f"the checkpoint holds state of {', '.join(unknown)}, which this pipeline does not have")
        for path, component in components.items():
            if path in state:
                component.load_state_dict(copy.deepcopy(state[path]))
            elif component.state_dict():
                raise ValueError(f"the checkpoint holds no state of {path}, which this pipeline needs")

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Scoring inside leaves no trace in any state: for evaluation."""
        state = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(state)

    def _traces(self, found: dict[int, list[Any]], rows: int, world: World) -> list[dict[str, Any]] | None:
        """What the sources say of each row of all ranks; None where none of them says any."""
        if not found:
            return None
        mine = [
            {self.names[k]: traces[row] for k, traces in found.items() if traces[row] is not None}
            for row in range(rows)
        ]
        return [trace for share in world.gather_objects(mine) for trace in share]

    def _global_components(self) -> list[Component]:
        """Those that see the gathered batch: all but sources, and sources that learn from it."""
        local = {f"rewards.{source.name}" for source in self.sources if not isinstance(source.reward, TrainableReward)}
        return [component for path, component in self.components().items() if path not in local]

    def _shape_tokens(self, source: Source, values: torch.Tensor, raw: Scores, samples: Samples) -> torch.Tensor:
        """A source's token values (N, T), bent by its token shapers."""
        for index, shaper in enumerate(source.shape):
            if isinstance(shaper, TokenShaper):
                path = f"rewards.{source.name}.shape.{index}"
                bent = _blamed(path, shaper.shape_tokens, values, raw, samples)
                if bent.shape != values.shape or not torch.equal(bent.isnan(), values.isnan()):
                    raise RewardError(f"{path} must give a number where the source does, and NaN elsewhere")
                values = bent.float()
        return values

    def _left_out(self, raw: Scores, samples: Samples, max_length: int | None) -> torch.Tensor:
        """(N,) whether the filter leaves a row's group out."""
        assert self.filter is not None
        outcomes = raw.values[:, raw.names.index(self.filter.source)]
        limit = max_length if self.filter.truncated == "drop" else None
        lengths = torch.tensor(samples.lengths if limit else [0] * len(samples), device=outcomes.device)
        staying = staying_groups(outcomes, lengths, raw.group_size, self.filter.low, self.filter.high, limit)
        return ~staying.repeat_interleave(raw.group_size)

    @staticmethod
    def _gathered(sources: Sequence[Source], local: Scored, world: World) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and status of all ranks (N, K). RewardError if one of these sources fails more often than it may."""
        values, status = world.gather(local.values), world.gather(local.status)
        reasons: list[list[str]] = [[] for _ in sources]
        if failures(status).any():
            for rank_reasons in world.gather_objects(local.reasons):
                reasons = [known + more for known, more in zip(reasons, rank_reasons, strict=True)]
        for k, source in enumerate(sources):
            check_failures(source, status[:, k], reasons[k])
        return values, status

    def _scored_again(
        self,
        sources: Sequence[Source],
        raw: Scores,
        tokens: dict[int, torch.Tensor],
        samples: Samples,
        world: World,
        device: Any,
    ) -> tuple[Scores, dict[int, torch.Tensor]]:
        """The batch's scores and token values with these sources' put in anew."""
        local = score_sources(sources, samples, raw.group_size, world, device, self.seed)
        values, status = raw.values.clone(), raw.status.clone()
        columns = [self.sources.index(source) for source in sources]
        values[:, columns], status[:, columns] = self._gathered(sources, local, world)
        anew = _gathered_tokens(local.tokens, samples, world, device)
        return raw._replace(values=values, status=status), tokens | {columns[k]: found for k, found in anew.items()}

    def _combine(
        self, raw: Scores, tokens: dict[int, torch.Tensor], samples: Samples, left_out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Source scores as they enter the combiner (N, K), and totals (N,)."""
        policies = [source.on_missing for source in self.sources]
        values = raw.values.clone()
        for k, shaped_tokens in tokens.items():
            rows = ~shaped_tokens.isnan().all(dim=1)
            values[rows, k] = shaped_tokens[rows].nansum(dim=1)
        if left_out is not None:
            values[left_out] = torch.nan
        # Rows to drop go first: they must enter no statistic on the way.
        kept = drop_rows(values, policies, raw.group_size)
        shaped = fill_holes(self._shape_sources(kept, samples), policies, raw.group_size)
        rewards = _one_per_row("combine", self.combine, raw._replace(values=shaped), samples)
        holes = shaped.isnan()
        if (rewards.isnan() & ~holes.any(dim=1)).any() or (~rewards.isnan() & holes.all(dim=1)).any():
            raise RewardError("combine must give a number where every source has one, and NaN where none has")
        for index, shaper in enumerate(self.shape):
            rewards = _shape(f"shape.{index}", shaper, rewards, samples)
        return shaped, rewards

    def _shape_sources(self, values: torch.Tensor, samples: Samples) -> torch.Tensor:
        columns = list(values.unbind(dim=1))
        for k, source in enumerate(self.sources):
            for index, shaper in enumerate(source.shape):
                if isinstance(shaper, TokenShaper):
                    continue
                columns[k] = _shape(f"rewards.{source.name}.shape.{index}", shaper, columns[k], samples)
        return torch.stack(columns, dim=1)

    def _measure(
        self, scores: Scores, rewards: torch.Tensor, seconds: list[float], world: World, device: Any
    ) -> dict[str, float]:
        slowest = world.gather(torch.tensor([seconds], device=device)).amax(dim=0).tolist()
        holes = scores.values.isnan().float().mean(dim=0).tolist()
        skipped = (scores.status == Status.SKIPPED).float().mean(dim=0).tolist()
        failed = failures(scores.status).float().mean(dim=0).tolist()
        weights = scores.weights.tolist()
        metrics = {"rewards/total/missing": rewards.isnan().float().mean().item()}
        for k, name in enumerate(scores.names):
            metrics[f"rewards/{name}/missing"] = holes[k]
            metrics[f"rewards/{name}/failed"] = failed[k]
            if self.sources[k].only_if is not None:
                metrics[f"rewards/{name}/saved"] = skipped[k]
            metrics[f"rewards/{name}/weight"] = weights[k]
            metrics[f"rewards/{name}/seconds"] = slowest[k]
        return metrics

    def _signs(
        self,
        scores: Scores,
        rewards: torch.Tensor,
        local: Samples,
        everyone: Samples,
        world: World,
        device: Any,
    ) -> dict[str, float]:
        """What shows over-optimisation; what this batch says nothing of is left out."""
        shares = [
            repeated_share(items, REPEATED_NGRAM) for items in local.completion_ids or map(str.split, local.texts)
        ]
        repeated = world.gather(torch.tensor(shares, dtype=torch.float64, device=device)).mean().item()
        signs = {"completions/repetition": repeated}
        if everyone.completion_ids:
            lengths = torch.tensor(everyone.lengths, device=rewards.device).double()
            correlation, share = explained(rewards, lengths, scores.group_size)
            signs |= {"rewards/total/length_correlation": correlation, "rewards/total/length_explained": share}
        if isinstance(self.combine, Unweighted) and self.combine.one_thing:
            members = self.combine.members(scores)
            several = (~members.isnan()).sum(dim=1) > 1
            signs["combine/disagreement"] = std(members[several], ddof=0).mean().item()
        return {name: value for name, value in signs.items() if not math.isnan(value)}


def _gathered_tokens(
    tokens: dict[int, list[list[float]]], samples: Samples, world: World, device: Any
) -> dict[int, torch.Tensor]:
    """Each source's token values of all ranks, (N, T) float32, NaN where it says nothing."""
    if not tokens:
        return {}
    widest = max(map(len, samples.completion_ids), default=0)
    width = int(world.gather(torch.tensor([widest], device=device)).max())
    found = {}
    for k, rows in tokens.items():
        mine = torch.full((len(rows), width), torch.nan)
        for row, values in enumerate(rows):
            mine[row, : len(values)] = torch.tensor(values)
        found[k] = world.gather(mine.to(device))
    return found


def _local_files(spec: Spec, reward: Reward, base_dir: str) -> list[tuple[str, float]]:
    """Local files and folders that a source is made of, with their times: edited, they give other scores."""
    code = inspect.unwrap(reward.function) if isinstance(reward, FunctionReward) else type(reward)
    options = [part for value in spec.options.values() for part in (value if isinstance(value, list) else [value])]
    named = [spec.use.rpartition(":")[0], *(value for value in options if isinstance(value, str))]
    found = [resolve_path(name.rpartition(":")[0] if ".py:" in name else name, base_dir) for name in named if name]
    with contextlib.suppress(TypeError, OSError):  # a function of no file, such as a built-in one
        found.append(inspect.getfile(code))
    there = [path for path in found if os.path.exists(path)]
    return [(path, max(os.stat(file).st_mtime for file in (path, *_entries(path)))) for path in there]


def _entries(path: str) -> list[str]:
    return [entry.path for entry in os.scandir(path)] if os.path.isdir(path) else []


def _blamed(path: str, component: Any, *arguments: Any) -> torch.Tensor:
    """Call a component; what it raises says where in the recipe it is. Every rank computes, and raises, the same."""
    try:
        result = component(*arguments)
    except Exception as error:
        raise RewardError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, torch.Tensor):
        raise RewardError(f"{path} returned {type(result).__name__}; it must return a tensor")
    return result


def _one_per_row(path: str, component: Any, *arguments: Any) -> torch.Tensor:
    """`_blamed`, for a component that gives (N,); the last argument is the batch's samples."""
    result, rows = _blamed(path, component, *arguments), len(arguments[-1])
    if result.shape != (rows,):
        raise RewardError(f"{path} returned shape {tuple(result.shape)}; it must return ({rows},)")
    return result


def _shape(path: str, shaper: Shaper, rewards: torch.Tensor, samples: Samples) -> torch.Tensor:
    """What a shaper makes of rewards: a hole stays a hole, and none is added."""
    holes = rewards.isnan()
    shaped = _one_per_row(path, shaper, rewards, samples)
    if (shaped.isnan() & ~holes).any():
        raise RewardError(f"{path} gave NaN for a row that has a reward")
    return shaped.masked_fill(holes, float("nan"))


def _plain(reward: Any) -> Source:
    """A bare reward, or TRL reward function, as a source under its own name."""
    reward = as_reward(reward)
    return Source(
        name=reward.display_name, reward=reward, weight=Schedule("constant", 1.0, 1.0), signature=repr(reward)
    )
