"""Reading JSON out of what a judge wrote: every repair, no surprise on any text, no text that takes for ever."""

from __future__ import annotations

import json
import math
import random
import time

import pytest

from trl_rewards.models.replies import as_number, extract_json


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 4}',
        'My verdict: {"score": 4}. Hope this helps!',
        '```json\n{"score": 4}\n```',
        "{'score': 4}",
        "{score: 4}",
        '{"score": 4,}',
        '{\n  "score" :\n 4\n}\n',
        "Verdict: {'score': 4,} and that's it",
        '<think>a {"score": 1} perhaps</think>{"score": 4}',
        'it came to me</think> so {"score": 4}',
        '<think>never closed {"score": 4}',
        '<think>{"score": 2}</think>{"score": 4}',
        '{"score": 4} to repeat it: {"score": 4.0}',
        '{"parts": [{"score": 1}, {"score": 2}], "score": 4}',
        'The set {x | x > 0} is fine. {"score": 4}',
        '[{"score": 4}]',
        '{"verdict": {"score": 4}}',
        '{{"score": 4}}',
        '{"score": 4} {"other": 1} {}',
        '{"score": 4, "note": "he said "hi" to me"}',
        "{'score': 4, 'note': 'it's fine, isn't it'}",
        '{"score": 4, "note": "line\none\\ttwo \\u00e9"}',
        '{"score": 4, "note": "because I was cut o',
        '{"score": 4, "parts": {"clarity": 3, "detail',
    ],
)
def test_a_score_is_found_however_it_is_wrapped(text):
    assert extract_json(text, ["score"])["score"] == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": True, "b": None, "c": false, "d": null}', {"a": True, "b": None, "c": False, "d": None}),
        ('{"a": [1, 2.5, -3, 1e3, "4"]}', {"a": [1, 2.5, -3, 1000.0, "4"]}),
        ("{best: [model-1, model two], worst: 'x'}", {"best": ["model-1", "model two"], "worst": "x"}),
        ('{"a": "é\\n\\"q\\" \\ud83d\\ude42"}', {"a": 'é\n"q" 🙂'}),
        ("{'a': 'say \\'hi\\' \"now\"'}", {"a": "say 'hi' \"now\""}),
        ('{"a": 1, "a": 2}', {"a": 2}),
        ('{"a": {}, "b": []}', {"a": {}, "b": []}),
        ('{"a": 4/5}', {"a": "4/5"}),
    ],
)
def test_values_are_what_they_say(text, value):
    assert extract_json(text) == value


@pytest.mark.parametrize("word", ["nan", "NaN", "Infinity", "-inf"])
def test_what_is_not_finite_is_no_number(word):
    found = extract_json(f'{{"score": {word}}}')
    assert not math.isfinite(found["score"])
    assert as_number(found["score"]) is None


@pytest.mark.parametrize(
    "text", ["", "no braces", "{", "}", "{}{", "{score}", "{4}", '{"score" 4}', "score: 4", "{'score: 4}", "[4]"]
)
def test_where_there_is_no_score_none_is_made_up(text):
    assert extract_json(text, ["score"]) is None


def test_a_number_that_may_have_been_cut_is_not_taken():
    assert extract_json('{"score": 1', ["score"]) is None  # perhaps of 10
    assert extract_json('{"scores": {"a": 5, "b": 1', ["scores"]) == {"scores": {"a": 5}}
    assert extract_json('{"score": 1 ', ["score"]) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 2} no, wait: {"score": 4}',
        'It says {"score": 10}, but {"score": 1}',
        '{"score": 4, "note": "x"} {"score": 5, "note": "y"} {"score": 4}',
        '[{"score": 2}, {"score": 4}]',
        '{"score": 2} and {"score": 4, "note": "cut o',
    ],
)
def test_of_objects_that_disagree_none_is_believed(text):
    assert extract_json(text, ["score"]) is None
    assert extract_json(text, ["score"], last=True)["score"] in (4, 1)


def test_every_key_must_be_there():
    text = '{"a": 1, "b": 2} then {"a": 3}'
    assert extract_json(text, ["a", "b"]) == {"a": 1, "b": 2}
    assert extract_json(text, ["a"], last=True) == {"a": 3}
    assert extract_json(text) == {"a": 3}
    assert extract_json(text, ["c"]) is None


def test_numbers_may_be_written_as_strings_but_nothing_else_is_a_number():
    assert [as_number(value) for value in (4, 4.5, "4", " 4.5 ", "-3", "1e2")] == [4, 4.5, 4, 4.5, -3, 100]
    for value in (True, None, "four", "4/5", [4], {"a": 4}, float("inf"), "1_0", "٤", "", 10**400, "9" * 5000):
        assert as_number(value) is None, value


def test_true_json_comes_back_as_json_reads_it():
    stream = random.Random(0)

    def value(depth=0):
        kind = stream.randrange(7 if depth < 3 else 5)
        if kind == 0:
            return stream.randrange(-99, 99)
        if kind == 1:
            return stream.random()
        if kind == 2:
            return "".join(stream.choice("ab'\"\\{}[]:, \n\té山") for _ in range(8))
        if kind == 3:
            return stream.choice([True, False, None])
        if kind == 4:
            return ""
        if kind == 5:
            return [value(depth + 1) for _ in range(stream.randrange(3))]
        return {str(stream.random()): value(depth + 1) for _ in range(stream.randrange(3))}

    for _ in range(1000):
        wanted = {"x": value(), "y": value()}
        text = json.dumps(wanted, indent=stream.choice([None, 1]), ensure_ascii=stream.random() < 0.5)
        assert extract_json(f"prose, it's {text} more") == wanted


def test_no_text_raises():
    stream = random.Random(1)
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        ",",
        ":",
        "\\",
        "a",
        "1",
        " ",
        "\n",
        "true",
        "</think>",
        "```",
        "é",
        "\ud800",
    ]
    for _ in range(10_000):
        found = extract_json("".join(stream.choices(pieces, k=stream.randrange(50))))
        assert found is None or isinstance(found, dict)


SIZE = 100_000
ADVERSARIAL = {
    "open braces": "{" * SIZE,
    "nested objects": '{"a":' * (SIZE // 5),
    "nested and broken at the end": '{"a":' * (SIZE // 5) + "!,!",
    "nested lists": '{"a":' + "[" * SIZE,
    "quotes": '{"a":"' + '" ' * (SIZE // 2),
    "backslashes": '{"a":"' + "\\" * SIZE,
    "empty objects": "{}" * (SIZE // 2),
    "bare words": "{a" * (SIZE // 2),
    "broken members": '{"a":{"b":1}x' * (SIZE // 13),
    "spaces": ('{"a"' + " " * 1000) * 100,
    "digits": '{"a":' + "9" * SIZE + "}",
    "thoughts": "<think></think>" * (SIZE // 15),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_long_hostile_text_takes_time_in_proportion(kind):
    """Not a speed test: what is quadratic in 100 kB would take minutes here, and what recurses would end Python."""
    start = time.process_time()
    extract_json(ADVERSARIAL[kind])
    assert time.process_time() - start < 10
