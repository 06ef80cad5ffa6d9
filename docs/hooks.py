"""What the site has beside the guides in this folder: a page for each component and for each file that is linked to.

Links are written as they work in the repository (`../recipes/README.md`) and are made to work in the site. A Markdown
file outside docs/ is a page of the site, and any other file a page with its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

from trl_rewards.docs import component_page
from trl_rewards.plugins import kinds, load_plugins

ROOT = Path(__file__).parent.parent
SPLIT = "\n## Documentation\n"  # the README's first screen, above it, is the site's; the rest is the page `reference`
TABLES = {"docs/advantages.md": "advantage", "docs/combiners.md": "combiner"}
CODE_OR_LINK = re.compile(r"^(?P<fence>```+).*?^(?P=fence)|`[^`\n]*`|(?<=\]\()[^)\s]+(?=\))", re.DOTALL | re.MULTILINE)
NO_LINK = ("`", "#", "http")  # how code, and links that stay as they are, begin
LANGUAGES = {".md": "markdown", ".py": "python", ".yaml": "yaml"}  # of files that are made pages


def on_files(files, config):
    """Add the pages that are not in docs/, and the README's first screen to the first page."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    first_screen = CODE_OR_LINK.sub(lambda found: moved(found.group()), read("README.md").partition(SPLIT)[0])
    texts["docs/index.md"] = first_screen + "\n" + texts["docs/index.md"]
    files.remove(files.get_file_from_path("index.md"))
    for entry in load_plugins().entries:
        texts[f"docs/components/{entry.kind}/{entry.name}.md"] = component_page(entry.name, entry.kind)
    families = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("plugins/*/README.md")}
    waiting = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", *families, *texts}
    while waiting:
        path = waiting.pop()
        if path not in texts:
            texts[path] = page_of(path)
        linked = {target_of(path, link) for link in links_of(with_names_linked(texts[path], path))}
        there = {target for target in linked if (ROOT / target).is_file()} - set(texts)
        waiting |= {target for target in there if Path(target).suffix in LANGUAGES}
    for path, text in texts.items():
        if files.get_file_from_path(uri_of(path)) is None:
            files.append(File.generated(config, uri_of(path), content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a page into the site's."""
    path, folder = path_of(page.file.src_uri), os.path.dirname(page.file.src_uri) or "."

    def link(found: re.Match[str]) -> str:
        written = found.group()
        if written.startswith(NO_LINK):  # GitHub wants \| for a bar in a table's code, and Python-Markdown shows both
            return written if written.startswith("```") else written.replace("\\|", "|")
        _, mark, anchor = written.partition("#")
        return os.path.relpath(uri_of(target_of(path, written)), folder) + mark + anchor

    return CODE_OR_LINK.sub(link, with_names_linked(markdown, path))


def moved(link: str) -> str:
    """A link of the README, as it is written in docs/."""
    return link if link.startswith(NO_LINK) else os.path.relpath(link, "docs")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def page_of(path: str) -> str:
    """What stands on the page of a file of the repository."""
    text = read(path)
    if path == "README.md":
        return f"# Reference\n{SPLIT}{text.partition(SPLIT)[2]}"
    if path.endswith(".md"):
        return text
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n`````{LANGUAGES[Path(path).suffix]}\n{text}`````\n"


def uri_of(path: str) -> str:
    """The site's source path for a path in the repository."""
    if path == "README.md":
        return "reference.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"{path}.md"


def path_of(uri: str) -> str:
    """The path in the repository of a page of the site; `uri_of` turned around."""
    if uri == "reference.md":
        return "README.md"
    return next((path for path in (uri.removesuffix(".md"), uri) if (ROOT / path).is_file()), f"docs/{uri}")


def links_of(text: str) -> list[str]:
    """The relative links of a Markdown text, those in code left out."""
    return [found.group() for found in CODE_OR_LINK.finditer(text) if not found.group().startswith(NO_LINK)]


def target_of(path: str, link: str) -> str:
    """The file of the repository that a link on a page means; for a folder its README, or that of a folder above."""
    target = Path(os.path.normpath(os.path.join(os.path.dirname(path), link.partition("#")[0])))
    if (ROOT / target).is_dir():
        target = next(above for above in [target, *target.parents] if (ROOT / above / "README.md").is_file())
        target /= "README.md"
    return target.as_posix()


def with_names_linked(text: str, path: str) -> str:
    """The tables of components and recipes with a link from each name to its page."""
    if path == "recipes/README.md":
        return re.sub(r"^\| `([\w/.-]+)` \|", r"| [`\1`](\1.yaml) |", text, flags=re.MULTILINE)
    if path not in (*TABLES, "plugins/README.md"):
        return text
    kind, lines = TABLES.get(path, ""), []
    up = "" if path.startswith("docs/") else "../docs/"
    for line in text.splitlines():
        if line.startswith("## ") and line[3:-1].lower() in kinds():
            kind = line[3:-1].lower()
        names, mark, rest = line.partition(" | ")
        if names.startswith("| `") and names != "| `use:`":
            names = re.sub(r"`(\w+)`", rf"[`\1`]({up}components/{kind}/\1.md)", names)
        lines.append(names + mark + rest)
    return "\n".join(lines)
