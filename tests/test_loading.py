"""From a name and options to a component: options are checked, documented, and a plain function is a reward."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest

from trl_rewards import (
    Context,
    Failed,
    Pipeline,
    PluginError,
    RecipeError,
    Reward,
    load_advantage,
    load_combiner,
    load_reward,
    load_shaper,
)
from trl_rewards.commands.show import describe
from trl_rewards.events import run_async
from trl_rewards.loading import check_options, option_docs, options_of
from trl_rewards.models.http import HttpClient, HttpFailure
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples


class Optioned(Reward):
    """For tests."""

    count: int
    """How many."""
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    names: list[str] | None = None
    """Two
    lines."""

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count must be at least 0, got {self.count}")

    def score(self, samples):
        return [float(self.count)] * len(samples)


class More(Optioned):
    extra: bool = False
    """In the subclass."""


USE = f"{__name__}:Optioned"


@pytest.fixture
def functions(write):
    """Path of a file with reward functions as TRL knows them."""
    return write(
        "functions.py",
        """
import functools

def lengths(completions, **kwargs):
    return [len(text) for text in completions]

def scaled(completions, answer, factor=1, **kwargs):
    return [factor * (text == wanted) for text, wanted in zip(completions, answer)]

def make(factor):
    def made(completions, **kwargs):
        return [factor * len(text) for text in completions]
    return made

async def later(completions, **kwargs):
    return [0.25 for _ in completions]

class Callable:
    async def __call__(self, completions, **kwargs):
        return [0.75 for _ in completions]

