"""The root's lists agree with the folders, the wheel holds what it should, and a stranger's plugin just works."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = sorted(file.parent for file in ROOT.glob("plugins/*/pyproject.toml"))
NAMES = [folder.name for folder in FOLDERS]
EXAMPLE = ROOT / "tests" / "third_party" / "trl-rewards-example"
needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"
)


def test_every_folder_under_plugins_is_a_plugin():
    folders = {path.name for path in ROOT.glob("plugins/*") if path.is_dir() and not path.name.startswith((".", "__"))}
    assert folders == set(NAMES)
    assert NAMES


def test_root_entry_points_are_the_core_and_the_folders():
    wanted = {"defaults": "trl_rewards.defaults"} | {name: f"trl_rewards_{name}" for name in NAMES}
    assert PYPROJECT["project"]["entry-points"]["trl_rewards"] == wanted


def test_root_wheel_vendors_every_plugin_folder():
    wanted = ["trl_rewards", *(f"plugins/{name}/trl_rewards_{name}" for name in NAMES)]
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == wanted
    for path in wanted:
        assert (ROOT / path / "__init__.py").is_file(), path


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_plugin_folder_looks_like_a_third_party_plugin(folder):
    own = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    assert own["project"]["name"] == f"trl-rewards-{folder.name}"
    assert own["project"]["entry-points"]["trl_rewards"] == {folder.name: f"trl_rewards_{folder.name}"}
    assert any(dependency.startswith("trl-rewards") for dependency in own["project"]["dependencies"])
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {folder.name}")
    assert list(folder.glob("tests/test_*.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_plugin_readme_names_every_component_of_the_plugin(folder):
    from trl_rewards import load_plugins

    readme = (folder / "README.md").read_text(encoding="utf-8")
    entries = [entry for entry in load_plugins().entries if entry.owner == folder.name]
    assert entries
    for entry in entries:
        assert f"`{entry.name}`" in readme, f"{folder.name}/README.md does not speak of {entry.name}"


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_plugin_module_begins_with_its_paper(folder):
    for module in folder.glob("trl_rewards_*/*.py"):
        first = module.read_text(encoding="utf-8").partition("\n")[0]
        assert first.startswith('"""'), module
        if module.name != "__init__.py" and not module.name.startswith("_"):
            head = "".join(module.read_text(encoding="utf-8").splitlines()[:3])
            assert "https://" in head, f"{module}: the paper's link belongs in the first lines"


def test_the_installed_version_is_the_packages():
    import importlib.metadata

    import trl_rewards

    assert trl_rewards.__version__ == PYPROJECT["project"]["version"]
    assert importlib.metadata.version("trl-rewards") == trl_rewards.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built offline with the hatchling that is installed."""
    out = tmp_path_factory.mktemp("wheel")
    code = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
@needs_hatchling
def test_the_wheel_holds_core_plugins_recipes_and_data_but_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"trl_rewards/py.typed", "trl_rewards/cli.py", "trl_rewards/defaults/__init__.py"}
    wanted |= {f"trl_rewards_{name}/__init__.py" for name in NAMES}
    recipes = ROOT / "recipes"
    found = [file.relative_to(recipes).as_posix() for file in recipes.rglob("*.yaml")]
    assert found
    wanted |= {f"trl_rewards/recipes/{name}" for name in found}
    bundled = ROOT / "trl_rewards" / "bundled"
    files = [file for file in bundled.glob("*/*") if file.is_file() and "__pycache__" not in file.parts]
    wanted |= {f"trl_rewards/{file.relative_to(ROOT / 'trl_rewards').as_posix()}" for file in files}
    assert wanted - names == set()
    stray = [name for name in names if "test_" in name or "/tests/" in name or "conftest" in name or ".pyc" in name]
    assert stray == []
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"trl_rewards", "trl_rewards-0.1.0.dist-info", *(f"trl_rewards_{name}" for name in NAMES)}


@pytest.mark.slow
@needs_hatchling
def test_the_wheel_declares_its_entry_points(wheel):
    text = zipfile.ZipFile(wheel).read("trl_rewards-0.1.0.dist-info/entry_points.txt").decode()
    for name in NAMES:
        assert f"{name} = trl_rewards_{name}" in text
    assert "trl-rewards = trl_rewards.cli:main" in text


def make_venv(folder: Path) -> Path:
    """A fresh environment with pip that also sees what this interpreter's has, so that nothing is downloaded."""
    venv.EnvBuilder(with_pip=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin"


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRL_REWARDS")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=env | environment, capture_output=True, text=True)


def install(binaries: Path, *what, cwd: Path) -> None:
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    done = run(binaries / "python", "-m", "pip", "install", *flags, *what, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_hatchling
def test_a_third_party_plugin_installs_and_is_used_in_a_recipe_without_any_change_here(tmp_path):
    binaries = make_venv(tmp_path / "venv")
    source = tmp_path / "src"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    install(binaries, source, cwd=tmp_path)
    command = [binaries / "python", "-m", "trl_rewards.cli"]

    listed = run(*command, "plugins", cwd=tmp_path, COLUMNS="200")
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("example")]
    assert "trl-rewards-example 0.1.0" in line
    assert "1 reward, 1 shaper" in line

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rewards:\n  - use: vowels\n    shape: [{use: negate}]\n  - use: example/vowels\n    as: raw\n")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "q", "completion": "Ada"}\n{"prompt": "q", "completion": "..."}\n')
    scored = run(*command, "score", "--config", recipe, "--data", data, "--out", "out.jsonl", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert '"scores": {"vowels": 0.6666666865348816, "raw": 0.6666666865348816}' in lines[1]
    assert '"total": 0.0' in lines[1]  # -2/3 + 2/3
    assert '"total": null' in lines[2]
    assert "trl-rewards-example:0.1.0" in lines[0]  # the signature names the stranger

    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("model_name_or_path: m\nrewards: [{use: vowles}]\n")
    refused = run(*command, "validate", misspelt, cwd=tmp_path)
    assert refused.returncode == 1
    assert "did you mean 'vowels'" in refused.stderr


@pytest.mark.slow
@needs_hatchling
def test_the_wheel_works_where_there_is_no_checkout(wheel, tmp_path):
    binaries = make_venv(tmp_path / "venv")
    install(binaries, wheel, cwd=tmp_path)
    # Without the parent's editable install, whose finder points at the checkout.
    where = (
        "import trl_rewards, trl_rewards_shaping; from trl_rewards.recipe_files import bundled_recipes; "
        "print(trl_rewards.__file__); print(sorted(bundled_recipes())); print(trl_rewards_shaping.__file__)"
    )
    done = run(binaries / "python", "-c", where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    package, recipes, plugin = done.stdout.splitlines()
    assert package.startswith(str(tmp_path / "venv"))
    assert plugin.startswith(str(tmp_path / "venv"))
    assert "'quickstart'" in recipes
    listed = run(binaries / "trl-rewards", "plugins", cwd=tmp_path, COLUMNS="200")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["plugin", *sorted(["defaults", *NAMES])]
