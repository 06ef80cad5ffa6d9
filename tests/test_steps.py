"""Steps of a text, and the tokens they end at."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.conftest import make_sentencepiece_tokenizer
from trl_rewards import Context, Failed, Samples, StepReward, bundled
from trl_rewards.steps import aggregate, splitter, step_ends, steps_in, token_ends, turn_ends

UNICODE = "Größe: 山 🙂👩‍👩‍👧 first.\n\nZweitens naïve é…\n\n第三步。完了"


@pytest.fixture(scope="module")
def byte_level():
    return AutoTokenizer.from_pretrained(bundled.FOLDER / "tiny")


@pytest.fixture(scope="module")
def sentencepiece():
    return make_sentencepiece_tokenizer()


def prefix_ends(tokenizer, ids):
    """The slow truth: how much of the text each prefix of the tokens decodes to."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = []
    for index in range(len(ids)):
        prefix = tokenizer.decode(ids[: index + 1], skip_special_tokens=True)
        right = next((at for at, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(prefix))
        ends.append(max([right, *ends]))  # half a character may spoil the whole ones before it
    return text, ends


@pytest.mark.parametrize(
    "text", ["one two\n\nthree.", "  first we add\n\n two", UNICODE, "a", "\n\n", "🙂" * 5, "<|im_start|>x"]
)
def test_token_ends_are_those_of_every_prefix(byte_level, sentencepiece, text):
    for tokenizer in (byte_level, sentencepiece):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert token_ends(tokenizer, ids) == prefix_ends(tokenizer, ids)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(byte_level):
    ids = byte_level("a\n\n🙂", add_special_tokens=False)["input_ids"]
    assert len(byte_level("🙂", add_special_tokens=False)["input_ids"]) > 1
    assert step_ends(byte_level, ids, ["a", "🙂"]) == [0, len(ids) - 1]


def test_steps_of_unicode_end_where_their_text_does(byte_level, sentencepiece):
    steps = steps_in(UNICODE, splitter("blank_line"))
    assert steps == ["Größe: 山 🙂👩‍👩‍👧 first.", "Zweitens naïve é…", "第三步。完了"]
    for tokenizer in (byte_level, sentencepiece):
        ids = [*tokenizer(UNICODE, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ends = step_ends(tokenizer, ids, steps)
        decoded = [tokenizer.decode(ids[: end + 1], skip_special_tokens=True).rstrip() for end in ends]
        assert decoded == [UNICODE[: UNICODE.index(step) + len(step)] for step in steps]
        assert ends[-1] == len(ids) - 2  # not the end-of-sequence token, which is no text


def test_special_tokens_within_a_step_are_no_part_of_its_text(byte_level):
    ids = byte_level("one<|im_start|> two\n\nthree", add_special_tokens=False)["input_ids"]
    text = byte_level.decode(ids, skip_special_tokens=True)
    assert text == "one two\n\nthree"
    assert step_ends(byte_level, ids, ["one two", "three"])[-1] == len(ids) - 1


@pytest.mark.parametrize(
    ("how", "text", "steps"),
    [
        ("blank_line", "a\nb\n \n\n c \n\n", ["a\nb", "c"]),
        ("line", "a\n\n b\nc", ["a", "b", "c"]),
        ("sentence", 'It is 3.5. "Is it?" Yes! 好。对。', ["It is 3.5.", '"Is it?"', "Yes!", "好。", "对。"]),
        ({"separator": r"\s*;\s*"}, "a; b ;c", ["a", "b", "c"]),
        ({"start": r"Step \d+:"}, "So. Step 1: a\n\nb Step 2: c", ["So.", "Step 1: a\n\nb", "Step 2: c"]),
        ({"end": r"</think>"}, "<think>a</think> b", ["<think>a</think>", "b"]),
        ("turn", "a\n\nb", ["a\n\nb"]),
        (str.split, "a b", ["a", "b"]),
    ],
)
def test_ways_to_split(how, text, steps):
    assert steps_in(text, splitter(how)) == steps


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("blank_lines", "did you mean 'blank_line'"),
        ({"regex": "a"}, "one of separator, start, end"),
        ({"start": "("}, "no regular expression"),
        ({"end": "x*"}, "matches the empty text"),
    ],
)
def test_ways_that_mean_nothing_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        splitter(how)


CALLS = [
    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]},
    {"role": "tool", "name": "sum", "content": "sum is 3"},
    {"role": "assistant", "content": "It is 3."},
]


