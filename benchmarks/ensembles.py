"""Do ensembles of reward models mitigate over-optimisation? Best of n and GRPO against a known truth.

    python benchmarks/ensembles.py [--seeds 0 1 2 3 4] [--out runs/ensemble-study] [--quick]

The truth ("gold") is whether an answer is right. For each seed: pairs of a right and a wrong answer of the bundled
policy, a quarter of them the wrong way round; five reward models that learn from these pairs, in an order of their own
each, from one start (the policy with a head that was fitted first); and what is chosen, or trained for, by one of
them (`single`), their mean, the worst of them (`min`), mean less half the variance (`uwo`), and by the one model that
their averaged weights make (`warm`). What is done already is in `--out` and not done again.

Writes `benchmarks/ensembles.json` and `docs/ensembles.png`, and prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from trl_rewards_ensembles.uwo import uwo

from trl_rewards import Recipe, bundled
from trl_rewards.models import Loading, average
from trl_rewards.models.sampling import load_sampler, sample_candidates
from trl_rewards.offline import score_dataset
from trl_rewards.pairs import Sampling
from trl_rewards.report import RunRecorder
from trl_rewards.train import build_trainer, quieten_libraries

ROOT = Path(__file__).parent.parent
GOLD = {"use": "exact_match", "with": {"take": "last_word"}}
METHODS = ("single", "mean", "min", "uwo", "warm")
LENGTH = 48  # tokens of an answer at most
WINDOW = 5  # GRPO steps of which a point of a curve is the mean
STUDENT = (12.706, 4.303, 3.182, 2.776)  # 97.5 % quantiles, one to four degrees of freedom


@dataclass(frozen=True)
class Study:
    """How large all is; one setting for all methods."""

    members: int = 5
    pairs: int = 128
    noise: float = 0.25
    """Share of pairs that are the wrong way round."""
    probe_steps: int = 20
    """Of the head alone, before all members start from it."""
    steps: int = 40
    """Of each reward model, with 16 pairs each: about five epochs."""
    learning_rate: float = 1e-3
    train_prompts: int = 1000
    """Prompts of the training split that pairs are made of, four answers each."""
    test_prompts: int = 50
    pool: int = 128
    """Answers to each held-out prompt, of which the best of n is estimated."""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    grpo_steps: int = 20
    grpo_batch: int = 48
    grpo_learning_rate: float = 6e-4


QUICK = Study(
    members=2,
    pairs=16,
    probe_steps=2,
    steps=2,
    train_prompts=60,
    test_prompts=4,
    pool=8,
    best_of=(1, 2, 4),
    grpo_steps=2,
    grpo_batch=16,
)


def draw(split: str, prompts: int, n: int, folder: Path) -> list[dict[str, Any]]:
    """The bundled policy's answers to the first prompts: each different one, how often it came, and whether it is
    right."""
    file = folder / f"{split}.json"
    if not file.exists():
        data = bundled.load_data()[split]
        data = data.select(range(min(prompts, len(data))))
        sampler = load_sampler(Loading(path=str(bundled.model_path()), dtype="float32"))
        drawn = sample_candidates(
            sampler,
            list(data["prompt"]),
            n,
            Sampling(max_new_tokens=LENGTH, batch_tokens=16384),
            work=folder / f"{split}.drawn",
        )
        counts = [Counter(sampled.text for sampled in group) for group in drawn]
        rows = [
            {"prompt": row["prompt"], "answer": row["answer"], "texts": list(count), "counts": list(count.values())}
            for row, count in zip(data, counts, strict=True)
        ]
        for row, gold in zip(rows, scored(rows, [GOLD], folder / f"{split}.scores"), strict=True):
            row["gold"] = [scores["exact_match"] for scores in gold]
        file.write_text(json.dumps(rows))
    return json.loads(file.read_text())


def scored(rows: list[dict[str, Any]], rewards: list[dict[str, Any]], out: Path) -> list[list[dict[str, float]]]:
    """What each reward says of each of the texts of each row."""
    from datasets import Dataset

    data = Dataset.from_list([{name: row[name] for name in ("prompt", "answer", "texts")} for row in rows])
    score_dataset(Recipe.parse({"rewards": rewards}, check_trl=False), data, out, "texts", batch_size=25)
    found: list[list[dict[str, float]]] = [[] for _ in rows]
    for line in map(json.loads, out.read_text().splitlines()[1:]):
        found[line["row"]].append(line["scores"])
    return found


def prefer(rows: list[dict[str, Any]], study: Study, seed: int, folder: Path) -> None:
    """Write the seed's pairs of a right and a wrong answer to one prompt, some of them turned."""
    rng = random.Random(f"{seed} pairs")
    usable = [row for row in rows if 0 < sum(row["gold"]) < len(row["gold"])]
    lines = []
    for row in rng.sample(usable, study.pairs):
        sides = [
            rng.choice([text for text, gold in zip(row["texts"], row["gold"], strict=True) if gold == wanted])
            for wanted in (1, 0)
        ]
        if rng.random() < study.noise:
            sides.reverse()
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
        lines.append(json.dumps({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def fit(model: str, data: Path, out: Path, study: Study, seed: int, head_only: bool = False) -> None:
    """Train a reward model by recipes/reward/cpu.yaml, or its head alone."""
    options = {
        "model_name_or_path": model,
        "dataset_name": str(data),
        "output_dir": str(out),
        "seed": seed,
        "max_steps": study.probe_steps if head_only else study.steps,
        "learning_rate": 1e-2 if head_only else study.learning_rate,
        "per_device_train_batch_size": 16,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    recipe = Recipe.load(str(ROOT / "recipes/reward/cpu.yaml"), words(options))
    trainer, _ = build_trainer(recipe)
    if head_only:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(name.startswith("score"))
    trainer.train()
    trainer.save_model(str(out))


def words(options: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", json.dumps(value) if not isinstance(value, str) else value)
    ]


def merge(folders: list[Path], out: Path) -> None:
    """WARM: one model of the members' mean weights."""
    shutil.rmtree(out, ignore_errors=True)
    average(out, folders)


def sources(method: str, folder: Path, study: Study) -> list[dict[str, Any]]:
    """The entries under `rewards:` of a method."""
    names = {"single": ["member0"], "warm": ["warm"]}.get(method, [f"member{k}" for k in range(study.members)])
    return [{"use": "model", "as": name, "with": {"path": str(folder / name), "dtype": "float32"}} for name in names]


def optimise(method: str, folder: Path, study: Study, seed: int) -> list[dict[str, float]]:
    """GRPO from the bundled policy by recipes/reward/cpu-grpo.yaml on a method's reward: at every step the KL to the
    start in nats per answer, the proxy and the gold reward of its answers, none of whose questions came before."""
    options = {
        "rewards": [*sources(method, folder, study), GOLD | {"weight": 0.0}],
        "combine": {"use": {"single": "mean", "warm": "mean"}.get(method, method)},
        "output_dir": str(folder / "grpo"),
        "seed": seed,
        "max_steps": study.grpo_steps,
        "per_device_train_batch_size": study.grpo_batch,
        "max_completion_length": LENGTH,
        "learning_rate": study.grpo_learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 2,
        "gradient_checkpointing": False,
        "beta": 1e-6,  # as good as none: TRL measures the KL where it is not 0
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    trainer, _ = build_trainer(Recipe.load(str(ROOT / "recipes/reward/cpu-grpo.yaml"), words(options)))
    trainer.remove_callback(RunRecorder)  # its report takes as long as the training
    trainer.train()
    trainer.pipeline.close()
    return [
        {
            "kl": log["kl"] * log["completions/mean_length"],  # TRL's is per token
            "proxy": log["reward"],
            "gold": log["rewards/exact_match/mean"],
        }
        for log in trainer.state.log_history
        if "kl" in log
    ]


def best_of(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> tuple[float, float]:
    """Expected proxy and gold reward of the best by proxy of n out of N answers, mean over prompts; both (P, N).

    Unbiased: the i-th lowest of N is the best of n with probability C(i - 1, n - 1) / C(N, n).
    https://huggingface.co/papers/2310.02743
    """
    size = proxy.shape[1]
    chance = torch.tensor([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)], dtype=torch.float64)
    order = proxy.argsort(dim=1)
    return tuple(float((values.gather(1, order) * chance).sum(dim=1).mean()) for values in (proxy, gold))


def combined(method: str, members: torch.Tensor, warm: torch.Tensor) -> torch.Tensor:
    """A method's reward of each answer, from those of the K members (..., K) and of the averaged model (...)."""
    if method == "uwo":
        return uwo(members.flatten(0, -2)).view(warm.shape)
    return {"mean": members.mean(-1), "min": members.amin(-1), "warm": warm}[method]


def expand(rows: list[dict[str, Any]], values: list[list[float]]) -> torch.Tensor:
    """(P, N): what each different answer has, as often as it came."""
    return torch.tensor(
        [
            [value for value, count in zip(found, row["counts"], strict=True) for _ in range(count)]
            for row, found in zip(rows, values, strict=True)
        ],
        dtype=torch.float64,
    )


def choose(folder: Path, pool: list[dict[str, Any]], study: Study) -> dict[str, Any]:
    """Best-of-n curves of a seed. `single` is the mean of what each member does alone.

    Proxies are in their deviations over the pool, from their mean there; `scale` has both, of `single` the first
    member's.
    """
    names = [f"member{k}" for k in range(study.members)]
    scores = scored(pool, sources("mean", folder, study) + sources("warm", folder, study), folder / "scores.jsonl")
    each = {name: expand(pool, [[one[name] for one in found] for found in scores]) for name in [*names, "warm"]}
    gold = expand(pool, [row["gold"] for row in pool])
    members = torch.stack([each[name] for name in names], dim=-1)
    curves, accuracies, scale = {}, {}, {}
    for method in METHODS:
        proxies = members.unbind(-1) if method == "single" else [combined(method, members, each["warm"])]
        scale[method] = [float(proxies[0].mean()), float(proxies[0].std())]
        accuracies[method] = statistics.fmean(accuracy(proxy, gold) for proxy in proxies)
        curves[method] = []
        for n in study.best_of:
            found = [best_of((proxy - proxy.mean()) / proxy.std(), gold, n) for proxy in proxies]
            point = {"kl": math.log(n) - (n - 1) / n, "proxy": [p for p, _ in found], "gold": [g for _, g in found]}
            curves[method].append({key: statistics.fmean(v) if key != "kl" else v for key, v in point.items()})
    disagreement = float((members.std(-1, correction=0) / members.mean(-1).std()).mean())
    return {"best_of_n": curves, "accuracy": accuracies, "scale": scale, "disagreement": disagreement}


def accuracy(proxy: torch.Tensor, gold: torch.Tensor) -> float:
    """Share of a prompt's pairs of a right and a wrong answer that the proxy has in the right order, ties half;
    mean over prompts that have such pairs."""
    shares = []
    for scores, right in zip(proxy, gold.bool(), strict=True):
        if right.any() and not right.all():
            gap = scores[right][:, None] - scores[~right]
            shares.append(float(((gap > 0).double() + (gap == 0).double() / 2).mean()))
    return statistics.fmean(shares)


def run_seed(seed: int, study: Study, folder: Path, methods: Sequence[str] = ()) -> None:
    """Reward models and best of n of a seed, and GRPO by these methods; what its file holds is not made again."""
    file = folder / f"seed{seed}.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"seed": seed, "seconds": {}}

    def once(part: str, key: str, make: Callable[[], Any]) -> None:
        if key in done.setdefault(part, {}):
            return
        before = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            done[part][key] = make()
        done["seconds"][f"{part}/{key}"] = round(time.process_time() - before, 1)
        file.write_text(json.dumps(done))
        print(f"seed {seed} {part}/{key}: {done['seconds'][f'{part}/{key}']} CPU seconds", flush=True)

    here = folder / f"seed{seed}"
    (here / "pairs").mkdir(parents=True, exist_ok=True)
    answers = draw("train", study.train_prompts, 4, folder)
    pool = draw("test", study.test_prompts, study.pool, folder)
    once("models", "pairs", lambda: prefer(answers, study, seed, here / "pairs"))
    once("models", "start", lambda: fit("bundled:tiny", here / "pairs", here / "start", study, seed, head_only=True))
    for k in range(study.members):
        once(
            "models",
            f"member{k}",
            lambda k=k: fit(str(here / "start"), here / "pairs", here / f"member{k}", study, 100 * seed + k),
        )
    once("models", "warm", lambda: merge([here / f"member{k}" for k in range(study.members)], here / "warm"))
    once("pool", "curves", lambda: choose(here, pool, study))
    for method in methods:
        once("grpo", method, lambda method=method: optimise(method, here, study, seed))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval, by Student's t; no interval of one seed."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def chosen(seed: dict[str, Any], method: str) -> dict[str, float]:
    """What the table has of best of n."""
    curves = seed["pool"]["curves"]
    gold = {name: [point["gold"] for point in curve] for name, curve in curves["best_of_n"].items()}
    return {
        "pairs in the right order": curves["accuracy"][method],
        "pairs less those of single": curves["accuracy"][method] - curves["accuracy"]["single"],
        "gold at its best n": max(gold[method]),
        "gold at the largest n": gold[method][-1],
        "less that of single": gold[method][-1] - gold["single"][-1],
        "less that of mean": gold[method][-1] - gold["mean"][-1],
    }


def trained(seed: dict[str, Any], method: str) -> dict[str, float]:
    """What the table has of GRPO, of whose run the last steps are the end."""
    curve = smooth(seed, method)
    ends = {name: smooth(seed, name)[-1]["gold"] for name in METHODS}
    return {
        "KL at the end": curve[-1]["kl"],
        "proxy, first": curve[0]["proxy"],
        "proxy at the end": curve[-1]["proxy"],
        "gold, first": curve[0]["gold"],
        "gold at the end": ends[method],
        "less that of single": ends[method] - ends["single"],
        "less that of mean": ends[method] - ends["mean"],
    }


def table(seeds: list[dict[str, Any]], figures: Callable) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each figure and method: mean over seeds, and half of the 95 % interval."""
    found = {method: [figures(seed, method) for seed in seeds] for method in METHODS}
    return {
        name: {method: interval([one[name] for one in found[method]]) for method in METHODS}
        for name in found["single"][0]
    }


def smooth(seed: dict[str, Any], method: str) -> list[dict[str, float]]:
    """A seed's GRPO run in means of five steps, the proxy in its deviations on the pool."""
    mean, deviation = seed["pool"]["curves"]["scale"][method]
    steps = [step | {"proxy": (step["proxy"] - mean) / deviation} for step in seed["grpo"][method]]
    windows = [steps[start : start + WINDOW] for start in range(0, len(steps), WINDOW)]
    return [{key: statistics.fmean(step[key] for step in window) for key in steps[0]} for window in windows]


def draw_curves(curves: dict[str, dict[str, list[list[dict[str, float]]]]], out: Path) -> None:
    """Proxy and gold over KL, means of the seeds with 95 % intervals; `curves`: title, method, seeds, points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(curves), figsize=(9, 6), sharex="col", squeeze=False)
    for column, (title, by_method) in enumerate(curves.items()):
        for method, seeds in by_method.items():
            points = list(zip(*seeds, strict=True))  # each is one of all seeds
            kl = [statistics.fmean(one["kl"] for one in point) for point in points]
            for row, name in enumerate(("proxy", "gold")):
                means, halves = zip(*(interval([one[name] for one in point]) for point in points), strict=True)
                panels[row][column].errorbar(kl, means, halves, label=method, capsize=2, lw=1.5, marker=".")
        panels[0][column].set_title(f"{title}, {len(next(iter(by_method.values())))} seeds")
        panels[1][column].set_xlabel("KL to the start policy, nats")
    panels[0][0].set_ylabel("proxy, deviations")
    panels[1][0].set_ylabel("gold: share of right answers")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ensemble-study")
    parser.add_argument("--report", action="store_true", help="of what is in --out; run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it runs: too small to mean anything")
    given = parser.parse_args()
    quieten_libraries()
    study = QUICK if given.quick else Study()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.report:
        for methods in ((), METHODS):
            for seed in given.seeds:
                run_seed(seed, study, given.out, methods)
    files = [given.out / f"seed{seed}.json" for seed in given.seeds]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    seeds = {
        "Best of n": [seed for seed in found if "pool" in seed],
        "GRPO": [seed for seed in found if set(METHODS) <= set(seed.get("grpo", ()))],
    }
    tables, curves = {}, {}
    for title, figures, points in (
        ("Best of n", chosen, lambda seed, method: seed["pool"]["curves"]["best_of_n"][method]),
        ("GRPO", trained, smooth),
    ):
        if not seeds[title]:
            continue
        tables[title] = table(seeds[title], figures)
        curves[title] = {method: [points(seed, method) for seed in seeds[title]] for method in METHODS}
        for name, row in tables[title].items():
            print(f"{title}, {name}:", {method: f"{mean:.3f} ± {half:.3f}" for method, (mean, half) in row.items()})
    to = given.out if given.quick else ROOT
    results = {"study": asdict(study), "tables": tables, "seeds": found}
    (to / "benchmarks").mkdir(exist_ok=True)
    (to / "docs").mkdir(exist_ok=True)
    (to / "benchmarks" / "ensembles.json").write_text(json.dumps(results) + "\n")
    draw_curves(curves, to / "docs" / "ensembles.png")


if __name__ == "__main__":
    main()
