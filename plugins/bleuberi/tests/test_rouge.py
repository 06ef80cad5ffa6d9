import json
import random
from pathlib import Path

import pytest
from trl_rewards_bleuberi.rouge import common_subsequence, rouge_l, rouge_l_compiled, word_places

from trl_rewards import Samples, load_reward

CASES = json.loads(Path(__file__).with_name("bleu_cases.json").read_text(encoding="utf-8"))["rouge"]


def score(name, completions, references, **options):
    samples = Samples(["q"] * len(completions), completions, columns={"references": references})
    return load_reward(name, **options).score(samples)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_scores_are_those_of_the_authors_code(case):
    texts = case["completions"], case["references"]
    assert score("rouge_l", *texts) == pytest.approx(case["expected"], abs=1e-9)
    assert score("bleu_rouge_f1", *texts) == pytest.approx(case["bleu_rouge_f1"], abs=1e-9)


def table(one, other):
    """Longest common subsequence as the textbook has it."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for column, against in enumerate(other):
            row.append(before[column] + 1 if word == against else max(row[column], before[column + 1]))
    return row[-1]


def texts(count):
    rng = random.Random(0)
    words = ["a", "b", "c", "The", "mat", "mat.", "it's", "3.5", "今", "Ä", "\u212a", "İx", "don't\n"]
    return [" ".join(rng.choices(words, k=rng.randrange(15))) for _ in range(count)]


def test_common_subsequence_is_that_of_the_textbook():
    rng = random.Random(1)
    for _ in range(300):
        one, other = (rng.choices("abcd", k=rng.randrange(90)) for _ in range(2))
        assert common_subsequence(one, *word_places(" ".join(other))) == table(one, other)


def test_scores_are_those_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    made = texts(900)
    for answer, *references in zip(made[::3], made[1::3], made[2::3], strict=True):
        there = [text for text in references if text.strip()]
        theirs = scorer.score_multi(there, answer)["rougeL"].fmeasure if there else None
        assert rouge_l(answer, tuple(references)) == theirs, (answer, references)


def test_scores_are_those_of_rouge_score_rs():
    pytest.importorskip("rouge_score_rs")
    made = texts(900)
    for answer, *references in zip(made[::3], made[1::3], made[2::3], strict=True):
        assert rouge_l_compiled(answer, tuple(references)) == rouge_l(answer, tuple(references)), (answer, references)
    assert score("rouge_l", ["the cat"], [["the cat sat"]], compiled=True) == [0.8]


@pytest.mark.parametrize("name", ["rouge_l", "bleu_rouge_f1"])
def test_empty_answers_score_0_and_rows_without_a_reference_have_no_opinion(name):
    answers = ["", "<answer> </answer>", "the cat", "the cat", ""]
    assert score(name, answers, [["the cat"], "the cat", ["", None], None, []]) == [0.0, 0.0, None, None, None]


def test_the_answer_alone_is_scored_unless_told_otherwise():
    completion = "<think>the cat</think><answer>the dog</answer>"
    assert score("rouge_l", [completion], [["the dog"]]) == [1.0]
    assert score("rouge_l", [completion], [["the dog"]], extract_answer=False)[0] < 1.0


def test_other_scripts_score_0():
    assert score("rouge_l", ["猫 坐"], [["猫 坐"]]) == [0.0]
