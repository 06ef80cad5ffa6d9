"""BLEU as a reward: completions per second on one core, beside other ways to the same numbers.

    python benchmarks/bleu.py [--data FOLDER] [--completions 2000] [--rounds 3]

2,000 completions in groups of 8, five references per prompt, then one completion per prompt, as when data are
selected. With --data (`testset-v1.jsonl` of https://github.com/WeOpenML/PandaLM and `references.jsonl`, as for
agreement.py) the texts are real; otherwise they have Zipf's word frequencies and 270 words, of which a third is copied
from the references. Ways are timed in turn, by CPU time, and the fastest of the rounds counts; before that
their numbers are compared. Needs sacrebleu, bleuscore, rouge-score and rouge-score-rs (`trl-rewards[test]`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from trl_rewards import Samples, load_reward

GROUP, REFERENCES = 8, 5
Texts = tuple[list[str], list[list[str]]]
"""Completions, and the references of each."""


def zipf_texts(prompts: int, group: int, words: int = 270) -> Texts:
    """Completions that copy runs of 3 to 12 words from their prompt's references."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30000)]
    shares = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(vocabulary))))
    completions, references = [], []
    for _ in range(prompts):
        own = [rng.choices(vocabulary, cum_weights=shares, k=rng.randint(200, 340)) for _ in range(REFERENCES)]
        for _ in range(group):
            text: list[str] = []
            while len(text) < words:
                source = rng.choice(own)
                start = rng.randrange(len(source))
                text += source[start : start + rng.randint(3, 12)]
                text += rng.choices(vocabulary, cum_weights=shares, k=15)
            completions.append(" ".join(text) + ".")
            references.append([" ".join(reference) + "." for reference in own])
    return completions, references


def real_texts(folder: Path, prompts: int, group: int) -> Texts:
    """Models' answers, `group` to a prompt (some twice), and five strong models' answers as references."""

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    wanted_by_prompt = {row["instruction"]: list(row["references"].values()) for row in read("references.jsonl")}
    answers: dict[str, list[str]] = {}
    for row in read("testset-v1.jsonl"):
        prompt = f"{row['instruction']}\n\n{row['input']}"
        prompt = prompt if prompt in wanted_by_prompt else row["instruction"]
        said = (str(row[key]) for key in ("response1", "response2"))
        answers.setdefault(prompt, []).extend(text for text in said if text.strip())  # evaluate divides by zero there
    found = [(own, wanted_by_prompt[prompt]) for prompt, own in answers.items() if prompt in wanted_by_prompt]
    completions, references = [], []
    for own, wanted in itertools.islice(itertools.cycle(found), prompts):
        completions += itertools.islice(itertools.cycle(own), group)
        references += [wanted] * group
    return completions, references


def evaluate_way(answer: str, references: list[str], tokenize: Callable[[str], str]) -> float:
    """What `evaluate` computes for a pair with `smooth=True`, everything counted anew, as plainly as there."""
    tokens, wanted = tokenize(answer).split(), [tokenize(text).split() for text in references]

    def ngrams(words: list[str]) -> Counter:
        return Counter(
            tuple(words[start : start + order]) for order in range(1, 5) for start in range(len(words) - order + 1)
        )

    merged: Counter = Counter()
    for words in wanted:
        merged |= ngrams(words)
    overlap = ngrams(tokens) & merged
    matches = Counter()
    for ngram, count in overlap.items():
        matches[len(ngram)] += count
    precisions = [(matches[order] + 1) / (max(len(tokens) - order + 1, 0) + 1) for order in range(1, 5)]
    ratio = len(tokens) / min(map(len, wanted))
    brevity = 1.0 if ratio > 1 else math.exp(1 - 1 / ratio)
    return brevity * math.exp(sum(map(math.log, precisions)) / 4)


def ways(texts: Texts) -> dict[str, dict[str, Callable[[], list[float]]]]:
    """{numbers: {way: what computes them}}; the first way of each is ours."""
    completions, references = texts
    samples = Samples(["q"] * len(completions), completions, columns={"references": references})
    pairs = list(zip(completions, references, strict=True))
    bleu, rouge = BLEU(effective_order=True), RougeScorer(["rougeL"], use_stemmer=False)
    tokenizer = Tokenizer13a()

    def ours(name: str, **options) -> Callable[[], list[float]]:
        reward = load_reward(name, extract_answer=False, **options)
        return lambda: reward.score(samples)

    return {
        "evaluate's BLEU": {
            "bleuberi": ours("bleuberi"),
            "bleuberi, compiled": ours("bleuberi", compiled=True),
            "evaluate's formula per pair": lambda: [evaluate_way(*pair, tokenizer) for pair in pairs],
        },
        "sacrebleu's BLEU": {
            "bleuberi": ours("bleuberi", convention="sacrebleu"),
            "bleuberi, compiled": ours("bleuberi", convention="sacrebleu", compiled=True),
            "one BLEU object, sentence_score": lambda: [bleu.sentence_score(*pair).score / 100 for pair in pairs],
            "sacrebleu.sentence_bleu": lambda: [sentence_bleu(*pair).score / 100 for pair in pairs],
        },
        "ROUGE-L": {
            "rouge_l": ours("rouge_l"),
            "rouge_l, compiled": ours("rouge_l", compiled=True),
            "rouge_score per pair": lambda: [
                rouge.score_multi(wanted, text)["rougeL"].fmeasure for text, wanted in pairs[:100]
            ],
        },
    }


def seconds(compute: Callable[[], list[float]]) -> tuple[float, list[float]]:
    start = time.process_time()
    scores = compute()
    return (time.process_time() - start) / len(scores), scores


def report(title: str, texts: Texts, rounds: int) -> None:
    words = sum(len(text.split()) for text in texts[0]) / len(texts[0])
    print(f"{title}: {len(texts[0])} completions of {words:.0f} words")
    for numbers, table in ways(texts).items():
        best: dict[str, float] = {}
        for _ in range(rounds):
            wanted: list[float] = []
            for way, compute in table.items():
                spent, scores = seconds(compute)
                best[way] = min(best.get(way, math.inf), spent)
                wanted = wanted or scores
                off = max(abs(one - other) for one, other in zip(wanted, scores, strict=False))
                assert off < 1e-12, f"{way}: off by {off}"
        print(f"  {numbers}")
        ours = next(iter(best.values()))
        for way, spent in best.items():
            print(f"    {way:34}{1 / spent:8.0f} a second   ours is {spent / ours:6.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--completions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for title, group in (("groups of 8", GROUP), ("one completion per prompt", 1)):
        prompts = options.completions // group
        texts = real_texts(options.data, prompts, group) if options.data else zipf_texts(prompts, group)
        report(title, texts, options.rounds)


if __name__ == "__main__":
    main()
