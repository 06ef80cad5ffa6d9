"""Data for a process reward model: steps that Monte Carlo estimation and a judge agree on.
https://huggingface.co/papers/2501.07301

    python -m trl_rewards_process.lessons --data solutions.jsonl --model Qwen/Qwen2.5-Math-7B-Instruct \\
        --outcome accuracy --judge "{use: first_error, with: {model: qwen2.5-72b, endpoint: 'http://…/v1'}}" \\
        --out prm/train.jsonl

Rows have a `prompt`, a `completion` and what the outcome reads, such as `answer`. From the end of each step the model
goes on several times; a step is right if any of these answers is (Math-Shepherd's estimation,
https://huggingface.co/papers/2312.08935). A solution is kept where the judge finds the same first wrong step. What is
written has `prompt`, `completions` (the steps) and `labels`, up to the first wrong step: the data of TRL's PRMTrainer.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_rewards import Context, RecipeError, Reward, RewardError, Samples, StepReward
from trl_rewards.files import write_rows
from trl_rewards_process.prm import question_of
from trl_rewards_process.processbench import first_error, reward_of

if TYPE_CHECKING:
    from trl_rewards.models import Sampler, Sampling


class Solution(NamedTuple):
    """A row of the data."""

    prompt: Any
    text: str
    steps: list[str]
    columns: Mapping[str, Any]
    """What the outcome reads."""


def hard_labels(rates: Sequence[float], threshold: float = 0.0) -> list[bool]:
    """Whether each step leads to a right answer more often than `threshold`; the paper's is 0 of 8."""
    return [rate > threshold for rate in rates]


def first_wrong(labels: Sequence[bool]) -> int:
    """Index of the first wrong step, -1 without one."""
    return next((index for index, label in enumerate(labels) if not label), -1)


def kept_labels(labels: Sequence[Any], first: int) -> list[Any]:
    """Labels up to and including the first wrong step: what follows from an error is neither right nor wrong."""
    return list(labels if first < 0 else labels[: first + 1])


def prefixes(text: str, steps: Sequence[str]) -> list[str]:
    """What is written before each step but the first, white space included. ValueError where steps are not in it."""
    starts, cursor = [], 0
    for step in steps:
        start = text.find(step, cursor)
        if start < 0:
            raise ValueError(f"a step is not in its text: {step[:60]!r}")
        starts.append(start)
        cursor = start + len(step)
    return [text[:start] for start in starts[1:]]


def opened(tokenizer: Any, prompt: Any) -> str:
    """A prompt up to where the answer begins, as text that is tokenised as it stands."""
    if isinstance(prompt, str):
        return prompt
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


def success_rates(
    solutions: Sequence[Solution],
    sampler: Sampler,
    outcome: Reward,
    n: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    work: Path | None = None,
    signature: str = "",
    progress: bool = False,
) -> list[list[float] | None]:
    """Each step's share of right answers among `n` that go on from its end, in [0, 1]; None for a solution with a step
    of which the outcome says nothing, or one that leaves no room in the model's context.

    After the last step there is nothing to go on with: it is 1 or 0 as the solution itself is. An answer is right
    where its outcome is above 0.5.
    """
    from trl_rewards.models import sample_candidates

    places: list[tuple[int, str]] = []
    prompts: list[str] = []
    too_long = set()
    for row, each in enumerate(solutions):
        before, starts = opened(sampler.tokenizer, each.prompt), prefixes(each.text, each.steps)
        if starts and len(sampler.tokenizer(before + starts[-1])["input_ids"]) >= sampler.context:
            too_long.add(row)
            continue
        places += [(row, start) for start in starts]
        prompts += [before + start for start in starts]
    drawn = sample_candidates(
        sampler, prompts, n, sampling, seed=seed, work=work, signature=signature, progress=progress
    )
    answers = [
        (row, start + each.text) for (row, start), group in zip(places, drawn, strict=True) for each in group
    ] + [(row, each.text) for row, each in enumerate(solutions)]
    right = iter(_outcomes(outcome, solutions, answers))
    rates: list[list[float | None]] = [[] for _ in solutions]
    for row, _ in places:
        known = [score > 0.5 for score in (next(right) for _ in range(n)) if score is not None]
        rates[row].append(fmean(known) if known else None)
    for row in range(len(solutions)):
        score = next(right)
        rates[row].append(None if score is None else float(score > 0.5))
    return [
        None if row in too_long or None in each else [rate for rate in each if rate is not None]
        for row, each in enumerate(rates)
    ]


