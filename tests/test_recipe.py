"""A recipe is TRL's config file plus our keys: strict, with every problem at once, in the words the user typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from trl_rewards import Advantage, Recipe, RecipeError, hookimpl
from trl_rewards.recipe_files import apply_overrides, bundled_recipes
from trl_rewards.schedules import Schedule
from trl_rewards.testing import plugin_manager
from trl_rewards.trl_keys import parse_trl

ROOT = Path(__file__).parent.parent
CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}


@pytest.fixture
def recipe(write):
    """Writes a recipe, text or a mapping, and loads it. TRL's keys are checked only if asked for: that needs torch."""

    def load(content, overrides=(), check_trl=False) -> Recipe:
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        return Recipe.load(write("recipe.yaml", text), overrides, check_trl)

    return load


@pytest.fixture
def problems(recipe):
    """The problems of a recipe, which must have some."""

    def of(content, overrides=(), check_trl=False) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            recipe(content, overrides, check_trl)
        return caught.value.problems

    return of


def one(found: list[str]) -> str:
    (problem,) = found
    return problem


MATCH = {"use": "exact_match"}

# --- problems --------------------------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once_with_the_path_the_user_typed(problems):
    text = """
trainer: grop
rewards:
  - use: bluberi
  - use: length
    with: {soft_limt: 10, hard_limit: twenty}
  - use: exact_match
    wieght: 2
    weight: heavy
    on_missing: renormalise
    timeout: 0
    shape: [{use: clip}]
combine: {use: weighted_some}
shape: [{use: scale, with: {factor: [1]}}]
"""
    found = problems(text)
    starts = [
        "trainer: unknown trainer 'grop', did you mean 'grpo'",
        "rewards[2]: unknown key 'wieght', did you mean 'weight'",
        "rewards[2].weight: must be a number",
        "rewards[2].on_missing: must be renormalize or group_mean or drop_row or drop_group or fail, "
        "got 'renormalise', "
        "did you mean 'renormalize'",
        "rewards[2].timeout: must be seconds above 0, got 0",
        "rewards[0].use: unknown reward 'bluberi', did you mean 'bleuberi'",
        "rewards[1].with: unknown option 'soft_limt', did you mean 'soft_limit'",
        "rewards[1].with.hard_limit: must be int, got 'twenty'",
        "rewards[2].shape[0].with: clip needs low, high or both",
        "combine.use: unknown combiner 'weighted_some', did you mean 'weighted_sum'",
        "shape[0].with.factor: must be float, got [1]",
    ]
    for start, problem in zip(starts, found, strict=True):
        assert problem.startswith(start)


