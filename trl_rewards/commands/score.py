"""Scoring completions without training: what `trl-rewards score` runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_rewards.components import Context, RewardBatch
from trl_rewards.data import load_splits, map_columns, model_path
from trl_rewards.errors import RecipeError
from trl_rewards.pairs import or_none
from trl_rewards.pipeline import Pipeline
from trl_rewards.recipe import Recipe
from trl_rewards.recipe_files import word_value
from trl_rewards.samples import Samples, as_completion

_STATUS = ("ok", "abstained", "failed", "timeout")


def scoring_recipe(config: str, rewards: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The recipe of `--config`, or one of the `--reward` entries alone, each as a recipe has it under `rewards:`.

    RecipeError if there is neither or both, or if the recipe has no rewards.
    """
    if bool(config) == bool(rewards):
        raise RecipeError(["give --config RECIPE, or --reward once or more"], "rewards")
    if rewards:
        entries = [word_value(entry) for entry in rewards]
        return Recipe.parse({"rewards": entries}, overrides, "command line", check_trl=False)
    recipe = Recipe.load(config, overrides, check_trl=False)
    if not recipe.trains_policy:
        raise RecipeError([f"trainer {recipe.trainer!r} has no rewards to score with"], config)
    return recipe


def score_file(
    config: str,
    overrides: Sequence[str],
    data: str,
    out: Path,
    split: str,
    completion: str,
    batch_size: int,
    trace: Path | None = None,
) -> str:
    """Score every row of a dataset and write JSON lines; rows that `out` holds already are kept. Returns a summary.

    `trace`: file that gets a line per completion that is scored, with the texts and what the rewards say of how their
    scores came about.

    A row whose completion column is a list holds the completions of one group: it gives one line per completion.
    What looks beyond a group sees batches of `batch_size` rows; running statistics begin anew when a file is resumed.
    """
    recipe = Recipe.load(config, overrides, check_trl=False)
    dataset = map_columns(split_of(load_splits(data, option="--data"), split, data, config), recipe.dataset, config)
    names = dataset.column_names
    if completion not in names:
        raise RecipeError([f"--completion: no column {completion!r} in {data} (it has {', '.join(names)})"], config)
    score_dataset(recipe, dataset, out, completion, batch_size, trace)
    return summary(out)


def split_of(splits: Any, split: str, data: str, source: str) -> Any:
    """A split of the dataset called `data`; RecipeError if there is none of that name."""
    if split not in splits:
        raise RecipeError([f"--split: no split {split!r} in {data} (there is {', '.join(splits)})"], source)
    return splits[split]


