"""The rows that components read: plain data, strict about sizes, clear about what is missing."""

from __future__ import annotations

import pickle

import pytest

from trl_rewards import Samples
from trl_rewards.samples import completion_text, content_text


def rows(count: int = 4, **options) -> Samples:
    return Samples(
        prompts=[f"p{row}" for row in range(count)],
        completions=[f"c{row}" for row in range(count)],
        completion_ids=[[row] * row for row in range(count)],
        columns={"answer": list(range(count)), "other": ["x"] * count},
        **options,
    )


def test_every_list_must_have_a_row_per_prompt():
    with pytest.raises(ValueError, match="completions has 1 rows, but there are 2 prompts"):
        Samples(["p", "p"], ["c"])
    with pytest.raises(ValueError, match="answer has 3 rows, but there are 1 prompts"):
        Samples(["p"], ["c"], columns={"answer": [1, 2, 3]})
    with pytest.raises(ValueError, match="completion_ids has 2 rows"):
        Samples(["p"], ["c"], completion_ids=[[1], [2]])


def test_rows_must_divide_into_groups():
    with pytest.raises(ValueError, match="4 rows do not divide into groups of 3"):
        rows(group_size=3)


def test_a_missing_column_names_those_there_are():
    with pytest.raises(KeyError, match=r"no column 'anwser', did you mean 'answer'.*\(columns: answer, other"):
        rows()["anwser"]
    with pytest.raises(KeyError, match="columns: none"):
        Samples(["p"], ["c"])["answer"]


def test_lengths_are_counted_in_tokens_and_need_token_ids():
    assert rows().lengths == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="these samples have no token ids"):
        Samples(["p"], ["c"]).lengths  # noqa: B018
    assert Samples([], []).lengths == []


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "hello"}], "hello"),
        ([], ""),
        ([{"role": "user", "content": "hello"}], ""),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ""),
        ([{"role": "assistant"}], ""),
        (
            [
                {"role": "assistant", "content": "I look it up", "tool_calls": [{}]},
                {"role": "tool", "content": "22"},
                {"role": "assistant", "content": "It is 22"},
            ],
            "It is 22",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
                }
            ],
            "ab",
        ),
    ],
)
def test_the_text_of_a_completion_is_what_the_assistant_said_last(completion, text):
    assert completion_text(completion) == text
    assert Samples(["p"], [completion]).texts == [text]


def test_the_text_of_a_message_is_its_text_blocks():
    assert content_text({"content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}]}) == "a"


def test_prompt_texts_join_the_messages():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert Samples(["plain", chat], ["a", "b"]).prompt_texts == ["plain", "Be brief.\nWhy?"]


def test_taken_rows_keep_their_columns_and_know_only_the_grouping_they_are_given():
    taken = rows(group_size=2, step=3, max_steps=9).take([3, 0])
    assert (taken.prompts, taken.completions, taken.completion_ids) == (["p3", "p0"], ["c3", "c0"], [[3, 3, 3], []])
    assert dict(taken.columns) == {"answer": [3, 0], "other": ["x", "x"]}
    assert (taken.group_size, taken.step, taken.max_steps) == (None, 3, 9)
    assert rows().take([0, 1], 2).group_size == 2
    assert len(rows().take([])) == 0


def test_only_keeps_the_declared_columns_and_star_keeps_all():
    assert list(rows().only(("answer", "absent")).columns) == ["answer"]
    assert list(rows().only(("*",)).columns) == ["answer", "other"]
    assert list(rows().only(()).columns) == []


def test_missing_lists_what_is_not_there():
    assert rows().missing(("answer", "solution", "*")) == ["solution"]


def test_concatenation_puts_back_what_was_split():
    whole = rows(step=5)
    parts = [whole.take([0]), whole.take([1, 2]), whole.take([3])]
    assert Samples.concatenate(parts) == whole
    assert Samples.concatenate(parts, 2).group_size == 2


def test_samples_survive_pickling():
    assert pickle.loads(pickle.dumps(rows(group_size=2))) == rows(group_size=2)
