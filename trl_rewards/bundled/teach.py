"""Small models taught by rule: what makes the bundled policy, and what recipes' scripts make of it."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rewards.bundled import model_path
from trl_rewards.bundled.quiz import TASKS, TRAIN_SIZES, Question

SYSTEM = "Think first, then answer in one sentence."


def command_line(doc: str | None, out: str, **numbers: int) -> tuple[argparse.Namespace, random.Random]:
    """The options of a script that teaches a model: --out, --seed and whole `numbers` with their defaults; and the
    generator that it draws from. Torch is seeded too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    for name, number in ({"seed": 0} | numbers).items():
        parser.add_argument(f"--{name}", type=int, default=number)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    return given, random.Random(given.seed)


def save_tokenizer(tokenizer, out: Path) -> None:
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that 4.x does not know; both know this one.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def prompt_text(tokenizer, text: str, system: str | None = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def batches(rng, tokenizer, reply, steps: int, batch_size: int, taken: set[str]):
    """`steps` batches of (input_ids, labels), each of replies of about equal length, so that little is padding."""
    # The constant keeps the small tasks from being starved, and comparing numbers is the hardest one to learn.
    tasks = list(TRAIN_SIZES)
    weights = [TRAIN_SIZES[task] + (250 if task == "compare" else 60) for task in tasks]
    made = 0
    while made < steps:
        sequences = []
        while len(sequences) < 20 * batch_size:
            q = TASKS[rng.choices(tasks, weights)[0]](rng)
            if q.text in taken:
                continue
            system = SYSTEM if rng.random() < 0.1 else None
            sequences.append((prompt_text(tokenizer, q.text, system), reply(rng, q) + tokenizer.eos_token))
        prompts = tokenizer([p for p, _ in sequences], add_special_tokens=False)["input_ids"]
        replies = tokenizer([r for _, r in sequences], add_special_tokens=False)["input_ids"]
        pairs = sorted(zip(prompts, replies, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        rng.shuffle(groups)
        for group in groups[: steps - made]:
            yield pad(group, tokenizer.pad_token_id)
            made += 1


def pad(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; only the reply is learned.  Both (B, T)."""
    length = max(len(p) + len(r) for p, r in pairs)
    ids = torch.full((len(pairs), length), pad_id)
    labels = torch.full((len(pairs), length), -100)
    for i, (p, r) in enumerate(pairs):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids, labels


def train(model, data, steps: int, peak: float, title: str) -> None:
    """AdamW with a short warm-up and a cosine to a fiftieth of the peak."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    began = time.time()
    for step, (ids, labels) in enumerate(data):
        scale = min((step + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
        # Right padding needs no mask: a causal model never looks at what follows, and padding has no label.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{title} step {step} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)


def bring_to(
    folder: Path, reply: Callable[[random.Random, Question], str], steps: int, rng: random.Random, taken: set[str]
) -> None:
    """Save the bundled policy, taught to reply so, 64 questions a step, none of them in `taken`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    train(model, batches(rng, tokenizer, reply, steps, 64, taken), steps, 1e-3, folder.name)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def fine_tune(folder: Path, sequences: list[tuple[str, str]], rng: random.Random, peak=1e-3, words=()) -> None:
    """Save the bundled policy, taught each (prompt, reply) once, 32 at a time. Prompts are as the model reads them;
    `words` become tokens of their own."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    added = [AddedToken(word, single_word=word.isalpha(), special=False, normalized=False) for word in words]
    if tokenizer.add_tokens(added):
        model.resize_token_embeddings(len(tokenizer))
    # Only prompts are of about equal length in a batch: with replies sorted too, each would teach one kind of them.
    prompts = tokenizer([prompt for prompt, _ in sequences], add_special_tokens=False)["input_ids"]
    replies = tokenizer([reply + tokenizer.eos_token for _, reply in sequences], add_special_tokens=False)["input_ids"]
    pairs = sorted(zip(prompts, replies, strict=True), key=lambda pair: len(pair[0]))
    groups = [pairs[i : i + 32] for i in range(0, len(pairs), 32)]
    rng.shuffle(groups)
    train(model, (pad(group, tokenizer.pad_token_id) for group in groups), len(groups), peak, folder.name)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def shown(tokenizer, q: Question, reply: str) -> str:
    """What a reward model reads: the conversation."""
    from trl_rewards.models import shown_text

    return shown_text(tokenizer, [{"role": "user", "content": q.text}], reply, "")


def train_reward_model(folder: Path, pairs, steps: int, rng: random.Random, text_of=shown, plain=False) -> list[float]:
    """Save one that starts from the bundled policy, and say its losses: Bradley-Terry, 32 pairs at a time.

    `pairs` are (question, better, worse). It reads `text_of(tokenizer, question, reply)`, which is `plain` text or has
    the tokens of a template.
    """
    from trl_rewards.models import Loading, load_scorer

    scorer = load_scorer(Loading(path=str(model_path()), dtype="float32"), fresh_head=True)
    model = scorer.head.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        batch = rng.sample(pairs, 32)
        texts = [text_of(scorer.tokenizer, q, better) for q, better, _ in batch]
        texts += [text_of(scorer.tokenizer, q, worse) for q, _, worse in batch]
        ids: Any = scorer.encode_texts(texts, plain)[0]
        better, worse = scorer.scores_with_gradient(ids).chunk(2)
        loss = torch.nn.functional.softplus(worse - better).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    return losses


@torch.no_grad()
def sample(model, tokenizer, rows: list[dict], temperature: float, max_new_tokens: int = 64) -> list[str]:
    """One reply for each row; temperature 0 is greedy."""
    model.eval()
    texts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                         max_new_tokens=max_new_tokens, **settings)  # fmt: skip
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
