"""A web search by Serper's API, as Themis looks things up.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_rewards import ToolCall
from trl_rewards.models import HttpClient, WebTool

NOTHING = "No good Google Search Result was found"


class WebSearch(WebTool):
    """Searches the web by serper.dev, or by a server of its form.

    It tells the answer that the search engine gives, if there is one; else what it knows of the thing, and the
    snippets of the pages that it found.
    """

    description = "Searches the web. Input: a search query"
    answers_to = ("google_serper",)
    key_header = "X-API-KEY"

    endpoint: str = "https://google.serper.dev"
    """Address of the API; `/search` is asked."""
    api_key_env: str | None = "SERPER_API_KEY"
    """Name of the environment variable that holds the key; null for a server that wants none."""
    pages: int = 10
    """Pages that are asked for and told of."""
    country: str = "us"
    """Where the search engine is asked from."""
    language: str = "en"
    """Language of the results."""

    def __post_init__(self):
        super().__post_init__()
        if self.pages < 1:
            raise ValueError(f"pages must be 1 or more, got {self.pages}")

    def call(self, input: str, call: ToolCall) -> str:
        return self.look_up({"q": input, "gl": self.country, "hl": self.language, "num": self.pages})

    async def fetch(self, client: HttpClient, question: Mapping[str, Any]) -> str:
        found = await client.post("/search", dict(question))
        return " ".join(snippets(found, self.pages)) or NOTHING


def snippets(found: Mapping[str, Any], pages: int) -> list[str]:
    """What Serper's results say, in the released order: a direct answer alone, or knowledge graph and pages."""
    box = found.get("answerBox") or {}
    if box.get("answer"):
        return [str(box["answer"])]
    if box.get("snippet"):
        return [box["snippet"].replace("\n", " ")]
    if box.get("snippetHighlighted"):
        return list(box["snippetHighlighted"])
    said: list[str] = []
    graph = found.get("knowledgeGraph") or {}
    if graph.get("type"):
        said.append(f"{graph.get('title')}: {graph['type']}.")
    if graph.get("description"):
        said.append(graph["description"])
    said += [f"{graph.get('title')} {name}: {value}." for name, value in (graph.get("attributes") or {}).items()]
    for page in (found.get("organic") or [])[:pages]:
        said += [page["snippet"]] if "snippet" in page else []
        said += [f"{name}: {value}." for name, value in (page.get("attributes") or {}).items()]
    return said
