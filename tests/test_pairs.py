"""Pairs, labels and best answers of scored candidates, by hand."""

from __future__ import annotations

import math

import pytest

from trl_rewards.pairs import (
    Candidate,
    Counts,
    Group,
    PairOptions,
    Sampling,
    Selection,
    best_row,
    kto_rows,
    make_pairs,
    pair_rows,
    refused_arguments,
    sft_row,
)

NAN = math.nan


def group(*candidates: tuple, prompt="p") -> Group:
    """(text, total[, tokens[, ended]]) per candidate; its one source's score is ten times the total."""
    made = []
    for text, total, *more in candidates:
        tokens, ended = (*more, 10, True)[:2] if len(more) < 2 else more
        made.append(Candidate(text, total, {"source": 10 * total}, tokens, ended))
    return Group(prompt, made)


def pairs_of(candidates: Group, **options) -> list[tuple[str, str, float]]:
    pairs, _ = make_pairs(candidates, Selection(**options))
    return [(pair.chosen.completion, pair.rejected.completion, pair.margin) for pair in pairs]


FOUR = group(("a", 0.5), ("b", 2.0), ("c", 1.0), ("d", -1.0))


def test_best_worst_is_the_largest_margin():
    assert pairs_of(FOUR) == [("b", "d", 3.0)]


def test_all_pairs_come_largest_margin_first_and_respect_the_least_margin_and_the_most_pairs():
    every = [("b", "d", 3.0), ("c", "d", 2.0), ("b", "a", 1.5), ("a", "d", 1.5), ("b", "c", 1.0), ("c", "a", 0.5)]
    assert pairs_of(FOUR, select="all") == every
    assert pairs_of(FOUR, select="all", min_margin=1.5) == every[:4]
    assert pairs_of(FOUR, select="all", max_pairs=2) == every[:2]


def test_best_random_puts_the_best_against_each_of_the_others_in_turn_and_repeats_itself():
    drawn = {make_pairs(FOUR, Selection(select="best_random"), seed)[0][0].rejected.completion for seed in range(30)}
    assert drawn == {"a", "c", "d"}
    again = [make_pairs(FOUR, Selection(select="best_random"), 7)[0] for _ in range(2)]
    assert again[0] == again[1]
    assert again[0][0].chosen.completion == "b"


def test_holes_are_never_in_a_pair():
    assert pairs_of(group(("a", NAN), ("b", 1.0), ("c", NAN), ("d", 0.0))) == [("b", "d", 1.0)]
    pairs, counts = make_pairs(group(("a", NAN), ("b", 1.0)), Selection())
    assert not pairs
    assert (counts.holes, counts.alone, counts.pairs) == (1, 1, 0)


def test_ties_make_no_pair_whatever_the_margin():
    pairs, counts = make_pairs(group(("a", 1.0), ("b", 1.0)), Selection(select="all"))
    assert not pairs
    assert counts.ties == 1
    assert pairs_of(group(("a", 1.0), ("b", 1.0), ("c", 0.0)), select="all") == [("a", "c", 1.0), ("b", "c", 1.0)]


def test_of_equal_texts_the_first_with_a_total_counts():
    pairs, counts = make_pairs(group(("a", NAN), ("a", 1.0), ("a", 0.0), ("b", 0.5)), Selection(select="all"))
    assert [(pair.chosen.completion, pair.margin) for pair in pairs] == [("a", 0.5)]
    assert (counts.holes, counts.repeats) == (1, 1)
    _, counts = make_pairs(group(("a", 1.0), ("a", 0.0)), Selection())
    assert (counts.repeats, counts.alone) == (1, 1)


def test_length_control_takes_the_largest_margin_among_pairs_of_similar_length():
    lengths = group(("a", 3.0, 100), ("b", 2.0, 30), ("c", 1.0, 36), ("d", -0.5, 10))
    assert pairs_of(lengths) == [("a", "d", 3.5)]
    assert pairs_of(lengths, length_ratio=3.0) == [("b", "d", 2.5)]  # 30 : 10
    assert pairs_of(lengths, length_ratio=2.8) == [("a", "c", 2.0)]  # 100 : 36
    assert pairs_of(lengths, length_ratio=1.2) == [("b", "c", 1.0)]  # 36 : 30
    pairs, counts = make_pairs(lengths, Selection(length_ratio=1.1))
    assert not pairs
    assert counts.filtered == 1


