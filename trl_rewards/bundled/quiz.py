"""The bundled data's questions, and right and wrong replies to them, by rule. No outside text.

A reply is of a kind (`REPLIES`):

- clean:      right, in the form `<think>17 + 5 = 22</think><answer>The sum is 22.</answer>`;
- guess:      no working (`<think>easy</think>`) and then a wrong number or word;
- slip:       the right form with a wrong step, number or word;
- bare:       right, but one or all of the tags are missing;
- ramble:     right at first, then it repeats itself or chatters on;
- unhelpful:  the right form, and no answer.

Some kinds of question have a *habit*: one particular wrong reply, such as naming the following day when asked for the
previous one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trl_rewards.bundled import load_data

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

GUESSING = ["easy", "quick guess", "no need to think"]
UNHELPFUL = ["I do not know.", "I can not say.", "Ask me later.", "It could be anything."]
CHATTER = ["I like it a lot.", "Is that good?", "That is all I can say.", "Thank you for asking me."]


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


def chain(rng: random.Random, lengths: Sequence[int] = (2, 2, 3, 3, 4)) -> Question:
    """A sum of several steps; `lengths` are those of which one is drawn."""
    steps = rng.choice(lengths)
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
SUMS = ("chain", "add", "subtract", "multiply", "compare")
"""Tasks about numbers."""


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


def usual(rng: random.Random) -> Question:
    """A question of any kind, as often of each as in the data."""
    return TASKS[rng.choices(list(TRAIN_SIZES), list(TRAIN_SIZES.values()))[0]](rng)


def more_questions(
    rng: random.Random, count: int, taken: set[str], draw: Callable[[random.Random], Question] = usual
) -> list[Question]:
    """Different questions; their texts are added to `taken`, which has none of them."""
    found: list[Question] = []
    while len(found) < count:
        question = draw(rng)
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


def said_exactly(reply: str, answer: str) -> bool:
    """Whether the last word between the answer tags is the answer."""
    found = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    words = found.group(1).split() if found else []
    return bool(words) and words[-1].strip(".,!?") == answer
