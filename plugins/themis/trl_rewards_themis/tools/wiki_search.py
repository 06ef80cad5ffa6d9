"""A search in Wikipedia, or any other corpus, as Themis looks things up.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_rewards import Context, ToolCall, ToolError
from trl_rewards.models import HttpClient, WebTool
from trl_rewards.passages import PassageIndex

NOTHING = "No passage was found."


class WikiSearch(WebTool):
    """Finds the passage of a corpus that fits a query best: in an index on this machine, or by a ColBERT server.

    `trl-rewards index CORPUS.jsonl --out wiki.sqlite` writes an index. It is ranked by BM25; the released code asked a
    ColBERTv2 server, so other passages may come first.
    """

    description = "Searches Wikipedia. Input: a search query"

    index: str | None = None
    """File that `trl-rewards index` wrote; or give `endpoint`."""
    endpoint: str = ""
    """Address of a ColBERT server, up to its `/api/search`, which is asked."""
    passages: int = 1
    """Passages that are told, best first, each on a line of its own."""

    def __post_init__(self):
        if (self.index is None) == (self.endpoint == ""):
            raise ValueError("wiki_search needs either index (a file of `trl-rewards index`) or endpoint (a server)")
        if self.passages < 1:
            raise ValueError(f"passages must be 1 or more, got {self.passages}")
        super().__post_init__()
        self._passages: PassageIndex | None = None

    def setup(self, context: Context) -> None:
        super().setup(context)
        self._passages = PassageIndex(context.path(self.index)) if self.index is not None else None

    def call(self, input: str, call: ToolCall) -> str:
        if self.index is None:
            return self.look_up({"query": input, "k": str(self.passages)})
        if self._passages is None:
            self.setup(Context())
        assert self._passages is not None
        found = self._passages.search(input, self.passages)
        if not found:
            raise ToolError(NOTHING)
        return "\n".join(f"{passage.title} | {passage.text}" if passage.title else passage.text for passage in found)

    async def fetch(self, client: HttpClient, question: Mapping[str, Any]) -> str:
        found = await client.get("/api/search", question)
        texts = [passage["text"] for passage in found["topk"]]
        if not texts:
            raise ToolError(NOTHING)
        return "\n".join(texts[: self.passages])
