"""From a name and options to a component, with every wrong option reported at once."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from trl_rewards.components import (
    Advantage,
    Combiner,
    Component,
    Context,
    Reward,
    Score,
    Selector,
    Shaper,
    TokenReward,
    Tool,
)
from trl_rewards.errors import PluginError, RecipeError, closest, did_you_mean
from trl_rewards.events import run_async
from trl_rewards.plugins import component_class, load_target
from trl_rewards.samples import Failed, Samples


def load_reward(use: str, /, **options: Any) -> Reward:
    """A reward source by name, `plugin/name`, `./file.py:thing` or `package.module:thing`.

    The instance is a TRL reward function: `trl.GRPOTrainer(reward_funcs=[load_reward("bleuberi")], …)`.
    Raises PluginError if it cannot be found and RecipeError if an option is wrong.
    """
    reward = _load("reward", use, options)
    reward.setup(Context())
    reward.used_alone = True
    return reward


def as_reward(given: Any) -> Reward:
    """A reward of what TRL takes as one of its `reward_funcs`: a function, a reward, or a reward model's name."""
    if isinstance(given, Reward):
        return given
    if isinstance(given, str):
        reward = _load("reward", "model", {"path": given})
        return reward
    if not callable(given):
        raise TypeError(f"a reward is a function, a Reward or the name of a reward model, got {given!r}")
    reward = FunctionReward(path=getattr(given, "__name__", type(given).__name__))
    reward.use(given)
    setattr(reward, "__name__", reward.path)  # noqa: B010 (a checker knows no such field; TRL names metrics by it)
    return reward


def load_combiner(use: str, /, **options: Any) -> Combiner:
    """A combiner by name. Raises as `load_reward` does."""
    return _load("combiner", use, options)


def load_shaper(use: str, /, **options: Any) -> Shaper:
    """A shaper by name. Raises as `load_reward` does."""
    return _load("shaper", use, options)


def load_advantage(use: str, /, **options: Any) -> Advantage:
    """An advantage by name. Raises as `load_reward` does."""
    return _load("advantage", use, options)


def load_objective(use: str, /, **options: Any) -> Any:
    """An `Objective` of pairs or an `OutcomeObjective` of labelled answers by name. Raises as `load_reward` does."""
    return _load("objective", use, options)


def load_selector(use: str, /, **options: Any) -> Selector:
    """A selector of training rows by name. Raises as `load_reward` does."""
    return _load("selector", use, options)


def load_tool(use: str, /, **options: Any) -> Tool:
    """A tool by name, to be put into a `trl_rewards.toolbox.Toolbox`. Raises as `load_reward` does."""
    return _load("tool", use, options)


def _load(kind: str, use: str, options: dict[str, Any]) -> Any:
    component_class(kind, use)  # a PluginError of its own, where `build` would make it one problem among others
    component, problems = build(kind, use, options)
    if problems:
        raise RecipeError(problems, source=f"{kind} {use!r}")
    return component


def build(kind: str, use: str, options: dict[str, Any], base_dir: str = ".") -> tuple[Any, list[str]]:
    """The component, or None and every problem with it. PluginError only through `component_class`, as a problem."""
    try:
        found = component_class(kind, use, base_dir)
    except PluginError as error:
        return None, [str(error)]
    cls: Any = found
    arguments: dict[str, Any] = options
    if not isinstance(found, type):  # a plain TRL reward function: its options are keyword arguments of each call
        cls, arguments = FunctionReward, {"path": use, "kwargs": options}
    problems = check_options(cls, arguments)
    if problems:
        return None, problems
    try:
        component = typing.cast(Any, cls)(**arguments)
        if isinstance(component, FunctionReward):
            component.resolve(base_dir)
    except (ValueError, TypeError, PluginError) as error:
        return None, [f"with: {error}"]
    name = use.rpartition(":")[2] if ":" in use else use.rpartition("/")[2]
    component.__name__ = name  # TRL names a reward function's metrics by it
    return component, []


def options_of(cls: Any) -> list[dataclasses.Field]:
    """The fields of a component class that are YAML options."""
    return [option for option in dataclasses.fields(cls) if option.init]


