"""What tools add to a small reward model: the records, the models and the measures of recipes/themis/cpu-*.yaml.

    python benchmarks/themis_tools.py                                # writes runs/themis; some seconds
    python benchmarks/themis_tools.py --seeds 0 1 2                  # trains and measures; some CPU minutes
    python benchmarks/themis_tools.py --measure runs/themis/model    # what recipes/themis/cpu-train.yaml left

The records have TARA's schema and are made by rule from the bundled arithmetic questions: a right and a wrong reply in
the bundled policy's form, without its thinking, and for each the thought, the expression that the tool `arithmetic` is
given, its value, and a rationale that compares the two. No question of the test split is learned.

Measured is how often the better reply of a held-out pair gets the higher score:

    tools      the trained reward model, which calls the tool
    no tools   the same model without its tool: it goes on from the place where the observation would be
    plain      the same architecture, trained as long on question and answer alone with the ranking loss
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import RewardConfig
from trl_rewards_themis.losses import pair_accuracy
from trl_rewards_themis.tara import DROPOUT, rows_of
from trl_rewards_themis.trajectory import MARKS, user_text, without_marks

from trl_rewards import RewardTrainer, Samples, bundled, load_objective, load_reward
from trl_rewards.bundled import make
from trl_rewards.models import without_thinking
from trl_rewards.recipe import Recipe

TASKS = {"add": make.add, "subtract": make.subtract, "multiply": make.multiply, "chain": make.chain}
RECIPE = Path(__file__).parent.parent / "recipes" / "themis" / "cpu-train.yaml"
PAIRS, HELD_OUT = 16000, 300
"""Training pairs, and pairs about questions of the test split."""
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


def expression(question: make.Question) -> str:
    """What the tool is asked, from the worked steps: "35 + 2 = 37", "37 - 7 = 30" is 35 + 2 - 7."""
    lines = [line.split() for line in question.think.splitlines()]
    return lines[0][0] + "".join(f" {symbol} {number}" for _, symbol, number, *_ in lines)


def usable(question: make.Question) -> bool:
    """Sums of two numbers in any words, and longer ones as formulas: a model this small is long in learning to read
    the other kinds of longer sums."""
    return readable(question.task, question.text)


def readable(task: str, text: str) -> bool:
    return task in TASKS and (task != "chain" or text.startswith("Compute"))


def record(rng: random.Random, question: make.Question, number: int, wrong: str) -> dict[str, Any]:
    """A pair of replies in TARA's schema. `wrong` is the kind of the rejected one, of `make.REPLIES`."""
    value = question.answer
    sides = {}
    for side, kind in (("pos_answer", "clean"), ("neg_answer", wrong)):
        reply = without_thinking(make.REPLIES[kind](rng, question))
        said = re.findall(r"\d+", reply)
        verdict = "No number."
        if said:
            verdict = f"{said[-1]} and {value}. They {'agree' if said[-1] == value else 'differ'}."
        if kind in ("bare", "ramble"):
            verdict += " The form is wrong."
        sides[side] = {
            "answer": reply,
            "score": 1.0 if kind == "clean" else -1.0,
            "actions": {
                "Thought": "I compute it.",
                "Action": "arithmetic",
                "Action Input": expression(question),
                "Observation": value,
            },
            "score_agent": {"explanation": verdict, "score": "1" if kind == "clean" else "-1"},
        }
    return {"id": f"arithmetic_{number}", "question": question.text, **sides}