def test_the_message_counts_the_problems_and_names_the_file(recipe, tmp_path):
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/recipe.yaml: 2 problems\n  - rewards\[0\].*\n  - combine"):
        recipe({"rewards": ["bluberi"], "combine": "nothing"})


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"weight": 1}, "rewards[0].use: a component's name is needed, got None"),
        ({"use": ""}, "rewards[0].use: a component's name is needed, got ''"),
        (3, "rewards[0]: must be a name or {use: name, with: {…}}, got 3"),
        (MATCH | {"with": [1]}, "rewards[0].with: must be a mapping of options, got [1]"),
        (MATCH | {"with": {1: 2}}, "rewards[0].with: must be a mapping of options, got {1: 2}"),
        (MATCH | {"as": "a b"}, "rewards[0].as: a name is letters"),
        (
            MATCH | {"as": "total"},
            "rewards[0].as: a name is letters, digits, '_', '-' and '.', and not 'total'; got 'total'",
        ),
        (MATCH | {"retries": -1}, "rewards[0].retries: must be a whole number from 0, got -1"),
        (MATCH | {"retries": 1.5}, "rewards[0].retries: must be a whole number from 0, got 1.5"),
        (MATCH | {"max_failures": 2}, "rewards[0].max_failures: must be a share from 0 to 1, got 2"),
        (MATCH | {"concurrency": 0}, "rewards[0].concurrency: must be a whole number from 1, got 0"),
        (MATCH | {"concurrency": True}, "rewards[0].concurrency: must be a whole number from 1, got True"),
        (MATCH | {"isolate": 1}, "rewards[0].isolate: must be true or false, got 1"),
        (MATCH | {"cache": 1.5}, "rewards[0].cache: must be true, false or a path, got 1.5"),
        (MATCH | {"timeout": "1 min"}, "rewards[0].timeout: must be seconds above 0, got '1 min'"),
        (MATCH | {"only_if": {"source": "a"}}, "rewards[0].only_if: must be {source: name, at_least: number}"),
        (MATCH | {"only_if": {"source": "a", "at_least": True}}, "rewards[0].only_if: must be {source: name"),
        (MATCH | {"only_if": {"source": "a", "missing": False}}, "rewards[0].only_if: must be {source: name"),
        (MATCH | {"only_if": {"source": "a", "missing": True, "at_least": 1}}, "rewards[0].only_if: must be {source"),
        (MATCH | {"on_missing": ["fail"]}, "rewards[0].on_missing: must be renormalize or"),
        (MATCH | {"weight": {"linear": [1, -1]}}, "rewards[0].weight: a schedule must not go below 0"),
        (MATCH | {"weight": {"linaer": [1, 0]}}, "rewards[0].weight: must be a number or one of"),
        (
            MATCH | {"shape": [{"use": "tanh", "with": {"scale": 0}}]},
            "rewards[0].shape[0].with: scale must be above 0",
        ),
        (MATCH | {"shape": ["tanhh"]}, "rewards[0].shape[0].use: unknown shaper 'tanhh', did you mean 'tanh'"),
        (
            MATCH | {"with": {"take": "first"}},
            "rewards[0].with.take: must be 'all' or 'last_word' or 'last_number', got 'first'",
        ),
        (MATCH | {"with": {"answer": 1}}, "rewards[0].with.answer: must be str, got 1"),
        ({"use": "./none.py:f"}, "rewards[0].use: no file './none.py' in"),
    ],
    ids=str,
)
def test_a_wrong_entry_under_rewards_is_named_by_its_path(entry, wanted, problems):
    assert one(problems({"rewards": [entry]})).startswith(wanted)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "the file is empty; a recipe is a mapping"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", "a recipe is a mapping of keys, got a list"),
        ("hello", "a recipe is a mapping of keys, got a str"),
        ("rewards: [\nlearning_rate: 1", "not YAML: line "),
        ("a: 1\n\tb: 2", "not YAML: line 2: "),
        ("trainer: grpo", "rewards: at least one source is needed"),
        ("rewards: []", "rewards: at least one source is needed"),
        ("rewards: exact_match", "rewards: must be a list of sources (`- use: name`), got str"),
        ("rewards: {use: exact_match}", "rewards: must be a list of sources (`- use: name`), got dict"),
        ("trainer: [grpo]\nrewards: [exact_match]", "trainer: unknown trainer ['grpo']"),
        ("rewards: [exact_match]\ncombine: [mean]", "combine: must be a name or {use: name, with: {…}}, got ['mean']"),
        ("rewards: [exact_match]\nadvantage: {name: center}", "advantage: unknown key 'name'"),
        ("rewards: [exact_match]\nrewards: [length]", "not YAML: line 2: 'rewards' is written twice"),
        ("rewards: [{use: exact_match, weight: 1, weight: 2}]", "not YAML: line 1: 'weight' is written twice"),
        ("rewards: [exact_match]\ndataset: tiny", "dataset: must be a mapping with columns, chat, system_prompt"),
        ("rewards: [exact_match]\ndataset: {column: {a: b}}", "dataset: unknown key 'column', did you mean 'columns'"),
        ("rewards: [exact_match]\ndataset: {columns: [a]}", "dataset.columns: must map names to column names"),
        ("rewards: [exact_match]\ndataset: {columns: {a: 1}}", "dataset.columns: must map names to column names"),
        ("rewards: [exact_match]\ndataset: {chat: 3}", "dataset.chat: must be true or false, got 3"),
        ("rewards: [exact_match]\ndataset: {system_prompt: 3}", "dataset.system_prompt: must be a string, got 3"),
    ],
)
def test_a_wrong_file_is_refused_in_plain_words(content, wanted, problems):
    assert problems(content)[0].startswith(wanted)


