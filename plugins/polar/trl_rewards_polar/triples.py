"""POLAR's pre-training data: two trajectories of one policy and one of another.  https://huggingface.co/papers/2507.05197

    python -m trl_rewards_polar.triples --policies A B "C?temperature=0.7" --prompts texts.jsonl --out triples.jsonl

For every prefix two policies are drawn. The first writes twice, reference and chosen; the second once, rejected. A
reward model that ranks chosen above rejected has to tell policies apart, and needs no human labels for it.

A policy is a model, or `base@adapter` for one with a LoRA adapter, and may end in settings:
`model?temperature=0.7&top_k=0`. With `--pool FILE` they come from a YAML list, whose keys are the fields of `Policy`.
Text is what goes from a policy to a triple, so policies may have different tokenizers.

Prompts are the rows of a file, folder, `bundled:` or Hub dataset. A column `prompt` is taken whole: messages are put
to the policy in its chat template (wrapper `sft`), a string is continued (wrapper `pretrain`). Without one, a column
`text` holds documents, and a prefix of each is continued.

If `--out` ends in `.jsonl`, it is one file. Else it is a folder that `dataset_name` can name, with `train.jsonl`,
`validation.jsonl` (the same policies, other prompts) and `test.jsonl` (policies that are nowhere else). A run that was
interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from trl_rewards import RewardError, Samples
from trl_rewards.files import write_rows

if TYPE_CHECKING:
    from trl_rewards.models import Loading

Prompt = str | list[dict[str, Any]]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model and how it samples. The defaults are the paper's."""

    model: str
    """Folder, `bundled:NAME` or Hub name."""
    name: str = ""
    """What triples call it; empty: the text that describes it."""
    adapter: str | None = None
    """LoRA adapter on the model: folder or Hub name."""
    revision: str | None = None
    """Branch, tag or commit on the Hub, such as a checkpoint of a run."""
    temperature: float = 1.0
    """0 is greedy, and then reference and chosen are the same text."""
    top_p: float = 0.9
    top_k: int = 50
    """0 keeps every token."""

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"policy {self.model!r}: temperature and top_k must be at least 0 and top_p in (0, 1], "
                f"got {self.temperature}, {self.top_k} and {self.top_p}"
            )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How trajectories are written, whatever the policy."""

    max_new_tokens: int = 4096
    batch_size: int = 32
    cut_loops: bool = True
    """Keep one round of what an output repeats until its end."""
    trim_endings: bool = True
    """Cut an output that ran out of tokens back to its last whole sentence."""
    seed: int = 0
    dtype: str = "bfloat16"
    device: str | None = None
    """None: this process's accelerator, or the CPU."""
    load_in_4bit: bool = False
    trust_remote_code: bool = False


class Planned(NamedTuple):
    """One triple before anything is written."""

    split: str
    prompt: int
    """Row of the prompts."""
    first: int
    """Policy that writes reference and chosen."""
    second: int
    """Policy that writes rejected."""
    cut: float
    """Where a document is cut, in [0, 1): 0 is the shortest prefix, towards 1 the longest."""


# --- policies


def read_policy(text: str) -> Policy:
    """`model`, `model@adapter`, either with `?setting=value&…`: fields of Policy. ValueError on another setting."""
    path, _, query = text.partition("?")
    model, _, adapter = path.partition("@")
    settings: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for setting, kind in (("temperature", float), ("top_p", float), ("top_k", int)):
        if setting in settings:
            settings[setting] = kind(settings[setting])
    return _policy({"model": model, "adapter": adapter or None, "name": text} | settings, text)


def read_pool(path: Path) -> list[Policy]:
    """The policies of a YAML list; an entry is text as `read_policy` takes it, or a mapping of Policy's fields.

    Folders that are named beside the file are found there.
    """
    import yaml

    from trl_rewards.data import model_path

    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a YAML list of policies, got {type(entries).__name__}")
    policies = [
        read_policy(entry) if isinstance(entry, str) else _policy({"name": entry.get("model")} | entry, str(path))
        for entry in entries
    ]
    beside = str(path.parent)
    return [
        replace(
            policy,
            model=model_path(policy.model, beside),
            adapter=policy.adapter and model_path(policy.adapter, beside),
        )
        for policy in policies
    ]


def _policy(settings: dict[str, Any], where: str) -> Policy:
    known = [field.name for field in fields(Policy)]
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"{where}: a policy has no setting {', '.join(unknown)}; it takes {', '.join(known)}")
    return Policy(**settings)


# --- the plan


