"""How often a reward agrees with recorded preferences: what `trl-rewards agree` runs."""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trl_rewards.commands.score import score_dataset, split_of
from trl_rewards.data import load_splits, map_columns
from trl_rewards.errors import RecipeError, did_you_mean
from trl_rewards.recipe import Recipe

PAIR = "the two answers"  # a column of ours, with a name that no dataset has
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Where pairs are, and which answer was preferred."""

    data: str
    split: str = "train"
    answers: tuple[str, str] = ("chosen", "rejected")
    """Columns of the two answers. Without a label the first is the preferred one."""
    label: str = ""
    """Column that says which answer was preferred."""
    values: tuple[str, str, str] = ("model_a", "model_b", "tie")
    """What the label says where the first answer, the second or none is preferred. Anything else is no label."""
    ties: Literal["half", "strict"] = "half"
    """`half`: recorded ties are left out, and the reward's count half. `strict`, as BLEUBERI's authors have it: a
    recorded tie counts, a tie of the reward agrees with it and with nothing else."""
    by: str = ""
    """Column of categories, for a row of the table each."""
    seed: int = 0
    """Of the order in which a pair's answers are shown to the reward, and of the bootstrap."""


class Compared(NamedTuple):
    """A recorded preference and what the reward says of the same two answers."""

    prompt: Hashable
    """Pairs of one prompt are not independent of each other."""
    preferred: int
    """1: the first answer, 2: the second, 0: neither."""
    first: float | None
    """The reward's score of the first answer; None without one."""
    second: float | None


class Agreement(NamedTuple):
    """How often a reward agrees, of the pairs that it has both scores for."""

    share: float | None
    """In [0, 1]; None without a pair."""
    low: float | None
    """95 % interval of the share."""
    high: float | None
    pairs: int
    ties: int
    """Of the pairs, those that the reward scores equal."""
    missing: int
    """Further pairs, which lack a score. They count as nothing."""
    prompts: int
    """Different prompts of the pairs: with fewer of them than pairs the interval is a bootstrap over prompts."""


def agreement(compared: Sequence[Compared], ties: Literal["half", "strict"] = "half", seed: int = 0) -> Agreement:
    """The share of pairs in which a reward agrees, with a 95 % interval.

    Wilson's, or where prompts come more than once a bootstrap over prompts, which keeps a prompt's pairs together.
    """
    points: dict[Hashable, list[float]] = {}
    tied = missing = 0
    for each in compared:
        if each.first is None or each.second is None:
            missing += 1
            continue
        says = 0 if each.first == each.second else 1 if each.first > each.second else 2
        tied += says == 0
        half = 0.5 if ties == "half" and says == 0 else 0.0
        points.setdefault(each.prompt, []).append(1.0 if says == each.preferred else half)
    every = [point for found in points.values() for point in found]
    if not every:
        return Agreement(None, None, None, 0, tied, missing, 0)
    share = statistics.fmean(every)
    repeated = len(points) < len(every)
    low, high = bootstrap(list(points.values()), seed) if repeated else wilson(share, len(every))
    return Agreement(share, low, high, len(every), tied, missing, len(points))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent pairs."""
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(points: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of all points, from draws of whole prompts; `points`: those of each prompt."""
    import numpy as np

    sums, sizes = np.array([sum(each) for each in points]), np.array([len(each) for each in points])
    generator = np.random.default_rng(seed)
    shares = []
    for _ in range(DRAWS):
        drawn = generator.integers(len(points), size=len(points))
        shares.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def agree(recipe: Recipe, recorded: Recorded, out: Path | None, batch_size: int) -> dict[str, Any]:
    """Score every pair with a recipe's rewards, and compare. What was found, as JSON can say it.

    `results` has the agreement of the total, and of each source where there are several, for all pairs and for each
    category. `out` keeps the scores, and an interrupted call goes on from it. RecipeError if columns are not there.
    """
    dataset, labels, left_out = read_pairs(recipe, recorded)
    scores = pair_scores(recipe, recorded, dataset, out, batch_size)
    prompts = [json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]
    categories = [str(value) for value in dataset[recorded.by]] if recorded.by else []
    results = []
    for name, found_scores in scores.items():
        compared = [Compared(*each) for each in zip(prompts, labels, *zip(*found_scores, strict=True), strict=True)]
        for category in [None, *sorted(set(categories))]:
            found = [each for row, each in enumerate(compared) if category is None or categories[row] == category]
            figures = agreement(found, recorded.ties, recorded.seed)._asdict()
            results.append({"reward": name, "category": category} | figures)
    return {"recorded": asdict(recorded), "left_out": left_out, "signature": recipe.signature, "results": results}


