"""What recipes/themis/cpu-*.yaml learn from, and a check of what they learned.

    python recipes/themis/records.py make                                 # writes runs/themis; some seconds
    python recipes/themis/records.py measure runs/themis/model --tools    # what recipes/themis/cpu-train.yaml left
    python recipes/themis/records.py plain --out runs/themis/plain        # a reward model that has no traces

The records have TARA's schema and are made by rule from the bundled arithmetic questions: a right and a wrong reply in
the bundled policy's form, without its thinking, and for each the thought, the expression that the tool `arithmetic` is
given, its value, and a rationale that puts the two side by side. No question of the test split is learned.

Measured is how often the better reply of a held-out pair gets the higher score: by the trained reward model, which
calls the tool; by the same model without its tool, which then goes on from the place where the observation would be;
and by the same architecture, trained as long on question and answer alone with the ranking loss.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import RewardConfig
from trl_rewards_themis.losses import pair_accuracy
from trl_rewards_themis.tara import DROPOUT, rows_of
from trl_rewards_themis.trajectory import MARKS, user_text, without_marks

from trl_rewards import RewardTrainer, Samples, bundled, load_objective, load_reward
from trl_rewards.bundled import quiz
from trl_rewards.files import write_rows
from trl_rewards.models import without_thinking
from trl_rewards.recipe import Recipe

TASKS = {"add": quiz.add, "subtract": quiz.subtract, "multiply": quiz.multiply, "chain": quiz.chain}
RECIPE = Path(__file__).parent / "cpu-train.yaml"
PAIRS, HELD_OUT = 16000, 300
"""Training pairs, and pairs about questions of the test split."""
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


def expression(question: quiz.Question) -> str:
    """What the tool is asked, from the worked steps: "35 + 2 = 37", "37 - 7 = 30" is 35 + 2 - 7."""
    lines = [line.split() for line in question.think.splitlines()]
    return lines[0][0] + "".join(f" {symbol} {number}" for _, symbol, number, *_ in lines)


def usable(question: quiz.Question) -> bool:
    """Sums of two numbers in any words, and longer ones as formulas: a model this small is long in learning to read
    the other kinds of longer sums."""
    return readable(question.task, question.text)


def readable(task: str, text: str) -> bool:
    return task in TASKS and (task != "chain" or text.startswith("Compute"))


def record(rng: random.Random, question: quiz.Question, number: int, wrong: str) -> dict[str, Any]:
    """A pair of replies in TARA's schema. `wrong` is the kind of the rejected one, of `quiz.REPLIES`."""
    value = question.answer
    sides = {}
    for side, kind in (("pos_answer", "clean"), ("neg_answer", wrong)):
        reply = without_thinking(quiz.REPLIES[kind](rng, question))
        said = re.findall(r"\d+", reply)
        found = f"The answer says {said[-1]}, the tool says {value}." if said else "The answer says nothing."
        if kind in ("bare", "ramble"):
            found += " The form is wrong."
        sides[side] = {
            "answer": reply,
            "score": 1.0 if kind == "clean" else -1.0,
            "actions": {
                "Thought": "I compute it.",
                "Action": "arithmetic",
                "Action Input": expression(question),
                "Observation": value,
            },
            "score_agent": {"explanation": found, "score": "1" if kind == "clean" else "-1"},
        }
    return {"id": f"arithmetic_{number}", "question": question.text, **sides}