def records(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Records to train on, and held-out ones, whose wrong replies are wrong by their number alone."""
    rng = random.Random(seed)
    data = bundled.load_data()
    tested = {row["prompt"][-1]["content"] for row in data["test"]}
    held_out: list[make.Question] = []
    train: list[dict] = []
    while len(train) < PAIRS:
        question = TASKS[rng.choices(list(TASKS), [1, 1, 1, 3])[0]](rng)
        if not usable(question) or not question.answer.isdigit():
            continue
        if question.text in tested:
            held_out.append(question)
            continue
        kind = rng.choice(["slip", "slip", "slip", "guess", "guess", "bare", "ramble", "unhelpful"])
        train.append(record(rng, question, len(train), kind))
    # Questions of the test split come up rarely, so the others are of texts that training does not have.
    known = {row["question"] for row in train}
    unseen = [question for question in held_out if question.text not in known]
    while len(unseen) < HELD_OUT:
        question = make.chain(rng)
        if usable(question) and question.text not in known:
            unseen.append(question)
    test = [record(rng, question, number, "slip") for number, question in enumerate(unseen[:HELD_OUT])]
    return train, test


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words with the space before them, digits and signs."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|\d| ?\p{L}+|\s|[^\s\p{L}\d]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["<pad>", "<unk>", "</s>", *MARKS]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(MARKS),
        clean_up_tokenization_spaces=False,
    )


def make_base(folder: Path, rows: list[dict], seed: int) -> None:
    """An untrained model and its tokenizer."""
    texts = [
        text
        for row in rows
        for side in ("chosen", "rejected")
        for text in (user_text(row["prompt"], row[side]), without_marks(row[f"{side}_trace"]))
    ]
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,  # what is copied is then easy to say
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(folder: Path, rows: list[dict]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_all(out: Path, seed: int) -> None:
    """Records, pairs, the arithmetic questions of the bundled data, and the untrained model."""
    train, test = records(seed)
    write(out / "records" / "train.jsonl", train)
    write(out / "records" / "test.jsonl", test)
    rows = rows_of(train, DROPOUT, seed)
    write(out / "pairs" / "train.jsonl", rows)
    write(out / "pairs" / "test.jsonl", rows_of(test))
    for split, questions in bundled.load_data().items():
        kept = [row for row in questions if readable(row["task"], row["prompt"][-1]["content"])]
        write(out / "questions" / f"{split}.jsonl", kept)
    make_base(out / "base", rows[:4000], seed)


def train(out: Path, objective: str, target: Path, seed: int, overrides: dict[str, Any]) -> float:
    """Train as the recipe says. CPU seconds."""
    recipe = Recipe.load(str(RECIPE))
    keys = {
        name: value
        for name, value in recipe.trl.items()
        if name not in ("model_name_or_path", "dataset_name", "dataset_test_split", "output_dir")
        and not name.startswith("eval")
    }
    args = RewardConfig(str(target), **{**keys, **overrides}, seed=seed, use_cpu=True, eval_strategy="no")
    rows = load_dataset("json", data_files=str(out / "pairs" / "train.jsonl"), split="train")
    if objective == "bradley_terry":
        rows = rows.map(
            lambda row: (
                {"prompt": f"Question: {row['prompt']}\n"}
                | {side: f"Answer: {row[side]}" for side in ("chosen", "rejected")}
            ),
            remove_columns=["chosen_trace", "rejected_trace"],
        )
    started = time.process_time()
    trainer = RewardTrainer(
        model=str(out / "base"), args=args, train_dataset=rows, objective=load_objective(objective)
    )
    trainer.train()
    trainer.save_model(str(target))
    trainer.processing_class.save_pretrained(target)
    return time.process_time() - started


def compare(reward: Any, rows: list[dict], question: str = "{}", answer: str = "{}") -> float:
    """Accuracy of a reward on pairs."""
    scores = []
    for side in ("chosen", "rejected"):
        samples = Samples([question.format(row["prompt"]) for row in rows], [answer.format(row[side]) for row in rows])
        scores.append([score if isinstance(score, float) else None for score in reward.score(samples)])
    return pair_accuracy(*scores)


def measure(out: Path, model: Path, plain: Path | None) -> dict[str, float]:
    """Accuracies on the held-out pairs."""
    rows = [json.loads(line) for line in (out / "pairs" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    options = {"path": str(model), "dtype": "float32", "max_new_tokens": 64, "max_length": 256}
    found = {
        "tools": compare(load_reward("themis", tools=["arithmetic"], **options), rows),
        "no tools": compare(load_reward("themis", **options), rows),
    }
    if plain:
        reward = load_reward("model", path=str(plain), dtype="float32")
        found["plain"] = compare(reward, rows, "Question: {}\n", "Answer: {}</s>")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/themis"))
    parser.add_argument("--seed", type=int, default=0, help="of records and untrained model")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="train and measure with each of these")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--measure", type=Path, help="a trained reward model")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.out, given.measure, None)))
        return
    if not given.seeds:
        make_all(given.out, given.seed)
        return
    table: list[dict[str, float]] = []
    for seed in given.seeds:
        folder = given.out / f"seed-{seed}"
        make_all(folder, seed)
        steps = {"max_steps": given.steps} if given.steps else {}
        seconds = train(folder, "themis", folder / "model", seed, steps)
        plain = train(folder, "bradley_terry", folder / "plain", seed, steps)
        table.append(measure(folder, folder / "model", folder / "plain"))
        print(json.dumps({"seed": seed, **table[-1], "seconds": round(seconds), "plain seconds": round(plain)}))
    for name in table[0]:
        values = [row[name] for row in table]
        print(f"{name:9} {fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