def test_a_turn_ends_at_its_end_token_and_tools_words_end_none(byte_level):
    parts = ['I look. <call>{"name": "sum", "arguments": {"a": 1}}<|im_end|>', "\nsum is 3\n", "It is 3.<|im_end|>"]
    ids = [byte_level(part, add_special_tokens=False)["input_ids"] for part in parts]
    flat = [token for part in ids for token in part]
    assert turn_ends(byte_level, flat, CALLS) == [len(ids[0]) - 1, len(flat) - 1]
    assert turn_ends(byte_level, flat[:-1], CALLS) == [len(ids[0]) - 1, len(flat) - 2]  # cut off


def test_a_tool_that_replies_what_is_said_next_catches_no_turn(byte_level):
    messages = [CALLS[0], {"role": "tool", "name": "sum", "content": "3"}, {"role": "assistant", "content": "3"}]
    parts = ['I look. <call>{"name": "sum", "arguments": {"a": 3}}<|im_end|>', "\n3<|im_end|>\n", "3<|im_end|>"]
    ids = [byte_level(part, add_special_tokens=False)["input_ids"] for part in parts]
    flat = [token for part in ids for token in part]
    assert turn_ends(byte_level, flat, messages) == [len(ids[0]) - 1, len(flat) - 1]


def test_a_turn_without_an_end_token_of_its_own_does_not_take_the_next_ones(byte_level):
    parts = ['I look. {"name": "sum"', "}\nsum is 3\n", "It is 3.<|im_end|>"]
    ids = [byte_level(part, add_special_tokens=False)["input_ids"] for part in parts]
    flat = [token for part in ids for token in part]
    first, second = turn_ends(byte_level, flat, CALLS)
    assert first < len(ids[0])
    assert second == len(flat) - 1


class Lengths(StepReward):
    """How long each step is."""

    def score_steps(self, samples, steps):
        return [[float(len(step)) for step in row] or None for row in steps]


def samples_of(tokenizer, *texts):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Samples(prompts=["q"] * len(texts), completions=list(texts), completion_ids=ids)


def test_values_stand_at_the_last_tokens_of_steps(byte_level):
    reward = Lengths()
    reward.setup(Context(tokenizer=byte_level))
    samples = samples_of(byte_level, "one\n\ntwo two", "")
    found, nothing = reward.score_tokens(samples)
    ends = step_ends(byte_level, samples.completion_ids[0], ["one", "two two"])
    assert [(at, value) for at, value in enumerate(found) if value is not None] == list(
        zip(ends, [3.0, 7.0], strict=True)
    )
    assert nothing is None


def test_without_tokens_steps_count_as_their_sum(byte_level):
    reward = Lengths()
    samples = samples_of(byte_level, "one\n\ntwo two")
    assert reward.score(samples) == reward.score_tokens(samples) == [10.0]


def test_a_row_without_any_value_is_a_hole(byte_level):
    class Silent(StepReward):
        def score_steps(self, samples, steps):
            return [[None] * len(row) for row in steps]

    reward = Silent()
    reward.setup(Context(tokenizer=byte_level))
    assert reward.score_tokens(samples_of(byte_level, "one\n\ntwo", "")) == [None, None]


def test_turns_of_messages_are_steps_with_their_calls():
    reward = Lengths(steps="turn")
    assert reward.steps_of(Samples(prompts=[[]], completions=[CALLS])) == [['I look.\nsum({"a": 1})', "It is 3."]]


def test_a_step_that_is_not_in_the_tokens_is_a_hole(byte_level):
    ids = byte_level("another text", add_special_tokens=False)["input_ids"]
    assert isinstance(step_ends(byte_level, ids, ["missing"]), Failed)


@pytest.mark.parametrize(
    ("take", "value"), [("sum", 1.5), ("mean", 0.75), ("min", 0.5), ("product", 0.5), ("last", 0.5), ("steps", 1.5)]
)
def test_one_number_of_steps(take, value):
    assert aggregate([1.0, None, 0.5], take) == pytest.approx(value)
    assert aggregate([None], take) is None


def test_a_function_of_a_file_splits(tmp_path, byte_level):
    (tmp_path / "cut.py").write_text(
        "def halves(text):\n    return [text[: len(text) // 2], text[len(text) // 2 :]]\n"
    )
    reward = Lengths(steps="./cut.py:halves")
    reward.setup(Context(base_dir=str(tmp_path), tokenizer=byte_level))
    assert reward.steps_of(Samples(prompts=["q"], completions=["abcd"])) == [["ab", "cd"]]