def check_options(cls: type, options: dict[str, Any]) -> list[str]:
    """Every problem with the options of a component, or another dataclass: unknown, missing, or of the wrong type."""
    import pydantic

    known = {option.name: option for option in options_of(cls)}
    problems = []
    mistyped = set()
    for name in options:
        if name not in known:
            mistyped.add(closest(name, known))
            wanted = ", ".join(known) or "no options"
            problems.append(f"with: unknown option {name!r}{did_you_mean(name, known)} (it takes {wanted})")
    types = option_types(cls)
    for name, option in known.items():
        if name not in options:
            required = option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
            if required and name not in mistyped:
                problems.append(f"with: {name} is required ({type_name(types[name])})")
            continue
        try:
            pydantic.TypeAdapter(types[name]).validate_python(options[name], strict=True)
        except pydantic.ValidationError as error:
            why = error.errors()[0]["msg"].lower()
            problems.append(f"with.{name}: must be {type_name(types[name])}, got {options[name]!r} ({why})")
        except pydantic.PydanticSchemaGenerationError:
            pass  # a class of the plugin's own, which it checks itself
    return problems


def option_types(cls: type) -> dict[str, Any]:
    """The type of each field; a name that a module imports for type checkers only stands for any."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(cls, localns=unknown or None)
        except NameError as error:
            unknown[str(error.name)] = _Anything


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return Any


class _Anything(metaclass=_AnyAttribute):
    """Stands for a module or class that is imported for type checkers only; its attributes may be anything."""


def type_name(annotation: Any) -> str:
    """A type as a YAML author would say it."""
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(repr(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Union:  # Literal[…] | None; str | None is a UnionType, which reads well
        return " or ".join(type_name(each) for each in typing.get_args(annotation))
    return str(annotation).replace("typing.", "")


def option_docs(cls: type[Component]) -> dict[str, str]:
    """The string literal under each field, by field name, base classes included."""
    import ast

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for pair in itertools.pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = inspect.cleandoc(text)
    return docs


class FunctionReward(Reward):
    """Any TRL reward function, sync or async, with arguments that a TRL YAML cannot give it.

    `use: ./my_reward.py:close_enough` is short for `use: function, with: {path: ./my_reward.py:close_enough}`.
    It sees all dataset columns, `trainer_state`, `log_metric` and `log_extra`, as in TRL.
    """

    columns = ("*",)
    deterministic = False  # nothing is known of a stranger's function

    path: str
    """`./file.py:function` or `package.module:function`."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of every call."""
    factory: dict[str, Any] | None = None
    """If given, `path` is called once with these and returns the reward function."""

    def resolve(self, base_dir: str) -> None:
        """Import the function. PluginError says what is wrong with `path`."""
        function = load_target(self.path, base_dir)
        self.use(function(**self.factory) if self.factory is not None else function)

    def use(self, function: Any) -> None:
        """Take this function, whatever `path` says. TypeError if it is none."""
        if not callable(function):
            raise TypeError(f"{self.path!r} is not a function but {function!r}")
        self.function: Callable[..., Any] = function
        self.context = Context()

    def setup(self, context: Context) -> None:
        self.context = context

    def is_async(self) -> bool:
        call = type(self.function).__call__  # an object may be async by its __call__
        return inspect.iscoroutinefunction(inspect.unwrap(self.function)) or inspect.iscoroutinefunction(call)

    def score(self, samples: Samples) -> list[Score]:
        return self.function(**self._arguments(samples))

    async def ascore(self, samples: Samples) -> list[Score]:
        return await self.function(**self._arguments(samples))

    def _arguments(self, samples: Samples) -> dict[str, Any]:
        progress = SimpleNamespace(global_step=samples.step, max_steps=samples.max_steps)
        return {
            **samples.columns,
            "prompts": samples.prompts,
            "completions": samples.completions,
            "completion_ids": samples.completion_ids,
            "trainer_state": self.context.trainer_state or progress,
            "log_metric": self.context.log_metric or (lambda name, value: None),
            "log_extra": self.context.log_extra or (lambda column, values: None),
            **self.kwargs,
        }

    def __call__(self, prompts, completions, completion_ids=None, **columns):
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        scores = self.function(**{**given, **columns, **self.kwargs})
        if self.is_async():  # TRL awaits coroutine functions only, and this is an object
            scores = run_async(scores)
        return [None if isinstance(score, Failed) else score for score in scores]


def reward_in_worker(use: str, options: dict[str, Any], base_dir: str) -> Callable[[Samples], Any]:
    """What a worker process runs for an isolated source: its own copy of the reward."""
    reward, problems = build("reward", use, options, base_dir)
    if problems:
        raise RecipeError(problems, source=f"reward {use!r}")
    reward.setup(Context(base_dir=base_dir))
    if reward.is_async():
        return functools.partial(_run_async, asyncio.Runner(), reward)
    return reward.score_tokens if isinstance(reward, TokenReward) else reward.score


def _run_async(runner: Any, reward: Reward, samples: Samples) -> list[Score]:
    return runner.run(reward.ascore(samples))
