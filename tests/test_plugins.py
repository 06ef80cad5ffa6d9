"""Discovery finds what is installed, a broken plugin hurts nobody else, and every name leads to one component."""

from __future__ import annotations

import importlib
import sys

import pytest

from trl_rewards import PluginError, Reward, Shaper, hookimpl, load_plugins, load_reward
from trl_rewards.plugins import Plugin, component_class, discover, first_sentence, load_target
from trl_rewards.testing import make_samples, plugin_manager

ONES = """
from trl_rewards import Reward, hookimpl

class Ones(Reward):
    def score(self, samples):
        return [1.0] * len(samples)

@hookimpl
def register_rewards():
    return {"ones": Ones}
"""


@pytest.fixture(autouse=True)
def _discover_afresh(monkeypatch):
    monkeypatch.delenv("TRL_REWARDS_DISABLE", raising=False)
    monkeypatch.delenv("TRL_REWARDS_PLUGINS", raising=False)
    discover.cache_clear()
    yield
    discover.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lays a distribution with one plugin on sys.path, as pip would: module, METADATA, entry_points.txt."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def add(name: str, code: str = ONES, target: str = "", distribution: str = "", module: str = "") -> None:
        module = module or f"plugin_under_test_{name}"
        (tmp_path / f"{module}.py").write_text(code)
        distribution = distribution or f"dist-{name}"
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[trl_rewards]\n{name} = {target or module}\n")
        importlib.invalidate_caches()
        discover.cache_clear()

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("plugin_under_test_"):
            del sys.modules[module]


# --- discovery -------------------------------------------------------------------------------------------------------


def test_an_installed_distribution_is_found_by_its_entry_point(install):
    install("mine")
    registry = load_plugins()
    plugin = next(plugin for plugin in registry.plugins if plugin.name == "mine")
    assert plugin == Plugin("mine", "dist-mine", "1.2", "plugin_under_test_mine", ("register_rewards",), None)
    assert load_reward("ones").score(make_samples(["a", "b"])) == [1.0, 1.0]


def test_plugins_are_found_once_per_process():
    assert load_plugins() is load_plugins()


def test_first_party_plugins_are_all_working():
    registry = load_plugins()
    assert registry.broken == []
    assert {"defaults", "advantages", "bleuberi", "shaping"} <= {plugin.name for plugin in registry.plugins}


def test_a_component_given_as_a_string_is_imported_only_when_it_is_asked_for(install, tmp_path):
    (tmp_path / "plugin_under_test_heavy.py").write_text(ONES)
    code = "from trl_rewards import hookimpl\n@hookimpl\ndef register_rewards():\n    return {'ones': '%s'}\n"
    install("lazy", code % "plugin_under_test_heavy:Ones")
    entry = load_plugins().find("reward", "ones")
    assert "plugin_under_test_heavy" not in sys.modules
    assert entry.load().__name__ == "Ones"
    assert "plugin_under_test_heavy" in sys.modules


def test_an_entry_point_may_name_an_object_in_a_module(install):
    code = ONES + "\nclass Bundle:\n    register_rewards = staticmethod(register_rewards)\nbundle = Bundle()\n"
    install("bundle", code, target="plugin_under_test_bundle:bundle")
    assert load_plugins().broken == []
    assert load_reward("bundle/ones").score(make_samples(["a"])) == [1.0]


# --- isolation -------------------------------------------------------------------------------------------------------