def test_a_missing_file_lists_the_bundled_recipes():
    with pytest.raises(RecipeError, match="no such file, nor a bundled recipe, did you mean 'quickstart'"):
        Recipe.load("quickstat")


def test_a_bundled_recipe_is_found_by_name():
    assert Recipe.load("quickstart", check_trl=False).trainer == "grpo"


def test_two_sources_of_one_name_are_refused_and_as_tells_them_apart(problems, recipe):
    twice = {"rewards": [MATCH, MATCH | {"with": {"take": "last_word"}}]}
    assert one(problems(twice)) == "rewards[1]: another source is called 'exact_match' already; name it with `as:`"
    twice["rewards"][1]["as"] = "last"
    assert [source.name for source in recipe(twice).rewards] == ["exact_match", "last"]


def test_a_name_is_the_last_part_of_use(recipe, write):
    file = write("mine.py", "def close(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    loaded = recipe({"rewards": ["defaults/exact_match", f"{file}:close", {"use": "bleuberi", "as": "b.1-x"}]})
    assert [source.name for source in loaded.rewards] == ["exact_match", "close", "b.1-x"]


def test_a_file_beside_the_recipe_is_found_whatever_the_working_directory(recipe, write):
    write("mine.py", "def close(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    assert recipe("rewards: ['./mine.py:close']").rewards[0].use == "./mine.py:close"


def test_group_scoped_random_and_counting_rewards_have_no_cache(problems, write):
    write(
        "mine.py",
        "from trl_rewards import Reward\nclass Rank(Reward):\n    scope = 'group'\n    def score(self, s): return []\n"
        "def f(completions, **kwargs): return []\n",
    )
    uses = ["./mine.py:Rank", "./mine.py:f", "rlcr"]
    found = problems({"rewards": [{"use": use, "cache": True} for use in uses]})
    assert found[0].startswith("rewards[0].cache: 'Rank' scores whole groups")
    assert found[1].startswith("rewards[1].cache: 'f' does not say that it is deterministic")
    assert found[2].startswith("rewards[2].cache: 'rlcr' is asked about every row")


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_yaml_1_2(recipe):
    loaded = recipe(
        "rewards: [{use: exact_match, weight: 5e-1}]\nlearning_rate: 1e-6\nwarmup_ratio: .1e0\nmax_grad_norm: 1.E+2\n"
        "adam_epsilon: 1.0e-8\nrun_name: e5\nseed: 3"
    )
    assert loaded.rewards[0].weight == Schedule("constant", 0.5, 0.5)
    assert loaded.trl == {
        "learning_rate": 1e-6,
        "warmup_ratio": 0.1,
        "max_grad_norm": 100.0,
        "adam_epsilon": 1e-8,
        "run_name": "e5",
        "seed": 3,
    }


def test_no_and_on_are_words_as_trl_wants_them(recipe):
    loaded = recipe("rewards: [exact_match]\nsave_strategy: no\neval_strategy: 'no'\nbf16: false\nfp16: False")
    assert loaded.trl == {"save_strategy": "no", "eval_strategy": "no", "bf16": False, "fp16": False}


def test_a_whole_number_is_fine_where_a_float_is_wanted(recipe):
    assert (
        recipe("rewards: [exact_match]\nshape: [{use: clip, with: {low: -1, high: 1}}]").shape[0].options["low"] == -1
    )


def test_a_negative_constant_weight_is_a_penalty(recipe):
    assert recipe("rewards: [{use: exact_match, weight: -0.5}]").rewards[0].weight.at(0.3) == -0.5


def test_only_if_reaches_the_source_and_the_signature(recipe):
    text = "rewards: [{use: exact_match, as: right}, {use: length, with: {soft_limit: 1, hard_limit: 2}, "
    made = recipe(text + "only_if: {source: right, at_least: 1, otherwise: 0.0}}]")
    assert '|only_if:{"at_least": 1, "otherwise": 0.0, "source": "right"}' in made.signature
    from trl_rewards import Pipeline
    from trl_rewards.scoring import Gate

    assert Pipeline.from_recipe(made).sources[1].only_if == Gate("right", 1, otherwise=0.0)
    with pytest.raises(RecipeError, match=r"rewards\.length\.only_if: no source 'wrong'"):
        Pipeline.from_recipe(recipe(text + "only_if: {source: wrong, at_least: 1}}]"))


# --- TRL's keys ------------------------------------------------------------------------------------------------------

PLAIN_TRL = """
# a config for `trl grpo --config`, not one key of ours
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/tldr
learning_rate: 1.0e-5
bf16: false
use_cpu: true
report_to: none
num_generations: 4
per_device_train_batch_size: 8
reward_funcs: [think_format_reward, accuracy_reward, get_soft_overlong_punishment, math.hypot]
reward_weights: [0.5, 1.0, 2, 0]
"""


def test_a_plain_trl_config_is_a_recipe_and_its_reward_functions_become_sources(recipe):
    loaded = recipe(PLAIN_TRL, check_trl=True)
    names = ["think_format_reward", "accuracy_reward", "get_soft_overlong_punishment", "hypot"]
    assert [source.name for source in loaded.rewards] == names
    assert [source.weight.at(0) for source in loaded.rewards] == [0.5, 1.0, 2.0, 0.0]
    assert loaded.rewards[0].use == "trl.rewards:think_format_reward"
    assert loaded.rewards[2].options["factory"] == {"max_completion_len": 1280, "soft_punish_cache": 256}
    assert loaded.trainer == "grpo"
    assert loaded.advantage is None
    script, training, model, _ = parse_trl(loaded)
    assert (script.dataset_name, training.learning_rate) == ("trl-lib/tldr", 1e-5)
    assert model.model_name_or_path == "Qwen/Qwen2.5-0.5B"
    assert training.reward_weights is None


def test_a_reward_model_of_trls_key_becomes_a_source(recipe):
    loaded = recipe("reward_model_name_or_path: my/model\nreward_funcs: think_format_reward")
    assert [(source.use, source.name) for source in loaded.rewards] == [
        ("model", "model"),
        ("trl.rewards:think_format_reward", "think_format_reward"),
    ]


def test_trls_overlong_punishment_scores_as_in_trl(recipe):
    from trl_rewards import Pipeline
    from trl_rewards.testing import make_samples

    pipeline = Pipeline.from_recipe(recipe("reward_funcs: [get_soft_overlong_punishment]"))
    samples = make_samples(["x", "y"])
    object.__setattr__(samples, "completion_ids", [[1] * 1024, [1] * 1152])  # half-way through the soft zone
    assert pipeline.score(samples).rewards.tolist() == [0.0, -0.5]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("reward_funcs: [acuracy_reward]", "reward_funcs: unknown 'acuracy_reward', did you mean 'accuracy_reward'"),
        ("reward_funcs: [{a: 1}]", "reward_funcs: must be names, got {'a': 1}"),
        ("reward_funcs: [no_module_at_all.f]", "reward_funcs[0].use: 'no_module_at_all' (in"),
        ("rewards: [exact_match]\nreward_weights: [1]", "reward_weights: goes with reward_funcs"),
        (
            "reward_funcs: [accuracy_reward]\nreward_weights: [1, 2]",
            "reward_weights: 2 weights for 1 reward functions",
        ),
        ("reward_funcs: [accuracy_reward]\nreward_weights: 2", "reward_weights: must be a list of numbers, got 2"),
        (
            "reward_funcs: [accuracy_reward]\nreward_weights: [a]",
            "reward_weights: must be a list of numbers, got ['a']",
        ),
        (
            "reward_model_name_or_path: 3\nrewards: [exact_match]",
            "reward_model_name_or_path.with.path: must be str | None, got 3",
        ),
    ],
)
def test_wrong_reward_keys_of_trl_are_named_as_the_user_typed_them(text, wanted, problems):
    assert one(problems(text)).startswith(wanted)


