"""POLAR's scaling law and its eye for unseen policies, on two CPU cores and without a download.

    python benchmarks/polar_scaling.py [--quick] [--seeds 1] [--work runs/polar-scaling]

The paper (https://huggingface.co/papers/2507.05197) finds a validation loss of 0.9 N^-0.0425 for reward models of 50
million to 1 billion parameters (R² 0.9886). This is the same measurement at a ten-thousandth of the size, some 40
minutes on busy cores:

- Policies. Texts come from a grammar of little stories. A style is a weight for each of its choices: words, topics,
  kinds of sentence, which kind follows which, which adjective goes with whom, punctuation. Styles come in families,
  so that policies of one family are hard to tell apart and others are easy. A language model is trained on neutral
  text and then, once for each style, on text of that style; that is a policy, and so are an early checkpoint of some
  and a lower temperature of others. Two families, with all their policies, are held out.
- Triples. `trl_rewards_polar.triples`, with the paper's sampling: a prefix of a neutral story, reference and chosen of
  one policy, rejected of another.
- Reward models of `SIZES`, from random weights, by `trainer: reward` and `objective: polar`: same triples in the same
  order, each once; the learning rate falls with the width.
- Validation loss on prompts that were not trained on, and accuracy on triples of the held-out policies. What a reader
  reaches who knows every policy's probabilities stands beside them: no model can do better.

Every stage keeps its files under `--work`, and a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from trl_rewards_polar.triples import Generation, Policy, build_triples, save_triples

from trl_rewards import load_reward
from trl_rewards.train import quieten_libraries, train

SIZES = {"5k": (16, 2), "20k": (32, 2), "70k": (48, 3), "120k": (64, 3), "190k": (80, 3)}  # width, layers
TRAITS, FAMILIES, MEMBERS = 8, 10, 3
HELD_OUT = (8, 9)  # families
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    sizes: tuple[str, ...] = tuple(SIZES)
    neutral_steps: int = 300
    style_steps: int = 60
    steps: int = 400
    pairs: int = 64
    """Triples in a training step."""
    validation: int = 2000
    test: int = 2000
    known: int = 1000
    """Triples of each kind that the reader who knows the policies is tried on."""


QUICK = Scale(tuple(SIZES)[:3], neutral_steps=100, style_steps=30, steps=60, validation=300, test=300, known=200)


# --- texts

TOPICS = [
    ("farmer horse cow dog hen miller", "barn field mill stable orchard", "wheat hay milk bread apples"),
    ("sailor captain gull fisher whale diver", "harbour island beach ship reef", "nets shells rope salt pearls"),
    ("baker teacher doctor tailor clerk mayor", "market school bridge square station", "books coins letters hats"),
    ("hunter fox owl bear witch ranger", "forest cave river cabin hill", "berries wood mushrooms nuts feathers"),
]
WORDS = {
    "adjective": ["old", "young", "small", "tall", "quiet", "proud", "clever", "tired", "kind", "wild"],
    "took": ["took", "found", "carried", "lost", "wanted", "sold", "hid", "counted"],
    "went": ["went to", "walked to", "came to", "ran to", "left for", "looked for"],
    "said": ["said", "whispered", "shouted", "answered", "asked", "thought"],
    "feeling": ["happy", "sad", "angry", "calm", "hungry", "afraid"],
    "when": [
        "in the morning",
        "at night",
        "after lunch",
        "in winter",
        "last week",
        "every day",
        "at noon",
        "long ago",
    ],
    "link": ["then", "later", "suddenly", "so", "soon", "but"],
    "number": ["two", "three", "four", "five", "six", "seven", "2", "3", "4", "5", "6", "7"],
    "speech": ["we must go", "it is late", "i know the way", "there is no time", "look at this", "do not worry"],
    "end": [".", "!", ";", "...", ","],
}
SENTENCES = [
    "the {adjective} {who} {went} the {where}",
    "the {who} {took} {number} {what}",
    "{link} the {who} {took} the {adjective} {what}",
    "{when} the {who} {went} the {where}",
    "the {who} was {feeling}",
    "the {who} {said} {speech}",
    "{link} the {who} was {feeling} and {took} {what}",
    "in the {where} there was a {adjective} {who}",
    "the {who} and the {other} {went} the {where} {when}",
    "nobody {took} the {what}",
]
PLACES = ("who", "where", "what")
Style = dict[str, list[float]]  # choice -> log weight of each way to make it


def choices() -> dict[str, int]:
    """Every choice of the grammar, and how many ways there are to make it."""
    sizes = {"topic": len(TOPICS), "same person": 2, "capital": 2, "first": len(SENTENCES)}
    sizes |= {f"after {kind}": len(SENTENCES) for kind in range(len(SENTENCES))}
    sizes |= {name: len(words) for name, words in WORDS.items()}
    for topic, lists in enumerate(TOPICS):
        sizes |= {f"{topic} {place}": len(words.split()) for place, words in zip(PLACES, lists, strict=True)}
        sizes |= {f"adjective of {who}": len(WORDS["adjective"]) for who in lists[0].split()}
    return sizes


NEUTRAL: Style = {choice: [0.0] * size for choice, size in choices().items()}


def draw_trait(rng: random.Random) -> Style:
    """Normal log weights for about a third of the choices."""
    return {
        choice: [rng.gauss(0, strength) for _ in weights]
        for choice, weights in NEUTRAL.items()
        for strength in rng.choices([0.55, 0.0], [1, 2])
    }


def styles() -> dict[str, Style]:
    """Name -> style; the first digit of a name is its family.

    A style has normal amounts of `TRAITS` traits, each of which bends a third of the choices. So what tells held-out
    styles apart is what tells the others apart, in other amounts. Members of a family differ by half as much.
    """
    rng = random.Random("styles")
    traits = [draw_trait(rng) for _ in range(TRAITS)]
    found = {}
    for family in range(FAMILIES):
        shared = [rng.gauss(0, 1) for _ in traits]
        for member in range(MEMBERS):
            amounts = [amount + rng.gauss(0, 0.5) for amount in shared]
            found[f"{family}{member}"] = {
                choice: [
                    sum(amount * trait[choice][way] for amount, trait in zip(amounts, traits, strict=True))
                    for way in range(len(weights))
                ]
                for choice, weights in NEUTRAL.items()
            }
    return found


class Author:
    """Writes stories of a style."""

    def __init__(self, style: Style):
        self._weights = {
            choice: list(itertools.accumulate(math.exp(weight) for weight in weights))
            for choice, weights in style.items()
        }

    def story(self, rng: random.Random, sentences: int) -> str:
        def choose(choice: str) -> int:
            (chosen,) = rng.choices(range(len(self._weights[choice])), cum_weights=self._weights[choice])
            return chosen

        topic = choose("topic")
        lists = {place: words.split() for place, words in zip(PLACES, TOPICS[topic], strict=True)}
        said, kind, who = [], None, None
        for _ in range(sentences):
            kind = choose("first" if kind is None else f"after {kind}")
            found = {place: lists[place][choose(f"{topic} {place}")] for place in PLACES}
            other = found["who"]
            if who is None or choose("same person"):
                who = found["who"]
            found |= {name: words[choose(name)] for name, words in WORDS.items()}
            found |= {"who": who, "other": other, "adjective": WORDS["adjective"][choose(f"adjective of {who}")]}
            sentence = SENTENCES[kind].format(**found)
            said.append((sentence.capitalize() if choose("capital") else sentence) + found["end"])
        return " ".join(said)


# --- policies


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a word is about a token, with POLAR's two marks."""
    rng = random.Random("tokenizer")
    texts = [author.story(rng, 5) for author in map(Author, styles().values()) for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|reward|>", "[UNUSED_TOKEN_130]"]
    trainer = trainers.BpeTrainer(
        vocab_size=760,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )


def config(tokenizer: Any, width: int, layers: int) -> Qwen3Config:
    """10 · layers · width² weights besides the embeddings, but for the norms."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )


def fit_policy(model: Any, tokenizer: Any, style: Style, steps: int, seed: str, save: dict[int, Path]) -> None:
    """Next-token training on fresh stories; `save` says where the model goes after which step."""
    rng, author = random.Random(seed), Author(style)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 10) * (1 - 0.9 * step / steps)
        texts = [author.story(rng, rng.randint(3, 5)) + tokenizer.eos_token for _ in range(48)]
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in save:
            model.save_pretrained(save[step])
            tokenizer.save_pretrained(save[step])


def make_policies(work: Path, scale: Scale) -> list[Policy]:
    """The pool: each style, an early checkpoint of each family's second, a colder one of each family's third."""
    folder = work / "policies"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    neutral = Qwen3ForCausalLM(config(tokenizer, 64, 2))
    pool = []
    if not (folder / "neutral" / "model.safetensors").is_file():
        saves = {scale.neutral_steps: folder / "neutral"}
        fit_policy(neutral, tokenizer, NEUTRAL, scale.neutral_steps, "neutral", saves)
        say("neutral policy")
    for name, style in styles().items():
        path, early = folder / name, folder / f"{name}-early"
        if not (path / "model.safetensors").is_file():
            saves = {scale.style_steps: path} | ({scale.style_steps // 3: early} if name[1] == "1" else {})
            model = AutoModelForCausalLM.from_pretrained(folder / "neutral")
            fit_policy(model, tokenizer, style, scale.style_steps, name, saves)
            say(f"policy {name}")
        pool.append(Policy(model=str(path), name=name))
        if name[1] == "1":
            pool.append(Policy(model=str(early), name=f"{name} early"))
        if name[1] == "2":
            pool.append(Policy(model=str(path), name=f"{name} cold", temperature=0.7))
    return pool


# --- triples


def make_triples(work: Path, scale: Scale, pool: Sequence[Policy]) -> None:
    """`triples/{train,validation,test}.jsonl`; test is of the held-out policies."""
    out, unfinished = work / "triples", work / "triples.unfinished"
    if out.is_dir():
        return
    rng, author = random.Random("stories"), Author(NEUTRAL)
    sizes = {"train": scale.steps * scale.pairs, "validation": scale.validation, "test": scale.test}
    stories = [author.story(rng, 2) for _ in range(sum(sizes.values()))]
    rows = build_triples(
        pool,
        stories,
        sizes,
        held_out=[policy.name for policy in pool if is_held_out(policy.name)],
        prefix_tokens=(1, 8),
        generation=Generation(max_new_tokens=MAX_NEW_TOKENS, batch_size=512, dtype="float32", device="cpu"),
        work=unfinished,
    )
    save_triples(rows, out)
    unfinished.unlink()
    say("triples " + ", ".join(f"{len(found)} {split}" for split, found in rows.items()))


def is_held_out(policy: str) -> bool:
    return int(policy[0]) in HELD_OUT


def read_triples(work: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "triples" / f"{split}.jsonl").read_text().splitlines()]


# --- reward models


def train_reward_model(work: Path, scale: Scale, size: str, seed: int) -> Path:
    """The folder of a trained reward model."""
    run = work / f"model-{size}-{seed}"
    if (run / "model.safetensors").is_file():
        return run
    width, layers = SIZES[size]
    tokenizer: Any = AutoTokenizer.from_pretrained(work / "policies" / "neutral")
    torch.manual_seed(seed)
    start = work / f"start-{size}-{seed}"
    Qwen3Model(config(tokenizer, width, layers)).save_pretrained(start)
    tokenizer.save_pretrained(start)
    recipe = {
        "trainer": "reward",
        "objective": {"use": "polar", "with": {"wrapper": "pretrain", **LENGTHS}},
        "model_name_or_path": str(start),
        "dataset_name": str(work / "triples"),
        "output_dir": str(run),
        "learning_rate": 0.1 / width,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, scale.steps // 20),
        "weight_decay": 0.01,
        "max_steps": scale.steps,
        "per_device_train_batch_size": scale.pairs,
        "max_length": LENGTHS["max_length"],
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "seed": seed,
    }
    file = work / f"model-{size}-{seed}.yaml"
    file.write_text(json.dumps(recipe, indent=2))
    train(str(file))
    return run


LENGTHS = {"max_length": 256, "max_response_length": 64}


def margins(work: Path, model: Path, split: str) -> list[float]:
    """Score of chosen minus that of rejected, triple by triple."""
    rows = read_triples(work, split)
    options = {"wrapper": "pretrain", "strip_thinking": False, "dtype": "float32", "device": "cpu", **LENGTHS}
    reward = load_reward("polar", path=str(model), **options)

    def scores(role: str) -> list[float]:
        """TRL's call of a reward function; it raises on none of these rows."""
        prompts, completions, references = ([row[name] for row in rows] for name in ("prompt", role, "reference"))
        found = [score for score in reward(prompts, completions, reference=references) if score is not None]
        assert len(found) == len(rows), f"{len(rows) - len(found)} triples have no score"
        return found

    pairs = list(zip(scores("chosen"), scores("rejected"), strict=True))
    reward.close()
    return [chosen - rejected for chosen, rejected in pairs]


def parameters(tokenizer: Any, size: str) -> int:
    """Weights besides the embeddings and the score head."""
    return Qwen3Model(config(tokenizer, *SIZES[size])).num_parameters(exclude_embeddings=True)


# --- the reader who knows the policies


@torch.no_grad()
def known_margins(rows: Sequence[dict[str, Any]], pool: Sequence[Policy]) -> list[float]:
    """Log odds that chosen is from the reference's policy and rejected from another, rather than the other way round.

    Every policy is as likely as another before the texts are seen. What a policy cannot sample is given a thousandth
    of its untruncated probability, since a text that is decoded and read again may have other tokens.
    """
    logps = []  # (policies, rows, 3)
    for path, sharing in itertools.groupby(pool, key=lambda policy: policy.model):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        for policy in sharing:
            texts = [row[role] for row in rows for role in ("reference", "chosen", "rejected")]
            prompts = [row["prompt"] for row in rows for _ in range(3)]
            logps.append(sampling_logps(model, tokenizer, policy, prompts, texts).view(len(rows), 3))
    reference, chosen, rejected = torch.stack(logps).double().unbind(-1)  # (policies, rows) each
    return (together_and_apart(reference, chosen, rejected) - together_and_apart(reference, rejected, chosen)).tolist()


def together_and_apart(reference: torch.Tensor, same: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(P, B) log-probabilities under each policy -> (B,) log Σ_{p≠q} P_p(reference) P_p(same) P_q(other)."""
    apart = torch.zeros(len(same), len(same), dtype=same.dtype).fill_diagonal_(-torch.inf)
    return ((reference + same)[:, None] + other[None] + apart[:, :, None]).flatten(0, 1).logsumexp(0)


def sampling_logps(
    model: Any, tokenizer: Any, policy: Policy, prompts: Sequence[str], texts: Sequence[str]
) -> torch.Tensor:
    """(B,) log-probability of each text after its prompt, as the policy samples."""
    found = []
    asked = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    said = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for start in range(0, len(texts), 256):
        pairs = list(zip(asked, said, strict=True))[start : start + 256]
        longest = max(len(a) + len(b) for a, b in pairs)
        ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
        mine = torch.zeros(len(pairs), longest, dtype=torch.bool)
        for row, (a, b) in enumerate(pairs):
            ids[row, : len(a) + len(b)] = torch.tensor(a + b)
            mine[row, len(a) : len(a) + len(b)] = True
        at = mine[:, 1:]
        logits = model(input_ids=ids).logits[:, :-1][at] / policy.temperature  # (tokens, vocabulary)
        token = ids[:, 1:][at][:, None]
        whole = logits.log_softmax(-1).gather(1, token)[:, 0]
        best, which = logits.topk(policy.top_k)
        shares = best.softmax(-1)
        kept = shares.cumsum(-1) - shares < policy.top_p
        nucleus = (which == token) & kept
        truncated = (shares * nucleus).sum(-1) / (shares * kept).sum(-1)
        logp = torch.zeros(at.shape)
        logp[at] = torch.log(0.999 * truncated + 0.001 * whole.exp())
        found.append(logp.sum(-1))
    return torch.cat(found)


# --- figures


def loss_of(found: Sequence[float]) -> float:
    """Mean of -log σ(margin)."""
    return statistics.fmean(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in found)


def accuracy(found: Sequence[float]) -> dict[str, float]:
    """Share of margins above 0 with its Wilson interval at 95 %."""
    share, n, z = statistics.fmean(m > 0 for m in found), len(found), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"accuracy": share, "low": middle - half, "high": middle + half, "triples": n}


def power_law(counts: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """a, b and R² of loss = a · N^-b, by least squares of the logarithms."""
    x, y = [math.log(count) for count in counts], [math.log(loss) for loss in losses]
    slope, start = statistics.linear_regression(x, y)
    return {"a": math.exp(start), "b": -slope, "R2": statistics.correlation(x, y) ** 2}


def resampled(counts: Sequence[float], margins_of: Sequence[Sequence[float]], times: int = 1000) -> dict[str, float]:
    """95 % interval of b over the choice of validation triples, the same ones for every model."""
    rng, found = random.Random(0), []
    losses = torch.tensor([[loss_of([margin]) for margin in margins] for margins in margins_of])  # (models, triples)
    for _ in range(times):
        rows = rng.choices(range(losses.shape[1]), k=losses.shape[1])
        found.append(power_law(counts, losses[:, rows].mean(1).tolist())["b"])
    found.sort()
    return {"b_low": found[int(0.025 * times)], "b_high": found[int(0.975 * times)]}


def kinds_of_pairs(rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Rows by how much their two policies have in common."""
    found: dict[str, list[int]] = {"same style": [], "same family": [], "other family": []}
    for row, triple in enumerate(rows):
        first, second = (name.split()[0] for name in triple["policies"])
        kind = "same style" if first == second else "same family" if first[0] == second[0] else "other family"
        found[kind].append(row)
    return {kind: at for kind, at in found.items() if at}


def measure(work: Path, scale: Scale, pool: Sequence[Policy], seeds: int) -> dict[str, Any]:
    """Every figure so far; written after each model."""
    rows = {split: read_triples(work, split) for split in ("validation", "test")}
    pairs = {split: kinds_of_pairs(found) for split, found in rows.items()}
    file = work / "margins.json"
    found: dict[str, dict[str, list[float]]] = json.loads(file.read_text()) if file.is_file() else {}

    def once(name: str, compute: Callable[[], dict[str, list[float]]]) -> None:
        if name not in found:
            found[name] = compute()
            file.write_text(json.dumps(found))
            losses = ", ".join(f"{split} {loss_of(values):.4f}" for split, values in found[name].items())
            say(f"{name}: loss {losses}")

    once("known policies", lambda: {
        split: known_margins(rows[split][: scale.known], [p for p in pool if is_held_out(p.name) == (split == "test")])
        for split in rows
    })  # fmt: skip
    for size, seed in itertools.product(scale.sizes, range(seeds)):
        model = train_reward_model(work, scale, size, seed)
        once(f"{size} {seed}", lambda model=model: {split: margins(work, model, split) for split in rows})

    def figures(values: dict[str, list[float]]) -> dict[str, Any]:
        return {
            split: {"loss": loss_of(values[split]), **accuracy(values[split])}
            | {
                kind: accuracy([values[split][row] for row in at if row < len(values[split])])
                for kind, at in pairs[split].items()
            }
            for split in rows
        }

    result: dict[str, Any] = {name: figures(values) for name, values in found.items()}
    tokenizer = AutoTokenizer.from_pretrained(work / "policies" / "neutral")
    counts = [parameters(tokenizer, size) for size in scale.sizes]
    laws = []
    for seed in range(seeds):
        of_size = [found[f"{size} {seed}"]["validation"] for size in scale.sizes]
        laws.append(power_law(counts, [loss_of(values) for values in of_size]) | resampled(counts, of_size))
    result |= {"parameters": dict(zip(scale.sizes, counts, strict=True)), "power law of each seed": laws}
    means = [
        statistics.fmean(loss_of(found[f"{size} {seed}"]["validation"]) for seed in range(seeds))
        for size in scale.sizes
    ]
    result["power law"] = power_law(counts, means)
    return result


def show(result: dict[str, Any], scale: Scale, seeds: int) -> str:
    """The figures as a table."""
    lines = [
        "| model | parameters | validation loss | validation accuracy | accuracy on held-out policies |",
        "|" + " --- |" * 5,
    ]
    names = [f"{size} {seed}" for size in scale.sizes for seed in range(seeds)]
    for name in [*names, "known policies"]:
        at = result[name]
        count = result["parameters"].get(name.split()[0], "")
        shares = [f"{at[split]['accuracy']:.3f} ({at[split]['low']:.3f} to {at[split]['high']:.3f})" for split in at]
        lines.append(f"| {name} | {count} | {at['validation']['loss']:.4f} | {shares[0]} | {shares[1]} |")
    law = result["power law"]
    lines.append(f"\nloss = {law['a']:.3f} N^-{law['b']:.4f}, R² {law['R2']:.4f}")
    for seed, law in enumerate(result["power law of each seed"]):
        lines.append(f"seed {seed}: b {law['b']:.4f} ({law['b_low']:.4f} to {law['b_high']:.4f}), R² {law['R2']:.4f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], scale: Scale, seeds: int, file: Path) -> None:
    """Validation loss and held-out accuracy over parameters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    counts = list(result["parameters"].values())
    law, known = result["power law"], result["known policies"]
    left.plot(
        counts, [law["a"] * n ** -law["b"] for n in counts], color="0.5", label=f"{law['a']:.2f} N^-{law['b']:.3f}"
    )
    for seed in range(seeds):
        at = [result[f"{size} {seed}"] for size in scale.sizes]
        left.plot(counts, [found["validation"]["loss"] for found in at], "o", color="C0")
        share = [found["test"]["accuracy"] for found in at]
        error = [[found["test"]["accuracy"] - found["test"]["low"] for found in at],
                 [found["test"]["high"] - found["test"]["accuracy"] for found in at]]  # fmt: skip
        right.errorbar(counts, share, yerr=error, fmt="o-", color="C1", capsize=3)
    left.axhline(known["validation"]["loss"], color="0.5", ls=":", label="policies known")
    right.axhline(known["test"]["accuracy"], color="0.5", ls=":", label="policies known")
    left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="validation loss")
    right.set(xscale="log", xlabel="parameters", ylabel="accuracy on held-out policies")
    left.legend()
    right.legend()
    figure.savefig(file, dpi=120)


_BEGAN = time.time()


def say(text: str) -> None:
    print(f"{time.time() - _BEGAN:6.0f} s  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/polar-scaling"))
    parser.add_argument("--quick", action="store_true", help="three sizes and little data: whether it runs")
    parser.add_argument("--seeds", type=int, default=1, help="reward models of each size")
    given = parser.parse_args()
    scale = QUICK if given.quick else Scale()
    quieten_libraries()
    pool = make_policies(given.work, scale)
    make_triples(given.work, scale, pool)
    result = measure(given.work, scale, pool, given.seeds)
    (given.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, scale, given.seeds, given.work / "scaling.png")
    print(show(result, scale, given.seeds))


if __name__ == "__main__":
    main()
