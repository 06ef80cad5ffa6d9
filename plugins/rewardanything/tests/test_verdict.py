import json
import random
from pathlib import Path

import pytest
from trl_rewards_rewardanything.verdict import answer_part, read_verdict, released_json, repaired

FILE = Path(__file__).with_name("rewardanything_cases.json")
CASES = {case["id"]: case for case in json.loads(FILE.read_text(encoding="utf-8"))["cases"]}
PARSE = [case for name, case in CASES.items() if name.startswith("ra-parse-")]
NAMES = {"model-1": "gpt4", "model-2": "claude", "model-3": "llama"}
# What the reader here does where the released parser loses a verdict, raises, or lets anything pass.
MORE = {
    "ra-parse-07": ({"gpt4": 5.0}, ["gpt4", "claude"]),
    "ra-parse-09": ({"gpt4": 5.0}, ["gpt4"]),
    "ra-parse-21": ({"gpt4": 5.0, "claude": 2.0}, ["gpt4", "claude"]),
    "ra-parse-22": ({"gpt4": 5.0}, ["gpt4"]),
    "ra-parse-25": ({"gpt4": 5.0, "claude": 3.5}, ["gpt4"]),
    "ra-parse-27": ({}, ["gpt4", "claude"]),
    "ra-parse-28": ({}, ["model-1", "model-2"]),
    "ra-parse-30": ({}, []),
    "ra-parse-33": ({"gpt4": 5.0}, ["gpt4"]),
    "ra-parse-38": ({}, ["gpt4"]),
}


@pytest.mark.parametrize("case", PARSE, ids=lambda case: case["id"])
def test_recorded_replies_are_read_as_by_the_released_parser_or_better(case):
    verdict = read_verdict(case["input"]["output_text"], case["input"]["masked2real"])
    result = case["output"]["result"]
    scores, ranking = MORE.get(case["id"][:11]) or (result["scores"], result["ranking"])
    assert (verdict.scores, verdict.ranking) == (scores, ranking)
    assert verdict.reasoning == result.get("reasoning", "x")


@pytest.mark.parametrize("case", PARSE, ids=lambda case: case["id"])
def test_the_released_steps_give_the_released_json(case):
    text, wanted = case["input"]["output_text"], case["output"]
    assert answer_part(text) == wanted["extract_json_content"]
    found = json.dumps(released_json(text)).replace("NaN", '"<float nan>"')
    assert json.loads(found) == wanted["safe_parse_json"]


@pytest.mark.parametrize("name", ["ra-fix-01", "ra-fix-03", "ra-fix-04"])
def test_repairs_are_the_released_ones(name):
    assert repaired(CASES[name]["input"]) == CASES[name]["output"]


def read(text):
    verdict = read_verdict(text, NAMES)
    return verdict.scores, verdict.ranking


def test_a_missing_ranking_is_derived_from_the_scores():
    verdict = read_verdict('{"scores": {"model-1": 2, "model-2": 5, "model-3": 4}}', NAMES)
    assert verdict.stated == []
    assert verdict.ranking == ["claude", "llama", "gpt4"]


def test_two_objects_count_if_they_say_the_same_or_the_first_is_a_thought():
    first, second = '{"scores": {"model-1": 1}}', '{"scores": {"model-1": 5}}'
    assert read(f"{second} again: {second} {{}}")[0] == {"gpt4": 5.0}
    assert read(f"<think>{first}</think>{second}")[0] == {"gpt4": 5.0}
    assert read(f"{first} no, rather {second} {{}}") == ({}, [])
    assert read_verdict(f"{first} no, rather {second}").problem == "no scores"


@pytest.mark.parametrize("key", ["best-to-worst", "best-to-worse"])
def test_the_ranking_is_found_under_either_key(key):
    assert read(f'{{"scores": {{"model-1": 1, "model-2": 2}}, "{key}": ["model-2", "model-1"]}}')[1] == [
        "claude",
        "gpt4",
    ]


def test_of_a_key_that_comes_twice_the_last_counts():
    text = '{"scores": {"model-1": 5, "model-1": 2}, "best-to-worst": ["model-1", "model-1"]}'
    assert read(text) == ({"gpt4": 2.0}, ["gpt4", "gpt4"])


def test_of_two_names_that_stand_for_one_the_last_score_counts():
    text = '{"scores": {"model-1": 5, "model-2": 2}, "best-to-worst": ["model-1", "model-2"]}'
    verdict = read_verdict(text, {"model-1": "same", "model-2": "same"})
    assert (verdict.scores, verdict.ranking) == ({"same": 2.0}, ["same", "same"])


@pytest.mark.parametrize("score", ["0", "6", "-1", "1e400", "NaN", "Infinity", "true", "null", '"good"', "[5]", '""'])
def test_a_score_that_is_no_number_from_1_to_5_is_left_out(score):
    verdict = read_verdict(f'{{"scores": {{"model-1": {score}, "model-2": 3}}}}', NAMES)
    assert verdict.scores == {"claude": 3.0}
    assert (
        read_verdict(f'{{"scores": {{"model-1": {score}}}}}', NAMES).problem == "no score that is a number from 1 to 5"
    )


def test_clamp_moves_scores_to_the_nearer_end_but_not_infinite_ones():
    text = '{"scores": {"model-1": 0, "model-2": 99, "model-3": Infinity}}'
    assert read_verdict(text, NAMES, clamp=True).scores == {"gpt4": 1.0, "claude": 5.0}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON object"),
        ("I like the first one best.", "no JSON object"),
        ("5", "no JSON object"),
        ("null", "no JSON object"),
        ('[{"scores": {"model-1": 5}}]', "no JSON object"),
        ('<think>{"scores": {"model-1": 5}}</think>', "no JSON object"),
        ('{"best-to-worst": ["model-1"]}', "no scores"),
        ('{"scores": [5, 2]}', "no scores"),
        ('{"scores": {}}', "no scores"),
        ('{"scores": {"model-1": 5}}', None),
    ],
)
def test_a_reply_without_scores_says_why(text, problem):
    assert read_verdict(text).problem == problem


def test_a_ranking_that_is_no_list_is_passed_over():
    assert read('{"scores": {"model-1": 2}, "best-to-worst": "model-1"}') == ({"gpt4": 2.0}, ["gpt4"])
    assert read('{"scores": {"model-1": 2}, "best-to-worst": [1, ["model-1"], "model-1"]}')[1] == ["gpt4"]


def test_no_text_raises():
    rng = random.Random(0)
    pieces = [
        *"{}[]\",:'\\ \n",
        "scores",
        "best-to-worst",
        "model-1",
        "5",
        "NaN",
        "<think>",
        "</think>",
        "```json",
        "é",
    ]
    for _ in range(2000):
        verdict = read_verdict("".join(rng.choices(pieces, k=rng.randrange(25))), NAMES)
        assert all(1 <= score <= 5 for score in verdict.scores.values())
    for text in ("{" * 20000, '{"a":' * 5000, "[" * 20000, '{"scores":' + "9" * 5000 + "}"):
        assert read_verdict(text).scores == {}