def records(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Records to train on, and held-out ones, whose wrong replies are wrong by their number alone."""
    rng = random.Random(seed)
    data = bundled.load_data()
    tested = {row["prompt"][-1]["content"] for row in data["test"]}
    held_out: list[quiz.Question] = []
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
        question = quiz.chain(rng)
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


def make_all(out: Path, seed: int) -> None:
    """Records, pairs, the arithmetic questions of the bundled data, and the untrained model."""
    train, test = records(seed)
    write_rows(out / "records" / "train.jsonl", train)
    write_rows(out / "records" / "test.jsonl", test)
    rows = rows_of(train, DROPOUT, seed)
    write_rows(out / "pairs" / "train.jsonl", rows)
    write_rows(out / "pairs" / "test.jsonl", rows_of(test))
    for split, questions in bundled.load_data().items():
        kept = [row for row in questions if readable(row["task"], row["prompt"][-1]["content"])]
        write_rows(out / "questions" / f"{split}.jsonl", kept)
    make_base(out / "base", rows[:4000], seed)


def train_plain(data: Path, out: Path, seed: int, steps: int | None) -> None:
    """Train the untrained model as the recipe says, but on question and answer alone with the ranking loss."""
    recipe = Recipe.load(str(RECIPE))
    keys = {
        name: value
        for name, value in recipe.trl.items()
        if name not in ("model_name_or_path", "dataset_name", "dataset_test_split", "output_dir")
        and not name.startswith("eval")
    }
    args = RewardConfig(str(out), **keys, seed=seed, use_cpu=True, eval_strategy="no")
    args.max_steps = steps or args.max_steps
    rows = load_dataset("json", data_files=str(data / "pairs" / "train.jsonl"), split="train")
    rows = rows.map(
        lambda row: (
            {"prompt": f"Question: {row['prompt']}\n"}
            | {side: f"Answer: {row[side]}" for side in ("chosen", "rejected")}
        ),
        remove_columns=["chosen_trace", "rejected_trace"],
    )
    objective = load_objective("bradley_terry")
    trainer = RewardTrainer(model=str(data / "base"), args=args, train_dataset=rows, objective=objective)
    trainer.train()
    trainer.save_model(str(out))
    trainer.processing_class.save_pretrained(out)


def measure(data: Path, model: Path, how: Literal["tools", "no tools", "plain"]) -> float:
    """A reward model's accuracy on the held-out pairs."""
    rows = [json.loads(line) for line in (data / "pairs" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    question, answer = "{}", "{}"
    if how == "plain":
        reward = load_reward("model", path=str(model), dtype="float32")
        question, answer = "Question: {}\n", "Answer: {}</s>"
    else:
        tools = ["arithmetic"] if how == "tools" else []
        options = {"dtype": "float32", "max_new_tokens": 64, "max_length": 256}
        reward = load_reward("themis", path=str(model), tools=tools, **options)
    scores = []
    for side in ("chosen", "rejected"):
        samples = Samples([question.format(row["prompt"]) for row in rows], [answer.format(row[side]) for row in rows])
        scores.append([score if isinstance(score, float) else None for score in reward.score(samples)])
    return pair_accuracy(*scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write records, pairs, questions and an untrained model")
    making.add_argument("--out", type=Path, default=Path("runs/themis"))
    making.add_argument("--seed", type=int, default=0)
    plain = commands.add_parser("plain", help="train a reward model without traces")
    plain.add_argument("--data", type=Path, default=Path("runs/themis"), help="what make wrote")
    plain.add_argument("--out", type=Path, required=True)
    plain.add_argument("--seed", type=int, default=0)
    plain.add_argument("--steps", type=int, help="instead of the recipe's")
    measuring = commands.add_parser("measure", help="accuracy on the held-out pairs")
    measuring.add_argument("model", type=Path)
    measuring.add_argument("--data", type=Path, default=Path("runs/themis"), help="what make wrote")
    measuring.add_argument("--out", type=Path, help="folder for measure.json")
    way = measuring.add_mutually_exclusive_group()
    way.add_argument("--tools", dest="how", action="store_const", const="tools", default="no tools")
    way.add_argument("--plain", dest="how", action="store_const", const="plain", help="the model is one of `plain`")
    given = parser.parse_args()
    if given.command == "make":
        make_all(given.out, given.seed)
    elif given.command == "plain":
        train_plain(given.data, given.out, given.seed, given.steps)
    else:
        found = {"accuracy": measure(given.data, given.model, given.how)}
        print(json.dumps(found))
        if given.out:
            (given.out / "measure.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
