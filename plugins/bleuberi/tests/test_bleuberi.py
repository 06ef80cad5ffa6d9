import json
import random
from pathlib import Path

import pytest
from trl_rewards_bleuberi import bleu as bleu_module
from trl_rewards_bleuberi.answers import answer_in
from trl_rewards_bleuberi.bleu import (
    SACREBLEU,
    bleu,
    count_compiled,
    count_matches,
    reference_statistics,
    tokenize_13a,
)
from trl_rewards_bleuberi.bleuberi import Bleuberi

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


def odd_strings(count):
    """Every trap of the tokeniser: entities, hyphens at line ends, separators that only Python splits at."""
    characters = "aZé今7.,-–'\"&;/<>[]{}~_ \n\t\r\x1c\x1f\x85\u3000\u00a0"
    pieces = [*characters, "&amp;", "&quot;", "&lt;", "<skipped>", "-\n", "1.5", "...", "the ", "cat "]
    rng = random.Random(0)
    return ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(count)]


def test_tokens_are_those_of_sacrebleu_on_odd_strings():
    reference = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    for text in odd_strings(3000):
        assert tokenize_13a(text) == reference(text).split(), repr(text)


def test_memory_of_tokens_is_bounded_and_takes_no_long_lines():
    cache = bleu_module._known_word
    assert cache.cache_info().maxsize == 2**16
    before = cache.cache_info().misses
    assert tokenize_13a("今" * 33 + ",") == ["今" * 33, ","]
    assert cache.cache_info().misses == before


def some_texts(rng):
    """An answer and two references that share words with it."""
    return [" ".join(rng.choices("abcdefgh", k=rng.randrange(1, 12))) for _ in range(3)]


@pytest.mark.parametrize("effective_order", [True, False])
@pytest.mark.parametrize(
    ("smoothing", "value"),
    [("exp", None), ("none", None), ("floor", None), ("floor", 0.5), ("add_k", None), ("add_k", 0.5)],
)
def test_sacrebleu_convention_is_its_sentence_score(smoothing, effective_order, value):
    metrics = pytest.importorskip("sacrebleu.metrics")
    method = smoothing.replace("_", "-")
    reference = metrics.BLEU(smooth_method=method, smooth_value=value, effective_order=effective_order)
    options = {"smoothing": smoothing, "effective_order": effective_order, "smooth_value": value}
    rng = random.Random(2)
    odd = odd_strings(300)
    texts = [some_texts(rng) for _ in range(200)] + [["the cat-\n", "the cat-", "a"], ["a", "a b", "c"]]
    texts += [[odd[row], odd[row + 1], "the cat"] for row in range(0, 299, 2) if odd[row + 1].strip()]
    found = score(
        [answer for answer, *_ in texts],
        [references for _, *references in texts],
        convention="sacrebleu",
        extract_answer=False,
        **options,
    )
    for (answer, *references), mine in zip(texts, found, strict=True):
        theirs = reference.sentence_score(answer, references).score / 100
        assert mine == pytest.approx(theirs, abs=1e-15), (answer, references)


def test_sacrebleu_convention_by_itself_is_sentence_bleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    references = ["The cat is on the mat.", "There is a cat on the mat, asleep."]
    for answer in ("The cat sat on a mat.", "A cat", "dog", "There is a cat on the mat, asleep."):
        theirs = sacrebleu.sentence_bleu(answer, references).score / 100
        assert score([answer], [references], convention="sacrebleu") == pytest.approx([theirs], abs=1e-15)


@pytest.mark.parametrize("ref_length", ["min", "closest"])
def test_bleuscore_counts_the_same(ref_length):
    pytest.importorskip("bleuscore")
    rng = random.Random(3)
    odd = odd_strings(1500)
    texts = [some_texts(rng) for _ in range(300)] + [odd[row : row + 3] for row in range(0, 1500, 3)]
    for answer, *references in texts:
        mine, theirs = (count(answer, tuple(references), 4, ref_length) for count in (count_matches, count_compiled))
        if mine is not None and not mine.length:
            mine = mine._replace(ref_length=0)  # nothing to compare
        assert theirs == mine, (answer, references)


