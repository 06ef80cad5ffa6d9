"""The documentation site builds, has a page for everything, and asks for nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_rewards import load_plugins
from trl_rewards.recipe_files import bundled_recipes

ROOT = Path(__file__).parent.parent
WANTS = ("script", "link", "img", "iframe", "source", "object")  # elements for which a browser fetches something

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("material"), reason='needs pip install -e ".[docs]"'),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]  # a broken link, a missing anchor, a page that no menu has
    return folder


def test_every_component_recipe_and_guide_has_a_page(site):
    wanted = [f"components/{entry.kind}/{entry.name}" for entry in load_plugins().entries]
    wanted += [f"recipes/{name}.yaml" for name in bundled_recipes()]
    wanted += [guide.stem for guide in (ROOT / "docs").glob("*.md") if guide.stem != "index"]
    assert [page for page in wanted if not (site / page / "index.html").is_file()] == []


def test_a_component_is_a_click_from_its_table_and_its_recipes_from_it(site):
    assert 'href="../components/advantage/bnpo/"' in (site / "plugins/index.html").read_text()
    assert 'href="../components/advantage/bnpo/"' in (site / "advantages/index.html").read_text()
    page = (site / "components/reward/bleuberi/index.html").read_text()
    assert "max_order" in page
    assert 'href="../../../recipes/quickstart.yaml/"' in page


def test_the_first_page_is_the_readmes_first_screen_and_where_to_go(site):
    page = (site / "index.html").read_text()
    assert "A recipe is a TRL config file plus a few keys" in page
    assert 'href="trl-script/"' in page


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 150
    tag = re.compile(rf"<(?:{'|'.join(WANTS)})\b[^>]*?(?:src|href|data)=[\"']?(?:https?:)?//[^>]*>")
    assert {found for page in pages for found in tag.findall(page.read_text(encoding="utf-8"))} == set()
    assert not any("@import" in (text := sheet.read_text()) or "url(http" in text for sheet in site.rglob("*.css"))
