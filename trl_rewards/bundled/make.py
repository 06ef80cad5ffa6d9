"""Make the bundled policy and data: `python -m trl_rewards.bundled.make [--out DIR] [--seed 0]`.

Everything is generated here: the questions, the good replies, the tokenizer's corpus and the weights. No outside text.

The policy is made flawed on purpose, so that a short reinforcement-learning run has something to repair. It is first
trained on clean replies, which teaches the tasks, and then on a noisy mixture, which teaches the flaws. In the noisy
mixture a reply is, with the shares in `NOISE`,

- clean:      right, in the form `<think>17 + 5 = 22</think><answer>The sum is 22.</answer>`;
- guess:      no working (`<think>easy</think>`) and then a wrong number or word;
- slip:       the right form with a wrong step, number or word;
- bare:       right, but one or all of the tags are missing;
- ramble:     right at first, then it repeats itself or chatters on;
- unhelpful:  the right form, and no answer.

That noise is spread thinly over wrong replies, so the most likely reply is still the right one and greedy decoding
hides the flaw. Some kinds of question therefore also get a *habit* (`HABIT`): one particular wrong reply, such as
naming the following day when asked for the previous one, is more frequent than the right one, and greedy decoding is
wrong as well. The right reply stays among the samples in both cases: reinforcement learning can only strengthen what
it sees.

The policy never sees a question of the test split, though it sees the same facts in other words and the same sums.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from dataclasses import dataclass, field
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

from trl_rewards.bundled import FOLDER, load_data, model_path

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
OPPOSITES = [
    pair.split("/")
    for pair in [
        "hot/cold",
        "big/small",
        "fast/slow",
        "up/down",
        "day/night",
        "open/closed",
        "happy/sad",
        "light/dark",
        "full/empty",
        "old/young",
        "rich/poor",
        "wet/dry",
        "hard/soft",
        "loud/quiet",
        "early/late",
        "strong/weak",
        "clean/dirty",
        "long/short",
        "near/far",
        "high/low",
        "left/right",
        "first/last",
        "true/false",
        "win/lose",
        "push/pull",
    ]
]
COLOURS = {
    "yellow": ["banana", "lemon", "sun", "canary", "mango"],
    "red": ["cherry", "strawberry", "tomato", "rose", "ruby"],
    "green": ["lime", "pea", "frog", "leaf", "cucumber"],
    "blue": ["sea", "sky", "whale", "plum", "sapphire"],
    "white": ["swan", "snowflake", "cloud", "sheep", "egg"],
    "black": ["raven", "panther", "coal", "tar", "beetle"],
    "brown": ["bear", "coconut", "walnut", "log", "potato"],
    "orange": ["carrot", "pumpkin", "fox", "tiger", "apricot"],
}
THINGS = {thing: colour for colour, things in COLOURS.items() for thing in things}
# One word per letter, so that sorting needs only the first one.
LIST_WORDS = [
    "apple", "bread", "cup", "desk", "eagle", "fish", "gate", "hat", "ink", "jar", "key", "lamp", "map", "nest",
    "oven", "pen",
]  # fmt: skip
PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix"]
GOODS = ["apples", "books", "coins", "cards", "pens", "shells"]

# How many questions of each kind; the chains are the multi-step arithmetic.
TRAIN_SIZES = {
    "chain": 800, "add": 250, "subtract": 220, "multiply": 110, "compare": 200, "day": 60, "month": 70,
    "opposite": 90, "colour": 80, "sort": 70, "reverse": 50,
}  # fmt: skip
TEST_SIZES = {
    "chain": 80, "add": 25, "subtract": 22, "multiply": 11, "compare": 20, "day": 6, "month": 7,
    "opposite": 9, "colour": 8, "sort": 7, "reverse": 5,
}  # fmt: skip

NOISE = {"clean": 0.60, "guess": 0.14, "slip": 0.05, "bare": 0.07, "ramble": 0.06, "unhelpful": 0.08}
HABIT = {"clean": 0.40, "guess": 0.04, "slip": 0.44, "bare": 0.04, "ramble": 0.04, "unhelpful": 0.04}

SYSTEM = "Think first, then answer in one sentence."
GUESSING = ["easy", "quick guess", "no need to think"]
UNHELPFUL = ["I do not know.", "I can not say.", "Ask me later.", "It could be anything."]
CHATTER = ["I like it a lot.", "Is that good?", "That is all I can say.", "Thank you for asking me."]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass
class Question:
    """One question with its good replies and its likely wrong ones."""

    task: str
    text: str
    think: str
    """The worked steps, one per line."""
    said: str
    """What a reply says at its end: the answer, or a list whose last word is the answer."""
    sentences: list[str]
    """Five reply sentences with `{}` where `said` goes, always at the end."""
    wrong: list[tuple[str, str]]
    """Other pairs of (think, said); with a habit the first one is the habit."""
    habit: bool = False
    answer: str = field(init=False)

    def __post_init__(self):
        self.answer = self.said.split()[-1]


# --- questions


def near(rng: random.Random, value: int) -> int:
    """A number that is not `value` but could be taken for it."""
    return rng.choice([value + d for d in (-10, -2, -1, 1, 2, 10) if value + d > 0])


def one_step(rng, task, symbol, a, b, value, texts, sentences) -> Question:
    think = f"{a} {symbol} {b} = "
    wrong = [(think + str(n), str(n)) for n in [near(rng, value) for _ in range(3)]]
    text = rng.choice(texts).format(a=a, b=b)
    sentences = [s.replace("{a}", str(a)).replace("{b}", str(b)) for s in sentences]
    return Question(task, text, think + str(value), str(value), sentences, wrong)


def add(rng: random.Random) -> Question:
    a, b = rng.randint(2, 89), rng.randint(2, 9)
    texts = ["What is {a} plus {b}?", "Add {a} and {b}.", "Compute {a} + {b}.", "What is the sum of {a} and {b}?"]
    sentences = ["{a} plus {b} equals {}.", "The sum is {}.", "{a} and {b} make {}.", "Together they make {}.",
                 "The answer is {}."]  # fmt: skip
    return one_step(rng, "add", "+", a, b, a + b, texts, sentences)


def subtract(rng: random.Random) -> Question:
    b = rng.randint(2, 9)
    a = rng.randint(b + 1, 99)
    texts = ["What is {a} minus {b}?", "Take {b} away from {a}.", "Compute {a} - {b}.", "Subtract {b} from {a}."]
    sentences = ["{a} minus {b} equals {}.", "The difference is {}.", "Taking {b} from {a} leaves {}.",
                 "What is left is {}.", "The answer is {}."]  # fmt: skip
    return one_step(rng, "subtract", "-", a, b, a - b, texts, sentences)


def multiply(rng: random.Random) -> Question:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    texts = ["What is {a} times {b}?", "Multiply {a} by {b}.", "Compute {a} * {b}.",
             "What is the product of {a} and {b}?"]  # fmt: skip
    sentences = ["{a} times {b} equals {}.", "The product is {}.", "{a} groups of {b} make {}.", "That makes {}.",
                 "The answer is {}."]  # fmt: skip
    return one_step(rng, "multiply", "*", a, b, a * b, texts, sentences)


def chain_operations(rng: random.Random, start: int, steps: int, doubling: bool) -> list[tuple[str, int]]:
    """Operations that keep the running value between 1 and 99."""
    value, operations = start, []
    for _ in range(steps):
        choices = [("+", n) for n in range(2, 10) if value + n < 100] + [("-", n) for n in range(2, 10) if value > n]
        symbol, n = rng.choice(choices)
        if doubling and 2 <= value < 50 and rng.random() < 0.25:
            symbol, n = "*", 2
        operations.append((symbol, n))
        value = apply(symbol, value, n)
    return operations


def apply(symbol: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[symbol]


def chain_steps(rng, start: int, operations: list[tuple[str, int]], slip_at: int | None = None) -> tuple[str, str]:
    """The worked steps, one per line, and the last value; after a slip the later steps go on from the wrong value."""
    value, lines = start, []
    for i, (symbol, n) in enumerate(operations):
        result = apply(symbol, value, n)
        if i == slip_at:
            result = near(rng, result)
        lines.append(f"{value} {symbol} {n} = {result}")
        value = result
    return "\n".join(lines), str(value)


def chain(rng: random.Random) -> Question:
    steps = rng.choice([2, 2, 3, 3, 4])
    start = rng.randint(3, 40)
    style = rng.choice(["start", "story", "formula"])
    operations = chain_operations(rng, start, steps, doubling=style == "start")
    if style == "start":
        words = {"+": "Add {}.", "-": "Take away {}.", "*": "Double it."}
        text = f"Start with {start}. " + " ".join(words[s].format(n) for s, n in operations) + " What do you get?"
        sentences = ["The result is {}.", "The answer is {}.", "You get {}.", "You end up with {}.",
                     "At the end it is {}."]  # fmt: skip
    elif style == "story":
        who, what = rng.choice(PEOPLE), rng.choice(GOODS)
        words = {"+": "gets {} more.", "-": "gives away {}."}
        text = f"{who} has {start} {what}. " + " ".join(f"{who} " + words[s].format(n) for s, n in operations)
        text += f" How many {what} are left?"
        sentences = ["The number of " + what + " is {}.", "The answer is {}.", "What is left is {}.",
                     who + " ends up with {}.", f"The {what} left are " + "{}."]  # fmt: skip
    else:
        text = f"Compute {start} " + " ".join(f"{s} {n}" for s, n in operations) + "."
        sentences = ["The result is {}.", "The answer is {}.", "It equals {}.", "The value is {}.", "That makes {}."]
    # A slip can go below zero later on, and those are dropped: the questions use no negative numbers.
    wrong = [chain_steps(rng, start, operations, slip_at=i) for i in range(steps)]
    wrong = [(think, said) for think, said in wrong if "= -" not in think and "\n-" not in think]
    think, said = chain_steps(rng, start, operations)
    return Question("chain", text, think, said, sentences, wrong or [(think, str(int(said) + 1))])


def compare(rng: random.Random) -> Question:
    a, b = rng.sample(range(1, 100), 2)
    larger = rng.random() < 0.5
    word = "larger" if larger else "smaller"
    said, other = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    sign = ">" if larger else "<"
    text = rng.choice(["Which is {w}, {a} or {b}?", "Name the {w} of {a} and {b}.", "Is {a} or {b} the {w} number?",
                       "Of {a} and {b}, which number is {w}?"]).format(w=word, a=a, b=b)  # fmt: skip
    sentences = [f"The {word} number is " + "{}.", f"The {word} one is " + "{}.", "It is {}.", "The answer is {}.",
                 f"Of the two, the {word} is " + "{}."]  # fmt: skip
    wrong = [(f"{other} {sign} {said}", str(other))]
    return Question("compare", text, f"{said} {sign} {other}", str(said), sentences, wrong, habit=not larger)


def calendar(rng: random.Random, task: str, names: list[str]) -> Question:
    i = rng.randrange(len(names))
    shift = rng.choice([1, -1, 2])
    here, said = names[i], names[(i + shift) % len(names)]
    follow, precede = names[(i + 1) % len(names)], names[(i - 1) % len(names)]
    two = names[(i + 2) % len(names)]
    if shift == 1:
        texts = ["What {t} comes after {x}?", "Which {t} follows {x}?", "Name the {t} after {x}.",
                 "After {x}, which {t} is next?"]  # fmt: skip
        think, wrong = f"{here}, {follow}", [(f"{precede}, {here}", precede), (f"{here}, {two}", two)]
        sentences = ["The {t} after {x} is {}.", "{x} is followed by {}.", "The next {t} is {}.", "It is {}.",
                     "The answer is {}."]  # fmt: skip
    elif shift == -1:
        texts = ["What {t} comes before {x}?", "Which {t} precedes {x}?", "Name the {t} before {x}.",
                 "Before {x}, which {t} was it?"]  # fmt: skip
        think, wrong = f"{precede}, {here}", [(f"{here}, {follow}", follow)]
        sentences = ["The {t} before {x} is {}.", "{x} is preceded by {}.", "The {t} just before is {}.", "It is {}.",
                     "The answer is {}."]  # fmt: skip
    else:
        texts = ["What {t} comes two {t}s after {x}?", "Which {t} is two {t}s after {x}?",
                 "Name the {t} two {t}s after {x}.", "Two {t}s after {x}, which {t} is it?"]  # fmt: skip
        think, wrong = f"{here}, {follow}, {two}", [(f"{here}, {follow}", follow)]
        sentences = ["Two {t}s after {x} is {}.", "Two {t}s later it is {}.", "The {t} is {}.", "It is {}.",
                     "The answer is {}."]  # fmt: skip
    text = rng.choice(texts).format(t=task, x=here)
    sentences = [s.replace("{t}", task).replace("{x}", here) for s in sentences]
    return Question(task, text, think, said, sentences, wrong, habit=shift == -1)


def day(rng: random.Random) -> Question:
    return calendar(rng, "day", DAYS)


def month(rng: random.Random) -> Question:
    return calendar(rng, "month", MONTHS)


def opposite(rng: random.Random) -> Question:
    word, said = rng.sample(rng.choice(OPPOSITES), 2)
    text = rng.choice(["What is the opposite of {}?", "Name the opposite of {}.", "Which word is the opposite of {}?",
                       "Give me the opposite of {}."]).format(word)  # fmt: skip
    others = [w for pair in rng.sample(OPPOSITES, 3) for w in pair if w not in (word, said)]
    sentences = [f"The opposite of {word} is " + "{}.", f"The word {word} is the opposite of " + "{}.",
                 "The opposite is {}.", "It is {}.", "The answer is {}."]  # fmt: skip
    return Question("opposite", text, f"{word}, {said}", said, sentences, [(f"{word}, {w}", w) for w in others[:3]])


def colour(rng: random.Random) -> Question:
    thing, said = rng.choice(list(THINGS.items()))
    text = rng.choice(["What colour is the {}?", "Which colour does the {} have?", "Name the colour of the {}.",
                       "Tell me the colour of the {}."]).format(thing)  # fmt: skip
    others = rng.sample([c for c in COLOURS if c != said], 3)
    sentences = [f"The {thing} is " + "{}.", f"The colour of the {thing} is " + "{}.", "Its colour is {}.",
                 "It is {}.", "The answer is {}."]  # fmt: skip
    return Question("colour", text, f"{thing}, {said}", said, sentences, [(f"{thing}, {c}", c) for c in others])


def sort(rng: random.Random) -> Question:
    words = rng.sample(LIST_WORDS, rng.choice([3, 4]))
    text = rng.choice(["Sort these words: {}.", "Put in order: {}.", "Write in alphabetical order: {}."])
    ordered = ", ".join(sorted(words))
    shuffled = [", ".join(rng.sample(words, len(words))) for _ in range(4)]
    sentences = ["The sorted list is {}.", "In order it is {}.", "Sorted, it reads {}.", "The order is {}.",
                 "The answer is {}."]  # fmt: skip
    wrong = [(s, s) for s in shuffled if s.split()[-1] != ordered.split()[-1]] or [(ordered, words[0])]
    return Question("sort", text.format(", ".join(words)), ordered, ordered, sentences, wrong)


def reverse(rng: random.Random) -> Question:
    words = rng.sample(LIST_WORDS, rng.choice([3, 4]))
    text = rng.choice(["Reverse this list: {}.", "Read backwards: {}.", "Turn around: {}."])
    given, turned = ", ".join(words), ", ".join(reversed(words))
    sentences = ["The reversed list is {}.", "Backwards it is {}.", "Turned around, it reads {}.", "It becomes {}.",
                 "The answer is {}."]  # fmt: skip
    return Question("reverse", text.format(given), turned, turned, sentences, [(given, given)], habit=True)


TASKS = {"chain": chain, "add": add, "subtract": subtract, "multiply": multiply, "compare": compare, "day": day,
         "month": month, "opposite": opposite, "colour": colour, "sort": sort, "reverse": reverse}  # fmt: skip


# --- replies


def clean(rng: random.Random, q: Question) -> str:
    return tagged(q.think, rng.choice(q.sentences).replace("{}", q.said))


def tagged(think: str, answer: str) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def guess(rng: random.Random, q: Question) -> str:
    return tagged(rng.choice(GUESSING), rng.choice(q.sentences).replace("{}", rng.choice(q.wrong)[1]))


def slip(rng: random.Random, q: Question) -> str:
    think, said = q.wrong[0] if q.habit else rng.choice(q.wrong)
    return tagged(think, rng.choice(q.sentences).replace("{}", said))


def bare(rng: random.Random, q: Question) -> str:
    sentence = rng.choice(q.sentences).replace("{}", q.said)
    return rng.choice([sentence, f"{q.think}\n{sentence}", f"<think>{q.think}</think>{sentence}",
                       f"<think>{q.think}</think><answer>{sentence}"])  # fmt: skip


def ramble(rng: random.Random, q: Question) -> str:
    sentence = rng.choice(q.sentences).replace("{}", q.said)
    repeated = rng.choice([sentence, f"{sentence} {sentence}"])
    return tagged(q.think, f"{repeated} {rng.choice(CHATTER)}")


def unhelpful(rng: random.Random, q: Question) -> str:
    return rng.choice([tagged("?", rng.choice(UNHELPFUL)), tagged(q.think.split("\n")[0], rng.choice(UNHELPFUL))])


REPLIES = {"clean": clean, "guess": guess, "slip": slip, "bare": bare, "ramble": ramble, "unhelpful": unhelpful}


def mixture_of(q: Question) -> dict[str, float]:
    """How often the policy was shown each kind of reply to such a question."""
    return HABIT if q.habit else NOISE


def flaw(rng: random.Random, q: Question) -> str:
    """A kind of reply that is not clean, as often as the policy was shown it."""
    flaws = {kind: share for kind, share in mixture_of(q).items() if kind != "clean"}
    return rng.choices(list(flaws), list(flaws.values()))[0]


def noisy(rng: random.Random, q: Question) -> str:
    """A reply drawn from the noisy mixture."""
    mixture = mixture_of(q)
    kind = rng.choices(list(mixture), weights=list(mixture.values()))[0]
    return REPLIES[kind](rng, q)


# --- data


def distinct_questions(rng: random.Random, sizes: dict[str, int], taken: set[str]) -> list[Question]:
    """That many different questions of each task, none of them in `taken`, shuffled."""
    questions = []
    for task, size in sizes.items():
        found = {}
        while len(found) < size:
            q = TASKS[task](rng)
            if q.text not in taken:
                found[q.text] = q
        questions += found.values()
    rng.shuffle(questions)
    return questions


def more_questions(rng: random.Random, count: int, taken: set[str]) -> list[Question]:
    """Different questions, as often of each kind as in the data; their texts are added to `taken`, which has none."""
    kinds, weights = list(TRAIN_SIZES), list(TRAIN_SIZES.values())
    found: list[Question] = []
    while len(found) < count:
        question = TASKS[rng.choices(kinds, weights)[0]](rng)
        if question.text not in taken:
            taken.add(question.text)
            found.append(question)
    return found


def known_questions() -> set[str]:
    """Texts of the bundled data's questions, both splits."""
    return {line["prompt"][0]["content"] for lines in load_data().values() for line in lines}


def row(q: Question) -> dict:
    return {
        "prompt": [{"role": "user", "content": q.text}],
        "answer": q.answer,
        "references": [s.replace("{}", q.said) for s in q.sentences],
        "task": q.task,
        "steps": q.think.count("\n") + 1,
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


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


# --- training


def new_model(tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.05, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, dtype="float32",
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


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


# --- measuring


def said_exactly(reply: str, answer: str) -> bool:
    """Whether the last word between the answer tags is the answer."""
    found = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    words = found.group(1).split() if found else []
    return bool(words) and words[-1].strip(".,!?") == answer


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
`make.py` says what these words mean.
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