def _outcomes(
    outcome: Reward, solutions: Sequence[Solution], answers: list[tuple[int, str]]
) -> Iterator[float | None]:
    """The outcome of each (row, answer)."""
    for start in range(0, len(answers), 512):
        rows = [solutions[row] for row, _ in answers[start : start + 512]]
        texts = [text for _, text in answers[start : start + 512]]
        yield from outcome(
            prompts=[row.prompt for row in rows],
            completions=[_completion(row.prompt, text) for row, text in zip(rows, texts, strict=True)],
            **{name: [row.columns[name] for row in rows] for name in outcome.reads()},
        )


def _completion(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def judged(
    solutions: Sequence[Solution], judge: StepReward, work: Path, signature: str, size: int = 64
) -> list[int | None]:
    """Index of the first wrong step by the judge, -1 without one; None where the judge could not say.

    A step is wrong where its value is below 0.5. `work` keeps replies as they come.
    """
    from trl_rewards.models import WorkFile

    keeper = WorkFile(work, signature, "verdicts of another judge or on other solutions")
    found = [each for line in keeper.lines for each in line]
    while len(found) < len(solutions):
        part = solutions[len(found) : len(found) + size]
        samples = Samples(
            [each.prompt for each in part],
            [_completion(each.prompt, each.text) for each in part],
            columns={name: [each.columns[name] for each in part] for name in judge.reads()},
        )
        scores = judge.score_steps(samples, [each.steps for each in part])
        verdicts = [first_error(each, 0.5) if isinstance(each, list) else None for each in scores]
        keeper.append(verdicts)
        found += verdicts
    return found


def rows_of(
    solutions: Sequence[Solution],
    rates: Sequence[list[float] | None],
    verdicts: Sequence[int | None] | None,
    threshold: float = 0.0,
    soft: bool = False,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows with `prompt`, `completions`, `labels` and `rates`, and how many solutions were kept, or left out for what.

    Without `verdicts` the estimation alone decides, as in Math-Shepherd.
    """
    rows, counts = [], Counter({"kept": 0})
    for index, (each, rate) in enumerate(zip(solutions, rates, strict=True)):
        verdict = verdicts[index] if verdicts is not None else None
        if rate is None:
            counts["too long or without an outcome"] += 1
            continue
        if verdicts is not None and verdict is None:
            counts["without a verdict"] += 1
            continue
        labels = hard_labels(rate, threshold)
        first = first_wrong(labels)
        if verdicts is not None and verdict != first:
            counts["in which the two disagree"] += 1
            continue
        counts["kept"] += 1
        kept = kept_labels(rate if soft else labels, first)
        rows.append(
            {
                "prompt": question_of(each.prompt),
                "completions": each.steps[: len(kept)],
                "labels": kept,
                "rates": rate[: len(kept)],
            }
        )
    return rows, counts


def read_solutions(
    data: str, split: str, steps: StepReward, columns: Sequence[str], limit: int | None
) -> list[Solution]:
    """The rows with a prompt and steps. RecipeError where columns are not there."""
    from trl_rewards.data import load_splits

    splits = load_splits(data, option="--data")
    if split not in splits:
        raise RecipeError([f"--split: no split {split!r} (there is {', '.join(splits)})"], data)
    rows = splits[split]
    if missing := [name for name in ("prompt", "completion", *columns) if name not in rows.column_names]:
        raise RecipeError([f"--data: no column {', '.join(missing)} (it has {', '.join(rows.column_names)})"], data)
    found = []
    for row in rows.select(range(min(limit or len(rows), len(rows)))):
        text = row["completion"] if isinstance(row["completion"], str) else row["completion"][-1]["content"]
        (parts,) = steps.steps_of(Samples([row["prompt"]], [text]))
        if parts:
            found.append(Solution(row["prompt"], text, parts, {name: row[name] for name in columns}))
    if not found:
        raise RecipeError(["--data: no row has a completion with a step"], data)
    return found


def build(given: argparse.Namespace) -> str:
    """Write the rows; what was made of the solutions, in lines. What an interrupted call did is beside `--out`."""
    import yaml

    from trl_rewards.data import model_path
    from trl_rewards.models import Loading, Sampling, load_sampler

    if given.out.exists():
        raise RewardError(f"--out: {given.out} exists; delete it, or give another name")
    if given.n < 1 or not 0 <= given.threshold < 1:
        raise RewardError(f"--n must be at least 1 and --threshold in [0, 1), got {given.n} and {given.threshold}")
    splitter = StepReward(steps=yaml.safe_load(given.steps))
    splitter.setup(Context())
    outcome = reward_of(given.outcome, "--outcome")
    judge = reward_of(given.judge, "--judge") if given.judge else None
    if judge is not None and not isinstance(judge, StepReward):
        raise RewardError(f"--judge: {given.judge!r} scores no steps")
    columns = dict.fromkeys([*outcome.reads(), *(judge.reads() if judge else ())])
    solutions = read_solutions(given.data, given.split, splitter, list(columns), given.limit)
    sampling = Sampling(
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        batch_tokens=given.batch_tokens,
    )
    quantization = "4bit" if given.load_in_4bit else None
    loading = Loading(path=model_path(given.model), dtype=given.dtype, quantization=quantization)
    work = given.out.with_name(given.out.name + ".unfinished")
    sampler = load_sampler(loading, given.backend)
    rates = success_rates(
        solutions,
        sampler,
        outcome,
        given.n,
        sampling,
        seed=given.seed,
        work=work / "answers.jsonl",
        signature=f"{given.backend} {loading}",
        progress=True,
    )
    del sampler
    gc.collect()  # the judge may need the memory
    verdicts = None
    if judge is not None:
        told = json.dumps([given.judge, [[each.prompt, each.steps] for each in solutions]])
        digest = hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        verdicts = judged(solutions, judge, work / "verdicts.jsonl", digest)
    rows, counts = rows_of(solutions, rates, verdicts, given.threshold, given.labels == "soft")
    write_rows(given.out, rows)
    shutil.rmtree(work)
    labels = [label for row in rows for label in row["labels"]]
    lines = [f"{len(solutions)} solutions: {', '.join(f'{count} {what}' for what, count in counts.items())}"]
    if labels:
        lines.append(f"{len(labels)} steps, {fmean(map(float, labels)):.1%} of them right")
    return "\n".join([*lines, f"-> {given.out}"])


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_rewards_process.lessons",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="file, folder or Hub name")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int, help="rows at most")
    parser.add_argument("--steps", default="blank_line", help="as the option of rewards of steps")
    parser.add_argument("--model", required=True, help="folder or Hub name of the model that goes on from each step")
    parser.add_argument("--outcome", required=True, help="reward in [0, 1], as an entry under `rewards:` in a recipe")
    parser.add_argument("--judge", help="reward of steps to agree with; left out, the estimation alone decides")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--labels", choices=("hard", "soft"), default="hard", help="soft: the share of right answers")
    parser.add_argument("--threshold", type=float, default=0.0, help="a step is right above this share")
    parser.add_argument("--n", type=int, default=8, help="answers from each step")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    try:
        print(build(given))
    except (RewardError, RecipeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