def test_compiled_scores_are_the_same():
    pytest.importorskip("bleuscore")
    completions = [FOX, "the lazy dog", "", "<skipped>", "dog-\n"]
    references = [[FOX, "dog"], ["a lazy dog", ""], ["x"], ["x"], ["dog-\n"]]
    for convention in ("evaluate", "sacrebleu"):
        plain, compiled = (
            score(completions, references, convention=convention, compiled=compiled) for compiled in (False, True)
        )
        assert compiled == plain


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
    assert score(["the cat sat"], [["the cat sat"]], smoothing="none") == [0.0]
    assert score(["the cat sat"], [["the cat sat"]], smoothing="none", max_order=3) == [1.0]
    assert score(["the cat sat"], [["the cat sat"]], smoothing="none", effective_order=True) == [1.0]


def test_add_k_gives_a_wrong_word_0():
    assert score(["London"], [["Paris"]])[0] == pytest.approx(0.5**0.25)
    assert score(["London", "Paris"], [["Paris"], ["Paris"]], smoothing="add_k") == [0.0, 1.0]


def test_effective_order_leaves_out_orders_without_ngrams():
    assert score(["London"], [["Paris"]], effective_order=True) == [0.5]  # (0 + 1) / (1 + 1)


def test_smoothing_worked_by_hand():
    # 3 tokens: 2 of 3 unigrams, 0 of 2 bigrams, 0 of 1 trigram.
    texts = {"completions": ["a x b"], "references": [["a b c"]]}
    for smoothing, rest in {"exp": 1 / 4 * 1 / 4, "floor": 0.1 / 2 * 0.1 / 1, "add_one": 1 / 3 * 1 / 2 * 1}.items():
        orders, unigrams = (4, 3 / 4) if smoothing == "add_one" else (3, 2 / 3)
        found = score(**texts, smoothing=smoothing, effective_order=smoothing != "add_one")
        assert found == pytest.approx([(unigrams * rest) ** (1 / orders)]), smoothing


def test_one_bleu_per_reference_is_averaged_or_the_best_is_taken():
    references = ["the cat", "sat on the mat", ""]
    each = [score(["the cat sat on the mat"], [[text]])[0] for text in references[:2]]
    assert score(["the cat sat on the mat"], [references], over_references="mean") == pytest.approx([sum(each) / 2])
    assert score(["the cat sat on the mat"], [references], over_references="max") == [max(each)]
    assert score(["the cat sat on the mat"], [references])[0] > max(each)  # jointly they cover all but one n-gram
    assert score(["x"], [[""]], over_references="mean") == [None]


def test_references_are_counted_once_for_the_completions_of_a_prompt():
    reference_statistics.cache_clear()
    score([f"the cat sat on mat {row}" for row in range(8)], [["the cat", "on the mat"]] * 8)
    assert reference_statistics.cache_info().misses == 1


def test_closest_reference_length_takes_the_shorter_of_two_equally_close():
    references = ["a b", "a b c d", "a b c d e f g h"]
    lengths = reference_statistics(tuple(references), 4).lengths
    assert lengths == (2, 4, 8)
    assert score(["a b c"], [references], ref_length="closest") == [1.0]  # 2 and not 4
    closest, shortest = (score(["a b c d e f g"], [references], ref_length=choice)[0] for choice in ("closest", "min"))
    assert closest == pytest.approx(shortest * 2.718281828459045 ** (1 - 8 / 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_order": 0}, "max_order must be at least 1, got 0"),
        ({"smooth_value": 0.5}, "smooth_value belongs to smoothing add_k or floor; smoothing is add_one"),
        ({"smooth_value": 0.0, "smoothing": "floor"}, "smooth_value must be above 0, got 0.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Bleuberi(**options)


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
        assert 0 <= (bleu(answer, tuple(references), SACREBLEU) or 0.0) <= 1 + 1e-12


def test_is_a_trl_reward_function_under_its_registered_name():
    reward = load_reward("bleuberi", references="solution")
    assert reward.reads() == ("solution",)
    scores = reward(prompts=["q"], completions=[[{"role": "assistant", "content": FOX}]], solution=[[FOX]])
    assert scores == [1.0]
