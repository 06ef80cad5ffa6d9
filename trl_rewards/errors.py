"""The errors a user meets: what was got, what is wanted, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """A recipe that cannot run. Holds every problem that was found, each with the path the user typed."""

    def __init__(self, problems: Iterable[str], source: str = "recipe"):
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class PluginError(LookupError):
    """A component that cannot be found, is claimed twice, or whose plugin is broken."""


class ToolError(RuntimeError):
    """What a tool says where it has no result: words for the model that asked, which reads them as it would a result.

    The reason for people is what it is raised from.
    """


class RewardError(RuntimeError):
    """A reward that broke its contract, or failed too often, while training or scoring."""


class AlarmStop(RuntimeError):
    """A recipe's alarm ended the run, as it says; what was trained is saved."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that one was probably meant for."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the closest known word, or an empty string."""
    meant = closest(word, known)
    return f", did you mean {meant!r}?" if meant else ""