HOOK = "from trl_rewards import Reward, hookimpl\n@hookimpl\n"
BROKEN = {
    "import_error": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
    "syntax_error": ("def f(:", "SyntaxError"),
    "exits_at_import": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "unknown_hook": (
        HOOK + "def register_reward():\n    return {}",
        "'register_reward', did you mean 'register_rewards'",
    ),
    "wrong_argument": (ONES + "\n@hookimpl\ndef batch_scored(batch, stepp):\n    pass", "stepp"),
    "raises": (HOOK + "def register_rewards():\n    raise KeyError('oh')", "KeyError: 'oh'"),
    "exits_while_registering": (HOOK + "def register_rewards():\n    raise SystemExit(3)", "SystemExit: 3"),
    "not_a_mapping": (HOOK + "def register_rewards():\n    return ['ones']", "must return {name: class"),
    "not_a_class": (HOOK + "def register_rewards():\n    return {'ones': lambda: 0}", "'ones' must be a Reward class"),
    "an_instance": (ONES.replace('"ones": Ones', '"ones": Ones()'), "'ones' must be a Reward class"),
    "another_kind": (HOOK + "def register_shapers():\n    return {'ones': Reward}", "'ones' must be a Shaper class"),
    "a_bad_name": (HOOK + "def register_rewards():\n    return {'a/b': Reward}", "without '/' and ':', got 'a/b'"),
    "a_number_as_name": (HOOK + "def register_rewards():\n    return {3: Reward}", "got 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_listed_with_its_reason_and_all_others_work(case, install):
    code, reason = BROKEN[case]
    install(case, code)
    install("zz_good", ONES.replace('"ones"', '"good"'))
    registry = load_plugins()
    (broken,) = registry.broken
    assert (broken.name, broken.distribution) == (case, f"dist-{case}")
    assert reason in broken.broken
    assert not [entry for entry in registry.entries if entry.owner == case]
    assert load_reward("good").score(make_samples(["a"])) == [1.0]
    assert load_reward("exact_match").answer == "answer"
    registry.manager.hook.batch_scored(batch=None, step=0)  # none of the broken plugin's hooks is left


def test_an_unknown_name_says_which_broken_plugin_might_have_had_it(install):
    install("flaky", "import no_such_module_anywhere")
    with pytest.raises(PluginError, match=r"unknown reward 'ones'.*plugin 'flaky' might provide it but is broken"):
        load_reward("ones")


def test_a_broken_plugin_is_no_part_of_the_error_for_a_name_that_exists(install):
    install("flaky", "import no_such_module_anywhere")
    assert load_reward("exact_match").answer == "answer"


@pytest.mark.parametrize("code", ["raise RuntimeError('no licence')", "raise SystemExit('no licence')"])
def test_a_component_whose_module_cannot_be_imported_names_its_plugin(code, install, tmp_path):
    (tmp_path / "plugin_under_test_late.py").write_text(code)
    install("early", HOOK + "def register_rewards():\n    return {'late': 'plugin_under_test_late:Late'}")
    assert load_plugins().broken == []
    with pytest.raises(PluginError, match=r"reward 'late' of plugin 'early' cannot be imported from .*no licence"):
        load_reward("late")


def test_two_entry_points_of_one_module_leave_the_first_one_working(install):
    install("aa", ONES + "\nseen = []\n@hookimpl\ndef batch_scored(batch, step):\n    seen.append(step)\n")
    install("bb", "", target="plugin_under_test_aa")
    registry = load_plugins()
    assert [plugin.name for plugin in registry.broken] == ["bb"]
    registry.manager.hook.batch_scored(batch=None, step=7)
    assert sys.modules["plugin_under_test_aa"].seen == [7]


def test_one_plugin_name_in_two_distributions_is_broken_for_the_second(install):
    install("same", distribution="dist-a")
    install("same", ONES.replace('"ones"', '"twos"'), distribution="dist-b", module="plugin_under_test_b")
    registry = load_plugins()
    (broken,) = registry.broken
    assert "same" in broken.broken
    assert len({broken.distribution} & {"dist-a", "dist-b"}) == 1
    assert len([entry for entry in registry.entries if entry.owner == "same"]) == 1


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_claimed_twice_raises_with_both_owners_and_plugin_slash_name_resolves(install):
    install("first")
    install("second", ONES.replace("[1.0]", "[2.0]"))
    with pytest.raises(PluginError, match="by both 'first' and 'second'; write 'first/ones' or 'second/ones'"):
        load_reward("ones")
    assert load_reward("first/ones").score(make_samples(["a"])) == [1.0]
    assert load_reward("second/ones").score(make_samples(["a"])) == [2.0]
    assert load_reward("second/ones").__name__ == "ones"


def test_a_name_of_the_wrong_plugin_says_who_has_it():
    with pytest.raises(
        PluginError, match="reward 'shaping/length' does not exist; 'length' is provided by 'defaults'"
    ):
        load_reward("shaping/length")


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(PluginError, match="unknown reward 'bluberi', did you mean 'bleuberi'"):
        load_reward("bluberi")


def test_a_name_of_another_kind_says_so():
    with pytest.raises(PluginError, match=r"unknown reward 'clip'.*'clip' is a shaper"):
        load_reward("clip")


def test_one_name_may_be_used_for_two_kinds():
    class Twice(Reward):
        pass

    class TwiceAgain(Shaper):
        pass

    class Both:
        register_rewards = staticmethod(hookimpl(specname="register_rewards")(lambda: {"twice": Twice}))
        register_shapers = staticmethod(hookimpl(specname="register_shapers")(lambda: {"twice": TwiceAgain}))

    with plugin_manager({"both": Both}) as registry:
        assert registry.broken == []
        assert component_class("reward", "twice") is Twice
        assert component_class("shaper", "twice") is TwiceAgain


# --- leaving plugins out ---------------------------------------------------------------------------------------------


def test_disable_leaves_the_named_plugins_out(monkeypatch):
    monkeypatch.setenv("TRL_REWARDS_DISABLE", "bleuberi, shaping")
    assert {"bleuberi", "shaping"}.isdisjoint(plugin.name for plugin in load_plugins().plugins)
    with pytest.raises(PluginError, match="unknown reward 'bleuberi'"):
        load_reward("bleuberi")
    assert load_reward("exact_match")


def test_a_disabled_plugin_is_not_imported(install, monkeypatch):
    install("flaky", "import no_such_module_anywhere")
    monkeypatch.setenv("TRL_REWARDS_DISABLE", "flaky")
    assert load_plugins().broken == []


def test_plugins_variable_takes_only_the_named_ones(monkeypatch):
    monkeypatch.setenv("TRL_REWARDS_PLUGINS", "bleuberi")
    assert [plugin.name for plugin in load_plugins().plugins] == ["bleuberi"]
    with pytest.raises(PluginError, match="unknown reward 'exact_match'"):
        load_reward("exact_match")


@pytest.mark.parametrize("value", ["", " ", "no_such_plugin"])
def test_a_plugins_variable_that_leaves_none_is_named_as_the_cause(value, monkeypatch):
    monkeypatch.setenv("TRL_REWARDS_PLUGINS", value)
    assert load_plugins().plugins == []
    with pytest.raises(PluginError, match=r"no plugins found, so no reward 'length'.*TRL_REWARDS_PLUGINS"):
        load_reward("length")


def test_without_any_entry_point_the_error_says_how_to_install(monkeypatch):
    monkeypatch.setattr("trl_rewards.plugins.entry_points", lambda group: ())
    with pytest.raises(PluginError, match=r'no plugins found, so no reward \'length\'; run "pip install -e \."'):
        load_reward("length")


# --- one-file plugins and dotted paths -------------------------------------------------------------------------------

FILE = """
from trl_rewards import Reward

class Close(Reward):
    def score(self, samples):
        return [0.5] * len(samples)

def close_enough(completions, **kwargs):
    return [0.25] * len(completions)

class Nested:
    Inner = Close
"""


def test_a_file_is_looked_for_beside_the_recipe_then_in_the_working_directory(write, tmp_path, monkeypatch):
    write("recipes/mine.py", FILE)
    write("cwd/mine.py", FILE.replace("0.5", "0.75"))
    write("cwd/other.py", FILE)
    monkeypatch.chdir(tmp_path / "cwd")
    beside = component_class("reward", "./mine.py:Close", str(tmp_path / "recipes"))
    assert beside().score(make_samples(["a"])) == [0.5]
    assert component_class("reward", "./mine.py:Close")().score(make_samples(["a"])) == [0.75]
    assert component_class("reward", "./other.py:Close", str(tmp_path / "recipes")).__name__ == "Close"
    assert component_class("reward", f"{tmp_path}/cwd/mine.py:Close")().score(make_samples(["a"])) == [0.75]


def test_a_plain_function_in_a_file_is_a_reward(write):
    reward = load_reward(f"{write('mine.py', FILE)}:close_enough")
    assert reward(prompts=["p"], completions=["c"]) == [0.25]
    assert reward.__name__ == "close_enough"


def test_a_file_used_twice_is_one_module(write, tmp_path):
    path = write("mine.py", FILE)
    assert load_target(f"{path}:Close") is load_target("./mine.py:Close", str(tmp_path))
    assert load_target(f"{path}:Nested.Inner") is load_target(f"{path}:Close")


def test_a_dotted_path_is_imported():
    assert component_class("shaper", "trl_rewards.defaults.shapers:Clip").__name__ == "Clip"


def test_a_dotted_path_may_lead_into_the_working_directory_as_in_trl(write, tmp_path, monkeypatch):
    write("module_in_cwd_for_test.py", FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert load_reward("module_in_cwd_for_test:close_enough").__name__ == "close_enough"


def test_a_missing_file_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=rf"no file './none.py' in {tmp_path}/there or {tmp_path}"):
        load_target("./none.py:thing", str(tmp_path / "there"))


def test_a_missing_attribute_gets_a_suggestion(write):
    with pytest.raises(PluginError, match="has no 'close_enuf', did you mean 'close_enough'"):
        load_target(f"{write('mine.py', FILE)}:close_enuf")


@pytest.mark.parametrize(
    ("code", "reason"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("def f(:", "SyntaxError"), ("exit(2)", "SystemExit: 2")],
)
def test_a_file_that_raises_is_an_error_with_its_reason_each_time(code, reason, write):
    path = write("bad.py", code)
    for _ in range(2):
        with pytest.raises(PluginError, match=f"cannot be imported: {reason}"):
            load_target(f"{path}:thing")


def test_a_dotted_module_that_is_missing_is_an_error():
    with pytest.raises(PluginError, match=r"'no_such_module' .*cannot be imported: ModuleNotFoundError"):
        load_target("no_such_module:thing")


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("shaper", "trl_rewards.defaults.rules:Length"),
        ("reward", "trl_rewards.defaults.shapers:Clip"),
        ("shaper", "math:tanh"),
        ("reward", "math:pi"),
    ],
)
def test_a_path_to_something_else_is_refused(kind, use):
    with pytest.raises(PluginError, match=r"is not a (Shaper|Reward) class"):
        component_class(kind, use)


# --- the author's kit ------------------------------------------------------------------------------------------------


def test_plugin_manager_adds_plugins_inside_the_block_only():
    class Mine(Reward):
        def score(self, samples):
            return [3.0] * len(samples)

    class Plug:
        @staticmethod
        @hookimpl
        def register_rewards():
            return {"mine_for_a_while": Mine}

    with plugin_manager({"plug": Plug}) as registry:
        assert registry.find("reward", "mine_for_a_while").owner == "plug"
        assert load_reward("mine_for_a_while").score(make_samples(["a"])) == [3.0]
        assert load_reward("exact_match")  # installed ones stay
    with pytest.raises(PluginError, match="unknown reward 'mine_for_a_while'"):
        load_reward("mine_for_a_while")


def test_the_first_sentence_ends_at_the_first_full_stop():
    class Documented(Reward):
        """Share of
        vowels. More is better.

        Second paragraph."""

    class Bare(Reward):
        pass

    assert first_sentence(Documented) == "Share of vowels."
    assert first_sentence(Bare) == ""
