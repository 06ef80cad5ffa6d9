"""Make the bundled policy and data: `python -m trl_rewards.bundled.make [--out DIR] [--seed 0]`.

Everything is generated: the questions and replies (`quiz`), the tokenizer's corpus and the weights. No outside text.

The policy is made flawed on purpose, so that a short reinforcement-learning run has something to repair. It is first
trained on clean replies, which teaches the tasks, and then on a noisy mixture of all kinds with the shares in
`quiz.NOISE`, which teaches the flaws.

That noise is spread thinly over wrong replies, so the most likely reply is still the right one and greedy decoding
hides the flaw. Some kinds of question therefore also get a *habit* (`HABIT`): one particular wrong reply, such as
naming the following day when asked for the previous one, is more frequent than the right one, and greedy decoding is
wrong as well. The right reply stays among the samples in both cases: reinforcement learning can only strengthen what
it sees.

The policy never sees a question of the test split, though it sees the same facts in other words and the same sums.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trl_rewards.bundled import FOLDER
from trl_rewards.bundled.quiz import (
    HABIT,
    NOISE,
    REPLIES,
    TASKS,
    TEST_SIZES,
    TRAIN_SIZES,
    clean,
    distinct_questions,
    noisy,
    row,
    said_exactly,
)
from trl_rewards.bundled.teach import SYSTEM, batches, sample, save_tokenizer, train
from trl_rewards.files import write_rows

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


# --- tokenizer


def train_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit and every operator with its spaces is one token."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" [-+*=<>] |\d| ?\p{L}+|\s|[^\s\p{L}\d]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1020, special_tokens=special, initial_alphabet=alphabet, min_frequency=2,
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    # Not special: a reward has to find the tags in text decoded with skip_special_tokens=True.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>",
                                   padding_side="left", model_max_length=512,
                                   clean_up_tokenization_spaces=False)  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tokenizer_corpus(rng: random.Random) -> list[str]:
    """Questions and replies of every kind, without the tags, which are tokens of their own."""
    corpus = [SYSTEM]
    for _ in range(20_000):
        q = rng.choice(list(TASKS.values()))(rng)
        reply = rng.choice(list(REPLIES.values()))(rng, q)
        corpus += [f"user\n{q.text}", "system\n", "assistant\n", re.sub("</?(think|answer)>", "\n", reply)]
    return corpus


def new_model(tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.05, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, dtype="float32",
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


# --- the whole


README = """\
# `bundled:tiny`

A {parameters:,}-parameter policy and {train} + {test} questions, so that a first run downloads nothing.
`model_path()` is the folder for `from_pretrained`, `load_data()` the `DatasetDict`.

Made by `python -m trl_rewards.bundled.make --seed {seed}`, which also writes this file: the questions, the tokenizer
and the weights all come from that script, without outside text. It is a toy for trying rewards on a CPU; it knows
nothing but its {tasks} kinds of question.

| | |
|---|---|
| architecture | `Qwen3ForCausalLM`, {layers} layers, hidden size {hidden}, vocabulary {vocabulary}, float32 |
| files | {megabytes:.1f} MB |
| columns | `prompt` (conversational), `answer`, `references` (5 sentences that end with the answer), `task`, `steps` |
| tasks (train / test) | {counts} |
| reply | `<think>17 + 5 = 22</think><answer>The sum is 22.</answer>`, {length:.0f} tokens on average |

The policy is flawed on purpose, to leave room for reinforcement learning: it was trained on clean replies and then on
a noisy mixture: {noise}.
On some kinds of question ({habits})
one particular wrong reply is the most frequent one: {habit_noise}.
`quiz.py` says what these words mean.
Questions of the train split may have been seen in supervised training; those of the test split were not.

Share of test questions answered exactly (last word between the answer tags), before any reinforcement learning:
**{sampled:.1%}** sampled at temperature 1 (mean of 5 draws), **{greedy:.1%}** greedy.

| task | temperature 1 | greedy |
|---|---|---|
{table}

Apache-2.0, like the project.
"""

HABIT_KINDS = "the smaller of two numbers, the previous day or month, a reversed list"


def shares(mixture: dict[str, float]) -> str:
    return ", ".join(f"{kind} {share:.0%}" for kind, share in mixture.items())


def measure(folder: Path, rows: list[dict]) -> dict:
    """The numbers of the README, from the saved files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    draws = [sample(model, tokenizer, rows, 1.0) for _ in range(5)]
    sampled = [sum(said_exactly(d[i], r["answer"]) for d in draws) / 5 for i, r in enumerate(rows)]
    best = [said_exactly(text, r["answer"]) for text, r in zip(sample(model, tokenizer, rows, 0), rows, strict=True)]
    table = []
    for task in TASKS:
        at = [i for i, r in enumerate(rows) if r["task"] == task]
        hot, cold = sum(sampled[i] for i in at) / len(at), sum(best[i] for i in at) / len(at)
        table.append(f"| {task} | {hot:.0%} | {cold:.0%} |")
    lengths = [len(ids) + 1 for d in draws for ids in tokenizer(d, add_special_tokens=False)["input_ids"]]
    return {
        "sampled": sum(sampled) / len(rows),
        "greedy": sum(best) / len(rows),
        "table": "\n".join(table),
        "length": sum(lengths) / len(lengths),
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
    }


def make(folder: Path, seed: int, clean_steps: int, noisy_steps: int) -> None:
    """Write `folder/tiny` and `folder/README.md`."""
    out = folder / "tiny"
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(2)

    test = distinct_questions(rng, TEST_SIZES, set())
    test_texts = {q.text for q in test}
    train_rows = [row(q) for q in distinct_questions(rng, TRAIN_SIZES, test_texts)]
    test_rows = [row(q) for q in test]
    write_rows(out / "train.jsonl", train_rows)
    write_rows(out / "test.jsonl", test_rows)

    tokenizer = train_tokenizer(tokenizer_corpus(random.Random(f"{seed} corpus")))
    save_tokenizer(tokenizer, out)

    # Each phase draws from its own generator, so that changing one leaves the others as they are.
    model = new_model(tokenizer)
    data = batches(random.Random(f"{seed} clean"), tokenizer, clean, clean_steps, 128, test_texts)
    train(model, data, clean_steps, 3e-3, "clean")
    data = batches(random.Random(f"{seed} noisy"), tokenizer, noisy, noisy_steps, 128, test_texts)
    train(model, data, noisy_steps, 1e-3, "noisy")
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, max_new_tokens=64
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)

    numbers = measure(out, test_rows)
    text = README.format(
        seed=seed, train=len(train_rows), test=len(test_rows), tasks=len(TASKS), habits=HABIT_KINDS,
        counts=", ".join(f"{task} {TRAIN_SIZES[task]} / {TEST_SIZES[task]}" for task in TASKS),
        noise=shares(NOISE), habit_noise=shares(HABIT),
        megabytes=sum(f.stat().st_size for f in out.iterdir()) / 1e6, **numbers,
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled policy and data.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where tiny/ and README.md go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean-steps", type=int, default=1500, help="training steps on clean replies")
    parser.add_argument("--noisy-steps", type=int, default=300, help="training steps on the noisy mixture")
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed, arguments.clean_steps, arguments.noisy_steps)


if __name__ == "__main__":
    main()