def pair_scores(
    recipe: Recipe, recorded: Recorded, dataset: Any, out: Path | None, batch_size: int
) -> dict[str, list[list[float | None]]]:
    """The two answers' scores of each pair that `read_pairs` found: the total's, and each source's where there are
    several. `out` as in `agree`."""
    flips = random.Random(recorded.seed)
    turned = [flips.random() < 0.5 for _ in range(len(dataset))]
    # A reward that sees both answers may prefer the one in front, which would be the chosen one.
    answers = zip(*([_answer(value) for value in dataset[name]] for name in recorded.answers), strict=True)
    pairs = [[b, a] if turn else [a, b] for (a, b), turn in zip(answers, turned, strict=True)]
    shown = dataset.remove_columns(list(recorded.answers)).add_column(PAIR, pairs)
    with tempfile.TemporaryDirectory() as scratch:
        file = out or Path(scratch, "scores.jsonl")
        score_dataset(recipe, shown, file, PAIR, batch_size)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    names = ["total"] if len(recipe.rewards) == 1 else ["total", *(source.name for source in recipe.rewards)]
    scores: dict[str, list[list[float | None]]] = {name: [[None, None] for _ in turned] for name in names}
    for line in lines:
        row = line["row"]
        place = 1 - line["completion"] if turned[row] else line["completion"]
        for name, value in ({"total": line["total"]} | line["scores"]).items():
            if name in scores:
                scores[name][row][place] = value
    return scores


def _answer(value: Any) -> Any:
    """A text or a chat as it is; a number or the like, which short answers in JSON may be, as JSON writes it."""
    return value if isinstance(value, str | list) else json.dumps(value)


def read_pairs(recipe: Recipe, recorded: Recorded) -> tuple[Any, list[int], dict[str, int]]:
    """The pairs that count, the answer that was preferred in each (1, 2, or 0 for neither), and how many were left
    out for what."""
    dataset = split_of(load_splits(recorded.data, option="--data"), recorded.split, recorded.data, recipe.source)
    if "prompt" not in [*dataset.column_names, *recipe.dataset.columns] and recorded.answers == ("chosen", "rejected"):
        from trl.data_utils import maybe_extract_prompt

        dataset = dataset.map(maybe_extract_prompt)  # where the answers begin with the prompt, as TRL reads them
    dataset = map_columns(dataset, recipe.dataset, recipe.source)
    names = dataset.column_names
    options = {"answers": recorded.answers, "label": [recorded.label], "by": [recorded.by]}
    problems = [
        f"--{option}: no column {name!r}{did_you_mean(name, names)} (there is {', '.join(names)})"
        for option, wanted in options.items()
        for name in wanted
        if name and name not in names
    ]
    for option, wanted in (("answers", recorded.answers), ("label-values", recorded.values)):
        if len(set(wanted)) < len(wanted):
            problems.append(f"--{option}: must be different ones, got {', '.join(wanted)}")
    if problems:
        raise RecipeError(problems, recipe.source)
    says = dict(zip(recorded.values, (1, 2, 0), strict=True))
    first, second = recorded.answers
    kept: list[int] = []
    labels: list[int] = []
    left_out = {"without two answers": 0, "without a label": 0, "recorded ties": 0}
    for index, row in enumerate(dataset):
        label = says.get(str(row[recorded.label])) if recorded.label else 1
        if row[first] is None or row[second] is None:
            left_out["without two answers"] += 1
        elif label is None:
            left_out["without a label"] += 1
        elif label == 0 and recorded.ties == "half":
            left_out["recorded ties"] += 1
        else:
            kept.append(index)
            labels.append(label)
    if not kept:
        values = sorted({str(value) for value in dataset[recorded.label]})[:8] if recorded.label else []
        wanted = f"--label-values: {recorded.label!r} says {', '.join(values)}, not {', '.join(recorded.values)}; "
        raise RecipeError([f"{wanted if recorded.label else ''}no pair is left: {left_out}"], recipe.source)
    return dataset.select(kept), labels, left_out


def report(found: dict[str, Any]) -> str:
    """The figures as a table in lines."""
    left_out = [f"{count} {what}" for what, count in found["left_out"].items() if count]
    results = found["results"]
    lines = [f"left out: {', '.join(left_out)}"] if left_out else []
    wide = max(len(each["category"] or each["reward"]) for each in results) + 2
    lines.append(f"{'':{wide}} agrees  95 % interval    pairs   ties  missing")
    for each in results:
        title = f"  {each['category']}" if each["category"] is not None else each["reward"]
        share = "     –             –" if each["share"] is None else _percents(each)
        lines.append(f"{title:{wide}} {share:23} {each['pairs']:7} {each['ties']:6} {each['missing']:8}")
    if any(each["prompts"] < each["pairs"] for each in results):
        lines.append(f"intervals by bootstrap over prompts, of which there are {results[0]['prompts']}")
    lines.append(found["signature"])
    return "\n".join(lines)


def _percents(each: Mapping[str, Any]) -> str:
    return f"{each['share']:6.1%}  {each['low']:6.1%} to {each['high']:6.1%}"