def test_paths_count_from_the_first_entry_under_rewards_whatever_trls_keys_add(problems):
    assert one(problems("reward_funcs: [think_format_reward]\nrewards: [{use: bluberi}]")).startswith("rewards[0].use")
    found = one(
        problems("reward_funcs: [think_format_reward]\nrewards: [{use: exact_match, as: think_format_reward}]")
    )
    assert found.startswith("rewards[0]: another source is called")


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"lerning_rate": 1e-6}, "lerning_rate: unknown key, did you mean 'learning_rate'"),
        ({"reward": []}, "reward: unknown key, did you mean 'rewards'"),
        ({"advantages": "center"}, "advantages: unknown key, did you mean 'advantage'"),
        ({7: 1}, "7: unknown key"),
        ({"learning_rate": "fast"}, "learning_rate: must be float, got 'fast'"),
        ({"num_generations": 2.5}, "num_generations: must be int | None, got 2.5"),
        ({"load_in_4bit": "maybe"}, "load_in_4bit: must be bool, got 'maybe'"),
        ({"lora_target_modules": 3}, "lora_target_modules: must be list[str] | None, got 3"),
        ({"env": ["A=1"]}, "env: must map names to values, got ['A=1']"),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, "these arguments are refused: "),
        (
            {"num_generations": 1, "per_device_train_batch_size": 1},
            "these arguments are refused: GRPO requires at least 2",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation: TRL would see one column, the total; write `combine: {use: normalize_",
        ),
    ],
    ids=str,
)
def test_a_wrong_key_of_trls_is_refused(keys, wanted, problems):
    assert one(problems({"rewards": ["exact_match"]} | CPU | keys, check_trl=True)).startswith(wanted)


def test_a_batch_that_holds_no_whole_groups_is_refused_before_anything_loads(problems):
    keys = {"per_device_train_batch_size": 6, "num_generations": 4}
    found = one(problems({"rewards": ["exact_match"]} | CPU | keys, check_trl=True))
    assert re.search(r"generation_batch_size \(6\) must be divisible by num_generations \(4\)", found)


def test_problems_of_ours_and_of_trls_come_together(problems):
    found = problems({"rewards": ["bluberi"], "lerning_rate": 1} | CPU, check_trl=True)
    assert [problem.partition(":")[0] for problem in found] == ["rewards[0].use", "lerning_rate"]


def test_trls_words_for_truth_are_taken_as_trl_takes_them(recipe):
    loaded = recipe(
        "rewards: [exact_match]\nbf16: no\nuse_cpu: yes\nreport_to: none\nsave_strategy: no", check_trl=True
    )
    training = parse_trl(loaded)[1]
    assert (training.bf16, training.use_cpu, training.save_strategy) == (False, True, "no")


# --- trainers and advantages -----------------------------------------------------------------------------------------


class ForTests:
    class PerToken(Advantage):
        level = "token"

    class Critical(Advantage):
        needs = frozenset({"values"})

    class Masked(Advantage):
        needs = frozenset({"mask"})

    @staticmethod
    @hookimpl
    def register_advantages():
        return {"per_token": ForTests.PerToken, "critical": ForTests.Critical, "masked": ForTests.Masked}


@pytest.fixture
def with_advantages():
    with plugin_manager({"for_tests": ForTests}):
        yield


def test_rloo_with_an_advantage_needs_beta_0(problems, recipe):
    content = {"trainer": "rloo", "rewards": ["exact_match"], "advantage": "leave_one_out"}
    assert one(problems(content)).startswith("beta: RLOO puts its KL penalty into the advantage")
    assert "default 0.05" in one(problems(content))
    assert "got 0.1" in one(problems(content | {"beta": 0.1}))
    assert recipe(content | {"beta": 0.0}).advantage.use == "leave_one_out"
    assert recipe({"trainer": "rloo", "rewards": ["exact_match"]}).advantage is None  # TRL's own keeps its KL


def test_rloo_refuses_token_level_advantages_and_grpo_takes_them(problems, recipe, with_advantages):
    content = {"rewards": ["exact_match"], "advantage": "per_token", "beta": 0.0}
    assert one(problems(content | {"trainer": "rloo"})).startswith("advantage: 'per_token' gives one value per token")
    assert recipe(content | {"trainer": "grpo"}).advantage.use == "per_token"


def test_an_advantage_that_needs_a_critic_is_refused_without_one(problems, recipe, with_advantages):
    content = {"rewards": ["exact_match"], "beta": 0.0}
    for trainer in ("grpo", "rloo"):
        wanted = f"advantage: 'critical' needs values, which trainer '{trainer}' does not have"
        assert one(problems(content | {"advantage": "critical", "trainer": trainer})) == wanted
    assert recipe(content | {"advantage": "masked"}).advantage.use == "masked"


def test_ppo_takes_gae_by_itself_and_refuses_an_advantage_that_would_lose_its_kl(problems, recipe):
    content = {"trainer": "ppo", "rewards": ["exact_match"]}
    assert recipe(content).advantage.use == "gae"
    wanted = "advantage: 'group_norm' does not look at token rewards, where PPO's KL penalty is"
    assert one(problems(content | {"advantage": "group_norm"})).startswith(wanted)
    for without in ({"kl_coef": 0.0}, {"kl_in": "loss"}):
        assert (
            recipe(content | {"advantage": "group_norm", "num_generations": 4} | without).advantage.use == "group_norm"
        )


def test_ppo_says_what_is_wrong_with_its_critic_and_names_before_anything_is_loaded(problems):
    content = {"trainer": "ppo", "rewards": ["exact_match"], "output_dir": "out", "use_cpu": True}
    for wrong, said in (
        ({"critic": "adapter"}, "critic 'adapter' needs a policy with LoRA"),
        ({"beta": 0.0}, "beta: PPO has it under another name: kl_coef"),
        ({"num_iterations": 1}, "num_iterations: PPO has it under another name: num_ppo_epochs"),
        ({"generation_kwargs": {"eos_token_id": 7}}, "set it in the model's generation_config"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "waits for evaluations"),
    ):
        assert said in one(problems(content | wrong, check_trl=True))


# --- overrides -------------------------------------------------------------------------------------------------------

BASE = """
learning_rate: 1e-6
rewards:
  - use: bleuberi
    with: {max_order: 4}
  - exact_match
advantage: center
"""


def test_another_component_by_an_override_drops_the_options_of_the_first():
    raw = {
        "advantage": {"use": "gae", "with": {"gamma": 0.9}},
        "rewards": [{"use": "bleuberi", "with": {"max_order": 2}}],
    }
    assert apply_overrides(raw, ["--advantage.use", "group_norm", "--rewards.0.use", "bleuberi"]) == []
    assert raw["advantage"] == {"use": "group_norm"}
    assert raw["rewards"][0]["with"] == {"max_order": 2}


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["--learning_rate", "2e-6"], lambda r: r.trl["learning_rate"] == 2e-6),
        (["--learning_rate=2e-6"], lambda r: r.trl["learning_rate"] == 2e-6),
        (["--max_steps", "-1"], lambda r: r.trl["max_steps"] == -1),
        (["--load_in_4bit"], lambda r: r.trl["load_in_4bit"] is True),
        (
            ["--load_in_4bit", "--seed", "3"],
            lambda r: r.trl == {"learning_rate": 1e-6, "load_in_4bit": True, "seed": 3},
        ),
        (["--save_strategy", "no"], lambda r: r.trl["save_strategy"] == "no"),
        (
            ["--lora_target_modules", "q_proj", "v_proj"],
            lambda r: r.trl["lora_target_modules"] == ["q_proj", "v_proj"],
        ),
        (["--run_name", "a: b: c"], lambda r: r.trl["run_name"] == "a: b: c"),
        (["--run_name", "[draft"], lambda r: r.trl["run_name"] == "[draft"),
        (["--dataset.system_prompt", "Answer: yes or no"], lambda r: r.dataset.system_prompt == "Answer: yes or no"),
        (["--model_init_kwargs", "{a: 1}"], lambda r: r.trl["model_init_kwargs"] == {"a": 1}),
        (["--rewards.0.weight", "0.3"], lambda r: r.rewards[0].weight.start == 0.3),
        (["--rewards.bleuberi.weight", "0.3"], lambda r: r.rewards[0].weight.start == 0.3),
        (["--rewards.exact_match.weight=-2"], lambda r: r.rewards[1].weight.start == -2),
        (["--rewards.1.with.take", "last_word"], lambda r: r.rewards[1].options == {"take": "last_word"}),
        (["--rewards.0.with.max_order", "2"], lambda r: r.rewards[0].options == {"max_order": 2}),
        (["--rewards.0.weight", "{linear: [1, 0]}"], lambda r: r.rewards[0].weight.kind == "linear"),
        (["--rewards.0", "length"], None),
        (["--advantage.with.eps", "0.1"], None),
        (["--advantage", "group_norm", "--advantage.with.eps", "0.1"], lambda r: r.advantage.options == {"eps": 0.1}),
        (["--combine.use", "mean"], lambda r: r.combine.use == "mean"),
        (["--dataset.columns.answer", "solution"], lambda r: r.dataset.columns == {"answer": "solution"}),
        (["--dataset.chat"], lambda r: r.dataset.chat is True),
        (["--trainer", "rloo", "--beta", "0.0"], lambda r: r.trainer == "rloo"),
        (["--advantage", "null"], lambda r: r.advantage is None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides_as_words(words, check, recipe, problems):
    if check is None:
        assert problems(BASE, words)
    else:
        assert check(recipe(BASE, words))


def test_overrides_as_a_mapping(recipe):
    loaded = recipe(BASE, {"learning_rate": 2e-6, "rewards.bleuberi.weight": 0.3, "shape": ["tanh"]})
    assert loaded.trl["learning_rate"] == 2e-6
    assert loaded.rewards[0].weight.start == 0.3
    assert loaded.shape[0].use == "tanh"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--rewards.7.weight", "1"], "--rewards.7.weight: no entry '7' among 2 (bleuberi, exact_match)"),
        (["--rewards.bleu.weight", "1"], "--rewards.bleu.weight: no entry 'bleu' among 2 (bleuberi, exact_match)"),
        (["--reward.0.weight", "1"], "--reward.0.weight: 'reward' is not one of trainer, rewards,"),
        (["--learning_rate.x", "1"], "--learning_rate.x: 'learning_rate' is not one of"),
        (["--rewards.0.with.max_order.x", "1"], "--rewards.0.with.max_order.x: rewards.0.with.max_order is 4"),
        (["learning_rate", "--seed", "1"], "unexpected word 'learning_rate'; overrides are written --name value"),
        (["--rewards.0.wieght", "1"], "rewards[0]: unknown key 'wieght', did you mean 'weight'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_override_is_named_as_it_was_typed(words, wanted, problems):
    assert one(problems(BASE, words)).startswith(wanted)


# --- signature and saving --------------------------------------------------------------------------------------------


def test_the_signature_is_stable_and_ignores_what_does_not_change_the_reward(recipe):
    first = recipe(BASE).signature
    assert recipe(BASE).signature == first
    assert recipe(BASE, ["--output_dir", "elsewhere"]).signature == first
    assert recipe("advantage: {use: center}\n" + BASE.replace("advantage: center", "")).signature == first
    assert "\n" not in first


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer", "rloo", "--beta", "0"],
        ["--rewards.0.weight", "0.5"],
        ["--rewards.0.weight", "{linear: [1, 0]}"],
        ["--rewards.0.weight", "{cosine: [1, 0]}"],
        ["--rewards.0.with.max_order", "3"],
        ["--rewards.0.as", "other"],
        ["--rewards.0.shape", "[tanh]"],
        ["--rewards.0.shape", "[{use: tanh, with: {scale: 2.0}}]"],
        ["--rewards.0.on_missing", "group_mean"],
        ["--combine", "mean"],
        ["--shape", "[tanh]"],
        ["--advantage", "group_norm"],
        ["--advantage", "null"],
    ],
    ids=" ".join,
)
def test_the_signature_changes_with_what_changes_the_reward(words, recipe):
    assert recipe(BASE, words).signature != recipe(BASE).signature


def test_the_signature_names_the_versions(recipe):
    import importlib.metadata

    signature = recipe(BASE).signature
    for distribution in ("trl-rewards", "trl"):
        assert f"{distribution}:{importlib.metadata.version(distribution)}" in signature


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--rewards.0.weight", "1e-6", "--learning_rate", "1e-6", "--save_strategy", "no"],
        ["--run_name", "'1e5'", "--rewards.0.as", "b.1"],
        ["--dataset.system_prompt", 'Größe 山: say "yes"\nor no # really'],
        ["--rewards.0.weight", "{linear: [1, 0.1]}", "--shape", "[{use: clip, with: {low: -5, high: 5}}]"],
    ],
    ids=str,
)
def test_a_saved_recipe_loads_to_the_same(words, recipe, tmp_path):
    loaded = recipe(BASE, words)
    loaded.save(tmp_path / "run")
    again = Recipe.load(tmp_path / "run" / "recipe.yaml", check_trl=False)
    assert again.signature == loaded.signature == (tmp_path / "run" / "signature.txt").read_text().strip()
    assert again.raw == loaded.raw | {"base_dir": loaded.base_dir}
    assert again.trl == loaded.trl


def test_a_saved_recipe_still_finds_the_files_that_were_beside_the_first(recipe, write, tmp_path):
    write("mine.py", "def close(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    loaded = recipe("rewards: ['./mine.py:close', {use: function, as: f, with: {path: './mine.py:close'}}]")
    loaded.save(tmp_path / "runs" / "a")
    again = Recipe.load(tmp_path / "runs" / "a" / "recipe.yaml", check_trl=False)
    assert again.signature == loaded.signature


# --- the recipes that come with the project --------------------------------------------------------------------------

OTHERS = ("accelerate", "claims")  # folders whose files are no recipes
SHIPPED = sorted(file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name not in OTHERS)


def test_recipes_are_shipped_and_found_by_name():
    assert len(SHIPPED) >= 1
    names = {file.relative_to(ROOT / "recipes").with_suffix("").as_posix() for file in SHIPPED}
    assert names == set(bundled_recipes())


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.relative_to(ROOT / "recipes").as_posix())
def test_a_shipped_recipe_is_valid(file):
    # A recipe for a GPU asks for bfloat16, which transformers refuses on a machine without one.
    recipe = Recipe.load(file, {"use_cpu": True})
    assert recipe.rewards or not recipe.trains_policy
    assert recipe.trl.get("model_name_or_path"), "a recipe names its policy"
    assert recipe.trl.get("dataset_name"), "a recipe names its data"
    assert file.read_text(encoding="utf-8").startswith("# "), "its first line says what it is"
