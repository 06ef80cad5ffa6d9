"""The passage index: what is found, what is refused, and how often it finds the right passage."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest

from trl_rewards import RewardError
from trl_rewards.passages import Passage, PassageIndex, build_index

ROWS = [
    {"title": "Oslo", "text": "The capital of Norway lies at the head of a fjord."},
    {"title": "Bergen", "text": "A city in Norway where it rains on most days, and people run in the rain."},
    {"text": "Größe and 山 are words too; O'Hara's café is closed."},
]
DATA = Path(os.environ.get("TRL_REWARDS_TEST_DATA", "no data")) / "wiki_corpus_xquad"


def corpus(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def index(write, tmp_path) -> PassageIndex:
    assert build_index([write("corpus.jsonl", corpus(ROWS))], str(tmp_path / "deep/index.sqlite")) == 3
    return PassageIndex(str(tmp_path / "deep/index.sqlite"))


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("What is the capital of Norway?", "Oslo"),
        ("raining cities", "Bergen"),  # stems
        ("bergen", "Bergen"),  # a title
        ("groesse grosse GRÖSSE größe", ""),
        ("O'Hara's \"cafe\" OR NOT (title:x*", ""),  # nothing is query syntax
    ],
)
def test_the_passage_that_fits_best_comes_first(index, query, title):
    assert index.search(query)[0].title == title


def test_fewer_passages_than_asked_for_and_none(index):
    assert [passage.title for passage in index.search("Norway", 5)] == ["Oslo", "Bergen"]
    for nothing in ("", "?!", "unheard", "\0", "\ud800"):
        assert index.search(nothing) == []
    assert len(index.search("the", 9)) == 2  # a query of common words alone is looked for as it is


def test_an_index_pickles(index):
    assert pickle.loads(pickle.dumps(index)).search("fjord") == index.search("fjord") == [Passage(**ROWS[0])]


def test_several_files_other_keys_and_passages_of_so_many_words(tmp_path):
    for number in range(2):
        with gzip.open(tmp_path / f"{number}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"head": f"t{number}", "body": "one two three four five"}) + "\n\n")
    out = str(tmp_path / "index.sqlite")
    files = [str(tmp_path / f"{number}.jsonl.gz") for number in range(2)]
    assert build_index(files, out, title="head", text="body", words=2) == 6
    assert sorted(PassageIndex(out).search("five", 9)) == [Passage("t0", "five"), Passage("t1", "five")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"text": "fine"}\n{"txt": "?"}\n', "line 2: no object with text under 'text': {\"txt\""),
        ("[1]\n", "line 1: no object with text"),
        ('{"text": ["a"]}\n', "line 1: no object with text"),
        ("text\n", "line 1: no object with text"),
        ("\n\n", "no passages in "),
    ],
)
def test_a_corpus_that_is_none_is_refused_and_leaves_no_file(text, complaint, write, tmp_path):
    with pytest.raises(RewardError) as caught:
        build_index([write("corpus.jsonl", text)], str(tmp_path / "index.sqlite"))
    assert complaint in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_files_that_are_there_or_are_not(write, tmp_path):
    path = write("corpus.jsonl", corpus(ROWS))
    with pytest.raises(RewardError, match="exists; delete it"):
        build_index([path], path)
    with pytest.raises(RewardError, match="no file 'nowhere'"):
        build_index(["nowhere"], str(tmp_path / "index.sqlite"))
    with pytest.raises(RewardError, match="no index 'nowhere'; write one with: trl-rewards index"):
        PassageIndex("nowhere")
    with pytest.raises(RewardError, match="is no index that trl-rewards index wrote"):
        PassageIndex(path)


@pytest.mark.skipif(not DATA.is_dir(), reason="TRL_REWARDS_TEST_DATA has no wiki_corpus_xquad")
def test_questions_find_their_wikipedia_passage(tmp_path):
    out = str(tmp_path / "index.sqlite")
    assert build_index([str(DATA / "passages.jsonl")], out) == 240
    ids = {row["text"]: row["doc_id"] for row in map(json.loads, (DATA / "passages.jsonl").open(encoding="utf-8"))}
    index, hits, total = PassageIndex(out), 0, 0
    for row in map(json.loads, (DATA / "questions.jsonl").open(encoding="utf-8")):
        total += 1
        hits += [ids[passage.text] for passage in index.search(row["question"])] == [row["doc_id"]]
    assert total == 1190
    assert hits >= 1120  # 1125 of 1190 with SQLite 3.40
