"""Does an ensemble of reward models stand more optimisation than one? Best of n against a known truth.

    python ensembles.py draw OUT                             # the bundled policy's answers, and which are right
    python ensembles.py pairs OUT --answers A --seed 0       # pairs of a right and a wrong one, some turned
    python ensembles.py score OUT --answers A --members M    # what the members, and their average, say of the answers
    python ensembles.py choose OUT --scores S --by uwo       # what the best of n by one method is worth

The truth is whether an answer is right. Methods: `single` (the mean of what each member does alone), the `mean` of the
members, the `worst` of them, their mean less half their variance (`uwo`), and the one model that their averaged
weights make (`warm`).
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import run
from trl_rewards_ensembles.uwo import uwo

from trl_rewards.files import write_rows

GOLD = {"use": "exact_match", "with": {"take": "last_word"}}
TRAIN_PROMPTS, TRAIN_ANSWERS = 400, 4
TEST_PROMPTS, TEST_ANSWERS = 40, 128
PAIRS, NOISE = 128, 0.25
BEST_OF = (1, 4, 16, 64)
COEFFICIENT = 0.5  # the paper's in best of n
METHODS = ("single", "mean", "worst", "uwo", "warm")


def draw(out: Path) -> None:
    """Of prompts of both splits: the bundled policy's different answers, how often each came, and whether it is
    right."""
    from trl_rewards import bundled
    from trl_rewards.models import Loading, Sampling, load_sampler, sample_candidates

    sampler = load_sampler(Loading(path=str(bundled.model_path()), dtype="float32"))
    for split, prompts, n in (("train", TRAIN_PROMPTS, TRAIN_ANSWERS), ("test", TEST_PROMPTS, TEST_ANSWERS)):
        data = bundled.load_data()[split].select(range(prompts))
        sampling = Sampling(max_new_tokens=48, batch_tokens=16384)
        drawn = sample_candidates(sampler, data["prompt"], n, sampling)
        counts = [Counter(each.text for each in group) for group in drawn]
        rows: list[dict[str, Any]] = [
            {"prompt": row["prompt"], "answer": row["answer"], "texts": list(count), "counts": list(count.values())}
            for row, count in zip(data, counts, strict=True)
        ]
        for row, found in zip(rows, scored(rows, [GOLD], out / f"{split}.scores.jsonl"), strict=True):
            row["gold"] = [scores["exact_match"] for scores in found]
        (out / f"{split}.json").write_text(json.dumps(rows))


def scored(rows: list[dict[str, Any]], rewards: list[dict[str, Any]], out: Path) -> list[list[dict[str, float]]]:
    """What each reward says of each of the texts of each row."""
    from datasets import Dataset

    from trl_rewards import Recipe
    from trl_rewards.commands.score import score_dataset

    data = Dataset.from_list([{name: row[name] for name in ("prompt", "answer", "texts")} for row in rows])
    score_dataset(Recipe.parse({"rewards": rewards}, check_trl=False), data, out, "texts", batch_size=25)
    found: list[list[dict[str, float]]] = [[] for _ in rows]
    for line in map(json.loads, out.read_text(encoding="utf-8").splitlines()[1:]):
        found[line["row"]].append(line["scores"])
    return found


def pairs(out: Path, answers: Path, seed: int) -> None:
    """Pairs of a right and a wrong answer to one prompt, some of them the wrong way round."""
    rng = random.Random(f"{seed} pairs")
    rows = json.loads((answers / "train.json").read_text())
    usable = [row for row in rows if 0 < sum(row["gold"]) < len(row["gold"])]
    found = []
    for row in rng.sample(usable, PAIRS):
        sides = [
            rng.choice([text for text, gold in zip(row["texts"], row["gold"], strict=True) if gold == wanted])
            for wanted in (1, 0)
        ]
        if rng.random() < NOISE:
            sides.reverse()
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
        found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    write_rows(out / "pairs" / "train.jsonl", found)  # a folder of nothing else, as a dataset is


def score(out: Path, answers: Path, members: Path) -> None:
    """Of each answer of the test prompts, as often as it came: the truth, each member's score, and their average's."""
    from trl_rewards.models import average

    folders = sorted(members.glob("member*"))
    average(out / "warm", folders)
    rewards = [
        {"use": "model", "as": folder.name, "with": {"path": str(folder), "dtype": "float32"}}
        for folder in [*folders, out / "warm"]
    ]
    rows = json.loads((answers / "test.json").read_text())
    found = scored(rows, rewards, out / "scores.jsonl")
    names = [folder.name for folder in folders]
    pool = []
    for row, scores in zip(rows, found, strict=True):
        times = [place for place, count in enumerate(row["counts"]) for _ in range(count)]
        pool.append(
            {
                "gold": [row["gold"][place] for place in times],
                "warm": [scores[place]["warm"] for place in times],
                "members": [[scores[place][name] for name in names] for place in times],
            }
        )
    (out / "pool.json").write_text(json.dumps(pool))


def choose(out: Path, scores: Path, by: str) -> None:
    """Write what the best of n are worth, by each proxy of the method and in the mean over these."""
    pool = json.loads((scores / "pool.json").read_text())
    gold = [row["gold"] for row in pool]
    results = [worth(proxy, gold) for proxy in proxies(pool, by)]
    mean = {key: statistics.fmean(result[key] for result in results) for key in results[0]}
    (out / "best_of_n.json").write_text(json.dumps(mean))


def proxies(pool: list[dict[str, Any]], by: str) -> list[list[list[float]]]:
    """What a method ranks answers by: prompts x answers, one for each member where it is `single`."""
    if by == "warm":
        return [[row["warm"] for row in pool]]
    if by == "single":
        count = len(pool[0]["members"][0])
        return [[[scores[member] for scores in row["members"]] for row in pool] for member in range(count)]
    combined = {
        "mean": lambda members: members.mean(dim=1),
        "worst": lambda members: members.min(dim=1).values,
        "uwo": lambda members: uwo(members, COEFFICIENT),
    }[by]
    return [[combined(torch.tensor(row["members"], dtype=torch.float64)).tolist() for row in pool]]


def worth(proxy: list[list[float]], gold: list[list[float]]) -> dict[str, float]:
    """Of a proxy: pairs of a right and a wrong answer in the right order, and the truth of its best of n."""
    found = {"accuracy": statistics.fmean(order for order in map(in_order, proxy, gold) if order is not None)}
    curve = {n: statistics.fmean(best_of(*each, n) for each in zip(proxy, gold, strict=True)) for n in BEST_OF}
    return (
        found | {f"gold@{n}": value for n, value in curve.items()} | {"lost": max(curve.values()) - curve[BEST_OF[-1]]}
    )


def in_order(proxy: Sequence[float], gold: Sequence[float]) -> float | None:
    """Share of a prompt's pairs of a right and a wrong answer that the proxy has in the right order, ties half."""
    right, wrong = ([one for one, truth in zip(proxy, gold, strict=True) if truth == wanted] for wanted in (1, 0))
    points = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    return statistics.fmean(points) if points else None


def best_of(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Expected truth of the best by proxy of n out of N answers.

    Unbiased: the i-th lowest of N is the best of n with probability C(i - 1, n - 1) / C(N, n).
    https://huggingface.co/papers/2310.02743
    """
    order = sorted(range(len(proxy)), key=proxy.__getitem__)
    return sum(math.comb(i, n - 1) * gold[place] for i, place in enumerate(order)) / math.comb(len(proxy), n)


if __name__ == "__main__":
    run(
        __doc__,
        {
            draw: {},
            pairs: {"--answers": Path, "--seed": int},
            score: {"--answers": Path, "--members": Path},
            choose: {"--scores": Path, "--by": METHODS},
        },
    )