def score_dataset(
    recipe: Recipe, dataset: Any, out: Path, completion: str, batch_size: int, trace: Path | None = None
) -> None:
    """What `score_file` does, of a dataset whose columns are mapped. RecipeError if rewards lack columns."""
    if batch_size < 1:
        raise RecipeError([f"--batch-size: at least 1, got {batch_size}"], recipe.source)
    pipeline = Pipeline.from_recipe(recipe)
    if problems := pipeline.missing_columns([name for name in dataset.column_names if name != completion]):
        raise RecipeError(problems, recipe.source)
    from rich.progress import track

    tokenizer, device = set_up(pipeline, recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    final = dataset[len(dataset) - 1][completion]
    last = [len(dataset) - 1, len(final) - 1 if is_group(final) else 0]  # the row and completion that end the file
    sources = hashlib.blake2b(
        repr([source.signature for source in pipeline.sources]).encode(), digest_size=8
    ).hexdigest()
    held = {"signature": recipe.signature, "sources": sources, "data": _digest(dataset, completion), "last": last}
    header = json.dumps(held) + "\n"
    done = _rows_done(out, header, batch_size, len(dataset))
    if trace:
        _keep_traces(trace, done)
    try:
        with out.open("a", encoding="utf-8") as stream, contextlib.ExitStack() as stack:
            # What a model wrote may be no UTF-8; as an escape it is JSON all the same.
            opened = trace.open("a", encoding="utf-8", errors="backslashreplace") if trace else None
            traces = stack.enter_context(opened) if opened else None
            if not done and stream.tell() == 0:
                stream.write(header)
            batches = list(_batches(len(dataset), done, batch_size))
            for start, end in track(batches, description="scoring", disable=not batches, transient=True):
                rows = [dataset[index] for index in range(start, end)]
                for line, told in _score_rows(pipeline, rows, start, completion, tokenizer, device):
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    if traces:
                        traces.write(json.dumps(line | told, ensure_ascii=False, default=str) + "\n")
                stream.flush()
    finally:
        pipeline.close()


def set_up(
    pipeline: Pipeline, recipe: Recipe, log_metric: Callable[[str, float], None] | None = None
) -> tuple[Any, Any]:
    """Load what a recipe's components need to score without training. The policy's tokenizer, or None, and the
    device."""
    from trl_rewards.models.pretrained import default_device

    device = default_device()
    base = _shared_base(recipe, device) if recipe.share_base else None
    tokenizer = policy_tokenizer(recipe)
    context = Context(device=device, seed=pipeline.seed, base_dir=recipe.base_dir, shared_base=base)
    pipeline.setup(replace(context, tokenizer=tokenizer, log_metric=log_metric))
    if base is not None:
        base.load()
    return tokenizer, device


def _batches(rows: int, done: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(done, rows, size):
        yield start, min(start + size, rows)


def _score_rows(
    pipeline: Pipeline, rows: list[dict[str, Any]], start: int, completion: str, tokenizer: Any, device: Any
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A line per completion, and what a trace has beside it. Rows of different group sizes are scored size by size, in
    their order. A completion that is not there has no score."""
    whole = [row[completion] if is_group(row[completion]) else [row[completion]] for row in rows]
    groups = [{rank: text for rank, text in enumerate(group) if text is not None} for group in whole]
    names = pipeline.names
    nothing = {"total": None, "scores": dict.fromkeys(names), "status": dict.fromkeys(names, "missing")}
    lines: dict[tuple[int, int], tuple[dict[str, Any], dict[str, Any]]] = {}
    for size in sorted({len(group) for group in groups} - {0}):
        members = [index for index, group in enumerate(groups) if len(group) == size]
        places = [(index, rank) for index in members for rank in groups[index]]
        repeated = [rows[index] for index, _ in places]
        completions = [as_completion(groups[index][rank], rows[index]["prompt"]) for index, rank in places]
        samples = Samples(
            prompts=[row["prompt"] for row in repeated],
            completions=completions,
            completion_ids=token_ids(tokenizer, completions),
            columns={name: [row[name] for row in repeated] for name in rows[0] if name not in ("prompt", completion)},
        )
        batch = pipeline.score(samples, group_size=size, device=device)
        scored, traces = _lines(pipeline, batch), batch.traces or [{}] * len(samples)
        told = [
            {"prompt": prompt, "text": text, "traces": found}
            for prompt, text, found in zip(samples.prompt_texts, samples.texts, traces, strict=True)
        ]
        lines |= dict(zip(places, zip(scored, told, strict=True), strict=True))
    for index, group in enumerate(whole):
        for rank in range(len(group)):
            line, beside = lines.get((index, rank), (nothing, {}))
            yield {"row": start + index, "completion": rank} | line, beside


def _keep_traces(trace: Path, done: int) -> None:
    """Leave the lines of the rows that are scored already in a file of traces, which is made where there is none."""
    kept = []
    if done and trace.exists():
        # Not splitlines, which also splits at the separators that JSON leaves as they are, such as U+2028.
        for line in io.StringIO(trace.read_text(encoding="utf-8")):
            if line.endswith("\n") and json.loads(line)["row"] < done:
                kept.append(line)
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text("".join(kept), encoding="utf-8")


def is_group(value: Any) -> bool:
    """Whether a column's value is a list of completions, and not one completion: a text or a chat."""
    return isinstance(value, list) and not (value and isinstance(value[0], dict))


def _lines(pipeline: Pipeline, batch: RewardBatch) -> list[dict[str, Any]]:
    values, status, totals = batch.scores.values.tolist(), batch.scores.status.tolist(), batch.rewards.tolist()
    return [
        {
            "total": or_none(totals[row]),
            "scores": {name: or_none(value) for name, value in zip(pipeline.names, values[row], strict=True)},
            "status": {name: _STATUS[code] for name, code in zip(pipeline.names, status[row], strict=True) if code},
        }
        for row in range(len(totals))
    ]


def _digest(dataset: Any, completion: str) -> str:
    """What tells one dataset from another: its size, columns, and first and last hundred rows."""
    size = len(dataset)
    rows = [dataset[row] for row in {*range(min(size, 100)), *range(max(size - 100, 0), size)}]
    text = json.dumps([size, completion, rows], sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _rows_done(out: Path, header: str, batch_size: int, size: int) -> int:
    """Rows that a file holds in whole batches; the rest is dropped from it. RecipeError if it is of other scores."""
    if not out.exists():
        return 0
    text = out.read_text(encoding="utf-8", errors="replace")
    begins = '{"signature": "'
    if not text.startswith(begins) and not begins.startswith(text):
        raise RecipeError([f"--out: {out} exists and holds no scores; give another file"], str(out))
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        kept.append(line)
    if not kept:
        out.unlink()
        return 0
    held, wanted = json.loads(kept[0]), json.loads(header)
    kinds = (("pipeline", "signature"), ("version of a reward's code", "sources"), ("dataset", "data"))
    for what, name in kinds:
        if held.get(name) != wanted[name]:
            raise RecipeError(
                [f"--out: {out} holds scores of another {what}; give another file or delete it: {held.get(name)}"],
                str(out),
            )
    scored = [json.loads(line) for line in kept[1:]]
    if scored and [scored[-1]["row"], scored[-1]["completion"]] == wanted["last"]:
        return size
    # Whole batches only: the last row may lack some of its completions, and a combiner may look at the whole batch.
    done = (scored[-1]["row"] if scored else 0) // batch_size * batch_size
    kept = kept[:1] + [line for line, row in zip(kept[1:], scored, strict=True) if row["row"] < done]
    out.write_text("".join(kept), encoding="utf-8")
    return done


def summary(out: Path) -> str:
    """Mean, spread and holes per source of a scored file, in lines."""
    import statistics

    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()[1:]]
    lines = [f"{len(rows)} completions scored -> {out}"]
    columns = {"total": [row["total"] for row in rows]}
    for row in rows:
        for name, value in row["scores"].items():
            columns.setdefault(name, []).append(value)
    for name, values in columns.items():
        there = [value for value in values if value is not None]
        holes = f", {len(values) - len(there)} without a score" if len(there) < len(values) else ""
        if not there:
            lines.append(f"  {name}: no scores")
            continue
        spread = statistics.pstdev(there)
        lines.append(
            f"  {name}: mean {statistics.fmean(there):.4f}, std {spread:.4f}, "
            f"min {min(there):.4f}, max {max(there):.4f}{holes}"
        )
    return "\n".join(lines)


def _shared_base(recipe: Recipe, device: Any) -> Any:
    """The policy's base, loaded as TRL would, for the sources that are adapters on it."""
    from trl_rewards.models.shared_base import SharedBase

    if not recipe.trl.get("model_name_or_path"):
        raise RecipeError(["model_name_or_path: share_base needs the policy's base"], recipe.source)
    return SharedBase(policy_loading(recipe, device))


def policy_loading(recipe: Recipe, device: Any) -> Any:
    """How TRL would load the recipe's policy, which there must be: a `Loading`."""
    from trl_rewards.models.pretrained import Loading, load_config, quantization_of

    keys = recipe.trl
    loading = Loading(
        path=model_path(keys["model_name_or_path"], recipe.base_dir),
        revision=keys.get("model_revision"),
        dtype=keys.get("dtype") or "float32",
        attn_implementation=keys.get("attn_implementation"),
        quantization=quantization_of(keys.get("load_in_4bit"), keys.get("load_in_8bit")),
        device=device,
        trust_remote_code=bool(keys.get("trust_remote_code")),
    )
    if loading.dtype == "auto":
        loading = replace(loading, dtype=str(load_config(loading).dtype or "float32").removeprefix("torch."))
    return loading


def policy_tokenizer(recipe: Recipe) -> Any:
    """The policy's tokenizer, so that lengths are in its tokens; None if there is no policy."""
    name = recipe.trl.get("model_name_or_path")
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(name, recipe.base_dir))
    except OSError:
        return None


def token_ids(tokenizer: Any, completions: list[Any]) -> list[list[int]]:
    """Token ids of each completion's text; empty without a tokenizer."""
    if tokenizer is None:
        return []
    from trl_rewards.samples import completion_text

    texts = [completion_text(completion) for completion in completions]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # any length: they are counted