def test_a_truncated_completion_is_rejected_and_not_chosen_unless_asked_for():
    cut = group(("a", 2.0, 48, False), ("b", 1.0, 20, True), ("c", 0.0, 48, False))
    assert pairs_of(cut) == [("b", "c", 1.0)]
    assert pairs_of(cut, choose_truncated=True) == [("a", "c", 2.0)]


def test_chat_completions_are_told_apart_by_what_they_say():
    def chat(text):
        return [{"role": "assistant", "content": text}]

    same = Group("p", [Candidate(chat("a"), 1.0, {}, 1), Candidate(chat("a"), 0.0, {}, 1)])
    assert make_pairs(same, Selection())[0] == []


def test_rows_have_trl_s_columns_the_margin_and_every_source_s_raw_scores():
    candidates = [Candidate("a", 2.0, {"s": 4.0, "t": NAN}, 3), Candidate("b", 0.5, {"s": 1.0, "t": 7.0}, 5)]
    told = Group("p", candidates, {"tools": ["x"]})
    (row,) = pair_rows(told, make_pairs(told, Selection())[0])
    assert row == {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "margin": 1.5,
        "score_chosen": 2.0,
        "score_rejected": 0.5,
        "tokens_chosen": 3,
        "tokens_rejected": 5,
        "s/chosen": 4.0,
        "s/rejected": 1.0,
        "t/chosen": None,
        "t/rejected": 7.0,
        "tools": ["x"],
    }


def test_counts_add_up():
    _, first = make_pairs(FOUR, Selection(select="all"))
    _, second = make_pairs(group(("a", NAN), ("b", 1.0)), Selection())
    assert first + second == Counts(prompts=2, candidates=6, holes=1, alone=1, pairs=6)


def test_best_of_n_keeps_all_that_was_scored():
    row = best_row(group(("a", NAN), ("b", 1.0), ("c", 1.0)))
    assert (row["completion"], row["total"], row["scores"]) == ("b", 1.0, {"source": 10.0})
    assert [each["total"] for each in row["candidates"]] == [None, 1.0, 1.0]
    assert best_row(group(("a", NAN))) is None


def test_rejection_sampling_keeps_the_best_that_is_good_enough():
    assert sft_row(FOUR, minimum=2.0)["completion"] == "b"
    assert sft_row(FOUR, minimum=2.1) is None
    assert sft_row(group(("a", NAN))) is None


def test_kto_labels_by_threshold_or_best_and_worst():
    assert [(row["completion"], row["label"]) for row in kto_rows(FOUR)] == [("b", True), ("d", False)]
    labelled = {row["completion"]: row["label"] for row in kto_rows(FOUR, threshold=0.5)}
    assert labelled == {"a": True, "b": True, "c": True, "d": False}
    assert list(kto_rows(group(("a", 1.0), ("b", 1.0), ("c", NAN)))) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_margin": -1.0}, "min_margin must be a number from 0, got -1.0"),
        ({"max_pairs": 2}, "max_pairs must be at least 1 and goes with select: all"),
        ({"length_ratio": 0.5}, "length_ratio must be at least 1"),
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"rounds": 0}, "must be at least 1"),
        ({"prompts_per_round": 0}, "must be at least 1"),
        ({"source": "dataset"}, "source: dataset needs `columns`"),
        ({"columns": ["a"]}, "columns goes with source: dataset"),
        ({"source": "dataset", "columns": ["a"], "rounds": 2}, "rounds must be 1 with source: dataset, got 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        PairOptions(**options)
    assert Sampling(temperature=0.0).temperature == 0.0  # greedy is no way to pairs, but one to an answer


def test_arguments_of_trl_s_that_rounds_leave_no_room_for_are_refused():
    assert refused_arguments({"eval_strategy": "no", "precompute_ref_log_probs": False}) == []
    said = refused_arguments({"eval_strategy": "steps", "precompute_ref_log_probs": True})
    assert [problem.partition(":")[0] for problem in said] == ["eval_strategy", "precompute_ref_log_probs"]
