import json
import random
from pathlib import Path

import pytest
from trl_rewards_bleuberi import register_rewards
from trl_rewards_bleuberi.bleuberi import Bleuberi, answer_in, bleu, reference_statistics, tokenize_13a

from trl_rewards import Samples, load_reward

CASES = json.loads(Path(__file__).with_name("bleu_cases.json").read_text(encoding="utf-8"))
FOX = "The quick brown fox jumps over the lazy dog near the quiet river bank."


def score(completions, references, **options):
    samples = Samples(["q"] * len(completions), completions, columns={"references": references})
    return Bleuberi(**options).score(samples)


@pytest.mark.parametrize("case", CASES["bleu"], ids=lambda case: case["id"])
def test_scores_are_those_of_the_authors_code(case):
    assert score(case["completions"], case["references"]) == pytest.approx(case["expected"], abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("case", CASES["tokens"], ids=lambda case: case["text"])
def test_tokens_are_those_of_the_authors_code(case):
    assert tokenize_13a(case["text"]) == case["expected"]


@pytest.mark.parametrize("case", CASES["answers"], ids=lambda case: case["text"])
def test_answers_are_those_of_the_authors_code(case):
    assert answer_in(case["text"]) == case["expected"]


def test_tokens_are_those_of_sacrebleu_on_odd_strings():
    reference = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    characters = "aZé今7.,-–'\"&;/<>[]{}~_ \n\t\r\x1c\u3000\u00a0"
    pieces = [*characters, "&amp;", "&quot;", "&lt;", "<skipped>", "-\n", "1.5", "..."]
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        assert tokenize_13a(text) == reference(text).split(), repr(text)


def test_score_worked_by_hand():
    # 6 tokens; matches 5/6, 3/5, 1/4, 0/3; one added to each: 6/7 · 4/6 · 2/5 · 1/4.
    wanted = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert score(["the cat sat on the mat"], [["the cat is on the mat"]]) == pytest.approx([wanted])


@pytest.mark.parametrize("completion", ["", " \n", float("nan"), None, "<answer></answer>", "<skipped>", []])
def test_an_answer_without_tokens_scores_0(completion):
    assert score([completion], [[FOX]]) == [0.0]


@pytest.mark.parametrize("references", [[], [""], ["<skipped>", " "], "", None, float("nan"), [None]])
def test_a_row_without_a_reference_has_no_opinion(references):
    assert score([FOX, ""], [references, references]) == [None, None]


def test_empty_references_are_left_out():
    assert score(["Paris"], [["", "Paris", None]]) == [1.0]


def test_a_string_is_one_reference():
    assert score([FOX], [FOX]) == [1.0]


def test_a_reference_that_is_no_text_is_refused_with_its_row():
    with pytest.raises(TypeError, match=r"column 'references', row 1: wanted text or a list of texts, got \[3\]"):
        score(["a", "b"], [["a"], [3]])


def test_turn_says_which_assistant_message_is_read():
    turns = [{"role": "assistant", "content": "let me look"}, {"role": "tool", "content": "Paris"}]
    completion = [*turns, {"role": "assistant", "content": FOX}]
    assert score([completion], [[FOX]], turn="last") == [1.0]
    assert score([completion], [["let me look"]]) == [1.0]


def test_extract_answer_off_scores_the_whole_completion():
    assert score([f"<answer>{FOX}</answer>"], [[FOX]], extract_answer=False)[0] < 1.0


def test_without_smoothing_a_missing_order_scores_0():
    assert score(["the cat sat"], [["the cat sat"]], smooth=False) == [0.0]
    assert score(["the cat sat"], [["the cat sat"]], smooth=False, max_order=3) == [1.0]


def test_smooth_unigrams_off_gives_a_wrong_word_0():
    assert score(["London"], [["Paris"]])[0] == pytest.approx(0.5**0.25)
    assert score(["London", "Paris"], [["Paris"], ["Paris"]], smooth_unigrams=False) == [0.0, 1.0]


def test_closest_reference_length_takes_the_shorter_of_two_equally_close():
    references = ["a b", "a b c d", "a b c d e f g h"]
    lengths = reference_statistics(tuple(references), 4).lengths
    assert lengths == (2, 4, 8)
    assert score(["a b c"], [references], ref_length="closest") == [1.0]  # 2 and not 4
    closest, shortest = (score(["a b c d e f g"], [references], ref_length=choice)[0] for choice in ("closest", "min"))
    assert closest == pytest.approx(shortest * 2.718281828459045 ** (1 - 8 / 7))


def test_max_order_must_be_positive():
    with pytest.raises(ValueError, match="max_order must be at least 1, got 0"):
        Bleuberi(max_order=0)


def test_invariants_on_random_texts():
    rng = random.Random(1)
    for _ in range(200):
        answer, *references = (" ".join(rng.choices("abcdef", k=rng.randrange(1, 15))) for _ in range(4))
        value = bleu(answer, tuple(references))
        assert value is not None
        assert 0 < value <= 1
        assert bleu(answer, tuple(reversed(references))) == value  # the order of references does not matter
        assert bleu(answer, (*references, references[0])) == value  # nor does saying one twice
        assert bleu(answer, (*references, answer)) == pytest.approx(1.0)  # identical to one of them


def test_is_a_trl_reward_function_under_its_registered_name():
    reward = load_reward(register_rewards()["bleuberi"], references="solution")
    assert reward.reads() == ("solution",)
    scores = reward(prompts=["q"], completions=[[{"role": "assistant", "content": FOX}]], solution=[[FOX]])
    assert scores == [1.0]