def plan_triples(
    prompts: int, policies: Sequence[str], sizes: dict[str, int], held_out: Sequence[str] = (), seed: int = 0
) -> list[Planned]:
    """Which prompt and which two policies each triple has; the same for the same arguments.

    `sizes` gives the triples of each split. A prompt is in one split only. Policies named in `held_out` write `test`,
    the others `train` and `validation`; each needs two. ValueError where prompts or policies do not suffice.
    """
    if unknown := [name for name in held_out if name not in policies]:
        raise ValueError(f"held-out policies {', '.join(unknown)} are not in the pool: {', '.join(policies)}")
    if len(set(policies)) < len(policies):
        raise ValueError(f"two policies have one name; give one of them a name of its own: {', '.join(policies)}")
    rng = random.Random(seed)
    order = rng.sample(range(prompts), prompts)
    wanted = {split: sizes[split] for split in SPLITS if sizes.get(split)}
    if prompts < len(wanted):
        raise ValueError(f"{prompts} prompts are not enough for the splits {', '.join(wanted)}")
    plan, start, total = [], 0, sum(wanted.values())
    for position, (split, size) in enumerate(wanted.items()):
        writers = [row for row, name in enumerate(policies) if (name in held_out) == (split == "test")]
        if len(writers) < 2:
            raise ValueError(f"split {split!r} needs two policies, got {', '.join(policies[row] for row in writers)}")
        left = len(wanted) - position - 1  # splits that still need a prompt each
        share = prompts - start if not left else min(max(1, prompts * size // total), prompts - start - left)
        rows = order[start : start + share]
        start += share
        for triple in range(size):
            first, second = rng.sample(writers, 2)
            plan.append(Planned(split, rows[triple % share], first, second, rng.random()))
    return plan


def prefix(document: str, tokenizer: Any, low: int, high: int, cut: float) -> str:
    """The first tokens of a document, at least `low` and at most `high` of them; `cut` in [0, 1) says how many."""
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    high = min(high, len(ids))
    length = min(low, high) + int(cut * (high - min(low, high) + 1))
    text = ""
    while not text and length <= len(ids):
        # Byte-level tokens may end within a character, which decodes as U+FFFD.
        text = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        length += 1
    return text


# --- what is kept of an output


def cut_loop(text: str, times: int = 3, minimum: int = 24) -> str:
    """The text with one round of what it repeats until its end, which may come in the middle of a round.

    A loop is at least `times` rounds and `minimum` characters, so that `1000` and `ha ha ha` stay.
    """
    for period in range(1, len(text) // times + 1):
        repeated = 0
        while repeated + period < len(text) and text[-1 - repeated] == text[-1 - repeated - period]:
            repeated += 1
        if repeated + period >= max(times * period, minimum):
            return text[: len(text) - repeated]
    return text


_SENTENCE_END = re.compile(r"""[.!?…]["'”’)\]]*(?=\s|$)|[。！？]["'”’」』）]*""")


def trim_ending(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it if no sentence ends."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


# --- writing


def generate(policy: Policy, prompts: Sequence[Prompt], generation: Generation | None = None) -> list[str]:
    """One output per prompt, in order, such as references for a recipe that trains towards `policy`.

    The same arguments give the same texts, and torch's global random stream is left as it is. RewardError where a
    prompt does not fit into the policy's context, or is a chat and the policy has no chat template.
    """
    writer = Writer(policy, generation or Generation())
    written = {row: text for batch in writer.batches(dict(enumerate(prompts))) for row, text in writer.write(batch)}
    return [written[row] for row in range(len(prompts))]


class Writer:
    """A loaded model that writes what a policy would; policies that differ in sampling alone may share one."""

    def __init__(self, policy: Policy, generation: Generation):
        from trl_rewards.models import load_sampler

        self.policy, self.generation = policy, generation
        self.sampler: Any = load_sampler(_loading(policy, generation), name=policy.name)

    def batches(self, prompts: dict[int, Prompt]) -> list[dict[int, list[int]]]:
        """Row -> token ids of its prompt, in batches of prompts of similar length."""
        encoded = {row: self.sampler.encode(prompt) for row, prompt in prompts.items()}
        return [{row: encoded[row] for row in rows} for rows in self.sampler.batches(encoded, self._sampling())]

    def _sampling(self) -> Any:
        from trl_rewards.models import Sampling

        policy, generation = self.policy, self.generation
        return Sampling(
            temperature=policy.temperature,
            top_p=policy.top_p,
            top_k=policy.top_k,
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            batch_tokens=sys.maxsize,
        )

    def write(self, batch: dict[int, list[int]]) -> list[tuple[int, str]]:
        """(row, text) of the batch, loops and broken endings cut."""
        from trl_rewards.models import stream

        streams = [stream(self.generation.seed, prompt, f"{self.policy} {row}") for row, prompt in batch.items()]
        drawn = self.sampler.draw(list(batch.values()), streams, self._sampling())
        return [(row, self._kept(sampled.text, sampled.ended)) for row, sampled in zip(batch, drawn, strict=True)]

    def _kept(self, text: str, ended: bool) -> str:
        kept = cut_loop(text) if self.generation.cut_loops else text
        return trim_ending(text) if self.generation.trim_endings and not ended and kept == text else kept


def _loading(policy: Policy, generation: Generation) -> Loading:
    from trl_rewards.data import model_path
    from trl_rewards.models import Loading

    return Loading(
        path=model_path(policy.model),
        revision=policy.revision,
        adapter=model_path(policy.adapter) if policy.adapter else None,
        dtype=generation.dtype,
        device=generation.device,
        quantization="4bit" if generation.load_in_4bit else None,
        trust_remote_code=generation.trust_remote_code,
    )


# --- the whole


def build_triples(
    policies: Sequence[Policy],
    prompts: Sequence[Prompt],
    sizes: dict[str, int],
    *,
    held_out: Sequence[str] = (),
    prefix_tokens: tuple[int, int] | None = None,
    generation: Generation | None = None,
    work: Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of triples per split: prompt, reference, chosen, rejected, wrapper, policies (the two names).

    Prompts are text in the rows; the contents of a chat's messages are joined by a newline, as POLAR reads them.
    `prefix_tokens` (least, most) cuts text prompts, in tokens of the first policy. Left out are triples that cannot
    teach anything: with a blank reference, or one text as chosen and as rejected. `work` is a file that keeps
    trajectories while they are written, so that an interrupted call can go on; the caller removes it. One model is
    loaded at a time.
    """
    generation = generation or Generation()
    plan = plan_triples(len(prompts), [policy.name for policy in policies], sizes, held_out, generation.seed)
    asked = [prompts[triple.prompt] for triple in plan]
    if prefix_tokens:
        asked = _cut(asked, plan, policies[0], generation, prefix_tokens)
    # Trajectories 3i, 3i + 1 and 3i + 2 are reference, chosen and rejected of triple i.
    requests: list[dict[int, Prompt]] = [{} for _ in policies]
    for row, triple in enumerate(plan):
        requests[triple.first] |= {3 * row: asked[row], 3 * row + 1: asked[row]}
        requests[triple.second][3 * row + 2] = asked[row]
    texts = _write_all(policies, requests, generation, work)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS if sizes.get(split)}
    shown = Samples(prompts=asked, completions=[""] * len(asked)).prompt_texts
    for index, triple in enumerate(plan):
        reference, chosen, rejected = (texts[3 * index + role] for role in range(3))
        if chosen != rejected and reference.strip():
            rows[triple.split].append(
                {
                    "prompt": shown[index],
                    "reference": reference,
                    "chosen": chosen,
                    "rejected": rejected,
                    "wrapper": "pretrain" if isinstance(asked[index], str) else "sft",
                    "policies": [policies[triple.first].name, policies[triple.second].name],
                }
            )
    return rows


def _cut(
    prompts: list[Prompt], plan: list[Planned], policy: Policy, generation: Generation, tokens: tuple[int, int]
) -> list[Prompt]:
    """Text prompts cut to their prefixes; chats as they are."""
    from trl_rewards.models import load_tokenizer

    tokenizer = load_tokenizer(_loading(policy, generation))
    return [
        prefix(prompt, tokenizer, *tokens, triple.cut) if isinstance(prompt, str) else prompt
        for prompt, triple in zip(prompts, plan, strict=True)
    ]


def _write_all(
    policies: Sequence[Policy], requests: list[dict[int, Prompt]], generation: Generation, work: Path | None
) -> dict[int, str]:
    """All trajectories by their number. Each batch that is written is a line of `work`."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trl_rewards.models import WorkFile

    held = [[asdict(policy) for policy in policies], asdict(generation), requests]
    header = hashlib.blake2b(json.dumps(held).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    keeper = WorkFile(work, header, "trajectories of another plan") if work else None
    texts: dict[int, str] = {row: text for line in (keeper.lines if keeper else []) for row, text in line}
    total = sum(map(len, requests))
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("trajectories", total=total, completed=len(texts))
        # Policies of one model follow each other, so that it is loaded once.
        order = sorted(range(len(policies)), key=lambda index: _weights(policies[index]))
        for _, sharing in itertools.groupby(order, key=lambda index: _weights(policies[index])):
            writer = None
            for index in sharing:
                if requests[index].keys() <= texts.keys():
                    continue
                progress.update(bar, description=policies[index].name)
                writer = writer or Writer(policies[index], generation)
                writer.policy = policies[index]
                for batch in writer.batches(requests[index]):
                    if batch.keys() <= texts.keys():
                        continue
                    written = writer.write(batch)
                    texts.update(written)
                    if keeper:
                        keeper.append(written)
                    progress.advance(bar, len(written))
    return texts


def _weights(policy: Policy) -> tuple[str, str, str]:
    """What two policies of one model have in common."""
    return policy.model, policy.revision or "", policy.adapter or ""


def read_prompts(name: str, split: str = "train", limit: int | None = None) -> tuple[list[Prompt], bool]:
    """The prompts of a dataset, at most `limit` rows, and whether they are documents of which to take a prefix."""
    from trl_rewards.data import load_splits

    splits = load_splits(name, streaming=True)
    if split not in splits:
        raise RewardError(f"no split {split!r} in {name!r}; there is {', '.join(splits)}")
    rows = list(itertools.islice(splits[split], limit))
    if not rows:
        raise RewardError(f"split {split!r} of {name!r} has no rows")
    column = next((column for column in ("prompt", "text") if column in rows[0]), None)
    if column is None:
        raise RewardError(f"{name!r} has no column 'prompt' or 'text' but {', '.join(rows[0])}")
    return [row[column] for row in rows], column == "text"


def save_triples(rows: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """One JSONL file of all splits, or a folder with one file per split."""
    files = {out: list(itertools.chain(*rows.values()))} if out.suffix == ".jsonl" else {}
    files = files or {out / f"{split}.jsonl": found for split, found in rows.items()}
    for file, found in files.items():
        write_rows(file, found)


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    paper = Generation()
    parser = argparse.ArgumentParser(
        prog="python -m trl_rewards_polar.triples", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--policies", nargs="+", default=[], metavar="POLICY", help="model, model@adapter, model?temperature=0.7&…")
    add("--pool", type=Path, help="YAML list of policies, besides or instead of --policies")
    add("--prompts", required=True, help="file, folder, bundled: or Hub dataset")
    add("--split", default="train", help="which split of it")
    add("--out", type=Path, required=True, help="a .jsonl file, or a folder with one file per split")
    add("--pairs", type=int, help="triples to train on; default: one for each prompt that is left")
    add("--validation", type=int, default=0, help="triples on prompts that are not trained on")
    add("--test", type=int, default=0, help="triples of the held-out policies")
    add("--held-out", nargs="+", default=[], metavar="NAME", help="policies that write --test and nothing else")
    add("--prefix-tokens", nargs=2, type=int, default=[1, 1024], metavar=("LOW", "HIGH"),
        help="length of a document's prefix, drawn evenly, in tokens of the first policy")  # fmt: skip
    add("--max-new-tokens", type=int, default=paper.max_new_tokens)
    add("--batch-size", type=int, default=paper.batch_size)
    add("--keep-loops", action="store_true", help="leave outputs that repeat themselves as they are")
    add("--keep-endings", action="store_true", help="leave broken last sentences")
    add("--seed", type=int, default=paper.seed)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=paper.dtype)
    add("--device", help="default: the accelerator, or the CPU")
    add("--load-in-4bit", action="store_true", help="bitsandbytes nf4")
    add("--trust-remote-code", action="store_true")
    given = parser.parse_args(words)
    try:
        print(_run(given))
    except (RewardError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _run(given: argparse.Namespace) -> str:
    """Make the files; what was made, in a line."""
    from transformers.utils.logging import disable_progress_bar

    if given.out.exists():
        raise RewardError(f"--out: {given.out} exists; delete it, or give another name")
    disable_progress_bar()
    policies = [*map(read_policy, given.policies), *(read_pool(given.pool) if given.pool else ())]
    asked_for = given.pairs + given.validation + given.test if given.pairs else None
    prompts, documents = read_prompts(given.prompts, given.split, asked_for)
    sizes = {
        "train": given.pairs or len(prompts) - given.validation - given.test,
        "validation": given.validation,
        "test": given.test,
    }
    if sizes["train"] < 1:
        raise RewardError(
            f"{len(prompts)} prompts leave none to train on; give more, or fewer --validation and --test"
        )
    generation = Generation(
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size,
        cut_loops=not given.keep_loops,
        trim_endings=not given.keep_endings,
        seed=given.seed,
        dtype=given.dtype,
        device=given.device,
        load_in_4bit=given.load_in_4bit,
        trust_remote_code=given.trust_remote_code,
    )
    work = given.out.with_name(given.out.name + ".unfinished")
    rows = build_triples(
        policies,
        prompts,
        sizes,
        held_out=given.held_out,
        prefix_tokens=tuple(given.prefix_tokens) if documents else None,
        generation=generation,
        work=work,
    )
    save_triples(rows, given.out)
    work.unlink()
    made = ", ".join(f"{len(found)} {split}" for split, found in rows.items())
    return f"{made} triples of {len(policies)} policies -> {given.out}"


if __name__ == "__main__":
    main()