instance = Callable()
partial = functools.partial(scaled, factor=3)
number = 3
""",
    )


# --- options ---------------------------------------------------------------------------------------------------------


def test_each_kind_loads_by_name_with_options():
    assert load_reward("length", soft_limit=1, hard_limit=3).hard_limit == 3
    assert load_combiner("normalize_then_sum", eps=0.1).eps == 0.1
    assert load_shaper("clip", low=-1).low == -1
    assert load_advantage("group_norm").ddof == 1


def test_a_component_is_called_by_its_registered_name(functions):
    assert load_reward("length", soft_limit=1, hard_limit=3).__name__ == "length"
    assert load_reward("defaults/exact_match").__name__ == "exact_match"
    assert load_reward(f"{functions}:lengths").__name__ == "lengths"
    assert load_shaper("trl_rewards.defaults.shapers:Tanh").__name__ == "Tanh"


def test_two_instances_of_one_class_keep_their_own_names():
    first, second = load_reward("exact_match"), load_reward("trl_rewards.defaults.rules:ExactMatch")
    assert (first.__name__, second.__name__) == ("exact_match", "ExactMatch")


def test_an_unknown_name_is_a_plugin_error_and_a_wrong_option_a_recipe_error():
    with pytest.raises(PluginError, match="unknown reward 'lenght', did you mean 'length'"):
        load_reward("lenght")
    with pytest.raises(RecipeError, match="reward 'length': 3 problems"):
        load_reward("length", soft="a", hard_limit="b")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "with: count is required (int)"),
        ({"count": 1, "cuont": 1}, "with: unknown option 'cuont', did you mean 'count'"),
        ({"count": "1"}, "with.count: must be int, got '1'"),
        ({"count": 1.5}, "with.count: must be int, got 1.5"),
        ({"count": True}, "with.count: must be int, got True"),
        ({"count": 1, "share": "0.5"}, "with.share: must be float, got '0.5'"),
        ({"count": 1, "share": None}, "with.share: must be float, got None"),
        ({"count": 1, "mode": "c"}, "with.mode: must be 'a' or 'b', got 'c'"),
        ({"count": 1, "names": "x"}, "with.names: must be list[str] | None, got 'x'"),
        ({"count": 1, "names": ["x", 1]}, "with.names: must be list[str] | None, got ['x', 1]"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_problem(options, problem):
    (found,) = check_options(Optioned, options)
    assert found.startswith(problem)


@pytest.mark.parametrize("options", [{"share": 1}, {"names": None}, {"names": []}, {"mode": "b"}], ids=str)
def test_what_yaml_can_say_is_taken(options):
    assert check_options(Optioned, {"count": 1} | options) == []


def test_a_type_that_only_type_checkers_import_or_pydantic_does_not_know_is_not_checked(write):
    path = write(
        "own.py",
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom trl_rewards import Reward\n"
        "if TYPE_CHECKING:\n    from torch import Tensor\n"
        "class Thing: ...\n"
        "class Own(Reward):\n    thing: Thing | None = None\n    tensor: Tensor | None = None\n    word: str = 'a'\n",
    )
    own = load_reward(f"{path}:Own", thing=3, tensor=[1.0], word="b")
    assert (own.thing, own.tensor, own.word) == (3, [1.0], "b")
    with pytest.raises(RecipeError, match=r"with.word: must be str, got 3"):
        load_reward(f"{path}:Own", word=3)
    describe(f"{path}:Own")


def test_show_knows_the_kind_of_a_class_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('from trl_rewards import Advantage\n\n\nclass Halved(Advantage):\n    """Half of it."""\n')
    assert describe(f"{path}:Halved").startswith(f"{path}:Halved · advantage · sequence level")


def test_what_post_init_refuses_is_one_problem_of_the_components():
    with pytest.raises(RecipeError, match="with: count must be at least 0, got -1"):
        load_reward(USE, count=-1)


def test_options_are_the_annotated_fields_base_classes_first():
    assert [option.name for option in options_of(More)] == ["count", "share", "mode", "names", "extra"]


def test_option_docs_are_the_strings_under_the_fields():
    docs = {name: doc for name, doc in option_docs(More).items() if name not in option_docs(Reward)}
    assert docs == {"count": "How many.", "names": "Two\nlines.", "extra": "In the subclass."}


def test_every_registered_option_that_takes_no_default_is_documented():
    from trl_rewards import load_plugins

    for entry in load_plugins().entries:
        cls = entry.load()
        required = [problem.split()[1] for problem in check_options(cls, {}) if "is required" in problem]
        assert set(required) <= set(option_docs(cls)), f"{entry.name}: {required}"


# --- functions -------------------------------------------------------------------------------------------------------


def test_a_function_is_a_reward_under_its_own_name(functions):
    reward = load_reward(f"{functions}:lengths")
    assert reward.score(make_samples(["a", "bcd"])) == [1, 3]
    assert reward(prompts=["p", "p"], completions=["a", "bcd"]) == [1, 3]
    assert reward.reads() == ("*",)


def test_options_of_a_function_are_keyword_arguments_of_each_call(functions):
    reward = load_reward(f"{functions}:scaled", factor=2)
    samples = make_samples(["a", "b"], answer=["a", "x"])
    assert reward.score(samples) == [2, 0]
    assert reward(prompts=["p", "p"], completions=["a", "b"], answer=["a", "x"]) == [2, 0]
    assert load_reward("function", path=f"{functions}:scaled", kwargs={"factor": 5}).score(samples) == [5, 0]
    assert load_reward(f"{functions}:partial").score(samples) == [3, 0]


def test_an_option_goes_before_a_column_of_its_name(functions):
    samples = make_samples(["a", "b"], answer=["a", "x"], factor=[7, 7])
    reward = load_reward(f"{functions}:scaled", factor=2)
    assert reward.score(samples) == reward(prompts=["p"] * 2, completions=samples.texts, **samples.columns) == [2, 0]


def test_a_factory_is_called_once_and_gives_the_function(functions):
    reward = load_reward("function", path=f"{functions}:make", factory={"factor": 10})
    assert reward.score(make_samples(["ab"])) == [20]


@pytest.mark.parametrize(("name", "value"), [("later", 0.25), ("instance", 0.75)])
def test_an_async_function_is_a_reward_in_a_pipeline_and_in_stock_trl(name, value, functions):
    reward = load_reward(f"{functions}:{name}")
    assert reward.is_async()
    assert asyncio.run(reward.ascore(make_samples(["a"]))) == [value]
    assert Pipeline([reward]).score(make_samples(["a"])).rewards.tolist() == [value]
    assert reward(prompts=["p"], completions=["a"]) == [value]

    async def notebook():
        return reward(prompts=["p"], completions=["a"])

    assert asyncio.run(notebook()) == [value]  # a loop is running where a notebook's cell is


def test_a_function_may_say_failed_in_stock_trl_too(write):
    code = "from trl_rewards import Failed\ndef f(completions, **kwargs):\n    return [Failed('down'), None, 1.0]\n"
    reward = load_reward(f"{write('f.py', code)}:f")
    assert reward(prompts=["p"] * 3, completions=["a"] * 3) == [None, None, 1.0]
    assert reward.score(make_samples(["a"] * 3)) == [Failed("down"), None, 1.0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"path": "{}:number"}, "with: '.*:number' is not a function but 3"),
        ({"path": "{}:nothing"}, "with: .* has no 'nothing'"),
        ({"path": "{}:make", "factory": {"fctor": 1}}, "with: make.* got an unexpected keyword argument 'fctor'"),
        ({"path": "./none.py:f"}, "with: no file './none.py'"),
        ({}, "with: path is required"),
    ],
    ids=str,
)
def test_a_wrong_function_is_found_before_anything_runs(options, problem, functions):
    filled = {name: value.format(functions) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(RecipeError, match=problem):
        load_reward("function", **filled)


def test_a_trl_reward_function_works_unchanged():
    reward = load_reward("trl.rewards:think_format_reward")
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>\na\n</think>\nb", "b")]
    assert reward.score(make_samples(completions)) == [1.0, 0.0]


def test_a_reward_takes_a_datasets_column_as_it_takes_a_list():
    from datasets import Dataset

    rows = Dataset.from_dict({"answer": ["4", "5"]})
    assert load_reward("exact_match")(["p", "p"], ["4", "4"], answer=rows["answer"]) == [1.0, 0.0]


def test_a_loaded_reward_is_closed_before_a_pipeline_sets_it_up_again_and_a_fresh_one_is_not(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from trl_rewards import Reward\n\n\n"
        "class Heavy(Reward):\n"
        "    def setup(self, context):\n        self.happened = [*vars(self).get('happened', []), context.seed]\n\n"
        "    def close(self):\n        self.happened.append('close')\n\n"
        "    def score(self, samples):\n        return [0.0] * len(samples)\n",
        encoding="utf-8",
    )
    reward = load_reward(f"{file}:Heavy")
    fresh = type(reward)()
    pipeline = Pipeline([reward, Source("fresh", fresh)])
    pipeline.setup(Context(seed=3))
    assert reward.happened == [0, "close", 3]
    assert fresh.happened == [3]


def test_the_judge_of_a_loaded_reward_ends_where_a_pipeline_starts_another():
    reward = load_reward("judge", endpoint="bundled:judge", model="scripted", criteria="Be short.")
    address = reward._asker._scripted.url
    pipeline = Pipeline([reward])
    pipeline.setup(Context())
    assert reward._asker._scripted.url != address
    with pytest.raises(HttpFailure):
        run_async(HttpClient(address, retries=0).get("/models"))
    pipeline.close()


def test_a_pipeline_takes_plain_reward_functions_under_their_own_names():
    from trl_rewards import Pipeline
    from trl_rewards.testing import make_samples

    def words(completions, **kwargs):
        return [float(len(str(completion).split())) for completion in completions]

    pipeline = Pipeline([words])
    assert pipeline.names == ["words"]
    assert pipeline.score(make_samples(["a b", "c"])).rewards.tolist() == [2.0, 1.0]
    with pytest.raises(TypeError, match="a reward is a function, a Reward or the name of a reward model, got 3"):
        Pipeline([3])
