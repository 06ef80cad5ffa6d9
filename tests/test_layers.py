"""Imports only go down, the core knows no plugin, and looking around costs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "trl_rewards"
LAYERS = {  # module or package -> layer; a module imports at its top only what is on its own layer or below
    "errors": 0,
    "files": 0,
    "filtering": 0,
    "alarms": 0,
    "preclip": 0,
    "events": 0,
    "samples": 0,
    "schedules": 0,
    "terminal": 0,
    "maths": 0,
    "components": 1,
    "pairs": 1,
    "calibration": 1,
    "members": 1,
    "workers": 1,
    "toolbox": 2,
    "passages": 1,
    "hookspecs": 2,
    "plugins": 2,
    "loading": 3,
    "steps": 2,
    "recipe_files": 1,
    "trl_keys": 3,
    "recipe": 3,
    "testing": 3,
    "bundled": 3,
    "data": 4,
    "scoring": 4,
    "pipeline": 4,
    "defaults": 4,
    "models": 4,
    "sandbox": 4,
    "trainers": 5,
    "console": 6,
    "report": 6,
    "commands": 6,
    "commands.probes": 1,
    "commands.show": 3,
    "commands.new": 3,
    "commands.footprint": 4,
    "docs": 6,
    "train": 6,
    "train_members": 6,
    "cli": 6,
}
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "matplotlib", "numpy")
PUBLIC_MODULES = {
    "trl_rewards",
    "trl_rewards.data",
    "trl_rewards.files",
    "trl_rewards.maths",
    "trl_rewards.models",
    "trl_rewards.passages",
    "trl_rewards.sandbox",
    "trl_rewards.steps",
    "trl_rewards.testing",
    "trl_rewards.toolbox",
}
PLUGIN_PACKAGES = sorted(folder for folder in ROOT.glob("plugins/*/trl_rewards_*") if folder.is_dir())


def top_level_imports(file: Path) -> list[str]:
    """Dotted names that a module imports when it is imported, `from a import b` as `a.b`; no type-checking blocks."""
    found: list[str] = []
    waiting: list[ast.AST] = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def all_imports(file: Path) -> list[str]:
    """Dotted names that a module imports anywhere."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def unit(file: Path) -> str:
    """The module or subpackage of the core that a file belongs to; of some a module in it, which has its own layer."""
    return placed(file.relative_to(CORE).with_suffix("").parts)


def placed(parts: Sequence[str]) -> str:
    inner = ".".join(parts[:2])
    return inner if inner in LAYERS else parts[0]


def core_files() -> list[Path]:
    return [file for file in sorted(CORE.rglob("*.py")) if file != CORE / "__init__.py"]


def test_every_module_of_the_core_has_a_layer():
    assert {unit(file) for file in core_files()} == set(LAYERS)


def test_imports_only_go_down():
    upward = []
    for file in core_files():
        for name in top_level_imports(file):
            parts = name.split(".")
            if parts[0] != "trl_rewards" or len(parts) < 2 or parts[1] not in LAYERS:
                continue  # a name of `trl_rewards` itself
            if LAYERS[placed(parts[1:])] > LAYERS[unit(file)]:
                upward.append(f"{file.relative_to(ROOT)} imports {name}")
    assert upward == []


def test_the_package_itself_imports_nothing_above_hookspecs():
    for name in top_level_imports(CORE / "__init__.py"):
        if name.startswith("trl_rewards."):
            assert LAYERS[name.split(".")[1]] <= 2, name


def test_layers_below_4_and_component_modules_import_nothing_heavy_at_the_top():
    light = [file for file in core_files() if LAYERS[unit(file)] < 4 or unit(file) in ("defaults", "data", "sandbox")]
    light += [file for package in PLUGIN_PACKAGES for file in package.rglob("*.py")]
    light += [CORE / "__init__.py", CORE / "cli.py"]
    heavy = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in light
        for name in top_level_imports(file)
        if name.split(".")[0] in HEAVY and file.name not in ("make.py", "teach.py")  # what made the bundled policy
    }
    assert heavy == set()


def test_layer_0_is_the_standard_library_only():
    for file in core_files():
        if LAYERS[unit(file)] == 0:
            for name in top_level_imports(file):
                assert name.split(".")[0] in {*sys.stdlib_module_names, "trl_rewards"}, f"{file.name} imports {name}"


def test_only_plugins_and_hookspecs_say_pluggy():
    saying = {unit(file) for file in core_files() if any(name.split(".")[0] == "pluggy" for name in all_imports(file))}
    assert saying == {"plugins", "hookspecs"}


def test_first_party_plugins_import_only_public_names():
    import trl_rewards

    assert PLUGIN_PACKAGES
    private = []
    for package in PLUGIN_PACKAGES:
        for file in package.rglob("*.py"):
            for name in all_imports(file):
                module, _, attribute = name.rpartition(".")
                if name.split(".")[0] != "trl_rewards" or name in PUBLIC_MODULES:
                    continue
                if module not in PUBLIC_MODULES or (module == "trl_rewards" and attribute not in trl_rewards.__all__):
                    private.append(f"{file.relative_to(ROOT)} imports {name}")
    assert private == []


def test_a_plugin_imports_no_other_plugin_and_the_core_none():
    names = {package.name for package in PLUGIN_PACKAGES}
    files = dict.fromkeys(CORE.rglob("*.py"), "")
    files |= {file: package.name for package in PLUGIN_PACKAGES for file in package.rglob("*.py")}
    for file, own in files.items():
        foreign = {name.split(".")[0] for name in all_imports(file)} & names - {own}
        assert not foreign, f"{file.relative_to(ROOT)} imports {foreign}"


def test_public_names_exist_and_are_complete():
    import trl_rewards

    assert sorted(trl_rewards.__all__) == trl_rewards.__all__
    for name in trl_rewards.__all__:
        assert getattr(trl_rewards, name) is not None
    assert set(trl_rewards._LAZY) <= set(trl_rewards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        trl_rewards.no_such_name  # noqa: B018


def fresh(code: str) -> None:
    """Runs code in a fresh interpreter, then asserts that nothing heavy was imported."""
    check = f"import sys; heavy = [name for name in {HEAVY!r} if name in sys.modules]; assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_discovery_and_showing_every_component_import_no_torch():
    fresh(
        "from trl_rewards import load_plugins\n"
        "from trl_rewards.commands.show import describe\n"
        "from trl_rewards.plugins import first_sentence\n"
        "registry = load_plugins()\n"
        "assert len(registry.entries) > 15 and not registry.broken\n"
        "for entry in registry.entries:\n"
        "    assert first_sentence(entry.load()), entry\n"
        "    assert entry.name in describe(f'{entry.owner}/{entry.name}', entry.kind)\n"
    )


@pytest.mark.parametrize("words", [["plugins"], ["list"], ["list", "shapers"], ["show", "bleuberi"], ["new", "x_y"]])
def test_commands_that_look_around_import_no_torch(words, tmp_path):
    fresh(
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "from trl_rewards.cli import app\n"
        f"assert not app({words!r}, standalone_mode=False)\n"
    )


def test_our_keys_of_a_recipe_are_checked_without_torch(write):
    recipe = write("r.yaml", "rewards: [{use: length, with: {soft_limit: 1, hard_limit: 2}, shape: [{use: tanh}]}]")
    fresh(
        "from trl_rewards import Recipe\n"
        f"recipe = Recipe.load({recipe!r}, check_trl=False)\n"
        "assert recipe.signature and recipe.rewards[0].name == 'length'\n"
    )
